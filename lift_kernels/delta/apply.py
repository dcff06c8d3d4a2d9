"""Apply, revert and switch deltas bit-exactly, in a module or in a copy of a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.atomic_file import sync_folder
from ..checkpoint.safetensors_file import TensorFile
from ..errors import FileError
from ..validation import require
from .differences import IN_FILES, Side, require_same_forms, require_same_names
from .format import Delta, Homes, bits
from .matching import find_homes
from .model_weights import Fingerprint, ModuleWeights, Weights, open_weights
from .weight_files import copy_checkpoint


class _Change(NamedTuple):
    """A delta, whether it is reverted, and where the model has its tensors."""

    delta: Delta
    reverse: bool
    homes: Homes


def apply_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn the base of a delta into the fine-tuned model, bit for bit.

    Everything is checked before anything is written.

    Args:
        model: the base. A module is changed in place. A model directory or a safetensors file is
            not changed.
        path: the delta file.
        output: the copy to write for a model directory or file; it must not exist.

    Raises:
        FileError: for a damaged delta, for a model that is not its base (the message says whether
            names, shapes, dtypes or contents differ), and for an output that cannot be written.
        ValueError: for an output with a module.
        TypeError: for a model of another type, such as a state dict.
    """
    _check_target(model, output)
    with Delta(path) as delta, open_weights(model) as weights:
        change = _Change(delta, False, find_homes(delta, weights, reverse=False))
        _check_contents(change, weights)
        _write(model, weights, [change], output)


def revert_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn a fine-tuned model back into the base of its delta, bit for bit.

    Args:
        model: the fine-tuned model, as in `apply_delta`.
        path: the delta that was applied to it last.
        output: as in `apply_delta`.

    Raises:
        FileError: as in `apply_delta`.
        ValueError, TypeError: as in `apply_delta`.
    """
    _check_target(model, output)
    with Delta(path) as delta, open_weights(model) as weights:
        change = _Change(delta, True, find_homes(delta, weights, reverse=True))
        _check_contents(change, weights)
        _write(model, weights, [change], output)


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
        ValueError, TypeError: as in `apply_delta`.
    """
    _check_target(model, output)
    with Delta(current) as old, Delta(wanted) as new, open_weights(model) as weights:
        _check_same_base(old, new)
        changes = [
            _Change(old, True, find_homes(old, weights, True)),
            _Change(new, False, find_homes(new, weights, True)),
        ]
        _check_contents(changes[0], weights)
        for name in new.info.shapes:
            new.read(name)  # checks the index list; the fingerprints guarantee the values
        _write(model, weights, changes, output)


def _check_target(model: nn.Module | str | Path, output: str | Path | None) -> None:
    """Raise unless a model is changed in place or copied to an output that does not exist."""
    if isinstance(model, nn.Module):
        require(
            output is None, "output is for model directories and files, but a module is changed in place; leave it out"
        )
        return
    require(
        isinstance(model, (str, Path)),
        f"a delta changes a module, a model directory or a safetensors file, not a {type(model).__name__}; "
        "load a state dict into its module first",
        TypeError,
    )
    require(output is not None, f"{model} is not changed in place; give an output", FileError)
    assert output is not None
    require_new(output)


def require_new(output: str | Path) -> None:
    """Raise FileError when a path exists already."""
    require(not os.path.lexists(output), f"{output} already exists; choose another output or remove it", FileError)


def _check_same_base(old: Delta, new: Delta) -> None:
    """Raise FileError unless two deltas were made for one base."""
    if old.info.base == new.info.base:
        return
    one, other = (Side(f"the model of {delta.path}", delta.info.forms) for delta in (old, new))
    remedies = dict.fromkeys(IN_FILES, "choose deltas of one base")
    if old.info.unchanged is not None and new.info.unchanged is not None:
        missing, extra = one.forms.keys() - other.forms.keys(), other.forms.keys() - one.forms.keys()
        require_same_names(one.label, other.label, missing, extra, remedies)
    require_same_forms(one, other, remedies)
    raise FileError(
        f"{old.path} and {new.path} were made for different bases of the same names and dtypes; "
        "choose deltas of one base"
    )


def _check_contents(change: _Change, weights: Weights) -> None:
    """Raise FileError unless a model, whose names and forms fit, is the one to change."""
    delta, reverse, homes = change
    info = delta.info
    expected, opposite = (info.result, info.base) if reverse else (info.base, info.result)
    digest = Fingerprint()
    for name, (home, *_) in homes.items():
        digest.add(name, weights.forms[home], weights.read(home))
    found = digest.hexdigest()
    if found == opposite != expected:
        raise FileError(
            f"{delta.path} is not applied to {weights.label}, which is its base; there is nothing to revert"
            if reverse
            else f"{delta.path} is already applied to {weights.label}; use the model as it is, or revert it first"
        )
    differs = delta.first_difference(weights, homes, reverse)
    if found == expected and differs is None:
        return
    where = f"{differs} holds other values" if differs else "a tensor that the delta does not change holds other values"
    if info.unchanged is None and not differs:
        where += ", or has another name"
    problem = "is not what was applied to this model last" if reverse else "was made for another base"
    remedy = "give the model with exactly this delta applied" if reverse else "give the base that it was made from"
    raise FileError(
        f"{delta.path} {problem}: names, shapes and dtypes fit, but {where} in {weights.label} "
        f"(fingerprint {expected[:12]}, this model has {found[:12]}); {remedy}"
    )


def _write(model: nn.Module | str | Path, weights: Weights, changes: list[_Change], output: str | Path | None) -> None:
    """Make changes that were checked, one after the other."""
    if isinstance(weights, ModuleWeights):
        _write_module(weights.tensors, changes)
    else:
        assert isinstance(model, (str, Path)) and output is not None
        _write_copy(Path(model), changes, Path(output))


@torch.no_grad()
def _write_module(tensors: Mapping[str, Tensor], changes: list[_Change]) -> None:
    """Change the weights of a module in place."""
    for delta, reverse, homes in changes:
        for name in delta.info.shapes:
            indices, old, new = delta.read(name)
            values = bits(old if reverse else new)
            for home in homes[name]:
                tensor = tensors[home].detach()
                flat = tensor.reshape(-1)  # a view, or a copy where the tensor is not contiguous
                bits(flat)[indices.long().to(tensor.device)] = values.to(tensor.device)
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))


def _write_copy(source: Path, changes: list[_Change], output: Path) -> None:
    """Copy a checkpoint to a temporary directory beside ``output``, change it, and rename it."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise FileError(f"cannot write {output}: {error.strerror}; choose another place") from error
    try:
        copy = work / output.name
        for file in copy_checkpoint(source, copy):
            _patch(file, changes)
        copy.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {output}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _patch(path: Path, changes: list[_Change]) -> None:
    """Write the changed values into a safetensors file whose dtypes and shapes were checked."""
    with TensorFile(path) as file:
        places = {name: (file.place(name), entry) for name, entry in file.entries.items()}
    for delta, reverse, homes in changes:
        for name in delta.info.shapes:
            for home in [home for home in homes[name] if home in places]:
                indices, old, new = delta.read(name)
                values = bits(old if reverse else new).numpy()
                start, entry = places[home]
                count = (entry.end - entry.start) // values.itemsize
                flat = np.memmap(path, dtype=values.dtype, mode="r+", offset=start, shape=(count,))
                flat[indices.numpy()] = values
                flat.flush()
                del flat
    with open(path, "rb+") as patched:
        os.fsync(patched.fileno())
