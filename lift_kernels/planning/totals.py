"""The peak of a whole step: what a form keeps, its passes, its scratch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from ..masks.costs import factoring_bytes
from ..masks.principal import BUDGET_SHARE, MEMORY_BUDGET
from .counted_pass import PassBytes, decoder_layers
from .forms import INDEX, TRANSFERS, Form, Kept, kept
from .model_shapes import Matrix, ModelShapes


@dataclass(frozen=True)
class Total:
    """Bytes of a form on each GPU.

    Attributes:
        weights: of the model, with its buffers.
        kept: beside weights and gradients.
        gradients: all of them.
        activations: the most that they take.
        scratch: the largest scratch, an estimate.
        peak: of the whole step.
    """

    weights: int
    kept: Kept
    gradients: int
    activations: int
    scratch: int
    peak: int


def total_of(
    form: Form,
    shapes: ModelShapes,
    counted: PassBytes,
    *,
    gpus: int = 1,
    warm_start: str | None = None,
    refreshes: bool = True,
    device: str = "cuda",
    gpu_memory: int | None = None,
) -> Total:
    """Return what a form takes.

        peak = weights + kept + max(activations and gradients, dense gradients + scratch of masks)

    Masks are made after a step, when activations and packed gradients are gone. Replicas on several
    GPUs have buffers in which gradients are averaged. A sharded form divides weights, gradients and
    what is kept. Of its layers two are whole at a time, beside embedding and head, and the gradient
    of one.

    Args:
        form: the form.
        shapes: the model.
        counted: its pass, of the form's kind.
        gpus: how many GPUs train together.
        warm_start: where bases are: "device", "cpu" or None for nowhere.
        refreshes: whether masks are made in the step.
        device: "cuda" or "cpu", on which masks are made one at a time.
        gpu_memory: bytes of a GPU, where they are known.
    """
    halved = form.kind == "packed" and form.grad_dtype == "bfloat16"
    parts = gpus if form.sharded else 1
    whole = kept(form, shapes, counted.added, counted.gradients, warm_start)
    own = Kept(**{name: value // parts for name, value in vars(whole).items()})
    weights, gradients = shapes.weight_bytes // parts, counted.gradients // (2 if halved else 1) // parts
    beside = TRANSFERS if form.offload else 0
    if form.sharded:
        layer, root = _units(shapes.model)
        beside += root + 2 * layer + (0 if form.kind == "lora" else layer)
        passing = counted.activations + gradients
    else:
        beside += gradients if gpus > 1 else 0
        passing = counted.halved if halved else counted.together
    masks = mask_scratch(shapes, device, gpu_memory) if form.lift and refreshes and not form.sharded else 0
    left = 0 if form.kind == "packed" else gradients
    peak = weights + own.device + beside + max(passing, left + masks)
    return Total(weights, own, gradients, counted.activations, max(beside, masks), peak)


def mask_scratch(shapes: ModelShapes, device: str, gpu_memory: int | None = None) -> int:
    """Return the bytes that new masks of all matrices take, about.

    ``gpu_memory`` is that of a GPU, which decides how many are made together.

    These are what is factored together (`principal_masks`), a bit for each entry of it, and the new
    index lists.
    """
    alike: dict[tuple, list[Matrix]] = defaultdict(list)
    for matrix in shapes.matrices:
        alike[matrix.shape, matrix.rank].append(matrix)
    itemsize = shapes.dtype.itemsize if device == "cuda" else 4
    largest = 0
    for (shape, rank), members in alike.items():
        each = factoring_bytes(shape, rank, itemsize)
        budget = min(MEMORY_BUDGET, (gpu_memory or MEMORY_BUDGET * BUDGET_SHARE) // BUDGET_SHARE)
        budget = budget if device == "cuda" else 0
        together = min(max(1, budget // each), sum(m.count for m in members))
        largest = max(largest, together * (each + shape.numel() // 8))
    return largest + INDEX * sum(m.padded for m in shapes.matrices)


def _units(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the largest layer, and of all weights outside layers."""
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    return max(layers, default=0), sum(p.nbytes for p in model.parameters()) - sum(layers)
