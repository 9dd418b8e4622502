"""Scores as parquet: the file in which a score store travels, without any text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_wkl.files import expanded, replacing
from st_wkl.progress import progress

# Marks exported files and their layout.
_KEY, _VERSION = b"st_wkl.scores", b"1"
_TYPES = {"teacher": "string", "query": "fixed_size_binary[16]", "document": "fixed_size_binary[16]", "score": "float"}
# Rows that are in memory at a time, and one row group of the file.
BATCH = 50_000

Row = tuple[str, bytes, bytes, float]


def write_export(
    path: str | os.PathLike[str], batches: Iterable[Sequence[Row]], *, total: int, show_progress: bool = True
) -> int:
    """Write rows to one parquet file, in one step, and return their number; `total` is for the bar."""
    schema = pa.schema(
        {"teacher": pa.dictionary(pa.int32(), pa.string()), "query": pa.binary(16), "document": pa.binary(16)}
        | {"score": pa.float32()},
        metadata={_KEY: _VERSION},
    )
    types = [pa.string(), *schema.types[1:]]
    count = 0
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        progress(total=total, desc="export", unit=" scores", disable=not show_progress) as bar,
    ):
        for rows in batches:
            columns = [
                pa.array(values, type=type_) for values, type_ in zip(zip(*rows, strict=True), types, strict=True)
            ]
            columns[0] = columns[0].dictionary_encode()
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            count += len(rows)
            bar.update(len(rows))
    return count


def read_export(path: str | os.PathLike[str], *, show_progress: bool = True) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of an exported file, piece by piece.

    Raises:
        ValueError: The file is damaged, of another kind, or holds what no store can hold.
    """
    try:
        with pq.ParquetFile(expanded(path)) as file:
            if (file.schema_arrow.metadata or {}).get(_KEY) != _VERSION:
                raise ValueError(f"{path} is no export of a score store that this version of st_wkl reads.")
            schema = file.schema_arrow
            kinds = {name: schema.field(name).type for name in schema.names}
            # Of a column whose values are written once and numbered, the type of the values.
            types = {name: str(getattr(kind, "value_type", kind)) for name, kind in kinds.items()}
            if types != _TYPES or len(schema.names) != len(_TYPES):
                raise ValueError(
                    f"{path} has the columns {_told(types)}, and an export has {_told(_TYPES)}. Nothing is imported: "
                    "export it again."
                )
            total = file.metadata.num_rows
            with progress(total=total, desc="import", unit=" scores", disable=not show_progress) as bar:
                for batch in file.iter_batches(BATCH):
                    rows = batch.to_pydict()
                    if problem := _problem(rows):
                        raise ValueError(f"{path} holds {problem}. Nothing is imported: export it again.")
                    yield rows
                    bar.update(len(batch))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Fetch or export it again.") from error


def _told(types: dict[str, str]) -> str:
    return ", ".join(f"{name} ({type_})" for name, type_ in types.items()) or "none"


def _problem(rows: dict[str, list[Any]]) -> str | None:
    """Return what cannot stand in a store, if there is such a thing."""
    for name in ("query", "document"):
        if any(value is None or len(value) != 16 for value in rows[name]):
            return f"a {name} without a hash of 16 bytes"
    if not all(score is not None and math.isfinite(score) for score in rows["score"]):
        return "a score that is not finite"
    for identity in dict.fromkeys(rows["teacher"]):
        try:
            sound = isinstance(json.loads(identity), dict)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            return f"a teacher that is no JSON object: {str(identity)[:80]!r}"
    return None
