"""Forms of training, and the bytes that each keeps beside weights, gradients and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..masks import costs
from .conversions import Kind
from .model_shapes import Matrix, ModelShapes

INDEX = 4
"""Bytes of an index."""
MOMENTS: Mapping[str, float] = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 * 4 / 32}
"""Bytes of both moments of an entry. 8-bit ones have two fp32 scales for each 32 entries."""
MOMENTS_8BIT_DENSE = 2 + 2 * 4 / 256
"""As bitsandbytes keeps them, with a scale for each 256."""
MASTERS: Mapping[str | None, int] = {"fp32": 4, "split": 2, None: 0}
"""Bytes of the master of an entry. A split one is the low 16 bits; the bf16 weight is the rest."""
TRANSFERS = 2 * 2**26
"""Bytes on the device through which offloaded state passes, an estimate."""
FINETUNE_OPTIONS = frozenset({"state_dtype", "master", "grad_dtype", "offload"})
"""Those of the options of LIFT's forms that the command ``finetune`` has; a test compares them."""
UNBUILT = "sharded weights are not supported yet"


@dataclass(frozen=True)
class Form:
    """A form of training.

    Attributes:
        name: for tables.
        kind: what is trained.
        state_dtype: of the moments, a key of `MOMENTS`, or "weights" for the dtype of the weights.
        master: a key of `MASTERS`.
        grad_dtype: of packed gradients; others have the dtype of the weights.
        offload: "cpu" where moments, masters and bases are in host memory.
        sharded: whether weights, gradients and state are divided among the GPUs (FSDP2). In other
            forms each GPU holds all of them, and its own part of the batch.
        finetune: whether the command ``finetune`` has it.
        python: what runs it otherwise.
        options: names of the options above that differ from the defaults.
    """

    name: str
    kind: Kind
    state_dtype: str = "float32"
    master: str | None = "fp32"
    grad_dtype: str = "float32"
    offload: str | None = None
    sharded: bool = False
    finetune: bool = False
    python: str = ""
    options: tuple[str, ...] = ()

    @property
    def lift(self) -> bool:
        """Whether LIFT chooses the entries."""
        return self.kind in ("dense", "packed")


def _lift(name: str, kind: Kind, **options: str | None) -> Form:
    """A form of LIFT, with the options that differ from their defaults."""
    shown = {k: f"torch.{v}" if k.endswith("dtype") and v != "8bit" else repr(v) for k, v in options.items()}
    groups = "pack_gradients" if kind == "packed" else "lift_param_groups"
    packing = [f"{k}={shown.pop(k)}" for k in ("grad_dtype",) if k in shown]
    start = f"LiftAdamW({groups}({', '.join(['model', 'freeze_rest=True', *packing])})"
    python = ", ".join([start, *(f"{k}={v}" for k, v in shown.items())]) + ")"
    form = Form(name, kind, finetune=set(options) <= FINETUNE_OPTIONS, python=python, options=tuple(options))
    return replace(form, **options)  # type: ignore[arg-type]


FORMS = (
    Form("full, AdamW", "full", "weights", None, finetune=True),
    Form("full, fp32 state and masters", "full", python="torch.optim.AdamW on fp32 copies of the weights"),
    Form("full, 8-bit AdamW", "full", "8bit", None, python="bitsandbytes.optim.AdamW8bit(model.parameters())"),
    Form("LoRA, rank 16", "lora", finetune=True),
    Form("SHiRA", "shira", finetune=True),
    _lift("LIFT", "packed"),
    _lift("LIFT, bf16 moments", "packed", state_dtype="bfloat16"),
    _lift("LIFT, 8-bit moments", "packed", state_dtype="8bit"),
    _lift("LIFT, 8-bit, split, bf16 grads", "packed", state_dtype="8bit", master="split", grad_dtype="bfloat16"),
    _lift("LIFT, offloaded state", "packed", offload="cpu"),
    _lift("LIFT, offloaded, bf16 grads", "packed", grad_dtype="bfloat16", offload="cpu"),
    _lift("LIFT, dense gradients", "dense"),
    _lift("LIFT, dense, bf16 state", "dense", state_dtype="bfloat16", master=None),
)
"""All forms. Those of LIFT with packed gradients go from the default to the leanest."""
SHARDED = tuple(
    replace(form, name=f"{form.name}, sharded", sharded=True, finetune=False)
    for form in FORMS
    if form.kind in ("full", "dense", "lora")
)
"""Forms that divide the weights among several GPUs, which nothing here can run yet."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a form keeps from step to step beside weights and gradients, on all GPUs alike.

    Attributes:
        values: trained numbers beside the weights: packed values, adapters.
        indices: index lists.
        moments: of Adam.
        masters: of trained entries or weights; packed values are their own.
        bases: for a warm start of the next masks.
        host: those of moments, masters, values and bases that are in host memory.
    """

    values: int = 0
    indices: int = 0
    moments: int = 0
    masters: int = 0
    bases: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.values + self.indices + self.moments + self.masters + self.bases


def kept(form: Form, shapes: ModelShapes, added: int, gradients: int, warm_start: str | None) -> Kept:
    """Return what a form keeps.

    Args:
        form: the form.
        shapes: the model.
        added: bytes that the form adds to the model (`counted_pass`).
        gradients: bytes of all gradients, of an adapter in fp32.
        warm_start: where bases are: "device", "cpu" or None for nowhere.
    """
    if form.kind == "full":
        per_weight = {"weights": 2 * shapes.dtype.itemsize, "8bit": MOMENTS_8BIT_DENSE}
        moments = per_weight.get(form.state_dtype) or MOMENTS[form.state_dtype]
        masters = 0 if shapes.dtype == torch.float32 else MASTERS[form.master]
        return Kept(moments=round(moments * shapes.parameters), masters=masters * shapes.parameters)
    if not form.lift:
        return Kept(values=gradients, indices=added - gradients, moments=2 * gradients)
    entries = sum(m.padded for m in shapes.matrices)
    packed = sum(m.padded for m in shapes.matrices if m.name in shapes.linear and form.kind == "packed")
    values = packed if form.master == "fp32" and form.grad_dtype == "float32" else 0  # They are the masters.
    masters = entries - values if shapes.dtype != torch.float32 else 0
    bases = sum(map(_basis_bytes, shapes.matrices)) if warm_start else 0
    moments = round(MOMENTS[form.state_dtype] * entries)
    parts = {"values": 4 * values, "moments": moments, "masters": MASTERS[form.master] * masters}
    if form.offload:
        return Kept(indices=INDEX * entries, host=sum(parts.values()) + bases)
    on_host = warm_start == "cpu"
    return Kept(**parts, indices=INDEX * entries, bases=0 if on_host else bases, host=bases if on_host else 0)


def _basis_bytes(matrix: Matrix) -> int:
    """Return the bytes of the bf16 bases of a matrix; none where no device iterates."""
    if not costs.may_leave_basis(matrix.shape, matrix.rank):
        return 0
    return 2 * matrix.count * min(matrix.shape) * costs.block_width(matrix.shape, matrix.rank, warm=True)
