"""Training checkpoints in one checksummed file, and the state of all random generators."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from .checksummed_file import ChecksummedFile, ChecksummedWriter, header_space

KIND = "checkpoint"


def save_checkpoint(path: str | Path, state: Any) -> None:
    """Write training state to one file.

    This replaces ``torch.save`` in a training loop. The file has a checksum and no pickle. It is
    written atomically: until it is complete and on the disk, an older file of that name stays.

    Args:
        path: the file.
        state: nested dicts, lists and tuples of tensors, numbers, strings, dtypes and None.

    Raises:
        TypeError: for a value of another type.
        FileError: when the disk is full or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "state", tensors))
    with ChecksummedWriter(path, KIND, header_space(tensors, [tree])) as out:
        out.metadata["tree"] = tree
        for name, tensor in tensors.items():
            out.add(name, tensor)


def load_checkpoint(path: str | Path) -> Any:
    """Return what `save_checkpoint` wrote, bit for bit, with tensors on the CPU.

    Raises:
        FileError: for a file that cannot be read, is damaged or is no checkpoint.
    """
    with ChecksummedFile(path, KIND) as file:
        try:
            return _decode(file.json("tree"), file)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{path} holds a malformed tree; it is damaged: go back to an older checkpoint") from error


def rng_state() -> dict[str, Any]:
    """Return the state of the random generators of Python, NumPy and torch on all devices.

    `save_checkpoint` can write it, and `set_rng_state` restores it.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = np.random.get_state()
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, gauss = state
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss))
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore a state that `rng_state` returned.

    The next random numbers are those that followed it.
    """
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested containers into JSON, and collect their tensors.

    A dict, a tuple, a dtype and a tensor become {"kind": content}.

    Args:
        value: the value to encode.
        place: path of the value in the whole state, which names its tensor.
        tensors: receives the tensors by their place.
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
    """Return what `_encode` turned into JSON, with tensors read from the file."""
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
