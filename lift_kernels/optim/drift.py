"""Drift of masks: the predicted share of a mask's entries that a refresh would exchange.

Between two refreshes only the entries of the mask move. So a sample of them tells how far a matrix
has moved since its last mask: the norm of their change over their norm then. This is its
*movement*. In real training the share of entries that a refresh exchanges is proportional to the
movement, over learning rates and over time. The factor, the *rate*, differs among matrices.
A matrix starts with a typical rate and learns its own: every refresh of it tells which share was
exchanged. The prediction is the rate times the movement, times a margin, so that it is rarely too
low.

``bench/bench_drift.py`` measures all of this on SmolLM2-135M, and the constants come from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..validation import ALIGNMENT, require
from .hyperparameters import mask_size
from .matrix_ref import MatrixRef
from .packed_state import PackedState

TYPICAL_RATE = 0.9
"""Of a matrix that has not been refreshed: the median over those of SmolLM2-135M."""
MARGIN = 1.6
"""Predicted over expected share. About 93 of 100 predictions are then at least the true share."""
PRIOR_ENTRIES = 25.0
"""Exchanged entries that weigh as much as all that was known about a rate before."""
_SPARSITY, _FEWEST, _MOST = 32, 256, 2048
STATE_KEYS = ("drift_values", "drift_rate")
"""What the state of a matrix holds: its sampled values at the last mask, and its rate."""


class Drift(NamedTuple):
    """How far a matrix is from its last mask.

    Attributes:
        movement: relative change of the sampled entries since then.
        changed: predicted share of its entries that a refresh would exchange.
    """

    movement: float
    changed: float


def sample_size(k: int) -> int:
    """How many of k entries are sampled: one of 32 up to one of 64, at least 256, at most 2048.

    So samples take about 1 % of the state. Their movement is that of all k entries within 7 %, at
    19 of 20 matrices.
    """
    return min(k, _MOST, max(_FEWEST, 1 << max(0, (k // _SPARSITY).bit_length() - 1)))


def predict(refs: Iterable[MatrixRef]) -> dict[MatrixRef, Drift]:
    """The drift of those matrices whose group bounds it and that know their values at a mask.

    Waits for the device once, whatever the number of matrices.
    """
    arenas = _by_arena(ref for ref in refs if _bound(ref) is not None and "drift_values" in ref.drift)
    if not arenas:
        return {}
    norms = []
    for arena, members in arenas:
        arena.regather_masters([ref.row for ref in members])
        then = [ref.drift["drift_values"] for ref in members]
        change = torch._foreach_sub(_sampled(arena, members), then)
        norms.append(torch.stack([*torch._foreach_norm(change), *torch._foreach_norm(then)]).view(2, -1))
    changes, values = torch.cat([pair.to(norms[0].device) for pair in norms], dim=1).tolist()
    # Where all values were 0, nothing tells how far they have moved.
    movements = [change / value if value > 0 else math.inf for change, value in zip(changes, values)]
    known = [ref for _, members in arenas for ref in members]
    return {
        ref: Drift(movement, MARGIN * float(ref.drift["drift_rate"]) * movement)
        for ref, movement in zip(known, movements)
    }


def is_stale(ref: MatrixRef, drift: Drift | None) -> bool:
    """Whether a matrix that is due needs a new mask.

    It does when its predicted drift reaches the bound of its group, when there is no prediction,
    and when its options ask for another number of entries.
    """
    bound = _bound(ref)
    if bound is None or drift is None or not drift.changed < bound:  # A movement may be NaN.
        return True
    matrix = ref.trainable.matrix
    _, k = mask_size(matrix, ref.group, ref.name)
    return ref.entries() != k * (1 if matrix.dim() == 2 else len(matrix))


def learn(ref: MatrixRef, drift: Drift, entries: int, exchanged: int) -> None:
    """Let a matrix learn its rate from a refresh that exchanged some of its entries.

    What was known counts like `PRIOR_ENTRIES` exchanged entries, so a few that chance to cross the
    threshold change little. ``drift`` is that before the refresh.
    """
    rate = ref.drift.get("drift_rate")
    if rate is None or not math.isfinite(drift.movement):
        return
    expected = PRIOR_ENTRIES / float(rate) + entries * drift.movement
    rate.fill_((PRIOR_ENTRIES + exchanged) / expected)


def forget(refs: Iterable[MatrixRef]) -> None:
    """Drop the values of masks that are about to be replaced. Rates stay."""
    for ref in refs:
        ref.drift.pop("drift_values", None)


def note(refs: Iterable[MatrixRef]) -> None:
    """Keep the present values of matrices with a new mask, where their group bounds the drift."""
    refs = list(refs)
    for ref in refs:
        if _bound(ref) is None:
            ref.drift = {}
    for arena, members in _by_arena(ref for ref in refs if _bound(ref) is not None):
        present = _sampled(arena, members)
        kept = [torch.empty_like(values) for values in present]  # Views would hold each other's memory.
        torch._foreach_copy_(kept, present)
        for ref, values in zip(members, kept):
            rate = ref.drift.get("drift_rate")
            # The rate stays on the host, where it is read and written without a wait.
            ref.drift = {
                "drift_values": values,
                "drift_rate": torch.tensor(TYPICAL_RATE, dtype=torch.float64) if rate is None else rate,
            }


def saved_part(ref: MatrixRef, entry: dict[str, Any]) -> dict[str, Tensor]:
    """What a saved state knows about the drift of a matrix; nothing where that is unbounded.

    A matrix whose state is older than this option is refreshed when it is due next.
    """
    if _bound(ref) is None or not all(key in entry for key in STATE_KEYS):
        return {}
    return {
        "drift_values": entry["drift_values"].to(ref.trainable.matrix.device, copy=True),
        "drift_rate": entry["drift_rate"].to("cpu", torch.float64, copy=True).reshape(()),
    }


def check_saved(entry: dict[str, Any], name: str) -> None:
    """Raise ValueError or TypeError, naming the matrix, unless saved samples and rate are whole."""
    values, rate = (entry.get(key) for key in STATE_KEYS)
    if values is None and rate is None:
        return
    require(values is not None and rate is not None, f"{name}: the state dict holds only one of {STATE_KEYS}")
    assert isinstance(values, Tensor) and isinstance(rate, Tensor)
    size = sample_size(entry["indices"].numel())
    require(
        values.shape == (size,),
        f"{name}: drift_values of the state dict has shape {tuple(values.shape)}, its index list needs ({size},)",
    )
    require(values.dtype == torch.float32, f"{name}: drift_values must be torch.float32, got {values.dtype}", TypeError)
    require(
        rate.numel() == 1 and 0 < float(rate) < math.inf,
        f"{name}: drift_rate of the state dict must be one positive number, got {rate}",
    )


def _bound(ref: MatrixRef) -> float | None:
    return ref.group.get("refresh_drift")  # Groups of older state dicts and pickles lack it.


def _by_arena(refs: Iterable[MatrixRef]) -> list[tuple[PackedState, list[MatrixRef]]]:
    members: dict[int, tuple[PackedState, list[MatrixRef]]] = {}
    for ref in refs:
        assert ref.arena is not None
        members.setdefault(id(ref.arena), (ref.arena, []))[1].append(ref)
    return list(members.values())


def _sampled(arena: PackedState, refs: Sequence[MatrixRef]) -> list[Tensor]:
    """Present fp32 values of the sampled entries of each matrix, gathered together.

    They lie evenly in its index list. fp32 masters are read where there are some, else weights.
    """
    rows = [ref.row for ref in refs]
    counts = [arena.counts[row] for row in rows]
    sizes = [sample_size(k) for k in counts]
    places = [arena.offsets[row] + torch.arange(n) * k // n for row, k, n in zip(rows, counts, sizes)]
    device, positions = arena.indices.device, torch.cat(places)
    if arena.master is not None and arena.master.dtype == torch.float32:
        sampled = arena.master[positions.to(arena.master.device, non_blocking=True)]
        return list(sampled.to(device).split(sizes))
    positions = positions.to(device, non_blocking=True)
    # A migration from empty lists gathers the values of all entries of all weights in one call.
    offsets = [0, *itertools.accumulate(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes)]
    values, first, second = torch.zeros(3, offsets[-1], device=device).unbind()
    ops.arena_migrate_(
        [arena.weights[row].detach() for row in rows],
        arena.indices[positions].split(sizes),
        torch.zeros(offsets[-1], dtype=torch.int32, device=values.device),
        offsets[:-1],
        [0] * len(rows),
        first,
        second,
        torch.zeros(len(rows), device=values.device),
        master=values,
    )
    return [values[start : start + n] for start, n in zip(offsets, sizes)]
