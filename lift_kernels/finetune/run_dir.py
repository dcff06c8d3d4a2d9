"""Files in the directory of a run, from which an interrupted run resumes bit-exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.atomic_file import write_atomic
from ..checkpoint.training_state import load_checkpoint
from ..delta.model_weights import fingerprint
from ..errors import FileError, UserError
from ..nn.linear import PackedLinear
from .config import Settings
from .model_io import save_model
from .prompts import Example

CHECKPOINT, SETTINGS, BEFORE, REPORT = "checkpoint.safetensors", "settings.json", "before.json", "report.json"
ANSWERS, PLOT = "answers.jsonl", "loss.png"


def make_folder(settings: Settings) -> Path:
    """Create the directory of a run.

    Raises:
        UserError: when the directory already holds files or cannot be written.
    """
    name = settings.name or f"{settings.method}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(settings.output).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}; choose another --output") from error
    if any(folder.iterdir()):
        raise UserError(f"{folder} already holds files; choose another --name or remove it")
    return folder


def open_folder(settings: Settings, resumed: bool, restarted: bool) -> tuple[Path, bool]:
    """Return the directory of a run, with its settings, and whether the run was interrupted before.

    Args:
        settings: options of the run.
        resumed: whether the user continues the run in the directory.
        restarted: whether a launcher has started a command again, which continues its own run.

    Raises:
        UserError: when the directory already holds files or cannot be written.
    """
    folder = Path(settings.output).expanduser() / str(settings.name) if resumed else None
    if restarted and folder is None:
        if settings.name:
            clean(Path(settings.output).expanduser() / settings.name)  # It may have died before it had settings.
        folder = _interrupted_run(settings)
    if folder is not None:
        clean(folder)
        return folder, True
    folder = make_folder(settings)
    write_atomic(folder / SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
    return folder, False


def _interrupted_run(settings: Settings) -> Path | None:
    """Return the newest directory of a run with just these settings that is not finished."""
    output = Path(settings.output).expanduser()
    folders = [output / settings.name] if settings.name else output.glob("*/")
    files = [folder / SETTINGS for folder in folders if not (folder / REPORT).exists()]
    same = [path for path in files if path.exists() and _read_settings(path) == saved_form(settings)]
    return max(same, key=lambda path: path.stat().st_mtime).parent if same else None


def saved_form(settings: Settings) -> Any:
    """Return settings as they are read again."""
    return json.loads(json.dumps(asdict(settings)))


def trained_weights(model) -> dict[str, torch.Tensor]:
    """Return the tensors that training changes, by name.

    These are the trainable parameters. For a packed layer it is the weight in place of its values.
    """
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    found = {}
    for name, p in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if own == "weight" if owner in packed and own in ("weight", "values") else p.requires_grad:
            found[name] = p.detach()
    return found


def identity(model, sequences: Sequence[Example]) -> dict[str, str]:
    """Return fingerprints of the frozen weights and the training data.

    A checkpoint holds neither, and a resumed run reads both again.
    """
    trained = trained_weights(model)
    frozen = fingerprint({name: p for name, p in model.state_dict().items() if name not in trained})
    return {"frozen weights": frozen, "training data": hashlib.sha256(json.dumps(sequences).encode()).hexdigest()}


def find_checkpoint(folder: Path, expected: dict[str, str], ranks: int = 1) -> dict[str, Any] | None:
    """Load the checkpoint of an interrupted run.

    Args:
        folder: directory of the run.
        expected: the `identity` of the resumed run.
        ranks: number of ranks of the resumed run.

    Returns:
        The checkpoint, or None when the run was interrupted before the first one.

    Raises:
        UserError: when the checkpoint is damaged, or was made with other weights or data or on
            another number of ranks.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = load_checkpoint(path)
    except FileError as error:
        raise UserError(f"{error}; or remove the file to start the training again") from error
    for what, value in expected.items():
        if checkpoint["identity"].get(what) != value:
            raise UserError(f"the {what} are not those of the interrupted run; restore them or start a new run")
    if len(checkpoint["random"]) != ranks:
        before = len(checkpoint["random"])
        raise UserError(f"the interrupted run had {before} ranks, and this one has {ranks}; resume it on {before}")
    return checkpoint


def settings_of(folder: str | Path) -> Settings:
    """Read the settings of an interrupted run.

    Args:
        folder: directory of the run.

    Returns:
        The settings with name and output of the directory, which may have been moved.

    Raises:
        UserError: for a directory without a run, and for a finished run.
    """
    path = Path(folder).expanduser()
    saved = _read_settings(path / SETTINGS)
    if saved is None:
        raise UserError(f"{path} holds no readable {SETTINGS}, so there is no run to resume; start a new one")
    if (path / REPORT).exists():
        raise UserError(f"the run in {path} is finished; start a new one with another --name")
    if not isinstance(saved, dict) or saved.keys() != {field.name for field in fields(Settings)}:
        raise UserError(f"{path / SETTINGS} was written by another version of lift_kernels; start a new run")
    return Settings(**saved | {"name": path.resolve().name, "output": str(path.resolve().parent)})


def _read_settings(path: Path) -> Any:
    """Return the content of a file of settings, or None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def save_once(model, tokenizer, folder: Path) -> None:
    """Write ``folder/model``, complete or not at all.

    A model that a killed run left there is replaced.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    target = folder / "model"
    work = Path(tempfile.mkdtemp(prefix=".model.", dir=folder))
    try:
        save_model(model, tokenizer, work / "model")
        if target.exists():
            shutil.rmtree(target)
        (work / "model").rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {target}: {error}; free some space, then run finetune --resume {folder}"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove the temporary files of a killed run, which were not complete."""
    for name in (CHECKPOINT, SETTINGS, BEFORE, REPORT, ANSWERS, PLOT, "model"):
        for path in folder.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def finish(folder: Path) -> None:
    """Remove the files that only an interrupted run needs, once the model is saved."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    (folder / BEFORE).unlink(missing_ok=True)
