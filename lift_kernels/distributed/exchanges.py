"""Tensors of unequal sizes from every rank to every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 16
"""Bytes, so that any dtype can be viewed at the start of each tensor."""


class Form(NamedTuple):
    """Dtype and shape of a tensor that another rank holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return self.dtype.itemsize * math.prod(self.shape)


def gather_objects(own: Any, group: dist.ProcessGroup) -> list[Any]:
    """What each rank of a group gives, by its place in the group. Every rank must call this."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    return every


def gather_tensors(
    own: Sequence[Tensor], forms: Sequence[Sequence[Form]], group: dist.ProcessGroup, device: torch.device
) -> list[list[Tensor]]:
    """The tensors of each rank of a group, by its place in the group. Every rank must call this.

    Each rank sends its tensors once, as the bytes of one buffer. One buffer is alive at a time.

    Args:
        own: the tensors of this rank.
        forms: those of the tensors of each rank, of ``own`` too.
        device: one that the group can send from. The tensors of other ranks arrive there.
    """
    here, every = dist.get_rank(group), []
    for place, rank in enumerate(dist.get_process_group_ranks(group)):
        if place == here:
            buffer = _packed(own, device)
        else:
            buffer = torch.empty(_size(forms[place]), dtype=torch.uint8, device=device)
        # gloo gathers equal sizes alone. A broadcast by each rank moves no byte more.
        if buffer.numel():
            dist.broadcast(buffer, src=rank, group=group)
        theirs = [] if place == here else _unpacked(buffer, forms[place])
        every.append(list(own) if place == here else [view.clone() for view in theirs])
    return every


def _padded(form: Form) -> int:
    return -(-form.nbytes // _ALIGNMENT) * _ALIGNMENT


def _size(forms: Sequence[Form]) -> int:
    return sum(_padded(form) for form in forms)


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors one after the other."""
    forms = [Form.of(tensor) for tensor in tensors]
    buffer = torch.empty(_size(forms), dtype=torch.uint8, device=device)
    for view, tensor in zip(_unpacked(buffer, forms), tensors):
        view.copy_(tensor)
    return buffer


def _unpacked(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Tensors as views of the bytes that `_packed` has made."""
    views, start = [], 0
    for form in forms:
        views.append(buffer[start : start + form.nbytes].view(form.dtype).view(form.shape))
        start += _padded(form)
    return views
