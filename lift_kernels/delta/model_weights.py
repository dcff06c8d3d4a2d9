"""Weights of a module, a state dict or a checkpoint, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..checkpoint.safetensors_file import TensorFile, tensor_bytes
from ..errors import FileError
from ..validation import require

Model: TypeAlias = "nn.Module | Mapping[str, Tensor] | str | Path | Weights"
"""A module, a state dict, a directory with safetensors or one such file."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "model.safetensors.index.json"


class Weights:
    """The tensors of a model, sorted by name.

    Tied tensors, which share their memory, are listed once, under their first name.

    Attributes:
        label: name of the model for messages.
        forms: dtype and shape by name.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, for reading only: it may share the model's memory.

        Raises:
            FileError: when the model has no tensor of this name.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the files, if there are any."""

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ModuleWeights(Weights):
    """Weights of a module or of a state dict in memory."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        super().__init__("the model")
        state = model.state_dict() if isinstance(model, nn.Module) else model
        seen: set[tuple] = set()
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue  # the result of a module's get_extra_state()
            place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            self.tensors[name] = tensor
        self.tensors = dict(sorted(self.tensors.items()))
        self.forms = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        require(name in self.tensors, f"{self.label} has no tensor {name}", FileError)
        return self.tensors[name].detach().cpu().contiguous()


class CheckpointWeights(Weights):
    """Weights in a safetensors file, or in the shards of a directory."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path))
        self.files = [TensorFile(file) for file in weight_files(Path(path))]
        self.owners = {name: file for file in self.files for name in file.entries}
        count = sum(len(file.entries) for file in self.files)
        require(count == len(self.owners), f"{path} holds a tensor in two of its files; save it again", FileError)
        self.owners = dict(sorted(self.owners.items()))
        self.forms = {name: (f.entries[name].dtype, f.entries[name].shape) for name, f in self.owners.items()}

    def read(self, name: str) -> Tensor:
        require(name in self.owners, f"{self.label} has no tensor {name}", FileError)
        return self.owners[name].read(name)

    def close(self) -> None:
        for file in self.files:
            file.close()


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Args:
        path: a directory, or one file, which is returned unread.

    Raises:
        FileError: for pickled weights, a damaged or unsafe index, and a directory in which it is
            not clear which files are the weights.
    """
    if not path.is_dir():
        require(
            path.suffix not in PICKLED,
            f"{path} holds pickled weights, which can run code when loaded; convert to safetensors",
            FileError,
        )
        return [path]
    if (path / INDEX).is_file():
        try:
            names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise FileError(f"{path / INDEX} is damaged; fetch or save the checkpoint again") from error
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
        require(
            bool(names) and plain,
            f"{path / INDEX} names files outside its directory; do not use this checkpoint",
            FileError,
        )
        return sorted(path / name for name in names)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    require(
        len(found) == 1,
        f"{path} holds {len(found) or 'no'} *.safetensors files and no model.safetensors; "
        "give a model directory in Hugging Face format, or one file",
        FileError,
    )
    return found


def open_weights(model: Model) -> Weights:
    """Return the weights of a model, which the caller closes; Weights are returned unchanged."""
    if isinstance(model, Weights):
        return model
    return CheckpointWeights(model) if isinstance(model, (str, Path)) else ModuleWeights(model)


class Fingerprint:
    """SHA-256 over name, dtype, shape and bytes of tensors, added in the order of their names.

    The same weights have the same fingerprint in memory and in files, however these are sharded.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Include a tensor."""
        self._digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        self._digest.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """Return the fingerprint as 64 hexadecimal digits."""
        return self._digest.hexdigest()


def fingerprint(model: Model) -> str:
    """Return the `Fingerprint` of a whole model as 64 hexadecimal digits."""
    digest = Fingerprint()
    with open_weights(model) as weights:
        for name in weights.forms:
            digest.add(name, weights.read(name))
    return digest.hexdigest()
