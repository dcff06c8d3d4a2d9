"""Delta files of a model: save, apply and revert, beside safetensors.

safetensors saves and loads the whole model. The model is SmolLM2-135M (or ``--model``). The
fine-tuned one differs from the base in the top 5 % of |W_r|, r = 64, of every linear layer.
Everything is done in fp32 and in bf16, timed in turns in a new random order each round, on the file
system of the temporary folder. First each method is checked: what was applied equals the fine-tuned
model, and what was reverted the base, bit for bit. A wrong one is refused, and the exit status is
then 1.

- ``save_delta``: both models in memory to a file, which is complete on the disk at the end (fsync).
  ``apply`` and ``revert``: of a module in memory, in place. ``apply to a checkpoint``: a
  safetensors file, copied and patched, complete on the disk at the end.
- safetensors: ``save_file`` of the whole model and an fsync, which it leaves out itself.
  ``load_file``, with every page read into memory of its own. The save is the baseline of ``ratio``
  for itself and save_delta, the load for the rest.
- ``bytes_per_entry``: of the file, of each entry that changed, measured. ``computed_bytes``: 4 of
  the index and two values.
- Roofline: bytes over measured rates. Files are written at the rate of a write with fsync. Files
  that are read were just written, so they are read at the rate of the page cache. Tensors in memory
  have the copy bandwidth. save_delta reads both models and writes the file. apply and revert read
  the model and the file. Of a checkpoint, base and file are read and the copy is written.
- Most of the distance to the roofline is the SHA-256 by which a delta knows its base. Its time over
  the model has a row of its own. save_delta takes it of both models, apply and revert of one.

    python -m bench.bench_delta [--model DIR] [--dtypes fp32 bf16] [--runs 3] [--dry-run]
        [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import plots
from bench.common import results, timing, training_methods
from lift_kernels import apply_delta, delta_info, revert_delta, save_delta
from lift_kernels.delta.model_weights import ModuleWeights, fingerprint
from lift_kernels.masks.principal import MaskRequest, principal_masks

COLUMNS = [
    "set",
    "variant",
    "median_ms",
    "ratio",
    "file_bytes",
    "bytes_per_entry",
    "computed_bytes",
    "share_of_floor",
    "status",
]
SAVE, LOAD, SHA = "safetensors save_file + fsync", "safetensors load_file", "SHA-256 of the model, for comparison"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Rates:
    """Measured bytes per second.

    They are of a copy in memory, of writing a file to the disk, and of reading it from the page
    cache.
    """

    copy: float
    write: float
    read: float

    @staticmethod
    def measured(folder: Path, mib: int) -> Rates:
        data, path = os.urandom(2**20) * mib, folder / "rate"
        buffer, best = bytearray(len(data)), {"write": 0.0, "read": 0.0}
        for _ in range(3):
            start = time.perf_counter()
            with path.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            middle = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                view = memoryview(buffer)
                while view:
                    view = view[file.readinto(view) :]
            end = time.perf_counter()
            for name, seconds in (("write", middle - start), ("read", end - middle)):
                best[name] = max(best[name], len(data) / seconds)
        path.unlink()
        return Rates(timing.copy_bandwidth(mib=2 * mib), **best)

    def seconds(self, memory: float = 0, written: float = 0, read: float = 0) -> float:
        return memory / self.copy + written / self.write + read / self.read


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """By name, tied ones once."""
    return {name: tensor.detach() for name, tensor in ModuleWeights(model).tensors.items()}


def same(model: nn.Module | dict[str, Tensor], expected: nn.Module) -> str:
    """What is wrong with a model that should equal another bit for bit, or an empty string."""
    got, right = (tensors(m) if isinstance(m, nn.Module) else m for m in (model, expected))
    if got.keys() != right.keys():
        return f"it has other tensors: {sorted(got.keys() ^ right.keys())[:1]}"
    for name, tensor in right.items():
        if tensor.dtype != got[name].dtype or not torch.equal(tensor, got[name]):
            return f"{name} differs"
    return ""


def tune(model: nn.Module) -> nn.Module:
    """A copy with other values at the principal entries of its matrices.

    Both dtypes can hold the changes.
    """
    model = copy.deepcopy(model)
    weights = training_methods.matrices(model)
    rank, density = training_methods.RANK, training_methods.DENSITY
    requests = [MaskRequest(w.detach(), min(rank, *w.shape), round(density * w.numel())) for w in weights]
    with torch.no_grad():
        for weight, mask in zip(weights, principal_masks(requests)):
            flat, index = weight.view(-1), mask.indices.long()
            flat[index] = 1.0625 * flat[index] + 2.0**-10
    return model


class Files:
    """Base and fine-tuned model of one dtype, their files, and the methods between them.

    The files are in ``folder``.
    """

    def __init__(self, base: nn.Module, tuned: nn.Module, folder: Path) -> None:
        self.base, self.tuned = base, tuned
        self.model = copy.deepcopy(base)  # the one that deltas are applied to
        self.delta, self.saved, self.copy = folder / "delta", folder / "base.safetensors", folder / "copy.safetensors"
        self.whole = folder / "whole.safetensors"
        save_file(tensors(base), self.saved)
        self.save()

    def save(self) -> None:
        save_delta(self.tuned, self.base, self.delta)

    def apply(self) -> None:
        apply_delta(self.model, self.delta)

    def revert(self) -> None:
        revert_delta(self.model, self.delta)

    def apply_to_file(self) -> None:
        apply_delta(self.saved, self.delta, self.copy)

    def save_whole(self) -> None:
        save_file(tensors(self.tuned), self.whole)
        with self.whole.open("rb") as file:
            os.fsync(file.fileno())

    def load_whole(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in load_file(self.whole).items()}

    def check(self) -> dict[str, str]:
        """By variant, what is wrong with it. Right ones are left out. All is left as it was."""
        found = {}

        def note(
            variant: str,
            run: Callable[[], object],
            result: Callable[[], nn.Module | dict[str, Tensor]],
            right: nn.Module,
        ):
            try:
                run()
                problem = same(result(), right)
            except Exception as error:  # a wrong step before leaves what this one does not take
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if problem:
                found[variant] = f"refused, it is wrong: {problem}"

        note("apply", self.apply, lambda: self.model, self.tuned)
        note("revert", self.revert, lambda: self.model, self.base)
        note("apply to a checkpoint", self.apply_to_file, lambda: load_file(self.copy), self.tuned)
        note(LOAD, self.save_whole, self.load_whole, self.tuned)
        if "apply" in found:
            found["save_delta"] = found["apply"]  # it is not known which of them is wrong
        self.copy.unlink(missing_ok=True)
        return found


def rounds(
    units: Sequence[dict[str, Callable[[], object]]], runs: int, after: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Seconds of every run, by variant.

    Units come in shuffled order, the methods of one unit in their own order. ``after`` each unit
    something is done that is not timed.
    """
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for unit in units for name in unit}
    for _ in range(runs):
        for i in rng.permutation(len(units)):
            for name, method in units[i].items():
                start = time.perf_counter()
                method()
                times[name].append(time.perf_counter() - start)
            after()
    return {name: np.array(values) for name, values in times.items()}


def compare(label: str, base: nn.Module, tuned: nn.Module, runs: int, rates: Rates, folder: Path) -> list[dict]:
    """One row per method, those that were refused included."""
    files = Files(base, tuned, folder)
    status = files.check()
    info, width = delta_info(files.delta), next(base.parameters()).element_size()
    size, delta = sum(t.nbytes for t in tensors(base).values()), info.file_bytes
    rooflines = {
        SAVE: rates.seconds(size, written=size),
        LOAD: rates.seconds(size, read=size),
        "save_delta": rates.seconds(2 * size, written=delta),
        "apply": rates.seconds(size, read=delta),
        "revert": rates.seconds(size, read=delta),
        "apply to a checkpoint": rates.seconds(read=size + delta, written=size),
        SHA: rates.seconds(size),
    }
    units: list[dict[str, Callable[[], object]]] = [
        {SAVE: files.save_whole},
        {LOAD: files.load_whole},
        {"save_delta": files.save},
        {"apply": files.apply, "revert": files.revert},
        {"apply to a checkpoint": files.apply_to_file},
        {SHA: lambda: fingerprint(files.base)},
    ]
    units = [unit for unit in units if not unit.keys() & status.keys()]
    times = rounds(units, runs, lambda: files.copy.unlink(missing_ok=True))
    sizes = {SAVE: size, "save_delta": delta}
    labels = {
        "op": "delta",
        "set": label,
        "tensors": len(tensors(base)),
        "parameters": size // width,
        "entries": info.entries,
    }
    table = []
    for name, roofline in rooflines.items():
        said: dict = {"variant": name, "status": status.get(name, "ok")}
        baseline = SAVE if name in (SAVE, "save_delta") else LOAD
        if name in times and baseline in times:
            said |= results.row(name, times[name], times[baseline], roofline * rates.copy, rates.copy) | {
                "baseline": baseline
            }
        if name in sizes:
            said["file_bytes"] = sizes[name]
        if name == "save_delta":
            said |= {"bytes_per_entry": round(delta / info.entries, 4), "computed_bytes": 4 + 2 * width}
        table.append(
            labels | said | {"write_gb_s": round(rates.write / 1e9, 3), "read_gb_s": round(rates.read / 1e9, 3)}
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--runs", type=int, default=3, help="interleaved rounds")
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny random Llama, files in a temporary folder unless --out"
    )
    parser.add_argument("--out", type=Path, help="folder for the results in place of bench/results/<device>-<level>")
    given = parser.parse_args(argv)
    if given.dry_run:
        given.out = given.out or Path(tempfile.mkdtemp())
        label = "random Llama"
        base = training_methods.random_model(
            training_methods.llama_config(*training_methods.TINY), torch.float32, "cpu"
        )
    else:
        from lift_kernels.finetune import model_io

        label = Path(given.model).name if given.model else "SmolLM2-135M"
        base, _ = model_io.load_model(model_io.find_model(given.model), torch.float32)
    tuned, table = tune(base), []
    with tempfile.TemporaryDirectory() as place:
        rates = Rates.measured(Path(place), 2 if given.dry_run else 128)
        for dtype in given.dtypes:
            models = (copy.deepcopy(model).to(DTYPES[dtype]) for model in (base, tuned))
            new = compare(f"{label}, {dtype}", *models, given.runs, rates, Path(place))
            results.show(new, COLUMNS)
            table += [row | results.environment() for row in new]
    folder = given.out or results.results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    results.write_csv(folder / "delta.csv", table)
    plots.draw("delta", folder)
    return int(any(row["status"].startswith("refused") for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
