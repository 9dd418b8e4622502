"""Texts without lists, which a teacher's embeddings alone can teach, and where the vectors of any dataset come from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, Value

from st_wkl.data._rows import LINES, file_kind
from st_wkl.data.arrow import as_dataset, columns
from st_wkl.data.collection import Collection
from st_wkl.data.collection_files import document_text
from st_wkl.data.embedding_teacher import Side
from st_wkl.data.tables import as_text, seen, tables
from st_wkl.data.vectors import TeacherVectors, VectorStore
from st_wkl.files import content_hash, expanded


@dataclass(repr=False)
class EmbeddingDataset:
    """Texts to learn a teacher's embeddings of: no judgements, no candidates, no scores.

    Args:
        queries: `query_id`, `text`: texts that the student will be asked, with its prompt for queries.
        documents: `document_id`, `text`: texts that it will find.
        provenance: Where they come from, in JSON values.

    Example:
        >>> dataset = EmbeddingDataset.of(documents=["Cats purr.", "Dogs bark.", "Cats purr."])
        >>> dataset
        EmbeddingDataset(0 queries, 2 documents)
        >>> distill("packaged:potion-base-8M", dataset, embedding_teacher="packaged:all-MiniLM-L6-v2",
        ...         output_dir="my-student")  # doctest: +SKIP
    """

    queries: Dataset
    documents: Dataset
    provenance: dict[str, Any] = field(default_factory=dict)

    # What is trained where no loss is named.
    loss: ClassVar[str] = "embedding"

    def __len__(self) -> int:
        return len(self.queries) + len(self.documents)

    def __repr__(self) -> str:
        return f"EmbeddingDataset({len(self.queries):,} queries, {len(self.documents):,} documents)"

    @property
    def train(self) -> Dataset:
        """The rows that are trained on: `text`, and its `side`."""
        parts = [(side, columns(table)["text"]) for side, table in self._sides()]
        sides = pa.array([side for side, texts in parts for _ in range(len(texts))], pa.string())
        texts = pa.chunked_array([chunk for _, found in parts for chunk in found.chunks], pa.large_string())
        features = Features({"text": Value("large_string"), "side": Value("string")})
        return as_dataset(pa.table({"text": texts, "side": sides}), features)

    def to_lists(self) -> Dataset:
        """Return the rows as `ListwiseCollator` takes them."""
        return self.train

    def positives(self) -> dict[str, dict[str, int]]:
        """Return nothing: no document is judged."""
        return {}

    def seen_as_relevant(self) -> set[str]:
        """Return the ids of all documents: each is taught."""
        return {*self.documents["document_id"]}

    def unjudged(self) -> dict[str, int]:
        """Return how many queries have no judged positive: all."""
        return {"unjudged_queries": len(self.queries), "teacher_positives": 0}

    def _sides(self) -> Iterator[tuple[Side, Dataset]]:
        yield "query", self.queries
        yield "document", self.documents

    @classmethod
    def of(
        cls,
        documents: Iterable[str | None] = (),
        queries: Iterable[str | None] = (),
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> EmbeddingDataset:
        """Return a dataset of texts, without those that are empty or come again, which are counted in a warning.

        Raises:
            ValueError: A text is null, or there is none.
        """
        found = {}
        empty = again = 0
        for side, texts in (("query", queries), ("document", documents)):
            if isinstance(texts, str):
                raise ValueError(f"{texts[:60]!r} is one text: give a list, or EmbeddingDataset.load(file).")
            kept: dict[str, None] = {}
            for number, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise ValueError(f"{side} {number} is {text!r}, not a text: drop it, or give it one.")
                empty += not text.strip()
                again += bool(text.strip()) and text in kept
                if text.strip():
                    kept[text] = None
            names = {f"{side}_id": Value("string"), "text": Value("large_string")}
            table = {f"{side}_id": [content_hash(text, size=8) for text in kept], "text": list(kept)}
            found[side] = as_dataset(pa.table(table, Features(names).arrow_schema), Features(names))
        if empty or again:
            warnings.warn(f"{empty:,} empty texts and {again:,} that come again are left out.", stacklevel=2)
        made = cls(found["query"], found["document"])
        if not len(made):
            raise ValueError("There are no texts to learn from.")
        counts = {"queries": len(made.queries), "documents": len(made.documents)}
        made.provenance = {"license": None, **(provenance or {}), "counts": counts}
        return made

    @classmethod
    def load(cls, source: Any, *, split: str = "train", text: str = "text") -> EmbeddingDataset:
        """Read texts.

        Args:
            source: A `Collection`, BEIR folder or Hub id: its documents, and the queries that are judged in `split`,
                never those of another. Or a file: `.txt` with a document a line, a table (JSON lines, CSV, TSV,
                Parquet, a data frame, a dataset) with a column of documents, whose `title` stands before them.
            split: Split of a collection's queries.
            text: Name of the column.

        Raises:
            FileNotFoundError: There is no such file or folder.
            ValueError: A text is null, or there is no such column; the message names the row.
        """
        path = Path(expanded(source)) if isinstance(source, str | os.PathLike) else None
        if isinstance(source, Collection) or (path is not None and not path.is_file()):
            collection = source if isinstance(source, Collection) else Collection.load(source)
            asked = [collection.queries[key] for key in collection.qrels.get(split, ())]
            told = {"name": collection.name, "fingerprint": collection.fingerprint}
            return cls.of(collection.documents.values(), asked, provenance={"collection": told, "split": split})
        told = {"name": path.name if path is not None else "texts"}
        if path is not None and file_kind(path) in LINES:
            with path.open(encoding="utf-8") as lines:
                return cls.of((line.strip() for line in lines), provenance={"collection": told})
        return cls.of(_texts(source, text), provenance={"collection": told})


def _texts(source: Any, name: str) -> Iterator[str]:
    """Yield the documents of tables."""
    for table in tables(source):
        first = table.first()
        if name not in first.column_names:
            raise ValueError(f"There is no column {name!r} in {seen({table.name: first})}: name it, text='…'.")
        for part, where in table.batches():
            titles = as_text(part["title"]).to_pylist() if "title" in part.column_names else [None] * len(part)
            for row, (title, text) in enumerate(zip(titles, as_text(part[name]).to_pylist(), strict=True)):
                if text is None:
                    raise ValueError(f"{where(row)} has no {name} (null): drop it, or give it one.")
                yield document_text(title or "", text)


def teacher_vectors(
    teacher: Any, dataset: Any, *, store: VectorStore | None = None, show_progress: bool = True
) -> TeacherVectors:
    """Return a teacher's vectors of all texts of a dataset, or of several by name; what is stored is not computed.

    Args:
        teacher: What `VectorStore.embed` takes, or vectors that it has made, which have to be those of all texts.
        dataset: A `DistillationDataset`, an `EmbeddingDataset`, or a `datasets.Dataset` of lists or texts.
        store: Default: that of the user's cache.
        show_progress: Show a bar.

    Raises:
        TypeError: The rows pass once, or hold columns.
        ValueError: A text has no vector among those that are given.
    """
    parts = [*dataset.values()] if isinstance(dataset, Mapping) else [dataset]
    made = teacher if isinstance(teacher, TeacherVectors) else None
    if made is not None and any(not hasattr(part, "__len__") for part in parts):
        return made  # rows that pass once show whether a text has a vector
    texts: dict[Side, dict[str, None]] = {"query": {}, "document": {}}
    for part in parts:
        for side, found in _texts_of(part):
            texts[side].update(dict.fromkeys(found))
    if made is None:
        return (store or VectorStore()).embed(teacher, texts, show_progress=show_progress)
    for side, known in texts.items():
        made.find(list(known), side)
    return made


def _texts_of(dataset: Any) -> Iterator[tuple[Side, Iterable[str]]]:
    """Yield the texts of each side."""
    if hasattr(dataset, "to_lists"):
        yield "query", dataset.queries["text"]
        yield "document", dataset.documents["text"]
        return
    names = dataset.column_names or []
    if not isinstance(dataset, Dataset) or not ({"query", "documents"} <= {*names} or {"text", "side"} <= {*names}):
        raise TypeError(
            "An embedding teacher has to see all texts before training: give a DistillationDataset, an "
            "EmbeddingDataset, or a datasets.Dataset of lists (query, documents, …), or, where rows pass once, vectors "
            "that VectorStore().embed(…) has made as embedding_teacher."
        )
    rows = dataset.with_format(None)
    if "documents" in names:
        yield "query", rows["query"]
        yield "document", (text for row in rows["documents"] for text in row)
    else:
        for side in ("query", "document"):
            yield side, (text for text, own in zip(rows["text"], rows["side"], strict=True) if own == side)
