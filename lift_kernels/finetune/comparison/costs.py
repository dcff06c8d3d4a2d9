"""How long the remaining runs of a comparison take: first by one batch, then by finished runs."""

from __future__ import annotations

import copy
import io
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from statistics import fmean, median

from ..evaluation import sample_losses
from ..origin import machine
from ..precision import autocast
from .material import FRONTIER_PIECES, Material, tokens_of
from .rows import Row

BACKWARD = 3.0
"""Seconds of forward and backward pass and step, in those of a forward pass."""
PROBE = 8  # samples of the batch that is timed
ANSWER = 4.0  # seconds of answers to the test part, in those of its losses


@dataclass(frozen=True)
class Costs:
    """Seconds of a run before there are rows that say them.

    Attributes:
        train: seconds of training.
        evaluation: seconds of loading a copy and measuring it, by stage.
        machine: what the seconds are of; rows of another machine say nothing.
    """

    train: float
    evaluation: dict[str, float]
    machine: str

    def expected(self, stage: str, label: str, rows: Sequence[Row]) -> float:
        """Return the seconds of a run of a method in a stage, by the rows where they say it."""
        own = [row for row in rows if row.machine == self.machine and row.status == "ok"]
        rest = {row: row.seconds - row.train_seconds for row in own}
        same = [spent for row, spent in rest.items() if row.stage == stage]
        known = [spent / self.evaluation[row.stage] for row, spent in rest.items()]
        evaluation = median(same) if same else self.evaluation[stage] * (median(known) if known else 1.0)
        return evaluation + (0.0 if stage == "base" else self._training(label, own))

    def _training(self, label: str, rows: Sequence[Row]) -> float:
        """The seconds of training: of the method, or else of any method, or else estimated."""
        trained = [row for row in rows if row.stage != "base"]
        same = [row.train_seconds for row in trained if row.method == label]
        return median(same) if same else fmean([r.train_seconds for r in trained]) if trained else self.train

    def total(self, left: Counter[tuple[str, str]], rows: Sequence[Row]) -> float:
        """Return the seconds of runs that remain, by stage and label."""
        return sum(count * self.expected(stage, label, rows) for (stage, label), count in left.items())


def measured(shared: Material) -> Costs:
    """Time a batch of the untrained model, and return what runs will cost."""
    model = copy.deepcopy(shared.model).to(shared.device)
    batch = shared.train.encoded[:PROBE]
    spent = 0.0
    with redirect_stderr(io.StringIO()), autocast(shared.options.settings, shared.device):
        for _ in range(2):  # the first pass warms up
            began = time.perf_counter()
            sample_losses(model, shared.tokenizer, batch, PROBE, "")
            spent = time.perf_counter() - began
    token = spent / tokens_of(batch)
    data = shared.train
    trained = tokens_of(data.sequences) / len(data.sequences) * data.rows * shared.steps
    validation = tokens_of(data.encoded) * token
    frontier = tokens_of(shared.neutral[:FRONTIER_PIECES]) * token
    scored = 1.0 if shared.options.settings.metric == "none" else 1 + ANSWER
    test = tokens_of(shared.test.encoded) * token * scored + tokens_of(shared.neutral) * token
    evaluation = {
        "base": validation + test,
        "pilot": validation + frontier,
        "rates": validation + frontier,
        "final": test,
    }
    return Costs(BACKWARD * trained * token, evaluation, machine(shared.device))
