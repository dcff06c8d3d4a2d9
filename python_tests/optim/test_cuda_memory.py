"""Memory of a refresh and of a save: on a GPU all of it, on the CPU that of large fp32 tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.tensor_accounts import PeakBytes
from torch import nn

from lift_kernels import LiftAdamW
from lift_kernels.masks import lowrank, principal
from lift_kernels.masks.costs import factoring_bytes
from lift_kernels.masks.lowrank import factored_dtype
from lift_kernels.masks.principal import MaskRequest, principal_masks

RANK = 16
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@contextlib.contextmanager
def peak_of(device: str, numel: int) -> Iterator[SimpleNamespace]:
    """Bytes at the peak beyond those before. On the CPU fp32 tensors of ``numel`` entries count."""
    found = SimpleNamespace(bytes=0)
    if device == "cpu":
        with PeakBytes(numel) as peak:
            yield found
        found.bytes = peak.peak
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    torch.cuda.synchronize()
    found.bytes = torch.cuda.max_memory_allocated() - before


def matrices(device: str, dtype: torch.dtype, count: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("method", ["chebyshev", "gram"])
@on_both
def test_a_refresh_keeps_to_its_budget(device, method, dtype, monkeypatch):
    """The budget is that of two matrices: their copies, and blocks of the iteration.

    Beside these lie Gram matrices, factors, bitmaps, and the scratch of libraries. They must stay
    below another copy, so that a second set of copies would be seen.
    """
    shape = (2048, 4096) if device == "cuda" else (300, 4096)
    if method == "gram" and device == "cuda":
        shape = (256, 32768)
    weights = matrices(device, dtype, 5, shape)
    size = factored_dtype(weights[0]).itemsize
    copy, limit = size * weights[0].numel(), 2 * factoring_bytes(weights[0].shape, RANK, size)
    requests = [MaskRequest(w, RANK, w.numel() // 50, f"w{i}") for i, w in enumerate(weights)]
    monkeypatch.setattr(principal, "MEMORY_BUDGET", limit)
    budget = None if device == "cuda" else limit  # Without a GPU it would be one matrix at a time.

    def make(some):  # With a generator no other thread works, where tensors would not be counted.
        return principal_masks(some, method=method, memory_budget=budget, generator=torch.Generator().manual_seed(0))

    make(requests[:2])  # Libraries take their scratch once.
    with peak_of(device, weights[0].numel()) as peak:
        masks = make(requests)
    assert len(masks) == 5
    assert peak.bytes <= (limit + copy if device == "cuda" else 2 * copy), f"{peak.bytes / copy:.2f} copies"
    # On the CPU the exact method takes one matrix at a time, in fp32 the matrix itself.
    together = 2 if method == "chebyshev" or device == "cuda" else int(dtype == BF16)
    assert peak.bytes >= together * copy, "the budget was not used"


@on_both
def test_a_second_set_of_copies_is_noticed(device, monkeypatch):
    """The check above fails where all copies are made before they are stacked."""

    def stacked(weights, units):
        copies = [weight.to(factored_dtype(weight), copy=True) for weight in weights]
        return torch.stack([copied if len(copied) >= copied.shape[1] else copied.T for copied in copies])

    monkeypatch.setattr(lowrank, "_tall_batch", stacked)
    with pytest.raises(AssertionError, match=r"4\.\d\d copies"):
        test_a_refresh_keeps_to_its_budget(device, "chebyshev", BF16, monkeypatch)


@on_both
def test_a_state_dict_takes_no_memory_of_the_device(device):
    """Every tensor is copied to the host by itself. Only samples of the weights are made before."""
    weights = [nn.Parameter(w) for w in matrices(device, BF16, 3, (512, 1024))]
    optimizer = LiftAdamW(weights, rank=4, density=0.2, selection="magnitude", refresh_interval=None)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    optimizer.state_dict()
    size = sum(t.numel() * t.element_size() for w in weights for t in optimizer.state[w].values())
    assert size > 4_000_000
    with peak_of(device, weights[0].numel() // 5) as peak:
        saved = optimizer.state_dict()
    assert peak.bytes <= (size // 20 if device == "cuda" else size), "the state lies on the device twice"
    for i, w in enumerate(weights):
        for key in ("indices", "exp_avg", "exp_avg_sq", "master"):
            assert saved["state"][i][key].device.type == "cpu"
            assert torch.equal(saved["state"][i][key], optimizer.state[w][key].cpu())
