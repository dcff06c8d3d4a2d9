"""Files that appear under their name only when they are complete and on the disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

from ..errors import FileError


class AtomicFile:
    """Writes a binary file that appears under its name only when it is complete.

    As a context manager it yields the open file. When the body succeeds, the content is flushed to
    the disk and the file gets its name. Until then, and when the body fails, an older file of that
    name stays as it was.

    Raises:
        FileError: when the disk is full or the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self):
        try:
            number, self._temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror}; choose another place") from error
        self._file = os.fdopen(number, "w+b")
        return self._file

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(self._temporary, 0o666 & ~umask)  # mkstemp lets only the owner read the file
                os.replace(self._temporary, self.path)
                sync_folder(self.path.parent)
        except OSError as failure:
            error = failure
        finally:
            try:
                self._file.close()
            except OSError as failure:  # closing writes what a full disk left in the buffer
                error = error or failure
        if error is not None:
            Path(self._temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(
                f"cannot write {self.path}: {error.strerror}; free some space or choose another place; "
                "a file that was there is unchanged"
            ) from error


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a small file as `AtomicFile` does, with text as UTF-8."""
    with AtomicFile(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Flush a directory to the disk, so that a rename in it survives a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
