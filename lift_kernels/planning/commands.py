"""What runs a form of training: a command line, or a line of Python."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from .forms import UNBUILT, Form

METHODS = {"full": "full", "lora": "lora", "shira": "shira", "dense": "lift", "packed": "lift"}
"""Methods of the command ``finetune``, by kind of training."""


@dataclass(frozen=True)
class Run:
    """What a command needs to know of a run.

    Attributes:
        model: what the user called it.
        dtype: of the weights.
        batch, seq, accumulation, gpus: of `plan_memory`.
        masks: options of LIFT that differ from the defaults, by their names.
        warm_start: where bases are kept.
    """

    model: str
    dtype: str
    batch: int
    seq: int
    accumulation: int
    gpus: int
    masks: dict[str, Any]
    warm_start: str | None


def command_of(form: Form, run: Run, checkpointing: bool) -> str:
    """Return what runs a form; for one that nothing runs, why."""
    if form.sharded:
        return f"computed; {UNBUILT}"
    if not form.finetune or (form.lift and run.warm_start is not None):
        masks = "".join(f", {name}={value!r}" for name, value in run.masks.items())
        line = form.python.removesuffix(")") + f"{masks}, warm_start={run.warm_start!r})" if form.lift else form.python
        return f"{line}; with gradient checkpointing" if checkpointing else line
    start = "python -m" if run.gpus == 1 else f"torchrun --nproc-per-node {run.gpus} -m"
    parts = [f"{start} lift_kernels finetune --model {shlex.quote(run.model)} --data my.jsonl"]
    parts += [f"--method {METHODS[form.kind]}"] if form.kind != "packed" else []
    parts += ["--gradients dense"] if form.kind == "dense" else []
    parts += [f"--dtype {run.dtype} --max-length {run.seq}"]
    parts += [f"--batch-size {run.batch * run.accumulation * run.gpus}"]
    parts += [f"--accumulation {run.accumulation}"] if run.accumulation > 1 else []
    parts += ["--checkpointing"] if checkpointing else []
    own = {name: getattr(form, name) for name in form.options} | (run.masks if form.lift else {})
    parts += [f"--{name.replace('_', '-')} {value}" for name, value in own.items()]
    parts += ["--parallel ddp"] if run.gpus > 1 else []
    return " ".join(parts)
