"""Noise on groups of entries of every linear matrix, against the loss of a model on a text.

The more a model's loss depends on a group of entries, the faster it rises with noise on them. The
groups have the same number of entries of each matrix, and get the same noise.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._progress import progress_bar
from ..errors import UserError
from ..masks.budget import mask_rank, trained_entries
from ..masks.selection import SelectionRequest, largest_indices, make_masks
from . import prompts
from .evaluation import answer_loss, neutral_examples
from .model_kinds import check_tokens, position_limit
from .prompts import IGNORE, Example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = (0.25, 0.5, 1.0, 2.0)
"""Sizes of the noise, in standard deviations of the matrix."""
LEAST_TOKENS = 16
_PIECE = 512  # tokens that a model reads at once, at most
_BATCH = 2048  # tokens, padding included


def smallest(weight: Tensor, k: int) -> Tensor:
    """Positions of the k entries of least magnitude."""
    return largest_indices(-weight.abs(), k)


GROUPS: dict[str, str | Callable[[Tensor, int], Tensor]] = {
    "principal": "principal",
    "largest": "magnitude",
    "smallest": smallest,
    "random": "random",
}
"""The groups of entries, and the selection that chooses each."""


class Trial(NamedTuple):
    """A loss with noise.

    Attributes:
        group: the entries that get noise, one of `GROUPS`.
        noise: its standard deviation, in those of each matrix.
        seed: of the noise.
        loss: in nats per token.
    """

    group: str
    noise: float
    seed: int
    loss: float


@dataclass(frozen=True)
class Probe:
    """The trials, the loss without noise in nats per token, and the number of predicted tokens."""

    trials: list[Trial]
    base: float
    tokens: int

    def losses(self, group: str, noise: float) -> Tensor:
        """The losses of all seeds, fp64."""
        found = [t.loss for t in self.trials if (t.group, t.noise) == (group, noise)]
        return torch.tensor(found, dtype=torch.float64)

    def sizes(self) -> list[float]:
        """The sizes of the noise, in order."""
        return sorted({trial.noise for trial in self.trials})


class _Chosen(NamedTuple):
    """Entries of a weight.

    Attributes:
        flat: the weight, one-dimensional.
        indices: int64 positions.
        unit: the standard deviation of the matrix of each entry, fp32.
    """

    flat: Tensor
    indices: Tensor
    unit: Tensor


def text_examples(model: Any, tokenizer: Any, path: str | Path | None) -> list[Example]:
    """Examples of a text, in pieces of up to 512 tokens, of which all but the first are labelled.

    Args:
        model: the model that is to read them.
        tokenizer: its tokenizer.
        path: a UTF-8 text, or a .jsonl file of objects with the string "text", or "question" and
            "answer". None takes the neutral text of `evaluation`.

    Raises:
        UserError: in one line, for a file that cannot be used or is too short, and for a tokenizer
            of another model.
    """
    if path is None:
        examples = neutral_examples(tokenizer)
    else:
        start = prompts.opening(tokenizer)
        size = min(_PIECE, position_limit(model.config) or _PIECE) - len(start)
        encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _read(Path(path))]
        pieces = [start + ids[at : at + size] for ids in encoded for at in range(0, len(ids), size)]
        examples = [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in pieces if len(ids) > 1]
    tokens = sum(len(example["input_ids"]) - 1 for example in examples)
    if tokens < LEAST_TOKENS:
        raise UserError(f"{path} has {tokens} tokens to predict; give a --probe-text of at least {LEAST_TOKENS}")
    check_tokens(model, tokenizer, examples, max(len(example["input_ids"]) for example in examples), 1)
    return examples


def _read(path: Path) -> list[str]:
    """The texts of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --probe-text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if path.suffix != ".jsonl":
        return [text]
    # Strings may hold U+2028 and others at which `str.splitlines` would split.
    return [_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(path: Path, number: int, line: str) -> str:
    """The text of a line of JSON."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"{prompts.prompt(row['question'])} {row['answer'].strip()}"
    raise UserError(f'{path}, line {number}: needs an object with the string "text", or "question" and "answer"')


def probe(
    model: Any,
    weights: Mapping[str, Tensor],
    examples: Sequence[Example],
    pad: int,
    *,
    density: float,
    rank: int,
    budget_rank: int | None = None,
    seeds: int = 1,
    sizes: Sequence[float] = NOISE,
) -> Probe:
    """Measure the loss with noise on each group of entries. Every weight is then as it was.

    Args:
        model: a causal language model; it is put into evaluation mode.
        weights: its matrices and 3-D stacks of matrices, by name.
        examples: what the loss is measured on.
        pad: id of the padding token.
        density, rank, budget_rank: as in `lift_kernels.LiftAdamW`; how many entries are chosen.
        seeds: how often each noise is drawn, with the seeds 0, 1, ...
        sizes: of the noise, in standard deviations of the matrix.

    Raises ValueError, naming the weight or the option, for non-finite weights and options out of
    range.
    """
    model.eval()
    requests = [
        SelectionRequest(
            matrix=weight.detach(),
            grad=None,
            rank=mask_rank(weight.shape, rank, name),
            k=trained_entries(weight.shape, density, budget_rank, name),
            name=name,
            number=number,
            kept={},
        )
        for number, (name, weight) in enumerate(weights.items())
    ]
    batches, tokens = _batches(examples, pad, model.device), sum(len(e["input_ids"]) - 1 for e in examples)
    trials = []
    with progress_bar(len(GROUPS) * len(sizes) * seeds + 1, "losses", "loss") as bar:
        base = _loss(model, batches)
        bar.update(1)
        for group, selection in GROUPS.items():
            chosen = _chosen(requests, selection)
            for size in sizes:
                for seed in range(seeds):
                    with _noise(chosen, size, seed):
                        trials.append(Trial(group, size, seed, _loss(model, batches)))
                    bar.update(1)
    return Probe(trials, base, tokens)


def _chosen(requests: Sequence[SelectionRequest], selection: str | Callable[[Tensor, int], Tensor]) -> list[_Chosen]:
    """The entries that a selection chooses of each weight."""
    masks = make_masks(requests, selection=selection, seed=0)
    units = [r.matrix.float().flatten(-2).std(-1, correction=0).view(-1).repeat_interleave(r.k) for r in requests]
    return [_Chosen(r.matrix.view(-1), m.indices.long(), unit) for r, m, unit in zip(requests, masks, units)]


@contextmanager
def _noise(chosen: Sequence[_Chosen], size: float, seed: int) -> Iterator[None]:
    """Normal noise on the chosen entries, for as long as the context lasts.

    Each size and each group gets the same draws, so that only what is compared differs.
    """
    generator = torch.Generator().manual_seed(seed)
    before = [flat[indices] for flat, indices, _ in chosen]
    try:
        for (flat, indices, unit), values in zip(chosen, before):
            draw = torch.randn(len(indices), generator=generator).to(flat.device)
            flat[indices] = (values.float() + size * unit * draw).to(flat.dtype)
        yield
    finally:
        for (flat, indices, _), values in zip(chosen, before):
            flat[indices] = values


def _batches(examples: Sequence[Example], pad: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Padded batches of examples of about the same length."""
    rest, batches = sorted(examples, key=lambda e: -len(e["input_ids"])), []
    while rest:
        count = max(1, _BATCH // len(rest[0]["input_ids"]))
        batch = prompts.collate(rest[:count], pad)
        batches.append({key: value.to(device) for key, value in batch.items()})
        rest = rest[count:]
    return batches


@torch.no_grad()
def _loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    losses, counts = zip(*(answer_loss(model, batch) for batch in batches))
    return sum(float(loss) for loss in losses) / sum(counts)


def csv_of(found: Probe, settings: Mapping[str, object]) -> str:
    """The trials as CSV, after the loss without noise, whose entries are ``none``.

    Args:
        found: the trials.
        settings: further columns, which are the same in each row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["entries", "noise", "seed", "loss", "tokens", *settings])
    for trial in [("none", 0.0, "", found.base), *found.trials]:
        writer.writerow([*trial, found.tokens, *settings.values()])
    return text.getvalue()


def table(found: Probe) -> str:
    """Losses by group and size of the noise, as aligned text."""
    sizes = found.sizes()
    seeds = len(found.losses(found.trials[0].group, sizes[0]))
    lines = [f"loss without noise: {found.base:.4f} nats per token, on {found.tokens} tokens"]
    lines.append("loss with noise of so many standard deviations of each matrix on a group of its entries")
    if seeds > 1:
        lines[-1] += f"\n(mean of {seeds} seeds, and their standard deviation)"
    width, column = max(map(len, GROUPS)), 8 if seeds == 1 else 18
    lines += ["", f"{'entries':<{width}}" + "".join(f"{size:>{column}g}" for size in sizes)]
    for group in GROUPS:
        losses = [found.losses(group, size) for size in sizes]
        cells = [f"{of.mean():.4f}" + (f" +- {of.std():.4f}" if seeds > 1 else "") for of in losses]
        lines.append(f"{group:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def draw(found: Probe, title: str) -> Figure:
    """Loss against the size of the noise: a line for each group, and a band over the seeds."""
    from matplotlib.figure import Figure

    sizes = found.sizes()
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="noise (standard deviations of the matrix)",
        ylabel="loss (nats per token)",
        title=title,
    )
    axes.axhline(found.base, color="0.5", linestyle="--", linewidth=1, label="without noise")
    for group, marker in zip(GROUPS, "osv^"):
        losses = torch.stack([found.losses(group, size) for size in sizes])
        (line,) = axes.plot(sizes, losses.mean(1).numpy(), marker=marker, markersize=4, label=group)
        if losses.shape[1] > 1:
            low, high = losses.aminmax(dim=1)
            axes.fill_between(sizes, low.numpy(), high.numpy(), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    seeds = losses.shape[1]
    axes.legend(title="noise on" + (f"\n(bands: range of {seeds} seeds)" if seeds > 1 else ""))
    return figure
