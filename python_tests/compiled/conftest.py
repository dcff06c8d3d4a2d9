"""Fixtures that run the CUDA kernels of subspace iteration on host threads."""

from __future__ import annotations

import pytest
from helpers.host_cuda import mask_kernels

from lift_kernels.ops import cuda, dispatch


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return mask_kernels(tmp_path_factory.mktemp("subspace_ops"))


@pytest.fixture
def on_host(host, monkeypatch):
    """Let the CUDA kernels run the subspace-iteration ops on CPU tensors."""
    choose = dispatch.choose

    def chosen(requested, device, op):
        only_cuda = "native-cpu" not in dispatch.OPS[op]
        return "native-cuda" if only_cuda and requested is None else choose(requested, device, op)

    monkeypatch.setattr(dispatch, "choose", chosen)
    monkeypatch.setattr(cuda, "native", host)
    return host
