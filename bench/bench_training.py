"""Fine-tuning end to end: tokens per second and peak memory of LIFT beside other methods.

The others are full fine-tuning, that of the linear layers alone, LoRA, SHiRA and GaLore. There are
two models: SmolLM2-135M (or ``--model``) and a random Llama that fits the device. Every method
trains a copy of the same weights on the same batch of random tokens, in fp32 on the CPU and in bf16
on a GPU. Training steps are timed in turns, in a new random order each round, after two untimed
ones. This is no contest of losses: the learning rates are customary ones.

- A method that is not installed or cannot run here has a row without a time whose ``status`` begins
  with ``missing:``.
- Correctness, of all steps: losses are finite and fall, and the first one is the plain model's. The
  first three losses of both full fine-tunings and of both LIFT modes equal those of plain torch
  code (for-loop AdamW, for LIFT on vectors of the first masks' entries). Those of both modes equal
  each other. Equal means to 1 % (bf16: 5 %) of what the loss fell. A wrong method is refused:
  ``status`` says why, its row has no time, and the exit status is 1.
- ``median_ms``: of a whole step, with new masks in it. LIFT's refresh is spread over 200 steps
  (``refresh_interval``). A model of fewer matrices renews one at each timed step all the same, and
  matrices / 200 of the seconds of that count. GaLore's projections are made in its first step. A
  200th of what that took longer is added to each of its steps. ``refresh_ms`` is the mean of these
  parts, ``step_ms`` the rest of the optimizer's step.
- ``ratio``: speed against full fine-tuning. ``ratio_linear``: against that of the linear layers,
  which trains the matrices that LIFT trains, and no embeddings.
- ``tokens_s``: tokens of a batch over the median. ``setup_s``: adapters, first masks, projections.
- ``peak_over_model_mib``: what setup and two steps take beyond the weights. ``steps_peak_mib``: the
  steps alone. A process of its own for each method makes a random model of the same form, because
  memory depends on shapes only. The peak of its resident memory, or of what CUDA has allocated, is
  counted from there.
- Roofline: FLOPs at the measured rate of products plus the bytes of the optimizer's step at the
  measured copy bandwidth. Each rate is the better of a measurement before and one after the steps.
- FLOPs, for T tokens in sequences of length L: 4 T for each entry of the linear layers and of the
  head (forward, and backward to the inputs). 2 T for each whose weight gradient is made: in full
  fine-tuning and GaLore all, in SHiRA and both LIFT modes those of the linear layers, which all of
  them make dense whatever they keep. LoRA instead has 6 T for each entry of its factors. 6 T L x
  heads x head size a layer for the causal half of attention. 4 r m n for GaLore's projections to
  and fro.
- Bytes: AdamW 7 values of each trained entry. GaLore the same but for the matrices, of which
  gradient and weight are read and the weight is written. LIFT as in `bench_sparse_adamw`, packed
  mode with a master.
- Not counted: norms, softmax, activations, the loss, peft's dense sums of weight and adapter,
  refreshes.

    python -m bench.bench_training [--sets smollm2 random] [--batch 2] [--length 64] [--runs 5]
        [--only NAME ...] [--no-memory] [--model DIR] [--tuned] [--dry-run] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench import plots
from bench.common import results, timing, training_methods, tuned
from bench.common.training_methods import FULL, INTERVAL, LINEAR, MATRIX, METHODS, PACKED, Step, Trainer

COLUMNS = [
    "set",
    "variant",
    "median_ms",
    "tokens_s",
    "ratio",
    "ratio_linear",
    "forward_backward_ms",
    "step_ms",
    "refresh_ms",
    "peak_over_model_mib",
    "trained",
    "share_of_floor",
    "status",
]
WARMUP, CHECKED = 2, 3  # steps
BYTES_OF_ALL = 48  # bytes a parameter, of all methods together in bf16, which are in memory at once
SIZES = [(512, 1376, 8, 8192), (1024, 2816, 16, 32000), (2048, 5632, 22, 32000), (2560, 6912, 32, 32000)]
"""Of random Llamas: hidden size, that of the MLP, layers, vocabulary."""


def size_for(device: str) -> tuple[int, int, int, int]:
    """The largest of `SIZES` of which all methods fit the GPU at once.

    On the CPU the smallest one is taken, because time is short there.
    """
    if device == "cpu":
        return SIZES[0]

    def needed(hidden: int, inner: int, layers: int, vocabulary: int) -> int:
        return BYTES_OF_ALL * (layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * vocabulary * hidden)

    free = torch.cuda.mem_get_info()[0] - 4 * 2**30
    return [size for size in SIZES if needed(*size) <= free or size is SIZES[0]][-1]


def build(kind: str, name: str | None, dtype: torch.dtype, device: str) -> tuple[str, nn.Module]:
    """A label and a model: ``smollm2`` (or the model ``name``), ``random`` or ``tiny``."""
    if kind == "smollm2":
        from lift_kernels.finetune import model_io

        model, _ = model_io.load_model(model_io.find_model(name), dtype)
        return Path(name).name if name else "SmolLM2-135M", model.to(device).train()
    config = training_methods.llama_config(*(training_methods.TINY if kind == "tiny" else size_for(device)))
    model = training_methods.random_model(config, dtype, device)
    return f"random Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.3g} M", model


def train(trainers: Sequence[Trainer], runs: int) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """``runs`` timed steps of each trainer, in turns, by name.

    Also the statuses of those that cannot run, which is found at their first step.
    """
    rng = np.random.default_rng(0)
    steps: dict[str, list[Step]] = {trainer.name: [] for trainer in trainers}
    broken: dict[str, str] = {}
    first: dict[str, float] = {}
    for round_ in range(-WARMUP, runs):
        for i in rng.permutation(len(trainers)):
            trainer = trainers[i]
            if trainer.name in broken:
                continue
            try:
                step = trainer.step()
            except Exception as error:  # the method's row says why, the others go on
                broken[trainer.name] = training_methods.failed(trainer.name, error)
                continue
            first.setdefault(trainer.name, step.optimizer)
            if round_ >= 0:
                steps[trainer.name].append(step)
    for trainer in trainers:
        if trainer.lists is not None:
            for step in steps[trainer.name]:
                step.refresh *= trainer.optimizer.param_groups[0]["refresh_interval"] / INTERVAL
        if trainer.name.startswith("GaLore") and trainer.name not in broken:
            later = float(np.median([step.optimizer for step in steps[trainer.name]]))
            projections = max(0.0, first[trainer.name] - later)
            trainer.setup += projections
            for step in steps[trainer.name]:
                step.refresh = projections / INTERVAL
    return steps, broken


def gap(losses: Sequence[float], expected: Sequence[float], tolerance: float) -> str:
    """What is wrong with losses, or an empty string.

    They are compared with the expected ones as far as these go.
    """
    fall = abs(expected[0] - min(expected))
    for i, (got, right) in enumerate(zip(losses, expected)):
        if not abs(got - right) <= tolerance * fall:
            return f"the loss of step {i + 1} is {got:.6g}, it should be {right:.6g} (the loss fell by {fall:.3g})"
    return ""


def problem(name: str, losses: dict[str, list[float]], plain: dict[str, list[float]], tolerance: float) -> str:
    """What is wrong with the losses of a method, or an empty string.

    ``plain``: losses of reference loops, by name of the method.
    """
    own, start = losses[name], next(iter(plain.values()))[0]
    if not all(map(math.isfinite, own)) or not own[-1] < own[0]:
        return f"the loss does not fall: {own[0]:.6g} to {own[-1]:.6g}"
    if abs(own[0] - start) > 1e-3 * tolerance * abs(start) + tolerance * abs(own[0] - own[-1]):
        return f"its first loss is {own[0]:.6g}, the plain model's is {start:.6g}"
    if name in plain and (found := gap(own, plain[name], tolerance)):
        return found
    other = {MATRIX: PACKED, PACKED: MATRIX}.get(name)
    if (
        other in losses
        and not gap(losses[other], plain[other], tolerance)
        and (found := gap(own, losses[other], tolerance))
    ):
        return f"{found} as in {other}"
    return ""


def references(trainers: Sequence[Trainer], model: nn.Module, tokens: Tensor) -> dict[str, list[float]]:
    """Losses of the first steps in plain torch code, by method.

    The methods are both full fine-tunings and both LIFT modes.
    """
    plain = {FULL: training_methods.reference_losses(model, tokens, CHECKED)}
    if any(trainer.name == LINEAR for trainer in trainers):
        plain[LINEAR] = training_methods.reference_losses(model, tokens, CHECKED, train=training_methods.full_linear)
    known: list[tuple[list[Tensor], list[float]]] = []
    for trainer in trainers:
        if trainer.lists is None:
            continue
        for lists, losses in known:  # both modes have the same first masks
            if all(map(torch.equal, lists, trainer.lists)):
                plain[trainer.name] = losses
        if trainer.name not in plain:
            plain[trainer.name] = training_methods.reference_losses(model, tokens, CHECKED, trainer.lists)
            known.append((trainer.lists, plain[trainer.name]))
    return plain


def machine(device: str, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """Measured bytes of a copy and FLOPs of a product, per second."""
    if quick:
        return timing.copy_bandwidth(device, mib=8, runs=3), timing.product_rate(device, dtype, 256, runs=3)
    return timing.copy_bandwidth(device), timing.product_rate(device, dtype, 2048 if device == "cpu" else 8192)


def compare(
    label: str,
    model: nn.Module,
    shape: tuple[int, int],
    runs: int,
    only: Sequence[str] | None = None,
    memory: bool = True,
) -> list[dict]:
    """One row per method, those without a time included."""
    parameter = next(model.parameters())
    device, dtype = parameter.device.type, parameter.dtype
    tolerance = 0.01 if dtype == torch.float32 else 0.05
    tokens = training_methods.random_tokens(model.config.vocab_size, shape, device)
    before = machine(device, dtype, runs < 3)
    chosen = [name for name in METHODS if only is None or name in only]
    peak = training_methods.peaks(chosen, model.config, dtype, shape, device) if memory else {}
    status = {name: "switched off by --only" for name in METHODS if name not in chosen}
    trainers = []
    for name in chosen:
        try:
            trainers.append(Trainer(name, copy.deepcopy(model), tokens))
        except Exception as error:  # whatever another package raises is its row's status
            status[name] = training_methods.failed(name, error)
    plain = references(trainers, model, tokens)
    steps, broken = train(trainers, runs)
    status |= broken
    losses = {trainer.name: trainer.losses for trainer in trainers if trainer.name not in broken}
    status |= {
        name: f"refused, it is wrong: {found}" for name in losses if (found := problem(name, losses, plain, tolerance))
    }
    rates = np.maximum(before, machine(device, dtype, runs < 3))
    labels = {
        "op": "training",
        "set": f"{label}, {str(dtype).removeprefix('torch.')}, {shape[0]} x {shape[1]} tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    totals = {name: np.array([step.total for step in steps[name]]) for name in (FULL, LINEAR) if name not in status}
    rows = {t.name: row(t, steps[t.name], model, rates, totals) for t in trainers if t.name not in status}
    found = {name: rows.get(name, {}) | peak.get(name, {}) | {"status": status.get(name, "ok")} for name in METHODS}
    return [labels | {"variant": name} | columns for name, columns in found.items()]


def row(
    trainer: Trainer, steps: Sequence[Step], model: nn.Module, rates: Sequence[float], totals: dict[str, np.ndarray]
) -> dict:
    """The columns of a method that was timed. ``totals``: seconds of both full fine-tunings."""
    bandwidth, products = rates
    taken = np.array([step.total for step in steps])
    work = training_methods.flops(trainer.name, model, trainer.tokens)
    roofline = work / products + training_methods.optimizer_bytes(trainer, model) / bandwidth
    forward_backward, optimizer, refresh = np.array([astuple(step) for step in steps]).T
    found = results.row(trainer.name, taken, totals.get(FULL, taken), roofline * bandwidth, bandwidth)
    said = {
        "tokens_s": trainer.tokens.numel() / np.median(taken),
        "forward_backward_ms": 1e3 * np.median(forward_backward),
        "step_ms": 1e3 * np.median(optimizer),
        "refresh_ms": 1e3 * np.mean(refresh),
        "setup_s": trainer.setup,
        "gflop": work / 1e9,
        "product_gflop_s": products / 1e9,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
    }
    renews = trainer.lists is not None or trainer.name.startswith("GaLore")
    linear = float(f"{np.median(totals[LINEAR] / taken):.4g}") if LINEAR in totals else ""
    return (
        found
        | {key: float(f"{value:.4g}") for key, value in said.items()}
        | {
            "trained": sum(p.numel() for p in trainer.trained())
            if trainer.lists is None
            else sum(map(len, trainer.lists)),
            "refresh_interval": INTERVAL if renews else "",
            "ratio": found["ratio"] if FULL in totals else "",
            "ratio_linear": linear,
            "baseline": FULL,
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument("--sets", nargs="+", default=["smollm2", "random"], choices=["smollm2", "random", "tiny"])
    parser.add_argument("--batch", type=int, default=2 if device == "cpu" else 8)
    parser.add_argument("--length", type=int, default=64 if device == "cpu" else 512)
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--only", nargs="*", help="methods to run; the others' rows say that they were switched off")
    parser.add_argument("--no-memory", action="store_true", help="no processes that measure peak memory")
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny Llama on the CPU, files in a temporary folder unless --out"
    )
    parser.add_argument("--out", type=Path, help="folder for the files in place of bench/results/<device>-<level>")
    tuned.add_option(parser)
    given = parser.parse_args(argv)
    if given.dry_run:
        device, given.sets, given.batch, given.length, given.runs = "cpu", ["tiny"], 2, 16, 2
        given.out = given.out or Path(tempfile.mkdtemp())
    table: list[dict] = []
    for kind in given.sets:
        label, model = build(kind, given.model, torch.float32 if device == "cpu" else torch.bfloat16, device)
        new = compare(label, model, (given.batch, given.length), given.runs, given.only, not given.no_memory)
        results.show(new, COLUMNS)
        table += [row | results.environment(device) for row in new]
        del model
    if given.tuned:
        table += tuned.rows_again("bench.bench_training", "training.csv", argv)
    folder = given.out or results.results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    results.write_csv(folder / "training.csv", table)
    plots.draw("training", folder)
    return int(any(str(row.get(key)).startswith("refused") for row in table for key in ("status", "memory_status")))


if __name__ == "__main__":
    raise SystemExit(main())
