"""Content of a delta file and its checks.

For each tensor that changed, the file holds the sorted indices of the changed entries and their old
and new values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.checksummed_file import ChecksummedFile
from ..checkpoint.safetensors_file import Dtype
from ..errors import FileError
from ..validation import MAX_ENTRIES, check_index_list, require
from .model_weights import Form, Weights

Homes: TypeAlias = Mapping[str, Sequence[str]]
"""For each tensor of a delta, the names under which a model has it."""


def delta_info(path: str | Path) -> DeltaInfo:
    """Return what a delta file says about itself.

    Raises:
        FileError: for a file that cannot be read, is damaged or is no delta.
    """
    with Delta(path) as delta:
        return delta.info


KIND = "delta"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by element size in bytes.

Values are compared and written as integers, so that -0.0 and NaN count like any other bits.
"""


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta file says about itself.

    Attributes:
        base: fingerprint of the model without the delta.
        result: fingerprint of the model with the delta.
        shapes: shape of each tensor that changed, by name.
        dtypes: dtype of each tensor that changed, by name.
        counts: number of changed entries of each tensor, by name.
        settings: settings of the method, as `save_delta` received them.
        file_bytes: size of the file in bytes.
        unchanged: dtype and shape of each tensor that did not change, by name; None for a file of
            version 0.1, which does not say.
    """

    base: str
    result: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    counts: dict[str, int]
    settings: dict[str, Any]
    file_bytes: int
    unchanged: dict[str, Form] | None = None

    @property
    def entries(self) -> int:
        """Number of changed entries in all tensors."""
        return sum(self.counts.values())

    @property
    def forms(self) -> dict[str, Form]:
        """Dtype and shape of each tensor that the file names, sorted by name."""
        changed: dict[str, Form] = {name: (self.dtypes[name], shape) for name, shape in self.shapes.items()}
        return dict(sorted((changed | (self.unchanged or {})).items()))


class Delta:
    """An open delta file, read one tensor at a time.

    Args:
        path: the file.

    Attributes:
        info: what the file says about itself.

    Raises:
        FileError: for a file that is not exactly what `save_delta` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = ChecksummedFile(path, KIND)
        try:
            self.info = self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the changed entries of a tensor.

        Returns:
            Flat indices (int32, sorted, within the tensor), old values and new values (both in the
            tensor's dtype); each of length ``info.counts[name]``.

        Raises:
            FileError: for a damaged index list.
        """
        indices, old, new = (self._file.read(part) for part in parts(name))
        try:
            check_index_list(indices, math.prod(self.info.shapes[name]), name)
        except (ValueError, IndexError) as error:
            raise FileError(f"{self.path}: {error}; the file is damaged: make it again") from error
        return indices, old, new

    def changes_alike(self, one: str, other: str) -> bool:
        """Return whether two tensors of one form undergo the same change, or none."""
        if one not in self.info.shapes or other not in self.info.shapes:
            return one not in self.info.shapes and other not in self.info.shapes
        return all(torch.equal(bits(a), bits(b)) for a, b in zip(self.read(one), self.read(other)))

    def first_difference(self, weights: Weights, homes: Homes, reverse: bool) -> str | None:
        """Return the first changed tensor of which a model holds other values at changed entries.

        All index lists up to that tensor are checked.

        Args:
            weights: weights of the model.
            homes: where the model has each tensor.
            reverse: expect the new values, as before a revert, and not the old ones.

        Raises:
            FileError: for a damaged index list.
        """
        for name in self.info.shapes:
            indices, old, new = self.read(name)
            present = bits(weights.read(homes[name][0]))[indices.long()]
            if not torch.equal(present, bits(new if reverse else old)):
                return name
        return None

    def _check(self) -> DeltaInfo:
        """Check the header against the tensors of the file."""
        file = self._file
        hashes, shapes, settings = file.json("hashes"), file.json("shapes"), file.json("settings")
        self._require(isinstance(shapes, dict) and isinstance(settings, dict) and isinstance(hashes, dict))
        self._require(all(isinstance(hashes.get(key), str) for key in ("base", "result")))
        self._require(sorted(part for name in shapes for part in parts(name)) == sorted(file.entries))
        dtypes: dict[str, torch.dtype] = {}
        counts: dict[str, int] = {}
        for name, shape in shapes.items():
            good = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
            self._require(good and len(shape) < 64 and math.prod(shape) <= MAX_ENTRIES)
            index, old, new = (file.entries[part] for part in parts(name))
            self._require(index.dtype == torch.int32 and isinstance(old.dtype, torch.dtype) and old.dtype == new.dtype)
            assert isinstance(old.dtype, torch.dtype)
            self._require(len(index.shape) == 1 and index.shape == old.shape == new.shape and 0 < index.shape[0])
            dtypes[name], counts[name] = old.dtype, index.shape[0]
        size = self.path.stat().st_size
        tuples = {name: tuple(shape) for name, shape in shapes.items()}
        return DeltaInfo(hashes["base"], hashes["result"], tuples, dtypes, counts, settings, size, self._unchanged())

    def _unchanged(self) -> dict[str, Form] | None:
        """Return the forms of the tensors that did not change, if the file has them."""
        if "unchanged" not in self._file.metadata:
            return None
        described = self._file.json("unchanged")
        self._require(isinstance(described, dict))
        for form in described.values():
            self._require(isinstance(form, list) and [type(part) for part in form] == [str, list])
            self._require(all(type(n) is int for n in form[1]))
        return {name: (_dtype(text), tuple(shape)) for name, (text, shape) in described.items()}

    def _require(self, condition: bool) -> None:
        require(condition, f"{self.path} is inconsistent; it is damaged: make it again", FileError)


def _dtype(text: str) -> Dtype:
    """Return the dtype that `str` turned into a text."""
    found = getattr(torch, text.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else text


def parts(name: str) -> tuple[str, str, str]:
    """Return the names of a tensor's indices, old values and new values in a file."""
    return f"{name}:indices", f"{name}:old", f"{name}:new"


def bits(tensor: Tensor) -> Tensor:
    """Return a flat view of a contiguous tensor as integers of the same size."""
    return tensor.detach().reshape(-1).view(INTEGERS.get(tensor.element_size(), torch.uint8))
