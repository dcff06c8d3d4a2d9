"""The command ``mask``: report and plot where a model's principal weights lie, and probe them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, UserError
from ..validation import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "mask",
        help="report and plot where a model's principal weights lie",
        description="Report and plot where a model's principal weights lie: a table, report.json and report.png. With "
        "--probe also how much the loss on a text depends on them: a table, probe.csv and probe.png.",
    )
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
    add(
        "--probe",
        action="store_true",
        help="besides the report, measure the loss with noise of 0.25, 0.5, 1 and 2 standard deviations of each matrix "
        "on its principal, largest, smallest and random entries, as many of each as --density selects",
    )
    add(
        "--probe-text",
        metavar="FILE",
        help='text of the probe, UTF-8; or a .jsonl file of objects with "text", or "question" and "answer" (default: '
        "the neutral text of the finetune command)",
    )
    add("--probe-seeds", type=int, metavar="N", help="how often each noise is drawn (default: 1)")
    parser.set_defaults(run=run, input_errors=(ValueError, TypeError, IndexError))


def run(options: argparse.Namespace) -> int:
    """Write the report of a model; return 0."""
    for option in ("probe_text", "probe_seeds"):
        if getattr(options, option) is not None and not options.probe:
            raise UserError(f"--{option.replace('_', '-')} {getattr(options, option)} needs --probe; add it")
    seeds = 1 if options.probe_seeds is None else options.probe_seeds
    require(seeds >= 1, f"--probe-seeds is {seeds}; it must be at least 1", UserError)
    write_report(
        options.model,
        options.density,
        options.rank,
        options.budget_rank,
        Path(options.output),
        probe_seeds=seeds if options.probe else 0,
        probe_text=options.probe_text,
    )
    return 0


def write_report(
    model_name: str | None,
    density: float,
    rank: int,
    budget_rank: int | None,
    folder: Path,
    *,
    probe_seeds: int = 0,
    probe_text: str | None = None,
) -> None:
    """Load a model, print its tables, and write report and probe when both are there.

    Args:
        model_name: a directory, GGUF file or hub id; None is the bundled model.
        density, rank, budget_rank: as in `lift_kernels.LiftAdamW`.
        folder: directory to write.
        probe_seeds: how often each noise is drawn; 0 for no probe.
        probe_text: file of the probe's text; None is the neutral text.

    Raises:
        FileError: for a folder that cannot be written or already holds a report.
        UserError: for a model or a text that cannot be used.
    """
    import torch

    from ..finetune import origin, probe
    from ..finetune.model_io import find_model, load_model
    from ..masks.report import draw, report_of, table
    from ..nn.param_groups import lift_param_groups, pattern_of, stacked_weights

    existing = folder / "report.json"
    require(not existing.exists(), f"{folder} already holds a report; choose another --output", FileError)
    source = find_model(model_name)
    model, tokenizer = load_model(source, torch.float32)
    examples = probe.text_examples(model, tokenizer, probe_text) if probe_seeds else []
    group = lift_param_groups(model, extra=pattern_of(stacked_weights(model)))[0]
    weights = dict(group["params"])
    rows, picture = report_of(weights, density, rank, budget_rank)
    settings = {"model": source.description, "density": density, "rank": rank, "budget_rank": budget_rank}
    budget = f"density {density:g}" if budget_rank is None else f"budget_rank {budget_rank}"
    title = f"{model_name or source.gguf_file}: {budget}, rank {rank}"
    report = {**settings, "matrices": [asdict(row) for row in rows]}
    texts, figures = {}, {"report.png": draw(rows, picture, f"principal weights of {title}")}
    tables = [table(rows)]
    if probe_seeds:
        found = probe.probe(
            model,
            weights,
            examples,
            tokenizer.pad_token_id,
            density=density,
            rank=rank,
            budget_rank=budget_rank,
            seeds=probe_seeds,
        )
        made = {"machine": origin.machine(model.device), "torch": torch.__version__, "commit": origin.commit()}
        texts["probe.csv"] = probe.csv_of(found, settings | made)
        figures["probe.png"] = probe.draw(found, title)
        tables.append(probe.table(found))
    texts["report.json"] = json.dumps(report, indent=2) + "\n"
    _write(folder, texts, figures)
    print("\n\n".join([*tables, f"written to {folder}: {', '.join(sorted([*texts, *figures]))}"]))


def _write(folder: Path, texts: dict[str, str], figures: dict[str, Figure]) -> None:
    """Write pictures and texts, ``report.json`` last: it marks a finished report."""
    from ..checkpoint.atomic_file import AtomicFile, write_atomic

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot create {folder}: {error.strerror}; choose another --output") from error
    for name, figure in figures.items():
        with AtomicFile(folder / name) as file:
            figure.savefig(file, format="png", dpi=120)
    for name, text in texts.items():
        write_atomic(folder / name, text)
