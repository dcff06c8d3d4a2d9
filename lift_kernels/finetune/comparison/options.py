"""Options of a comparison, and their saved form, by which an interrupted one goes on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...checkpoint.atomic_file import write_atomic
from ...errors import FileError, UserError
from ..config import LEARNING_RATES, SPARSE, Settings
from .plan import Design, read_entries

SETTINGS, ROWS = "settings.json", "runs.csv"
METHODS = ("lift", "random", "full", "lora")
DEFAULTS: dict[str, Any] = {"steps": 30, "metric": "none", "seed": 0}
"""Options of a training run that differ from those of finetune."""
QUICK: dict[str, Any] = {"steps": 20, "seeds": 1, "most_rates": 1, "validation": 32, "test": 64, "pieces": 20}
"""What --quick sets where no option says otherwise."""
MAY_CHANGE = ("seeds", "device", "model", "data", "neutral")
"""Options that may differ where a comparison goes on; so may all methods but the first.

Files may lie elsewhere: digests tell whether they hold the same.
"""
RESTORE = {
    "model": "give the same --model",
    "neutral text": "take the same version of Python, which has most of the text, and the same files of --neutral",
}
"""How to get back what a digest is of."""
OF_SETTINGS = tuple(
    "model data split problems loss shots packing truncate metric neutral gradients density rank budget_rank include "
    "exclude extra refresh_interval refresh_drift steps epochs batch_size accumulation checkpointing max_length dtype "
    "autocast device".split()
)
"""Options of `Settings` that a comparison takes."""


@dataclass(frozen=True)
class Comparison:
    """Options of a comparison; ``python -m lift_kernels compare --help`` lists them too.

    Attributes:
        settings: those of every training run. Method, rate and seed are the run's own.
        methods: METHOD, or METHOD@RATE for a fixed rate; the first is the reference.
        rates: METHOD=RATE, the first rate of a search in place of the default.
        most_rates: the most rates that a search tries; 1 takes the first one without a search.
        seeds: seeds of each method in the final stage.
        validation: samples that choose the rates.
        test: samples that only final runs see.
        pieces: the most pieces of neutral text; None takes all.
        budget: seconds, after which no run begins; None for no limit.
        task: name of the data in the rows.
        output: directory of the comparison.

    Raises:
        UserError: for a value that is not allowed.
    """

    settings: Settings
    methods: tuple[str, ...] = METHODS
    rates: tuple[str, ...] = ()
    most_rates: int = 7
    seeds: int = 3
    validation: int = 64
    test: int = 200
    pieces: int | None = None
    budget: float | None = None
    task: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("most_rates", 1), ("validation", 2), ("test", 2), ("pieces", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        design_of(self)  # refuses methods and rates
        if not self.task:
            object.__setattr__(self, "task", _task(self.settings))
        if re.search(r"[\r\n]", self.task):
            raise UserError("task has a line break; give one line to --task")
        if not self.output:
            name = re.sub(r"[^\w.-]+", "-", self.task).strip("-.")
            object.__setattr__(self, "output", str(Path("runs") / f"compare-{name}"))


def _task(settings: Settings) -> str:
    """Return the name of the data, where the user gives none."""
    if settings.data:
        return "+".join(Path(name).stem for name in settings.data)
    return "word problems" if settings.problems == "plain" else f"{settings.problems} word problems"


def design_of(options: Comparison) -> Design:
    """Return what a comparison runs; raises UserError as `read_entries`."""
    entries = read_entries(options.methods, LEARNING_RATES, options.rates, options.most_rates > 1)
    return Design(entries, options.seeds, options.most_rates)


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m or 2h.

    Raises:
        UserError: for another text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget {text} is no duration; give a number with a unit, such as 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def from_command(given: dict[str, Any]) -> Comparison:
    """Return the options of a new comparison.

    Args:
        given: the options that the user gave, by their names in `Comparison` and `Settings`. The
            budget is a text. With "quick", those of QUICK replace defaults, and the directory is
            another one.

    Raises:
        UserError: for a value that is not allowed.
    """
    given = dict(given)
    quick = given.pop("quick", False)
    defaults = DEFAULTS | (QUICK if quick else {})
    if given.get("epochs") is not None:
        defaults.pop("steps")
    given = defaults | given
    if "budget" in given:
        given["budget"] = seconds_of(given["budget"])
    own = {f.name for f in fields(Comparison)}
    settings = Settings(**{name: value for name, value in given.items() if name not in own})
    mine: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in own}
    chosen = Comparison(settings=settings, **mine)
    return replace(chosen, output=f"{chosen.output}-quick") if quick and "output" not in mine else chosen


def saved_form(options: Comparison) -> dict[str, Any]:
    """Return options as they are read again."""
    settings = asdict(options.settings)
    form = {name: settings[name] for name in OF_SETTINGS}
    form |= {name: value for name, value in asdict(options).items() if name not in ("settings", "budget", "output")}
    return json.loads(json.dumps(form))


def read_saved(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the saved comparisons of a folder, by task; none where there is no file.

    Raises:
        FileError: for a file that holds something else.
    """
    path = folder / SETTINGS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; restore it or choose another --output") from error
    except ValueError as error:
        raise FileError(f"{path} is no JSON ({error}); restore it or choose another --output") from error
    if not isinstance(saved, dict) or not all(isinstance(form, dict) for form in saved.values()):
        raise FileError(f"{path} holds no settings of a comparison; restore it or choose another --output")
    return saved


def resumed(place: str, task: str | None, given: dict[str, Any]) -> Comparison:
    """Return the options of a comparison that goes on.

    Args:
        place: its directory, or the file of its rows.
        task: which of several tasks; None where there is one.
        given: further options that the user gave, which replace the saved ones.

    Raises:
        UserError: where there is no comparison, and for an option that may not change.
    """
    if "quick" in given:
        raise UserError("--resume goes on with the options of its comparison; leave out --quick")
    path = Path(place).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists() or (path.is_file() and path.name != ROWS):
        raise UserError(f"--resume {place} is neither the directory of a comparison nor its {ROWS}")
    saved = read_saved(folder)
    if not saved:
        raise UserError(f"{folder} has no {SETTINGS}, so there is no comparison to resume; start a new one")
    if task is None and len(saved) > 1:
        raise UserError(f"{folder} has the tasks {', '.join(saved)}; choose one with --task")
    name = next(iter(saved)) if task is None else task
    if name not in saved:
        raise UserError(f"{folder} has no task {name!r}, only {', '.join(saved)}; correct --task")
    form = {key: value for key, value in saved[name].items() if key != "digests"}
    try:
        from_command(_without_none(form))
    except TypeError as error:  # an unknown name, or a text in place of a number
        raise FileError(
            f"{folder / SETTINGS} has options of task {name!r} that are none ({error}); restore it or choose another "
            "--output"
        ) from error
    options = from_command(_without_none(form) | given | {"output": str(folder), "task": name})
    check_same(options, saved[name], folder)
    return options


def _without_none(form: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in form.items() if value is not None}


def check_same(options: Comparison, saved: dict[str, Any], folder: Path) -> None:
    """Refuse options that differ from those that the finished runs had.

    Raises:
        UserError: naming the first difference.
    """
    form = saved_form(options)
    for name, value in form.items():
        if name == "methods" and saved.get(name):  # It is the reference.
            same = value[0] == saved[name][0]
        else:
            same = name in MAY_CHANGE or saved.get(name) == value
        if not same:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} is {_text(value)}, and the comparison in {folder} has {_text(saved.get(name))}; go on with "
                f"--resume {folder} and without {option}, or choose another --output"
            )


def _text(value: Any) -> str:
    return "none" if value in (None, []) else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_digests(digests: dict[str, str], saved: dict[str, Any], folder: Path) -> None:
    """Refuse a model or data that differ from those of the finished runs.

    Raises:
        UserError: naming the first difference.
    """
    for name, value in saved.get("digests", {}).items():
        if digests.get(name) != value:
            restore = RESTORE.get(name, "restore the files of --data")
            raise UserError(
                f"the {name} of the comparison in {folder} was another one; {restore}, or choose another --output"
            )


def save(options: Comparison, digests: dict[str, str]) -> None:
    """Write the options beside those of other tasks of the directory."""
    folder = Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    saved = read_saved(folder) | {options.task: saved_form(options) | {"digests": digests}}
    write_atomic(folder / SETTINGS, json.dumps(saved, indent=2) + "\n")


def of_run(options: Comparison, method: str, rate: float, seed: int) -> Settings:
    """Return the settings of one training run."""
    extra = options.settings.extra if method in SPARSE else None  # others have no use for it
    return replace(options.settings, method=method, lr=rate, seed=seed, save_steps=0, extra=extra)
