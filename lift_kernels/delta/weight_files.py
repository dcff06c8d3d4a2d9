"""Which files of a checkpoint hold its weights, and copies of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PurePosixPath

from ..errors import FileError
from ..validation import require

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLED)


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Args:
        path: a directory, or one file, which is returned unread.

    Raises:
        FileError: for pickled weights, a damaged or unsafe index, a shard that is missing, and a
            path that does not exist or a directory in which it is not clear which files are the
            weights.
    """
    if not path.is_dir():
        require(
            path.suffix not in PICKLED,
            f"{path} holds pickled weights, which can run code when loaded; load the model with "
            "transformers, if you trust it, and save it with save_pretrained",
            FileError,
        )
        require(
            os.path.lexists(path),
            f"cannot read {path}: no such file or directory; check the path, and download a model of the hub first",
            FileError,
        )
        return [path]
    if (path / "model.safetensors").is_file():  # transformers, too, looks for it before the index
        return [path / "model.safetensors"]
    if (path / INDEX).is_file():
        return _shards(path)
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        instead = f", but {others[0]}" if others else ""
        raise FileError(
            f"{path} holds no *.safetensors files{instead}; load the model with transformers and save it with "
            "save_pretrained, or give a directory that holds safetensors"
        )
    require(
        len(found) == 1,
        f"{path} holds {len(found)} *.safetensors files, no model.safetensors and no {INDEX}; give one of the files",
        FileError,
    )
    return found


def _shards(path: Path) -> list[Path]:
    """Return the files that the index of a directory names."""
    index = path / INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileError(f"{index} is damaged; fetch or save the checkpoint again") from error
    require(bool(names), f"{index} names no files; fetch or save the checkpoint again", FileError)
    for name in names:
        plain = (
            isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        )
        require(plain, f"{index} names files outside its directory; do not use this checkpoint", FileError)
    missing = sorted(name for name in names if not (path / name).exists())
    if missing:
        raise FileError(
            f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(names)} files); "
            "fetch the checkpoint again"
        )
    return sorted(path / name for name in names)


def copy_checkpoint(source: Path, target: Path) -> list[Path]:
    """Copy a checkpoint and return the copies of its weight files.

    Links are followed. Weights in other files are left out: beside changed ones they would be
    outdated. So are hidden directories, which hold the objects of Git or the state of a download.

    Args:
        source: a directory or a file.
        target: the directory or file to write; it must not exist.

    Raises:
        FileError: for a file of ``source`` that cannot be read.
        OSError: when ``target`` cannot be written.
    """
    files = weight_files(source)
    if source.is_dir():
        _copy_folder(source, target, files)
        return [target / file.relative_to(source) for file in files]
    _copy_file(source, target)
    return [target]


def _copy_folder(source: Path, target: Path, files: list[Path]) -> None:
    target.mkdir()
    real = source.resolve()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            circle = path.resolve() == real or path.resolve() in real.parents
            require(not circle, f"{path} is a link to a directory that holds it; remove the link", FileError)
            if not path.name.startswith("."):
                _copy_folder(path, target / path.name, files)
        elif path in files or not _holds_or_lists_others(path, files):
            _copy_file(path, target / path.name)


def _holds_or_lists_others(path: Path, files: list[Path]) -> bool:
    """Return whether a file holds, or is the index of, weights other than those in ``files``."""
    used = path.name == INDEX and path.parent / "model.safetensors" not in files
    return path.suffix in _WEIGHT_SUFFIXES or (path.name.endswith(".index.json") and not used)


def _copy_file(source: Path, target: Path) -> None:
    """Copy the content, and not the mode: the copy can be written even if the source cannot."""
    try:
        with open(source, "rb"):
            pass
    except OSError as error:
        raise FileError(f"cannot read {source}: {error.strerror}; fetch it again or remove it") from error
    shutil.copyfile(source, target)
