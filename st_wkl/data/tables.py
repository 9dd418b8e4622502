"""Anything that holds rows, as Arrow tables of bounded size: files, folders of files, data frames, datasets."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_wkl.data._rows import file_kind, numbered_lines, rows
from st_wkl.data.collection_files import fetched

_BYTES = 32 << 20  # of a batch, about
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_RUNS = (".trec", ".run")
# What others keep scores and corpora in; a pickle may run any code.
_UNREAD = tuple(".pkl .pickle .pt .npz .npy .zip .tar .tgz .7z .zst .bz2 .xz .xlsx .xls".split())  # noqa: SIM905
_REMEDY = f"unpack it, or write its rows as one of {', '.join(_TABLES)}, such as query_id, document_id, score."
# Where a row of a batch stands, for messages.
Where = Callable[[int], str]


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, which can be read again and again.

    Args:
        name: Of the file, or what the table was called.
        source: A file, or a frame.
    """

    name: str
    source: Any

    def batches(self) -> Iterator[tuple[pa.Table, Where]]:
        """Yield the rows in parts of some 32 MB, each with what says where one of its rows stands."""
        if not isinstance(self.source, Path):
            first = 0
            for part in _frame_parts(self.source):
                yield part, _counted(f"{self.name}, row", first)
                first += len(part)
        elif file_kind(self.source) == ".parquet":
            yield from _parquet_parts(self.source)
        else:
            yield from _row_parts(self.source)

    def first(self) -> pa.Table:
        """Return the first rows, none of an empty table."""
        return next((part for part, _ in self.batches()), pa.table({}))


def tables(source: Any, revision: str | None = None, name: str = "the rows") -> list[Table]:
    """Return what a source holds.

    Args:
        source: A file (JSON lines, CSV, TSV, plain or gzipped; JSON, Parquet; a run of TREC by the name `.trec` or
            `.run`), a folder of these, a dataset of the Hub, a data frame of pandas or polars, a table of pyarrow, a
            `datasets.Dataset` or `IterableDataset`, or several of these by name.
        revision: Branch, tag or commit of a dataset of the Hub.
        name: What a frame is called in messages.

    Raises:
        FileNotFoundError: There is no such file, folder or dataset, or a folder holds no file that is read.
        TypeError: It is none of these.
    """
    if isinstance(source, str | os.PathLike):
        path = fetched(source, revision)
        if path.is_file() and file_kind(path) in _UNREAD:
            raise ValueError(f"{path} cannot be read: {_REMEDY}")
        if path.is_file():
            return [Table(str(path), path)]
        there = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
        found = [file for file in there if _is_read(file.relative_to(path))]
        if lost := [file.name for file in there if file not in found and file_kind(file) in _UNREAD]:
            warnings.warn(f"In {path}, {', '.join(lost[:5])} cannot be read: {_REMEDY}", stacklevel=4)
        if not found:
            what = "holds no file that is read" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}. Give {', '.join(_TABLES)} (text also as .gz), {', '.join(_RUNS)}.")
        return [Table(str(file), file) for file in found]
    if isinstance(source, Mapping):
        return [Table(str(key), one) for key, part in source.items() for one in _frames(part, str(key))]
    return [Table(name, frame) for frame in _frames(source, name)]


def _is_read(file: Path) -> bool:
    return file_kind(file) in _TABLES + _RUNS and not any(part.startswith(".") for part in file.parts)


def _frames(frame: Any, name: str) -> list[Any]:
    if isinstance(frame, str | os.PathLike):
        return [table.source for table in tables(frame)]
    if not hasattr(frame, "__arrow_c_stream__") and not hasattr(frame, "with_format"):
        raise TypeError(
            f"{name}: {type(frame).__name__} is nothing whose rows can be read. Give a file, a folder, a data frame, a "
            "table of pyarrow or a dataset."
        )
    return [frame]


def _counted(what: str, first: int) -> Where:
    return lambda row: f"{what} {first + row + 1}"


def _at_once(sample: pa.Table) -> int:
    return min(max(_BYTES * max(len(sample), 1) // max(sample.nbytes, 1), 16), 100_000)


def _frame_parts(frame: Any) -> Iterator[pa.Table]:
    if hasattr(frame, "with_format"):  # a dataset, whose rows may come from anywhere
        arrow = frame.with_format("arrow")
        sample = next(iter(arrow.iter(64)), None)
        if sample is not None:
            yield from arrow.iter(_at_once(sample))
        return
    table = pa.table(frame)
    step = _at_once(table)
    for start in range(0, len(table), step):
        yield table.slice(start, step)


def _parquet_parts(path: Path) -> Iterator[tuple[pa.Table, Where]]:
    first = 0
    try:
        # Not all of the file in memory, as it would be with pre_buffer, until it is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            sample = next(file.iter_batches(64), None)
            for batch in file.iter_batches(_at_once(pa.table(sample))) if sample is not None else ():
                yield pa.table(batch), _counted(f"{path}, row", first)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read beyond row {first} ({error}). Fetch it again.") from error


def _row_parts(path: Path) -> Iterator[tuple[pa.Table, Where]]:
    found, size = (_run_rows(path) if file_kind(path) in _RUNS else rows(path)), 64
    unit = "row" if file_kind(path) == ".json" else "line"
    for first in found:
        numbers, entries = zip(*chain([first], islice(found, size - 1)), strict=True)
        names = dict.fromkeys(name for entry in entries for name in entry)

        def where(row: int, numbers: tuple[int, ...] = numbers) -> str:
            return f"{path}, {unit} {numbers[row]}"

        part = pa.table({name: _column([entry.get(name) for entry in entries], name, where) for name in names})
        yield part, where
        size = _at_once(part)


def _run_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        cells = line.split()
        if len(cells) != 6:
            raise ValueError(
                f"{path}, line {number}: expected 6 columns (query Q0 document rank score tag), got {len(cells)}: "
                f"{line[:80]!r}."
            )
        yield number, {"query_id": cells[0], "document_id": cells[2], "score": cells[4]}


def _column(values: list[Any], name: str, where: Where) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of several types, as ids of JSON may be
        kinds = Counter(isinstance(value, dict | list) for value in values if value is not None)
        if kinds[True]:  # the rarer kind is the mistake
            odd = kinds[True] <= kinds[False]
            row, value = next(
                (row, value)
                for row, value in enumerate(values)
                if value is not None and isinstance(value, dict | list) == odd
            )
            raise ValueError(
                f"{where(row)}: the field {name!r} holds {str(value)[:60]!r}, and other rows hold another type."
            ) from None
        return pa.array([None if value is None else as_text(pa.array([value]))[0].as_py() for value in values])


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return values of any type as text: whole numbers without a point, dates as ISO has them, text as it stands.

    Raises:
        ValueError: They are lists or structures.

    Example:
        >>> as_text(pa.array([7.0, None, 2.5])).to_pylist()
        ['7', None, '2.5']
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.cast(kind.value_type))
    if pa.types.is_floating(kind):
        # pandas makes floats of whole numbers as soon as one is missing.
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
        plain = pc.if_else(whole, column, 0.0).cast(pa.int64()).cast(pa.large_string())
        return pc.if_else(pc.fill_null(whole, False), plain, column.cast(pa.large_string()))
    if pa.types.is_nested(kind):
        raise ValueError(f"expected text or a number, got {kind}")
    return column.cast(pa.large_string())


def plain_name(name: str) -> str:
    """Return the name of a column in small letters, without what stands between its words.

    Example:
        >>> plain_name("Query-ID")
        'queryid'
    """
    return re.sub(r"[^0-9a-z]", "", name.lower())


def seen(first: Mapping[str, pa.Table]) -> str:
    """Return tables with their columns, for messages."""
    shown = [f"{name} ({', '.join(part.column_names) or 'empty'})" for name, part in list(first.items())[:5]]
    return "; ".join(shown) + (f" and {len(first) - 5:,} more" if len(first) > 5 else "")
