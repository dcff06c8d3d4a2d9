"""Rows of a run's data, from files, folders and the Hugging Face hub.

JSON and CSV are read by Python's own modules, which keep every text as it is written and know the
line of an error. (pandas, which datasets reads CSV with, takes the answer NA for a missing one and
7.50 for 7.5.) Parquet needs pyarrow. Folders and hub ids need datasets, which knows their splits.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

TRAIN = "train"  # the split of data that has only one
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Row:
    """A row of data.

    Attributes:
        values: what the row holds, by column; something else than a dict where it has no columns.
        where: file and line, or dataset and row.
    """

    values: Any
    where: str


def read_rows(names: Sequence[str], split: str, columns: Collection[str]) -> list[Row]:
    """Read all rows of a run.

    Args:
        names: files, folders and hub ids. ``owner/name:configuration`` names one of the
            configurations of a dataset on the hub.
        split: the split that is read of folders and hub ids.
        columns: the columns that may be needed. Others are left out where they cost memory.

    Raises:
        UserError: for what cannot be read, with the number of the first bad line.
    """
    rows = []
    divided = False
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found, has_splits = _read_folder(path, split, columns)
        elif path.exists() or _format(path) in SUFFIXES:
            found, has_splits = read_file(path, columns), False
        elif match := HUB_ID.fullmatch(name):
            found, has_splits = _read_hub(match["id"], match["config"], split, columns), True
        else:
            raise UserError(f"cannot read {name}: there is no such file, and it is no hub id; check --data")
        if not found:
            raise UserError(f"{name} holds no rows; check --data")
        divided |= has_splits
        rows += found
    if split != TRAIN and not divided:
        raise UserError(f"split is {split!r}, and {', '.join(names)} has no splits; leave out --split")
    return rows


def read_file(path: Path, columns: Collection[str] = ()) -> list[Row]:
    """Read the rows of one file; see `read_rows`."""
    kind = _format(path)
    if kind not in SUFFIXES:
        raise UserError(f"cannot tell the format of {path}; give it a name that ends in {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        return _read_parquet(path, columns)
    text = _text(path)
    if kind == ".csv":
        return list(_csv_rows(path, text, columns))
    return _json_array(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text)


def refuse_first(bad: Sequence[tuple[str, str]]) -> None:
    """Raise a UserError for the first of some bad rows, if there is one.

    Args:
        bad: where each bad row is, and what is wrong with it.
    """
    if bad:
        where, reason = bad[0]
        more = sum(other == reason for _, other in bad) - 1
        raise UserError(f"{where}: {reason}" + (f" (as in {more} more)" if more else ""))


def _format(path: Path) -> str:
    """Return the last suffix of a name in lower case, without that of gzip."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _text(path: Path) -> str:
    """Return the text of a UTF-8 file, which may be compressed and begin with a mark."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: damaged gzip file ({error}); compress it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --data") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _json_lines(path: Path, text: str) -> list[Row]:
    rows, bad = [], []
    # Strings may hold U+2028 and others at which `str.splitlines` would split.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                rows.append(Row(json.loads(line), where))
            except (ValueError, RecursionError) as error:
                bad.append((where, f"not valid JSON ({_reason(error)}); write one object a line, or one array"))
    refuse_first(bad)
    return rows


def _json_array(path: Path, text: str) -> list[Row]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON ({_reason(error)}); correct the array") from error
    return [Row(item, f"{path}, row {number}") for number, item in enumerate(items, 1)]


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _csv_rows(path: Path, text: str, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a CSV file whose first line that is not blank names the columns."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    bad = []
    with _long_fields():
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{where}: not valid CSV ({error}); put a field with quotes in quotes, and double those inside"
                ) from error
            if fields is None:
                break
            if header is None:
                header = [name.strip() for name in fields] or None
                _refuse_repeated(header or (), columns, where)
            elif len(fields) == len(header):
                yield Row(dict(zip(header, fields)), where)
            elif fields:  # a blank line has none
                counts = f"{len(fields)} fields, where the first line has {len(header)}"
                bad.append((where, f"{counts}; put a field with commas in quotes"))
    refuse_first(bad)


def _refuse_repeated(names: Sequence[str], columns: Collection[str], where: str) -> None:
    """Raise a UserError for a needed column that is there twice."""
    for name in names:
        if name in columns and names.count(name) > 1:
            raise UserError(f"{where}: {names.count(name)} columns are called {name}; rename or remove all but one")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Read CSV fields of any length; by default 128 KiB is the limit."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, columns: Collection[str]) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow; run `pip install pyarrow`") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_repeated(names, columns, str(path))
            return _table_rows(file.read(_needed(names, columns)), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as Parquet: {_one_line(error)}; check --data") from error


def _needed(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """Return the columns to read: all of them where none is known, for the message about it."""
    return [name for name in names if name in columns] or list(names)


def _table_rows(table: Any, name: str) -> list[Row]:
    """Return the rows of a pyarrow table."""
    import pyarrow

    for i, column in enumerate(table.columns):
        if pyarrow.types.is_floating(column.type):  # a float32 of 7.1 is to stay 7.1 in double precision
            exact = column.cast(pyarrow.string()).cast(pyarrow.float64())
            table = table.set_column(i, table.column_names[i], exact)
    return [Row(values, f"{name}, row {number}") for number, values in enumerate(table.to_pylist(), 1)]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading {name} needs the package datasets; run `pip install datasets`") from error
    return datasets


def _read_folder(path: Path, split: str, columns: Collection[str]) -> tuple[list[Row], bool]:
    """Return the rows of a folder, and whether it has several splits.

    The names of files tell their split, by the rules of datasets.
    """
    datasets = _datasets(f"the folder {path}")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # by save_to_disk
        saved = datasets.load_from_disk(str(path))
        several = isinstance(saved, dict)
        return _dataset_rows(_chosen(saved, split, path) if several else saved, str(path), columns), several
    try:
        builder = datasets.load_dataset_builder(str(path))
    except Exception as error:  # datasets raises errors of many types
        raise UserError(f"cannot read the folder {path}: {_one_line(error)}; name its files in --data") from error
    splits = {str(key): [Path(file) for file in files] for key, files in builder.config.data_files.items()}
    used = {file.resolve() for files in splits.values() for file in files}
    for file in sorted(path.rglob("*")):
        if _format(file) in SUFFIXES and file.resolve() not in used and not _hidden(file.relative_to(path)):
            raise UserError(
                f"{path} has files of several formats, and {file.name} would be left out; name the files in --data"
            )
    rows = [row for file in _chosen(splits, split, path) for row in read_file(file, columns)]
    return rows, splits.keys() != {TRAIN}


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _chosen(splits: Any, split: str, name: str | Path) -> Any:
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; give --split one of {', '.join(map(str, splits))}")
    return splits[split]


def _read_hub(name: str, config: str | None, split: str, columns: Collection[str]) -> list[Row]:
    datasets = _datasets(f"{name} from the hub")
    try:
        found = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"there is no file {name}, and no dataset of that name on the hub that you may read; check --data"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"there is no file {name} here, and the hub does not answer; check --data and the network"
        ) from error
    except Exception as error:  # datasets raises errors of many types
        reason = _one_line(error)
        remedy = "check --data"
        if "config name is missing" in reason.lower():
            remedy = f"append one to --data, such as {name}:CONFIGURATION"
        elif "unknown split" in reason.lower():
            remedy = "give another --split"
        raise UserError(f"cannot read {name} from the hub: {reason}; {remedy}") from error
    return _dataset_rows(found, name, columns)


def _dataset_rows(dataset: Any, name: str, columns: Collection[str]) -> list[Row]:
    """Return the rows of a `datasets.Dataset`."""
    needed = dataset.select_columns(_needed(dataset.column_names, columns))
    return _table_rows(needed.with_format("arrow")[:], name)


def _one_line(error: Exception) -> str:
    """Return the beginning of an error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" Example of usage")[0][:300].rstrip(".;")
