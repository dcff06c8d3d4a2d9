"""Apply, revert and switch deltas bit-exactly, in a module or in a copy of a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from ..checkpoint.atomic_file import sync_folder
from ..checkpoint.safetensors_file import TensorFile
from ..errors import FileError
from ..validation import require
from .format import Delta, bits
from .model_weights import PICKLED, Model, ModuleWeights, fingerprint, open_weights, weight_files

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLED)
"""Files in other weight formats. Beside a patched checkpoint they would hold outdated weights."""

_Change: TypeAlias = tuple[Delta, bool]
"""A delta, and whether it is reverted."""


def apply_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn the base of a delta into the fine-tuned model, bit for bit.

    Everything is checked before anything is written.

    Args:
        model: the base. A module is changed in place. A model directory or a safetensors file is
            not changed.
        path: the delta file.
        output: the copy to write for a model directory or file; it must not exist.

    Raises:
        FileError: for a damaged delta, for a model that is not its base, and for an output that
            cannot be written.
        ValueError: for an output with a module.
    """
    with Delta(path) as delta:
        _require_model(
            model, delta.info.base, f"{path} was made for another base", "give the base that it was made from"
        )
        _write(model, [(delta, False)], output)


def revert_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn a fine-tuned model back into the base of its delta, bit for bit.

    Args:
        model: the fine-tuned model, as in `apply_delta`.
        path: the delta that was applied to it last.
        output: as in `apply_delta`.

    Raises:
        FileError: as in `apply_delta`.
        ValueError: as in `apply_delta`.
    """
    with Delta(path) as delta:
        _require_model(
            model,
            delta.info.result,
            f"{path} is not what was applied to this model last",
            "give the model with exactly this delta applied",
        )
        _write(model, [(delta, True)], output)


def switch_delta(
    model: nn.Module | str | Path, current: str | Path, wanted: str | Path, output: str | Path | None = None
) -> None:
    """Revert one delta and apply another one of the same base.

    Args:
        model: the fine-tuned model, as in `apply_delta`.
        current: the delta that was applied to it last.
        wanted: the delta to apply.
        output: as in `apply_delta`.

    Raises:
        FileError: as in `apply_delta`, and for deltas of different bases.
        ValueError: as in `apply_delta`.
    """
    with Delta(current) as old, Delta(wanted) as new:
        require(
            old.info.base == new.info.base,
            f"{current} and {wanted} were made for different bases; choose deltas of one base",
            FileError,
        )
        _require_model(
            model,
            old.info.result,
            f"{current} is not what was applied to this model last",
            "give the model with exactly this delta applied",
        )
        _write(model, [(old, True), (new, False)], output)


def _require_model(model: Model, expected: str, problem: str, remedy: str) -> None:
    """Raise FileError unless the model has the expected fingerprint."""
    found = fingerprint(model)
    require(
        found == expected, f"{problem} (fingerprint {expected[:12]}, this model has {found[:12]}); {remedy}", FileError
    )


def _write(model: nn.Module | str | Path, changes: list[_Change], output: str | Path | None) -> None:
    """Check all changes against the model, then make them one after the other."""
    with open_weights(model) as weights:
        for i, (delta, reverse) in enumerate(changes):
            # The values that a later delta replaces appear when the first is reverted. The
            # fingerprints guarantee them.
            delta.check(weights, reverse=reverse, values=i == 0)
    if isinstance(model, nn.Module):
        require(
            output is None, "output is for model directories and files, but a module is changed in place; leave it out"
        )
        _write_module(model, changes)
    else:
        require(output is not None, f"{model} is not changed in place; give an output", FileError)
        assert output is not None
        _write_copy(Path(model), changes, Path(output))


@torch.no_grad()
def _write_module(model: nn.Module, changes: list[_Change]) -> None:
    """Change the weights of a module in place."""
    tensors = ModuleWeights(model).tensors
    for delta, reverse in changes:
        for name in delta.info.shapes:
            indices, old, new = delta.read(name)
            tensor = tensors[name].detach()
            values = (old if reverse else new).to(tensor.device)
            flat = tensor.reshape(-1)  # a view, or a copy where the tensor is not contiguous
            flat[indices.long().to(tensor.device)] = values
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))


def _write_copy(source: Path, changes: list[_Change], output: Path) -> None:
    """Copy a checkpoint to a temporary directory beside ``output``, change it, and rename it."""
    require(not output.exists(), f"{output} already exists; choose another output or remove it", FileError)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise FileError(f"cannot write {output}: {error.strerror}; choose another place") from error
    try:
        copy = work / output.name
        files = [file.resolve() for file in weight_files(source)]
        if source.is_dir():
            shutil.copytree(
                source, copy, ignore=lambda folder, names: [n for n in names if _is_outdated(Path(folder) / n, files)]
            )
            patched = [copy / file.name for file in weight_files(source)]
        else:
            shutil.copyfile(source, copy)
            patched = [copy]
        for file in patched:
            _patch(file, changes)
        copy.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {output}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_outdated(path: Path, files: list[Path]) -> bool:
    """Return whether a file holds weights other than those in ``files``, which are patched."""
    return path.suffix in _WEIGHT_SUFFIXES and path.resolve() not in files


def _patch(path: Path, changes: list[_Change]) -> None:
    """Write the changed values into a safetensors file whose dtypes and shapes were checked."""
    with TensorFile(path) as file:
        places = {name: (file.place(name), entry) for name, entry in file.entries.items()}
    for delta, reverse in changes:
        for name in delta.info.shapes.keys() & places.keys():
            indices, old, new = delta.read(name)
            values = bits(old if reverse else new).numpy()
            start, entry = places[name]
            count = (entry.end - entry.start) // values.itemsize
            flat = np.memmap(path, dtype=values.dtype, mode="r+", offset=start, shape=(count,))
            flat[indices.numpy()] = values
            flat.flush()
            del flat
    with open(path, "rb+") as patched:
        os.fsync(patched.fileno())
