"""The runs of a comparison one after the other, and what it writes."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...checkpoint.atomic_file import write_atomic
from ...errors import FileError, UserError
from ..estimate import span
from . import costs, options, picture, plan, rows, summary, verdict
from .costs import Costs
from .material import Material, load
from .options import ROWS, Comparison, design_of
from .rows import STAGES, Row
from .trial import CannotRun, run_trial

TABLE, PICTURE, VERDICT = "table.md", "compare.png", "verdict.txt"
FILES = (TABLE, PICTURE, VERDICT, ROWS, options.SETTINGS)


class Session:
    """A comparison that runs.

    Attributes:
        shared: model and data.
        design: what runs.
        rows: finished runs of the task.
        failed: methods that cannot run, and why.
        began: the time by `time.perf_counter` from which the budget counts.
        costs: what runs will cost.
    """

    def __init__(self, shared: Material, found: Sequence[Row], began: float) -> None:
        self.shared, self.options = shared, shared.options
        self.design = design_of(self.options)
        self.folder = Path(self.options.output).expanduser()
        self.rows = list(found)
        self.failed: dict[str, str] = {}
        self.began = began
        self.costs: Costs = costs.measured(shared)

    def left(self, most: bool) -> Counter[tuple[str, str]]:
        """Return the runs that remain, by stage and label."""
        return plan.remaining(self.design, self.rows, self.failed, most)

    def remains(self, by_stage: bool = False) -> str:
        """Return how many runs remain and how long they take, for people."""
        both = [self.left(most) for most in (False, True)]
        if not both[1].total():
            return "none"
        runs = _range(*(left.total() for left in both))
        time_left = _range(*(span(self.costs.total(left, self.rows)) for left in both))
        stages = {s: _range(*(sum(n for (t, _), n in left.items() if t == s) for left in both)) for s in STAGES}
        detail = f" ({', '.join(f'{s} {n}' for s, n in stages.items() if n != '0')})" if by_stage else ""
        return f"{runs} run{'' if runs == '1' else 's'}{detail}, about {time_left}"

    def over_budget(self, trial: plan.Trial) -> bool:
        """Return whether a run would end after the budget."""
        if self.options.budget is None:
            return False
        spent = time.perf_counter() - self.began
        return spent + self.costs.expected(trial.stage, trial.label, self.rows) > self.options.budget

    def run(self) -> bool:
        """Run what remains; return whether the comparison is complete."""
        print(f"to run: {self.remains(by_stage=True)}", flush=True)
        before = ""
        while (trial := plan.next_trial(self.design, self.rows, self.failed)) is not None:
            if before == "pilot" and trial.stage != "pilot" and len(self.design.entries) > 1:
                print(self._planned(), flush=True)
            before = trial.stage
            known = plan.known(trial, self.rows)
            if known is None and self.over_budget(trial):
                print(f"the budget of {span(self.options.budget or 0)} has no time for another run")
                return False
            try:
                found = run_trial(self.shared, trial) if known is None else [known]
            except CannotRun as reason:
                self.failed[trial.label] = str(reason)
                print(f"{trial.label} cannot run: {reason}", flush=True)
                continue
            rows.add(self.folder / ROWS, found)
            self.rows += found
            print(f"{self._line(found[0])}; to run: {self.remains()}", flush=True)
        return True

    def _line(self, row: Row) -> str:
        """Return what a run found."""
        name = row.method if row.stage == "base" else f"{row.method} at {row.rate:g}, seed {row.seed}"
        if row.status == "diverged":
            return f"{row.stage}: {name}: diverged, {row.seconds:.0f} s"
        text = f"{row.stage}: {name}: {row.part} loss {row.target_loss:.4f}"
        if row.neutral_losses:
            text += f", neutral text {self._neutral(row)}"
        if row.accuracy is not None:
            text += f", {row.accuracy:.1%} right"
        return f"{text}, {row.seconds:.0f} s"

    def _neutral(self, row: Row) -> str:
        if row.stage == "base":
            return f"{row.neutral_loss:.4f}"
        return f"{row.neutral_loss - summary.base_row(self.rows, row.part).neutral_loss:+.4f}"

    def _planned(self) -> str:
        """Return what the design can find, as the pilot says."""
        seeds, samples = self.options.seeds, len(self.shared.test.heldout)
        found = summary.planned(self.rows, self.design.entries[0].label, seeds, samples)
        if found is None:
            return "the pilot diverged, so it does not say what the design can find; give a lower rate with --rates"
        share = f", {found.share:.1%} of what training gained" if found.share == found.share else ""
        many = "seed" if seeds == 1 else "seeds"
        return (
            f"with {seeds} {many} and {samples} test samples, the comparison finds differences from about "
            f"{found.nats:.4f} nats per token on{share} (in 80 % of repetitions, as the only comparison). This is "
            "roughly what two runs of each of two methods tell: methods that differ more from run to run need more"
        )

    def write(self, complete: bool) -> None:
        """Write table, picture and verdict of the finished runs, and print table and verdict."""
        notes = [f"{label} cannot run: {reason}." for label, reason in self.failed.items()]
        if not complete:
            notes.append(f"Not complete: {self.remains()} remain. To go on: {self._command()}")
        if (reference := self._reference()) is None:
            first, end = self.design.entries[0].label, "" if complete else " yet"
            head = f"There is no final run of {first}{end}, so nothing is compared."
            text = "\n".join([head, *self._tried(), *notes])
        else:
            found = summary.summarize(self.rows, reference)
            planned = summary.planned(self.rows, reference, self.options.seeds, len(self.shared.test.heldout))
            text = "\n".join([verdict.words(found, self._not_looked_at(), planned), *notes])
            caption = verdict.caption(found, self._model())
            write_atomic(self.folder / TABLE, f"{caption}\n\n{verdict.markdown_table(found)}\n")
            self._draw(found)
            print(f"\n{verdict.text_table(found)}")
        write_atomic(self.folder / VERDICT, text + "\n")
        written = ", ".join(name for name in FILES if (self.folder / name).exists())
        print(f"\n{text}\n\nwritten to {self.folder}: {written}")

    def _reference(self) -> str | None:
        """Return the label of the reference, or None while it has no final run.

        Where the first method cannot run, or diverged with every rate, the next one that could run
        takes its place.
        """
        known = {row.method for row in self.rows if row.stage == "final"}
        first, *others = (entry.label for entry in self.design.entries)
        losses = summary.tried(self.rows, first).values()
        lost = first in self.failed or (losses and not any(map(math.isfinite, losses)))
        able = [first, *others] if lost else [first]
        return next((label for label in able if label in known), None)

    def _model(self) -> str:
        return self.options.settings.model or "SmolLM2-135M"

    def _draw(self, found: summary.Summary) -> None:
        try:
            picture.draw(self.rows, found, self._model(), self.folder / PICTURE)
        except ModuleNotFoundError:
            print("the picture needs the package matplotlib; run `pip install matplotlib`")
        except FileError:
            raise
        except UserError as error:  # No run has losses to draw.
            print(error)

    def _tried(self) -> list[str]:
        """Return what the searches have found, a line each."""
        searches = {entry.label: summary.tried(self.rows, entry.label) for entry in self.design.entries}
        return [
            f"Validation losses of {label}: {', '.join(f'{_loss(loss)} at {rate:g}' for rate, loss in found.items())}."
            for label, found in searches.items()
            if found
        ]

    def _command(self) -> str:
        tasks = len(options.read_saved(self.folder))
        task = f" --task '{self.options.task}'" if tasks > 1 else ""
        return f"python -m lift_kernels compare --resume {self.folder}{task}"

    def _not_looked_at(self) -> list[str]:
        """Return what the comparison did not vary."""
        fixed = [f"{entry.label} at {entry.rate:g}" for entry in self.design.entries if entry.fixed]
        rates = [f"other rates than {', '.join(fixed)}"] if fixed else []
        return [*rates, "other models and data", f"other lengths of training than {self.shared.steps} steps"]


def _range(low: object, high: object) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def compare(chosen: Comparison) -> bool:
    """Run a comparison to its end or its budget, and write what it found.

    Args:
        chosen: options; where their directory holds finished runs of the task, they are kept.

    Returns:
        Whether it is complete.

    Raises:
        UserError: for input that cannot be used, and where finished runs have other options.
    """
    began = time.perf_counter()
    folder = Path(chosen.output).expanduser()
    _check_saved(chosen, folder)
    shared = load(chosen)
    with _alone(folder):
        _check_saved(chosen, folder, shared.digests)
        for name in FILES:
            for path in folder.glob(f".{name}.*"):  # that a killed process left half written
                path.unlink(missing_ok=True)
        found = rows.read(folder / ROWS, chosen.task, shared.fingerprint)
        options.save(chosen, shared.digests)
        return _run(Session(shared, found, began))


def _check_saved(chosen: Comparison, folder: Path, digests: dict[str, str] | None = None) -> None:
    """Refuse options, and digests where they are given, other than those of the finished runs."""
    saved = options.read_saved(folder).get(chosen.task)
    if saved is not None:
        options.check_same(chosen, saved, folder)
        options.check_digests(digests or saved.get("digests", {}), saved, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a directory, and hold a lock of it that ends with this process.

    Raises:
        FileError: where another process holds it, or the directory cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(
                f"another process runs the comparison in {folder}; wait for its end, or choose another --output"
            ) from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):  # a file system that has no such locks
                raise
        yield
    finally:
        os.close(number)


def _run(session: Session) -> bool:
    """Run a comparison from the rows that it has, and write what it found."""
    found, folder, task = session.rows, session.folder, session.options.task
    if found:
        print(f"{folder} holds {len(found)} rows of {task}, which are kept")
    try:
        complete = session.run()
    except KeyboardInterrupt:
        session.write(complete=False)
        raise
    session.write(complete)
    return complete
