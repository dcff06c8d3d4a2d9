"""Fixtures of the tests of ops."""

from __future__ import annotations

import pytest

from lift_kernels.ops import dispatch


@pytest.fixture
def fresh():
    """Dispatch as in a new process, which makes and logs each choice once."""
    for cached in (dispatch.native_op, dispatch._default, dispatch._warn_once):
        cached.cache_clear()
    yield
    for cached in (dispatch.native_op, dispatch._default, dispatch._warn_once):
        cached.cache_clear()
