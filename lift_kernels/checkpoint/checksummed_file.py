"""Checksummed safetensors files with a kind and a version, written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..errors import FileError
from ..validation import require
from .atomic_file import AtomicFile
from .safetensors_file import MAX_HEADER, TensorFile, described, tensor_bytes

VERSION = 1
_CHUNK = 4 << 20
_NO_CHECKSUM = "0" * 64


class ChecksummedFile(TensorFile):
    """Reads a safetensors file whose kind, version and checksum are verified on opening.

    The checksum covers header and data, so that one altered bit anywhere is a FileError.

    Args:
        path: the file.
        kind: expected kind, "delta" or "checkpoint".

    Raises:
        FileError: for a file that cannot be read, is damaged, or has another kind or version.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(path)
        try:
            found, version = self.metadata.get("format", ""), self.metadata.get("version", "")
            writer = {"delta": "save_delta or `python -m lift_kernels delta make`", "checkpoint": "save_checkpoint"}
            other = f"{path} is not a {kind} file of lift_kernels; give one that {writer[kind]} wrote"
            require(found == f"lift_kernels.{kind}", other, FileError)
            newer = f"{path} has version {version[:20]!r}, but this package reads {VERSION}; update lift_kernels"
            require(version == str(VERSION), newer, FileError)
            self._verify()
        except BaseException:
            self.close()
            raise

    def json(self, key: str) -> Any:
        """Return the JSON value of a metadata key.

        Raises:
            FileError: when the key is missing or its value malformed.
        """
        self._require(key in self.metadata, f"lacks {key}")
        try:
            return json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path} holds a malformed {key}; it is damaged: make it again") from error

    def _verify(self) -> None:
        """Raise FileError unless header and data match the checksum."""
        claimed = self.metadata.get("checksum", "")
        spelled = f'"checksum":"{claimed}"'.encode()
        self._require(len(claimed) == 64 and self._header.count(spelled) == 1, "has no checksum")
        blank = self._header.replace(spelled, f'"checksum":"{_NO_CHECKSUM}"'.encode())
        digest = hashlib.sha256()
        self._file.seek(self._data)
        while chunk := self._file.read(_CHUNK):
            digest.update(chunk)
        self._require(_checksum(blank, digest) == claimed, "does not match its checksum")


def _checksum(header: bytes, data: Any) -> str:
    """Return the checksum of a header with a blank checksum and of the digest of the data."""
    return hashlib.sha256(header + data.digest()).hexdigest()


class ChecksummedWriter:
    """Writes a checksummed file tensor by tensor, as a context manager.

    The file appears under its name when the body has succeeded. When the body fails, an older file
    of that name stays as it was.

    Args:
        path: the file.
        kind: kind of the file, "delta" or "checkpoint".
        header_size: bytes to reserve for the header, from `header_space`. The header comes first in
            the file, but its content is known last.

    Attributes:
        metadata: strings for the header; they may be set until the body ends.

    Raises:
        FileError: when the disk is full, the file cannot be written or the header is too large.
    """

    def __init__(self, path: str | Path, kind: str, header_size: int) -> None:
        require(header_size <= MAX_HEADER, f"cannot write {path}: its header would need {header_size} bytes", FileError)
        self.metadata: dict[str, str] = {}
        self._kind, self._header_size, self._offset = kind, header_size, 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._digest = hashlib.sha256()
        self._atomic = AtomicFile(path)

    def __enter__(self) -> ChecksummedWriter:
        self._file = self._atomic.__enter__()
        try:
            self._file.seek(8 + self._header_size)
        except BaseException as error:
            self._atomic.__exit__(type(error), error, None)
            raise
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor under a name.

        Raises:
            TypeError: for a dtype that safetensors lacks.
        """
        entry = described(name, tensor, self._offset)
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._digest.update(data)
        self._entries[name] = entry
        self._offset = entry["data_offsets"][1]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                self._atomic.__exit__(type(failure), failure, None)
                raise
        self._atomic.__exit__(kind, error, trace)

    def _finish(self) -> None:
        """Write the header into its space."""
        fixed = {"checksum": _NO_CHECKSUM, "format": f"lift_kernels.{self._kind}", "version": str(VERSION)}
        header = json.dumps({"__metadata__": fixed | self.metadata, **self._entries}, separators=(",", ":"))
        encoded = header.encode().ljust(self._header_size)  # the format allows spaces behind the JSON
        assert len(encoded) == self._header_size, "header_space was called with too few names or metadata"
        checksum = f'"checksum":"{_checksum(encoded, self._digest)}"'.encode()
        self._file.seek(0)
        self._file.write(len(encoded).to_bytes(8, "little"))
        self._file.write(encoded.replace(f'"checksum":"{_NO_CHECKSUM}"'.encode(), checksum, 1))


def header_space(names: Iterable[str], metadata: Iterable[str]) -> int:
    """Return how many bytes are enough for the header of a checksummed file.

    Args:
        names: names of all tensors, each of at most 5 dimensions.
        metadata: values of the metadata, or strings that are at least as long.
    """
    tensors = sum(len(json.dumps(name)) + 5 * 20 + 2 * 20 + 60 for name in names)
    size = tensors + sum(len(json.dumps(value)) + 40 for value in metadata) + 300
    return -(-size // 64) * 64
