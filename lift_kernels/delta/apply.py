"""Delta files: what fine-tuning changed, as a small file that is applied to the base and taken off
again, to the bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..checkpoint.atomic_file import sync_folder
from ..checkpoint.safetensors_file import TensorFile
from ..errors import FileError
from ..validation import require
from .format import Delta, bits
from .model_weights import PICKLED, Model, ModuleWeights, fingerprint, open_weights, weight_files

_STALE = (".safetensors", ".gguf", *PICKLED)
"""Other forms of the weights: beside a patched checkpoint they would hold the old ones."""


def apply_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn the base of a delta into the fine-tuned model, exactly.

    A module is changed in place. For a model directory, or one safetensors file, ``output`` names
    the copy to write. Everything is checked before anything is written; raises FileError for a
    damaged delta and for a model that is not its base.
    """
    with Delta(path) as delta:
        _require_model(
            model, delta.info.base, f"{path} was made for another base", "give the base that it was made from"
        )
        _write(model, [(delta, False)], output)


def revert_delta(model: nn.Module | str | Path, path: str | Path, output: str | Path | None = None) -> None:
    """Turn the fine-tuned model back into the base, exactly; as `apply_delta`."""
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
    """Take off the delta ``current`` and apply ``wanted``, of the same base; as `apply_delta`."""
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
    found = fingerprint(model)
    require(
        found == expected, f"{problem} (fingerprint {expected[:12]}, this model has {found[:12]}); {remedy}", FileError
    )


def _write(model: nn.Module | str | Path, moves: list[tuple[Delta, bool]], output: str | Path | None) -> None:
    """Check each delta against the model, then put in its new values, or with True its old ones,
    one delta after the other.
    """
    with open_weights(model) as weights:
        for i, (delta, reverse) in enumerate(moves):
            # What a later delta replaces is there only once the first is off; the fingerprints
            # vouch for it.
            delta.check(weights, reverse=reverse, values=i == 0)
    if isinstance(model, nn.Module):
        require(output is None, "output is for model directories and files; a module is changed in place")
        _write_module(model, moves)
    else:
        require(output is not None, f"{model} is not changed in place; name an output", FileError)
        assert output is not None
        _write_copy(Path(model), moves, Path(output))


@torch.no_grad()
def _write_module(model: nn.Module, moves: list[tuple[Delta, bool]]) -> None:
    tensors = ModuleWeights(model).tensors
    for delta, reverse in moves:
        for name in delta.info.shapes:
            indices, old, new = delta.read(name)
            tensor = tensors[name].detach()
            values = (old if reverse else new).to(tensor.device)
            flat = tensor.reshape(-1)  # a view, or a copy where the tensor is not contiguous
            flat[indices.long().to(tensor.device)] = values
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))


def _write_copy(source: Path, moves: list[tuple[Delta, bool]], output: Path) -> None:
    """Copy a checkpoint beside ``output``, patch the copy, then give it its name."""
    require(not output.exists(), f"{output} exists already; choose another output or remove it", FileError)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise FileError(f"cannot write {output}: {error.strerror}; choose another place") from error
    try:
        copy = work / output.name
        files = [file.resolve() for file in weight_files(source)]
        if source.is_dir():
            shutil.copytree(
                source, copy, ignore=lambda folder, names: [n for n in names if _stale(Path(folder) / n, files)]
            )
            patched = [copy / file.name for file in weight_files(source)]
        else:
            shutil.copyfile(source, copy)
            patched = [copy]
        for file in patched:
            _patch(file, moves)
        copy.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {output}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _stale(path: Path, files: list[Path]) -> bool:
    return path.suffix in _STALE and path.resolve() not in files


def _patch(path: Path, moves: list[tuple[Delta, bool]]) -> None:
    """Write the values of each delta into a safetensors file of the right form."""
    with TensorFile(path) as file:
        places = {name: (file.place(name), entry) for name, entry in file.entries.items()}
    for delta, reverse in moves:
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
