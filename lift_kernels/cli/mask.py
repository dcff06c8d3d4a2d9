"""The command ``mask``: report and plot where a model's principal weights lie."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..validation import require


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("mask", help="report and plot where a model's principal weights lie")
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model directory, GGUF file or hub id (default: the bundled SmolLM2-135M)",
    )
    add("--density", type=float, default=0.05, help="share of each matrix that is selected (default: 0.05)")
    add("--rank", type=int, default=64, help="rank of the approximation that selects the entries (default: 64)")
    add("--budget-rank", type=int, help="select (rows + columns) x this many entries per matrix, instead of --density")
    add("--output", metavar="DIR", default="mask_report", help="directory to write (default: mask_report)")
    parser.set_defaults(run=run, input_errors=(ValueError, TypeError, IndexError))


def run(options: argparse.Namespace) -> int:
    """Write the report of a model; return 0."""
    write_report(options.model, options.density, options.rank, options.budget_rank, Path(options.output))
    return 0


def write_report(model_name: str | None, density: float, rank: int, budget_rank: int | None, folder: Path) -> None:
    """Load a model, print its table, and write ``report.json`` and ``report.png``.

    Args:
        model_name: a directory, GGUF file or hub id; None is the bundled model.
        density, rank, budget_rank: as in `lift_kernels.LiftAdamW`.
        folder: directory to write.

    Raises:
        FileError: for a folder that cannot be written or already holds a report.
        UserError: for a model that cannot be used.
    """
    import torch

    from ..checkpoint.atomic_file import AtomicFile, write_atomic
    from ..finetune.model_io import find_model, load_model
    from ..masks.report import draw, report_of, table
    from ..nn.param_groups import lift_param_groups, pattern_of, stacked_weights

    existing = folder / "report.json"
    require(not existing.exists(), f"{folder} already holds a report; choose another --output", FileError)
    source = find_model(model_name)
    model, _ = load_model(source, torch.float32)
    group = lift_param_groups(model, extra=pattern_of(stacked_weights(model)))[0]
    rows, picture = report_of(dict(group["params"]), density, rank, budget_rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot create {folder}: {error.strerror}; choose another --output") from error
    settings = {"model": source.description, "density": density, "rank": rank, "budget_rank": budget_rank}
    budget = f"density {density:g}" if budget_rank is None else f"budget_rank {budget_rank}"
    figure = draw(rows, picture, f"principal weights of {model_name or source.gguf_file}: {budget}, rank {rank}")
    with AtomicFile(folder / "report.png") as file:
        figure.savefig(file, format="png", dpi=120)
    report = {**settings, "matrices": [asdict(row) for row in rows]}
    write_atomic(existing, json.dumps(report, indent=2) + "\n")
    print(f"{table(rows)}\n\nwritten to {folder}: report.json, report.png")
