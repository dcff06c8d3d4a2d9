"""Do loaded states and first masks belong to the weights that the model has now?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..nn.weight_sample import count_differing
from .matrix_ref import MatrixRef
from .several_ranks import Replicas, agree_on_loaded

logger = logging.getLogger("lift_kernels")


def differing(samples: Mapping[MatrixRef, Tensor]) -> dict[MatrixRef, int]:
    """The matrices whose entries are not those of their samples, and how many of these differ.

    Waits for the device once. Raises for a weight that changed its dtype, device or strides.
    """
    for ref in samples:
        assert ref.arena is not None
        ref.arena.check_weights([ref.row])
    counts = [count_differing(s, ref.trainable.matrix, ref.views()["indices"]) for ref, s in samples.items()]
    numbers = torch.stack([count.to(counts[0].device) for count in counts]).tolist()
    return {ref: number for ref, number in zip(samples, numbers) if number}


def check_loaded(samples: Mapping[MatrixRef, Tensor], replicas: Replicas) -> None:
    """Raise RuntimeError, naming a parameter, unless a loaded state is of the present weights.

    An error of one rank is raised on all ranks of the group.
    """
    error: Exception | None = None
    try:
        _raise_for(differing(samples), samples)
    except Exception as problem:
        error = problem
    agree_on_loaded(samples, replicas, error)


def _raise_for(found: Mapping[MatrixRef, int], samples: Mapping[MatrixRef, Tensor]) -> None:
    if found:
        first, number = next(iter(found.items()))
        raise RuntimeError(
            f"the optimizer's state was saved with other weights than the model has now: {len(found)} of "
            f"{len(samples)} matrices differ, first {first.name} ({number} of {samples[first].numel()} sampled trained "
            "entries); load the model's weights of the same checkpoint before this step, or, if the present weights "
            "are meant, call optimizer.refresh(drop_gradients=True), which makes masks from them"
        )


def warn_of_stale_masks(stale: list[str], total: int) -> None:
    """Say which first masks, by name, were made before the weights were loaded; forget them."""
    logger.warning(
        "%d of %d masks were made by pack_gradients from other weights than the present ones, e.g. that of %s; "
        "load the weights before pack_gradients, or call optimizer.refresh(drop_gradients=True) for masks of the "
        "present weights",
        len(stale),
        total,
        stale[0],
    )
    stale.clear()
