"""Files as rows, to the letter: nothing in them is taken for a number, a date or a missing value by its looks."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_wkl.progress import progress

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
_MARKS |= {codecs.BOM_UTF16_BE: "utf-16"}
# What is read as a text a line.
LINES = (".txt", ".log")
_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 131,072 characters


def file_kind(path: Path) -> str:
    """Return the ending that says how a file is written, in small letters and without `.gz`: `.jsonl`, `.tsv`, ..."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(number, row)` of a table: JSON lines, a JSON list, CSV or TSV with a header, or Parquet.

    Numbers are those of lines, and those of rows where there are no lines. Cells of CSV and TSV are text as it stands;
    an empty one is empty text.

    Raises:
        ValueError: A row cannot be read, with its place, or the file is of another kind.
    """
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    kind = file_kind(path)
    if kind in (".csv", ".tsv"):
        yield from _table_rows(path, "," if kind == ".csv" else "\t")
    elif kind in readers:
        yield from readers[kind](path)
    else:
        raise ValueError(
            f"{path} is of a kind that is not read here. Write it as {', '.join(readers)}, .csv or .tsv (text files "
            "may be gzipped)."
        )


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, line)` of a plain or gzipped text file without its blank lines.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: The file is cut off, damaged or in another encoding; the message says which and what to do.
    """
    number = 0
    with _explained(path, lambda: number), _opened(path) as lines:
        for number, line in enumerate(progress(lines, desc=path.name, unit=" lines", delay=2, leave=False), 1):
            if "\0" in line:
                raise ValueError(
                    f"{path}, line {number}: there is a NUL character. If the file is UTF-16 without a byte order "
                    "mark, save it as UTF-8; otherwise it is damaged: fetch it again."
                )
            if line.strip():
                yield number, line.rstrip("\r\n")


def delimited(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield `(line number, cells)` of a text file with quotes as spreadsheets write them, without its blank lines."""
    csv.field_size_limit(_LONGEST_FIELD)
    number = 0
    with _explained(path, lambda: number), _opened(path, newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"{path}, line {number}: {error}. Is a quotation mark open, or a part cut off?"
                ) from error
            if any(cells):
                yield number, cells


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as raw:
        start = raw.read(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
    with opener(path, "rt", encoding=encoding, newline=newline) as lines:
        yield lines


@contextmanager
def _explained(path: Path, number: Any) -> Iterator[None]:
    """Say where a file breaks off, and what to do about it."""
    try:
        yield
    except UnicodeDecodeError as error:
        line = _first_foreign_line(path) or number() + 1
        cut = error.reason == "unexpected end of data"
        raise ValueError(
            f"{path} cannot be read beyond line {line - 1} ({error}). "
            + ("The file is cut off: fetch it again." if cut else "It is written in another encoding, perhaps Latin-1 ")
            + ("" if cut else f"or Windows-1252. Save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name}")
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeError) as error:
        raise ValueError(
            f"{path} cannot be read beyond line {number()} ({error}). Fetch or unpack it again."
        ) from error


def _first_foreign_line(path: Path) -> int | None:
    """Return the first line that is no UTF-8: text is decoded in blocks, of which an error tells no line."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}). The file may be cut off: fetch it again."
            ) from error
        yield number, _object(row, f"{path}, line {number}")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a `.json` file: one list of objects, or, as is common, JSON lines under that name."""
    first = next((line for _, line in numbered_lines(path)), "")
    if not first.lstrip().startswith("["):
        yield from _jsonl_rows(path)
        return
    try:
        found = json.loads("\n".join(line for _, line in numbered_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON list ({error}). The file may be cut off: fetch it again.") from error
    for number, row in enumerate(found, 1):
        yield number, _object(row, f"{path}, row {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with _id and text, got {json.dumps(row)[:60]!r}.")
    return row


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    first = next((line for _, line in numbered_lines(path)), "")
    if delimiter not in first:  # spreadsheets write .csv with the separator of their country
        delimiter = next((other for other in (";", "\t", "|") if other in first), delimiter)
    for number, cells in delimited(path, delimiter):
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: two columns have one name: {', '.join(map(repr, header))}. Rename one.")
        elif len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} cells under the {len(header)} columns "
                f"{', '.join(map(repr, header))}. Put a cell that holds {delimiter!r} in quotation marks."
            )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1_000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read beyond row {number} ({error}). Fetch it again.") from error


def chained(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, row)` of several files, the place with file and line for messages."""
    for path in files:
        unit = "row" if file_kind(path) in (".parquet", ".json") else "line"
        for number, row in rows(path):
            yield f"{path}, {unit} {number}", row
