"""Report of a fine-tuning run: table, ``report.json``, ``answers.jsonl``, ``loss.png``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..checkpoint.atomic_file import AtomicFile, write_atomic

VALUE_WIDTH = 90  # columns of a value in the table

Report = dict[str, Any]  # flat, with dotted keys such as "heldout_loss.before"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _accuracy(report: Report, when: str) -> str:
    low, high = report[f"exact_match.{when}_low"], report[f"exact_match.{when}_high"]
    return f"{report[f'exact_match.{when}']:.1%} ({100 * low:.0f}..{100 * high:.0f})"


def _change(report: Report, key: str) -> str:
    low, high = report[f"{key}.change_low"], report[f"{key}.change_high"]
    interval = "" if low is None else f" ({low:+.4f}..{high:+.4f})"
    return f"{report[f'{key}.change']:+.4f}{interval}"


def table(report: Report) -> str:
    """Return the report as aligned text: measures before and after, then the costs."""
    measures, costs = _measures(report), _costs(report)
    width = max(len(row[0]) for row in measures)
    column = max(len(row[1]) for row in measures)
    lines = [f"{name:<{width}}  {before:<{column}}  {after}".rstrip() for name, before, after in measures]
    rule = "-" * max(map(len, lines))
    lines.insert(1, rule)
    for name, value in costs:
        # A path is not broken, so that it can be copied.
        parts = textwrap.wrap(value, VALUE_WIDTH, break_long_words=False, break_on_hyphens=False)
        lines += [f"{title:<{width}}  {part}" for title, part in zip_longest([name], parts or [""], fillvalue="")]
    lines.insert(1 + len(measures), rule)
    return "\n".join(lines)


def _measures(report: Report) -> list[tuple[str, str, str]]:
    """Return the rows of the table about the model: name, before, after."""
    get = report.__getitem__
    rows = [("", "before", "after")]
    for key, name, over in (
        ("heldout_loss", f"held-out loss ({get('heldout_loss.unit')})", f"{get('heldout.samples')} samples"),
        ("neutral_loss", "loss on neutral text (nats per token)", f"{get('neutral.pieces')} pieces"),
    ):
        rows.append((name, f"{get(f'{key}.before'):.4f}", f"{get(f'{key}.after'):.4f}"))
        rows.append((f"  its change, mean of {over} (95 % interval)", "", _change(report, key)))
    if get("metric") != "none":
        name = "right choices" if get("metric") == "choice" else "exact match"
        title = f"{name}, {get('exact_match.problems')} problems (95 % interval)"
        rows.insert(3, (title, _accuracy(report, "before"), _accuracy(report, "after")))
    return rows


def _costs(report: Report) -> list[tuple[str, str]]:
    """Return the other rows of the table: name and value."""
    get = report.__getitem__
    state, dense = get("optimizer_state_bytes.measured"), get("optimizer_state_bytes.dense")
    gradients, dense_gradients = get("gradient_bytes.measured"), get("gradient_bytes.dense")
    per_entry = f", {get('extra_bytes.an_entry'):.2f} bytes per entry" if get("extra_bytes.an_entry") else ""
    refreshes, skipped = get("refreshes"), get("refreshes.skipped")
    per_refresh = f"{get('seconds.refreshes'):.3f} s in all ({refreshes} times)" if refreshes else "none"
    if skipped:
        due, overlap = skipped + get("refreshes.matrices"), get("refreshes.skipped_overlap")
        per_refresh += f"; {skipped} of {due} masks skipped, predicted overlap {overlap:.4f}"
    return [
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
        ("metric", f"{get('metric')}: {get('metric.description')}"),
        ("neutral text", f"{get('neutral.description')}; {get('neutral.tokens'):,} tokens"),
    ]


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON; the file appears complete or not at all."""
    write_atomic(path, json.dumps(report, indent=2) + "\n")


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write held-out samples with answers and losses, one JSON object per line."""
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
        xlabel="step",
        ylabel=f"loss ({report['heldout_loss.unit']})",
        title=f"{report['method']}: {report['model.name']}",
    )
    joined = " (later samples see earlier ones)" if report["data.together"] > 1 else ""
    axes.plot(range(1, len(losses) + 1), losses, label=f"training batch{joined}", color="tab:blue", linewidth=1)
    ends = [report["heldout_loss.before"], report["heldout_loss.after"]]
    axes.plot([0, len(losses)], ends, "o", label="held-out samples, one by one, before and after", color="tab:orange")
    for i, step in enumerate(refresh_steps):
        axes.axvline(step, color="0.8", linewidth=1, zorder=0, label="mask refresh" if i == 0 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend()
    with AtomicFile(path) as file:
        figure.savefig(file, format="png", dpi=150)
