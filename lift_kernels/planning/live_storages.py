"""Bytes of tensor storages that are alive while code runs, on real tensors and on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SHARES = (0.0, 0.5, 1.0)
"""Shares of the gradients' bytes at which peaks are kept: none, half and all of them."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that ops make, until nothing holds them.

    Each storage counts once, however many views it has. What an op allocates and frees within
    itself is not seen; ``scratch`` may say how much it is.

    Attributes:
        alive: bytes that are alive now.
        gradients: those of them that `mark_gradient` has marked.
        peaks: by share s of `SHARES`, the most bytes that were alive at once, of which gradients
            count s times their size; since the start or the last `restart_peaks`.
    """

    def __init__(self, scratch: Mapping[Any, Callable[..., int]] | None = None) -> None:
        """``scratch`` gives the bytes that an op takes within itself, from its arguments."""
        super().__init__()
        self.alive, self.gradients = 0, 0
        self.peaks = dict.fromkeys(SHARES, 0)
        self._sizes: dict[int, int] = {}
        self._marked: set[int] = set()
        self._scratch = scratch or {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor)
        self._look()

    def mark_gradient(self, tensor: Tensor) -> None:
        """Say that a tensor is a gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes and key not in self._marked:
            self._marked.add(key)
            self.gradients += self._sizes[key]
            self._look()

    def restart_peaks(self) -> dict[float, int]:
        """Return the peaks, and begin again with what is alive now."""
        before, self.peaks = self.peaks, dict.fromkeys(SHARES, 0)
        self._look()
        return before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self._look(self._scratch[func](*args, **(kwargs or {})) if func in self._scratch else 0)
        return out

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:  # sparse tensors have parts, which ops have made
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.alive -= size
        if key in self._marked:
            self._marked.remove(key)
            self.gradients -= size

    def _look(self, more: int = 0) -> None:
        """Raise the peaks to what is alive now, and ``more``."""
        for share in SHARES:
            now = self.alive + more - round((1 - share) * self.gradients)
            self.peaks[share] = max(self.peaks[share], now)
