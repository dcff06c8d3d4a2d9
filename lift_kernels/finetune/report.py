"""Report of a fine-tuning run: table, ``report.json``, ``answers.jsonl``, ``loss.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.atomic_file import AtomicFile, write_atomic

Report = dict[str, Any]  # flat, with dotted keys such as "heldout_loss.before"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _accuracy(report: Report, when: str) -> str:
    low, high = report[f"exact_match.{when}_low"], report[f"exact_match.{when}_high"]
    return f"{report[f'exact_match.{when}']:.1%} ({100 * low:.0f}..{100 * high:.0f})"


def table(report: Report) -> str:
    """Return the report as aligned text: measures before and after, then the costs."""
    get = report.__getitem__
    measures = [
        ("", "before", "after"),
        (
            "held-out loss (nats per answer token)",
            f"{get('heldout_loss.before'):.4f}",
            f"{get('heldout_loss.after'):.4f}",
        ),
        (
            f"exact match, {get('exact_match.problems')} problems (95 % interval)",
            _accuracy(report, "before"),
            _accuracy(report, "after"),
        ),
        (
            "loss on neutral text (nats per token)",
            f"{get('neutral_loss.before'):.4f}",
            f"{get('neutral_loss.after'):.4f}",
        ),
    ]
    state, dense = get("optimizer_state_bytes.measured"), get("optimizer_state_bytes.dense")
    gradients, dense_gradients = get("gradient_bytes.measured"), get("gradient_bytes.dense")
    per_entry = f", {get('extra_bytes.an_entry'):.2f} bytes per entry" if get("extra_bytes.an_entry") else ""
    refreshes, skipped = get("refreshes"), get("refreshes.skipped")
    per_refresh = f"{get('seconds.refreshes'):.3f} s in all ({refreshes} times)" if refreshes else "none"
    if skipped:
        due, overlap = skipped + get("refreshes.matrices"), get("refreshes.skipped_overlap")
        per_refresh += f"; {skipped} of {due} masks skipped, predicted overlap {overlap:.4f}"
    costs = [
        ("trained entries", f"{get('entries'):,} of {get('covered_weights'):,} ({get('density'):.2%})"),
        ("optimizer state", f"{_mib(state)}, dense fp32 AdamW {_mib(dense)} ({state / dense:.1%})"),
        ("gradients", f"{_mib(gradients)}, dense {_mib(dense_gradients)} ({gradients / dense_gradients:.1%})"),
        ("on top of the frozen model", f"{_mib(get('extra_bytes.measured'))}{per_entry}"),
        ("forward + backward", f"{get('seconds.forward_backward'):.3f} s per step (median of {get('settings.steps')})"),
        ("optimizer step", f"{get('seconds.step'):.3f} s per step (median)"),
        ("mask refresh", per_refresh),
        ("whole run", f"{get('seconds.total'):.0f} s, of which training took {get('seconds.train'):.0f} s"),
        ("model", get("model.description")),
        ("data", get("data.description")),
    ]
    width = max(len(row[0]) for row in measures)
    column = max(len(row[1]) for row in measures)
    lines = [f"{name:<{width}}  {before:<{column}}  {after}".rstrip() for name, before, after in measures]
    rule = "-" * max(map(len, lines))
    lines.insert(1, rule)
    return "\n".join([*lines, rule, *(f"{name:<{width}}  {value}" for name, value in costs)])


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON; the file appears complete or not at all."""
    write_atomic(path, json.dumps(report, indent=2) + "\n")


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write questions with their answers before and after training, one JSON object per line."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def plot_losses(report: Report, losses: Sequence[float], refresh_steps: Sequence[int], path: Path) -> None:
    """Plot the training loss, the held-out loss before and after, and the mask refreshes.

    Args:
        report: the report of the run.
        losses: training loss of each step in nats per token.
        refresh_steps: number of steps before each refresh.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure  # not pyplot, which needs global state and perhaps a display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss (nats per answer token)", title=f"{report['method']}: {report['model.name']}"
    )
    axes.plot(
        range(1, len(losses) + 1),
        losses,
        label="training batch (several problems in a sequence)",
        color="tab:blue",
        linewidth=1,
    )
    ends = [report["heldout_loss.before"], report["heldout_loss.after"]]
    axes.plot([0, len(losses)], ends, "o", label="held-out (single problems), before and after", color="tab:orange")
    for i, step in enumerate(refresh_steps):
        axes.axvline(step, color="0.8", linewidth=1, zorder=0, label="mask refresh" if i == 0 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend()
    with AtomicFile(path) as file:
        figure.savefig(file, format="png", dpi=150)
