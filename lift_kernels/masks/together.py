"""Masks that a group of ranks makes together: each makes a part, and all get all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..distributed.agreement import Plan
from ..distributed.checksums import index_digests, weight_digests
from ..distributed.exchanges import Form, gather_objects, gather_tensors
from ..distributed.owners import share_out
from ..distributed.replicas import Replicas
from .principal import Mask

if TYPE_CHECKING:
    from .selection import SelectionRequest


class _Made(NamedTuple):
    """What a rank says of its masks before it sends their tensors.

    Attributes:
        forms: of the tensors of each mask, by field.
        rest: the other fields of each mask.
        error: class and words of what was raised instead.
    """

    forms: list[dict[str, Form]]
    rest: list[dict[str, Any]]
    error: tuple[str, str] | None = None


def agree_on_masks(parts: Sequence[SelectionRequest], options: Mapping[str, Any], replicas: Replicas) -> None:
    """Raise RuntimeError on every rank, naming a matrix, unless all are about to make these masks.

    Every rank of the group must call this. ``options`` are further things that must be alike.
    """
    replicas.agree(Plan(Plan.MASKS, options, _described(parts)))


def agree_on_lists(parts: Sequence[SelectionRequest], masks: Sequence[Mask], replicas: Replicas) -> None:
    """Raise RuntimeError on every rank, naming a matrix, unless all have made the same masks."""
    digests = index_digests({str(i): [mask.indices] for i, mask in enumerate(masks)})
    entries = [(part.name, {"entries": digests[str(i)]}) for i, part in enumerate(parts)]
    replicas.agree(Plan(Plan.TRAINS, {}, entries))


def make_together(
    parts: Sequence[SelectionRequest],
    make: Callable[[Sequence[SelectionRequest]], list[Mask]],
    costs: Sequence[float],
    group: dist.ProcessGroup,
    *,
    keep_bases: bool,
) -> list[Mask]:
    """A mask of every part, on every rank of the group. Every rank must call this.

    Follows `agree_on_masks`.

    Args:
        parts: the matrices, the same on every rank.
        make: makes masks of some of them, on this rank.
        costs: of the parts, in any unit.
        keep_bases: whether bases and thresholds are sent, too.

    An error of ``make`` on one rank is raised on all of them.
    """
    if not parts:
        return []
    owners = share_out(costs, dist.get_world_size(group))
    here = dist.get_rank(group)
    masks: list[Mask] = []
    problem: Exception | None = None
    try:
        masks = make([part for part, owner in zip(parts, owners) if owner == here])
    except Exception as error:  # The other ranks wait for these masks, so they must learn of it.
        problem = error
    if not keep_bases:
        masks = [mask._replace(basis=None, threshold=None) for mask in masks]
    made = gather_objects(_made(masks, problem), group)
    _raise_together(made, problem, group)
    own = [field for mask in masks for field in mask if isinstance(field, Tensor)]
    forms = [[form for of_mask in of_rank.forms for form in of_mask.values()] for of_rank in made]
    tensors = [iter(of_rank) for of_rank in gather_tensors(own, forms, group, parts[0].matrix.device)]
    rest = [iter(zip(of_rank.forms, of_rank.rest)) for of_rank in made]
    return [_received(*next(rest[owner]), tensors[owner], part.matrix) for part, owner in zip(parts, owners)]


def _described(parts: Sequence[SelectionRequest]) -> list[tuple[str, dict[str, str]]]:
    """What must be alike of each matrix, by its name. The order is that of the messages."""
    digests = weight_digests([part.matrix for part in parts])
    return [
        (
            part.name,
            {
                "shape": str(tuple(part.matrix.shape)),
                "dtype": str(part.matrix.dtype),
                "device": part.matrix.device.type,
                "rank": str(part.rank),
                "number of trained entries": str(part.k),
                "number": str(part.number),
                "warm start": str(part.kept.get("basis") is not None),
                "weights": digest,
            },
        )
        for part, digest in zip(parts, digests)
    ]


def _made(masks: Sequence[Mask], problem: Exception | None) -> _Made:
    fields = [mask._asdict() for mask in masks]
    return _Made(
        [{key: Form.of(value) for key, value in of_one.items() if isinstance(value, Tensor)} for of_one in fields],
        [{key: value for key, value in of_one.items() if not isinstance(value, Tensor)} for of_one in fields],
        None if problem is None else (type(problem).__name__, str(problem)),
    )


def _raise_together(made: Sequence[_Made], own: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise the error of this rank, or else that of the first rank that has one."""
    if own is not None:
        raise own
    for rank, of_rank in zip(dist.get_process_group_ranks(group), made):
        if of_rank.error is not None:
            kind, words = of_rank.error
            known = {"ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError}
            said = words if kind in known else f"{kind}: {words}"
            raise known.get(kind, RuntimeError)(f"rank {rank}: {said}")


def _received(forms: dict[str, Form], rest: dict[str, Any], tensors: Any, matrix: Tensor) -> Mask:
    """A mask from its other fields and the next of the tensors of its owner."""
    return Mask(**rest, **{key: next(tensors).to(matrix.device) for key in forms})
