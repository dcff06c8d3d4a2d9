"""Checkpoints of training: any nest of tensors and plain values in one sealed file, and the state
of all random generators.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from .checksummed_file import ChecksummedFile, ChecksummedWriter, header_room

KIND = "checkpoint"


def save_checkpoint(path: str | Path, state: Any) -> None:
    """Write ``state``, a nest of dicts, lists and tuples of tensors, numbers, strings, dtypes and
    None, to one file.

    What ``torch.save`` does for a training loop, but without pickle, with a checksum, and
    atomically: until the new file is complete and on the disk, an old one of that name stays.
    Raises TypeError for a value of another type, and FileError where the disk refuses.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "state", tensors))
    with ChecksummedWriter(path, KIND, header_room(tensors, [tree])) as out:
        out.metadata["tree"] = tree
        for name, tensor in tensors.items():
            out.add(name, tensor)


def load_checkpoint(path: str | Path) -> Any:
    """What `save_checkpoint` wrote, to the bit, tensors on the CPU. Raises FileError for a damaged
    file or one of another kind.
    """
    with ChecksummedFile(path, KIND) as file:
        try:
            return _decode(file.json("tree"), file)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{path} holds a malformed tree; it is damaged: go back to an older checkpoint") from error


def rng_state() -> dict[str, Any]:
    """The state of the random generators of Python, NumPy and torch on every device, for
    `save_checkpoint`.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = np.random.get_state()
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, gauss = state
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss))
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers that would have followed `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nest; its tensors go to ``tensors``. Containers and what JSON lacks become
    {"kind": content}.
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, dict):
        return {"dict": [[_key(k, place), _encode(v, f"{place}.{k}", tensors)] for k, v in value.items()]}
    if type(value) in (list, tuple):
        content = [_encode(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
        return content if type(value) is list else {"tuple": content}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved; turn it into tensors and plain values")


def _key(key: Any, place: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{place}: keys must be strings or integers, got {key!r}")
    return key


def _decode(value: Any, file: ChecksummedFile) -> Any:
    if isinstance(value, list):
        return [_decode(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    content: Any
    kind, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind == "tensor" and isinstance(content, str):
        return file.read(content)
    if kind == "dict":
        return {_key(k, "a key"): _decode(v, file) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(v, file) for v in content)
    dtype = getattr(torch, str(content), None) if kind == "dtype" else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"unknown form {value!r}")
    return dtype
