"""Sealed files of ours: safetensors, streamed, with a kind, a version and a checksum over every
byte.
"""

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
from .safetensors_file import DTYPE_NAMES, MAX_HEADER, TensorFile, tensor_bytes

VERSION = 1
_CHUNK = 4 << 20
_NO_CHECKSUM = "0" * 64


class ChecksummedFile(TensorFile):
    """A file of ours: of a kind (``"delta"``, ``"checkpoint"``) and version, with a checksum over
    header and data.

    The checksum is verified when the file is opened, so one altered bit anywhere is a FileError and
    nothing is used.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(path)
        try:
            found, version = self.metadata.get("format", ""), self.metadata.get("version", "")
            require(found == f"lift_kernels.{kind}", f"{path} is no {kind} file of lift_kernels", FileError)
            newer = f"{path} has version {version[:20]!r}, this package reads {VERSION}; update lift_kernels"
            require(version == str(VERSION), newer, FileError)
            self._verify()
        except BaseException:
            self.close()
            raise

    def json(self, key: str) -> Any:
        """The JSON value under a key of the metadata; FileError when it is missing or malformed."""
        self._require(key in self.metadata, f"lacks {key}")
        try:
            return json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path} holds a malformed {key}; it is damaged: make it again") from error

    def _verify(self) -> None:
        claimed = self.metadata.get("checksum", "")
        spelled = f'"checksum":"{claimed}"'.encode()
        self._require(len(claimed) == 64 and self._header.count(spelled) == 1, "has no checksum")
        blank = self._header.replace(spelled, f'"checksum":"{_NO_CHECKSUM}"'.encode())
        digest = hashlib.sha256()
        self._file.seek(self._data)
        while chunk := self._file.read(_CHUNK):
            digest.update(chunk)
        self._require(_seal(blank, digest) == claimed, "does not match its checksum")


def _seal(header: bytes, data: Any) -> str:
    return hashlib.sha256(header + data.digest()).hexdigest()


class ChecksummedWriter:
    """Writes a sealed file tensor by tensor; as a context manager it appears under its name only
    when it is complete.

    The header comes first in the file but is known last, so its room is reserved by ``reserve``
    (see `header_room`). When the body fails, or the disk is full (FileError), a file of that name
    that was there before is untouched.
    """

    def __init__(self, path: str | Path, kind: str, reserve: int) -> None:
        require(reserve <= MAX_HEADER, f"cannot write {path}: its header would need {reserve} bytes", FileError)
        self.metadata: dict[str, str] = {}
        self._kind, self._room, self._offset = kind, reserve, 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._digest = hashlib.sha256()
        self._atomic = AtomicFile(path)

    def __enter__(self) -> ChecksummedWriter:
        self._file = self._atomic.__enter__()
        try:
            self._file.seek(8 + self._room)
        except BaseException as error:
            self._atomic.__exit__(type(error), error, None)
            raise
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._digest.update(data)
        place = [self._offset, self._offset + data.nbytes]
        self._entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        self._offset = place[1]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as late:
                self._atomic.__exit__(type(late), late, None)
                raise
        self._atomic.__exit__(kind, error, trace)

    def _finish(self) -> None:
        fixed = {"checksum": _NO_CHECKSUM, "format": f"lift_kernels.{self._kind}", "version": str(VERSION)}
        header = json.dumps({"__metadata__": fixed | self.metadata, **self._entries}, separators=(",", ":"))
        encoded = header.encode().ljust(self._room)  # the format allows spaces behind the JSON
        assert len(encoded) == self._room, "header_room was called with too few names or metadata"
        seal = f'"checksum":"{_seal(encoded, self._digest)}"'.encode()
        self._file.seek(0)
        self._file.write(len(encoded).to_bytes(8, "little"))
        self._file.write(encoded.replace(f'"checksum":"{_NO_CHECKSUM}"'.encode(), seal, 1))


def header_room(names: Iterable[str], metadata: Iterable[str]) -> int:
    """Bytes that are enough for the header of a file with tensors of these names (5 dimensions at
    most) and these metadata.
    """
    tensors = sum(len(json.dumps(name)) + 5 * 20 + 2 * 20 + 60 for name in names)
    size = tensors + sum(len(json.dumps(value)) + 40 for value in metadata) + 300
    return -(-size // 64) * 64
