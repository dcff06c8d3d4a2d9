"""What a run leaves in its directory while it goes on, and how an interrupted one goes on from
there with the same bits.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from ..files import FileError, write_atomic
from ..linear import PackedLinear
from ..weights import fingerprint
from .encoding import Example
from .modelio import save_model
from .settings import Settings, UserError

CHECKPOINT, SETTINGS, BEFORE, REPORT = "checkpoint.safetensors", "settings.json", "before.json", "report.json"


class EpochStart(TrainerCallback):
    """Keeps the random state from which an epoch drew its order, or puts the one of the interrupted
    epoch back.
    """

    def __init__(self) -> None:
        self.random: dict[str, Any] | None = None
        self.interrupted: dict[str, Any] | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.interrupted is not None:
            set_rng_state(self.interrupted)
            self.interrupted = None
        self.random = rng_state()


class Resumable(Trainer):
    """A Trainer whose checkpoint is one file of ours, and resuming from it changes no bit.

    Trainer's own checkpoints are several files, some of them pickles, that a crash can leave
    half-written.
    """

    model: Any  # Trainer declares these as optional; they are there once training or loading begins
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity: dict[str, str] = {}
        self.checkpoint: dict[str, Any] = {}
        self.epoch_start = EpochStart()
        self.add_callback(self.epoch_start)

    def progress(self) -> dict[str, Any]:
        """Records of the run so far, plain values; kept in checkpoints."""
        return {}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Take up what `progress` gave."""

    def train_from(self, checkpoint: dict[str, Any] | None) -> None:
        """Train to the end, from the start or from a loaded checkpoint."""
        if checkpoint is None:
            self.train()
            return
        self.checkpoint = checkpoint
        self.restore_progress(checkpoint["progress"])
        if checkpoint["step"] >= self.args.max_steps:
            self._load_from_checkpoint("")
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            return
        self.epoch_start.interrupted = checkpoint["epoch_random"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(checkpoint["trainer_state"])
            self.train(resume_from_checkpoint=folder)

    # ---- Trainer's own names ---------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TRAINER_STATE_NAME
            self.state.save_to_json(str(path))
            trainer_state = path.read_text()
        state = {
            "identity": self.identity,
            "step": self.state.global_step,
            "model": trained_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "trainer_state": trainer_state,
            "random": rng_state(),
            "epoch_random": self.epoch_start.random,
            "progress": self.progress(),
        }
        try:
            save_checkpoint(Path(str(self.args.output_dir)) / CHECKPOINT, state)
        except FileError as error:
            raise UserError(str(error)) from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        saved = self.checkpoint["model"]
        trained = trained_weights(self.model)
        fitting = trained.keys() == saved.keys() and all(p.shape == saved[name].shape for name, p in trained.items())
        if not fitting:
            raise UserError(f"{CHECKPOINT} is of another model; start a new run")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self.checkpoint["optimizer"])
            self.lr_scheduler.load_state_dict(self.checkpoint["scheduler"])

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            set_rng_state(self.checkpoint["random"])


def trained_weights(model) -> dict[str, torch.Tensor]:
    """What training changes, by name: trainable parameters, and of packed layers the weight in
    place of its values.
    """
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    found = {}
    for name, p in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if own == "weight" if owner in packed and own in ("weight", "values") else p.requires_grad:
            found[name] = p.detach()
    return found


def identity(model, sequences: Sequence[Example]) -> dict[str, str]:
    """Fingerprints of what a checkpoint does not hold and a resumed run reads again: frozen weights
    and training data.
    """
    trained = trained_weights(model)
    frozen = fingerprint({name: p for name, p in model.state_dict().items() if name not in trained})
    return {"frozen weights": frozen, "training data": hashlib.sha256(json.dumps(sequences).encode()).hexdigest()}


def find_checkpoint(folder: Path, expected: dict[str, str]) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run, None before the first. Raises UserError when it is
    damaged or does not fit.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = load_checkpoint(path)
    except FileError as error:
        raise UserError(f"{error}; or remove the file, and the run starts its training anew") from error
    for what, value in expected.items():
        if checkpoint["identity"].get(what) != value:
            raise UserError(f"the {what} are not those of the interrupted run; put them back, or start a new run")
    return checkpoint


def begin(folder: Path, settings: Settings) -> None:
    """Note the settings of a run in its directory."""
    write_atomic(folder / SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")


def settings_of(folder: str | Path) -> Settings:
    """The settings of an interrupted run. Raises UserError for a directory that is none or holds a
    finished run.
    """
    path = Path(folder).expanduser()
    try:
        saved = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no readable {SETTINGS}, so there is no run to resume; start a new one"
        ) from error
    if (path / REPORT).exists():
        raise UserError(f"the run in {path} is finished; start a new one with another --name")
    if not isinstance(saved, dict) or saved.keys() != {field.name for field in fields(Settings)}:
        raise UserError(f"{path / SETTINGS} is of another version of lift_kernels; start a new run")
    return Settings(**saved | {"name": path.resolve().name, "output": str(path.resolve().parent)})


def save_once(model, tokenizer, folder: Path) -> None:
    """Write ``folder/model`` whole or not at all; one that a killed run left there is replaced."""
    target = folder / "model"
    work = Path(tempfile.mkdtemp(prefix=".model.", dir=folder))
    try:
        save_model(model, tokenizer, work / "model")
        if target.exists():
            shutil.rmtree(target)
        (work / "model").rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; free some space, then --resume {folder}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written: files that have not got their name yet."""
    for name in (CHECKPOINT, SETTINGS, BEFORE, REPORT, "model"):
        for path in folder.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def finish(folder: Path) -> None:
    """Remove the checkpoint of a finished run: the model is saved."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    (folder / BEFORE).unlink(missing_ok=True)
