"""Safetensors files, read one tensor at a time with checked bounds and written atomically."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from ..errors import FileError
from ..validation import require
from .atomic_file import AtomicFile

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SMALL = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an entry, where these are no whole bytes."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OTHER_FILES = {
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; run `git lfs pull` in its directory",
    b"GGUF": "is a GGUF file; load it with transformers, or give it to the command line as --base",
    b"PK\x03\x04": "holds pickled weights, which can run code when loaded; load the model with transformers, if you "
    "trust it, and save it with save_pretrained",
}
"""What files of other kinds begin with, and what to do about them."""

Dtype: TypeAlias = "torch.dtype | str"
"""A dtype, or the safetensors name of one that torch lacks."""


@dataclass(frozen=True)
class Entry:
    """Dtype, shape and place of a tensor in a file.

    Attributes:
        dtype: dtype of the tensor; where torch lacks it, its name in the file.
        shape: shape of the tensor. torch counts two entries of F4 as one.
        start: its first byte, counted from the end of the header.
        end: the byte behind its last one.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file whose tensors are read one at a time.

    Sizes are checked before memory is allocated. The header must be smaller than the file, and the
    tensors must fill the rest of it exactly.

    Args:
        path: the file.

    Attributes:
        entries: dtype, shape and place by tensor name.
        metadata: the strings that the file carries.

    Raises:
        FileError: for a file that cannot be read, is truncated or malformed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            lost = self.path.is_symlink() and not self.path.exists()
            remedy = "it is a link to a missing file: fetch it again" if lost else "check the path"
            raise FileError(f"cannot read {path}: {error.strerror}; {remedy}") from error
        try:
            self._header, self._data = self._read_header()
            self.entries, self.metadata = self._parse()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Return a tensor in new memory on the CPU.

        A tensor of a dtype that torch lacks is returned as its bytes.

        Raises:
            FileError: when the file lacks the tensor or has become shorter.
        """
        self._require(name in self.entries, f"holds no tensor {name}")
        entry = self.entries[name]
        buffer = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        try:
            self._file.seek(self._data + entry.start)
            got = self._file.readinto(buffer.numpy().data)
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror}") from error
        self._require(got == buffer.numel(), f"was cut off inside {name} while it was read")
        return buffer if isinstance(entry.dtype, str) else buffer.view(entry.dtype).reshape(entry.shape)

    def place(self, name: str) -> int:
        """Return the position of a tensor's first byte in the file."""
        return self._data + self.entries[name].start

    def _require(self, condition: bool, problem: str) -> None:
        require(
            condition, f"{self.path} {problem}; it is damaged or of another kind: fetch or make it again", FileError
        )

    def _read_header(self) -> tuple[bytes, int]:
        """Return the header and the position behind it."""
        try:
            size = os.fstat(self._file.fileno()).st_size
            start = self._file.read(24)
            for beginning, remedy in _OTHER_FILES.items():
                require(not start.startswith(beginning), f"{self.path} {remedy}", FileError)
            length = int.from_bytes(start[:8], "little")
            self._require(size >= 8, f"has {size} bytes and is not a safetensors file")
            self._require(
                0 < length <= min(size - 8, MAX_HEADER), f"claims a header of {length} bytes in a file of {size}"
            )
            self._file.seek(8)
            header = self._file.read(length)
        except OSError as error:  # for example, the path is a directory
            raise FileError(f"cannot read {self.path}: {error.strerror}; give a safetensors file") from error
        self._require(len(header) == length, "is cut off inside its header")
        self._size = size
        return header, 8 + length

    def _parse(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return entries and metadata of the header."""
        try:
            parsed = json.loads(self._header.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise FileError(
                f"{self.path} has a header that is not valid JSON; "
                "it is damaged or of another kind: fetch or make it again"
            ) from error
        self._require(isinstance(parsed, dict), "has a header that is not a JSON object")
        metadata = parsed.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        self._require(
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
            "has metadata that are not strings",
        )
        entries = {name: self._entry(name, value) for name, value in parsed.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            self._require(entry.start == end, f"has a gap or an overlap before the tensor {name[:80]!r}")
            end = entry.end
        self._require(self._data + end == self._size, f"should have {self._data + end} bytes and has {self._size}")
        return entries, metadata

    def _entry(self, name: str, value: Any) -> Entry:
        """Return the entry that the header describes."""
        shown = name[:80]
        self._require(
            isinstance(value, dict) and value.keys() >= {"dtype", "shape", "data_offsets"},
            f"describes the tensor {shown!r} wrongly",
        )
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        self._require(isinstance(dtype, str) and dtype != "", f"has the tensor {shown!r} of a malformed dtype")
        for numbers in (shape, offsets):
            good = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            self._require(good and len(numbers) < 64, f"has the tensor {shown!r} of a malformed shape or place")
        self._require(len(offsets) == 2 and offsets[0] <= offsets[1], f"has the tensor {shown!r} of a malformed place")
        if dtype in _DTYPES or dtype in _SMALL:
            bits = math.prod(shape) * (_SMALL.get(dtype) or 8 * _DTYPES[dtype].itemsize)
            self._require(
                8 * (offsets[1] - offsets[0]) == bits,
                f"has {offsets[1] - offsets[0]} bytes for the tensor {shown!r} of {-(-bits // 8)}",
            )
        if dtype == "F4" and shape[-1] % 2:
            return Entry(dtype, tuple(shape), *offsets)  # torch counts pairs, and no row of pairs ends here
        if dtype == "F4":
            shape = [*shape[:-1], shape[-1] // 2]
        return Entry(_DTYPES.get(dtype, dtype), tuple(shape), *offsets)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key occurs twice")
    return out


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write an ordinary safetensors file without a checksum, as `AtomicFile` does.

    Args:
        path: the file.
        tensors: tensors by name, in the order of the file.

    Raises:
        FileError: when the disk is full or the file cannot be written.
        TypeError: for a dtype that safetensors lacks.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = described(name, tensor, offset)
        offset = entries[name]["data_offsets"][1]
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with AtomicFile(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))


def described(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    """Return what the header says about a tensor whose first byte is at ``start``.

    Raises:
        TypeError: for a dtype that safetensors lacks.
    """
    can_be_stored = tensor.dtype in _NAMES
    require(can_be_stored, f"{name}: safetensors has no dtype {tensor.dtype}; convert the tensor", TypeError)
    shape = list(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        shape[-1:] = [2 * n for n in shape[-1:]]
    end = start + tensor.numel() * tensor.element_size()
    return {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}


def has_name(dtype: Dtype) -> bool:
    """Return whether torch and safetensors both have a dtype."""
    return dtype in _NAMES


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
