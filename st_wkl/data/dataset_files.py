"""The folder of a distillation dataset: three tables, where they come from, and the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from st_wkl.data.dataset_card import dataset_card
from st_wkl.data.report import scores_by_label

TABLES = ("train", "queries", "documents")
PROVENANCE = "provenance.json"
PREFERENCES = "preferences"
# Where the provenance keeps what the collection was told about documents of a query's id; absent if nothing.
IGNORES = "ignore_identical_ids"


def features(table: str, *, preferences: bool = False) -> Features:
    """Return the `datasets.Features` of one of the three tables, `"train"`, `"queries"` or `"documents"`.

    Args:
        table: Name of the table.
        preferences: With the column of a pairwise teacher, which only `"train"` may have.
    """
    text = Value("string")
    if table != "train":
        return Features({"query_id" if table == "queries" else "document_id": text, "text": text})
    lists = Features(query_id=text, document_ids=List(text), scores=List(Value("float32")), labels=List(Value("int32")))
    place = Value("int32")
    pair = {"first": place, "second": place, "probability": Value("float32")}
    return Features({**lists, PREFERENCES: List(pair)}) if preferences else lists


def is_saved(folder: Path) -> bool:
    """Tell whether a folder is that of a dataset, be it complete or not."""
    if (folder / PROVENANCE).is_file() or not (folder / "train.parquet").is_file():
        return (folder / PROVENANCE).is_file()
    try:
        return list(features("train")) == pq.read_schema(folder / "train.parquet").names[:4]
    except (OSError, pa.ArrowException):
        return True


def check_free(folder: Path) -> None:
    """Stop at a folder that holds something else.

    Raises:
        FileExistsError: It does.
    """
    if folder.exists() and not (folder / PROVENANCE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something other than a distillation dataset. Give another folder.")


def read_tables(folder: Path) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Return the three tables of a folder, and where they come from.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    for name in (*(f"{table}.parquet" for table in TABLES), PROVENANCE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so it is no complete distillation dataset. Copy or build it again."
            )
    tables = {}
    for name in TABLES:
        try:
            # Read directly: `datasets` would first copy the file to its cache.
            table = pq.read_table(folder / f"{name}.parquet")
            tables[name] = Dataset(table, fingerprint=_file_digest(folder / f"{name}.parquet")[:8].hex())
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{folder / name}.parquet is damaged ({error}). Copy or build it again.") from error
    try:
        return tables, json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / PROVENANCE} is damaged ({error}). Copy or build it again.") from error


def describe(folder: Path, provenance: dict[str, Any]) -> None:
    """Write provenance and card beside the tables in a folder."""
    text = json.dumps(provenance, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")
    contents = hashlib.blake2b(b"".join(map(_file_digest, sorted(folder.iterdir()))), digest_size=16).hexdigest()
    train, documents = (pq.ParquetFile(folder / f"{name}.parquet") for name in ("train", "documents"))
    card = dataset_card(
        provenance,
        rows=train.metadata.num_rows,
        documents=documents.metadata.num_rows,
        preferences=PREFERENCES in train.schema_arrow.names,
        contents=contents,
        scores=_scores(folder) if train.metadata.num_rows else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _scores(folder: Path) -> str:
    """Return the picture of the scores of a folder's lists."""
    table = pq.read_table(folder / "train.parquet", columns=["scores", "labels"])
    scores, labels = (table[name].combine_chunks().flatten().to_numpy() for name in ("scores", "labels"))
    return scores_by_label(scores, labels > 0) if len(scores) else ""


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
