"""Weights of a module, a state dict or a checkpoint, read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoint.safetensors_file import Dtype, TensorFile, tensor_bytes
from ..errors import FileError
from ..validation import require
from .weight_files import PICKLED, weight_files

__all__ = [
    "PICKLED",
    "CheckpointWeights",
    "Fingerprint",
    "Form",
    "Model",
    "ModuleWeights",
    "Weights",
    "fingerprint",
    "open_weights",
]

Model: TypeAlias = "nn.Module | Mapping[str, Tensor] | str | Path | Weights"
"""A module, a state dict, a directory with safetensors or one such file."""
Form: TypeAlias = tuple[Dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class Weights:
    """The tensors of a model, sorted by name.

    Tied tensors, which share their memory, are listed once, under their first name.

    Attributes:
        label: name of the model for messages.
        forms: dtype and shape by name.
        ties: for each further name of a tied tensor, the name under which it is listed.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.forms: dict[str, Form] = {}
        self.ties: dict[str, str] = {}

    def list_as(self, names: Collection[str]) -> None:
        """List each tied tensor under its first name that is in ``names``, if one is."""

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

    def __init__(self, model: nn.Module | Mapping[str, Tensor], label: str = "the model") -> None:
        super().__init__(label)
        state = model.state_dict() if isinstance(model, nn.Module) else model
        groups: dict[tuple, tuple[list[str], Tensor]] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue  # the result of a module's get_extra_state()
            plain = tensor.layout == torch.strided and not (tensor.is_meta or is_traceable_wrapper_subclass(tensor))
            kind = "meta tensor" if tensor.is_meta else f"{type(tensor).__name__} of layout {tensor.layout}"
            unusable = f"{name} of {label} is a {kind}, and a delta needs its plain values"
            require(plain, f"{unusable}; load the model without sharding, quantization or the meta device", FileError)
            place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            # Empty tensors have no memory of their own.
            groups.setdefault(place if tensor.numel() else (name,), ([], tensor))[0].append(name)
        self._groups = list(groups.values())
        self.list_as(())

    def list_as(self, names: Collection[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.ties = {}
        for group, tensor in self._groups:
            listed = next((name for name in group if name in names), group[0])
            self.tensors[listed] = tensor
            self.ties |= {name: listed for name in group if name != listed}
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
        self.owners: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                other = self.owners.setdefault(name, file)
                twice = f"{name} is in {other.path} and in {file.path}; save the checkpoint again"
                require(other is file, twice, FileError)
        self.owners = dict(sorted(self.owners.items()))
        self.forms = {name: (f.entries[name].dtype, f.entries[name].shape) for name, f in self.owners.items()}

    def read(self, name: str) -> Tensor:
        require(name in self.owners, f"{self.label} has no tensor {name}", FileError)
        return self.owners[name].read(name)

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_weights(model: Model, label: str = "the model") -> Weights:
    """Return the weights of a model, which the caller closes; Weights are returned unchanged.

    Args:
        model: the model.
        label: what messages call a model in memory.

    Raises TypeError for anything else.
    """
    if isinstance(model, Weights):
        return model
    require(
        isinstance(model, (str, Path, nn.Module, Mapping)),
        f"{label} must be a module, a state dict, a model directory or a safetensors file, got {type(model).__name__}",
        TypeError,
    )
    return CheckpointWeights(model) if isinstance(model, (str, Path)) else ModuleWeights(model, label)


class Fingerprint:
    """SHA-256 over name, dtype, shape and bytes of tensors, added in the order of their names.

    The same weights have the same fingerprint in memory and in files, however these are sharded.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, form: Form, tensor: Tensor) -> None:
        """Include a tensor of a dtype and shape."""
        self._digest.update(f"{name}\0{form[0]}\0{form[1]}\0".encode())
        self._digest.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """Return the fingerprint as 64 hexadecimal digits."""
        return self._digest.hexdigest()


def fingerprint(model: Model) -> str:
    """Return the `Fingerprint` of a whole model as 64 hexadecimal digits."""
    digest = Fingerprint()
    with open_weights(model) as weights:
        for name, form in weights.forms.items():
            digest.add(name, form, weights.read(name))
    return digest.hexdigest()
