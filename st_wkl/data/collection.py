"""A test collection in the sense of information retrieval: documents, queries and judgements, validated once."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from st_wkl.data._reading import (
    Qrels,
    config_names,
    document_text,
    download,
    read_beir,
    read_mteb,
    task_ignores_identical_ids,
    whole_gains,
)
from st_wkl.data.selection import is_own_text

__all__ = ["Collection", "Missing", "document_text"]

Missing = Literal["raise", "drop"]


@dataclass(frozen=True, repr=False)
class Collection:
    """Documents, queries and graded judgements, checked when they are put together.

    Everything after this class may rely on it: ids are non-empty text, every query has text, every judgement is a
    whole number and points at a document and a query that exist.

    Args:
        name: Name for people and for provenance, e.g. `"nfcorpus"`.
        documents: `{document_id: text}`, the text in MTEB's form, see `document_text`. Empty documents exist in real
            collections; they are counted and warned about.
        queries: `{query_id: text}`.
        qrels: `{split: {query_id: {document_id: gain}}}`; a gain of 0 means judged and not relevant.
        missing: What to do about judgements of documents or queries that the collection does not hold: `"raise"`
            an error (default, since it usually means that files do not belong together), or `"drop"` them, counted.
        ignore_identical_ids: Whether a query's own document, the one of its id, is left out of its candidates, its
            training list and its results, as MTEB's tasks of that name do. `None`: if most queries are documents of the
            same id and text (a title may stand before it), as in collections of arguments or of duplicate questions;
            that is said once.

    Raises:
        TypeError: An id or a text is not a `str`.
        ValueError: Anything else that is wrong; the message names the place and what to do.

    Example:
        >>> collection = Collection(
        ...     "mine",
        ...     documents={"d1": "Cats purr.", "d2": "Dogs bark."},
        ...     queries={"q1": "which animal purrs"},
        ...     qrels={"train": {"q1": {"d1": 1}}},
        ... )
        >>> collection.positives("train")
        {'q1': {'d1': 1}}
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels = field(default_factory=dict)
    missing: InitVar[Missing] = "raise"
    ignore_identical_ids: bool | None = None

    def __post_init__(self, missing: Missing) -> None:
        """Validate, and normalise the gains to `int`."""
        if missing not in ("raise", "drop"):
            raise ValueError(f'missing must be "raise" or "drop", got {missing!r}.')
        for kind, texts in (("documents", self.documents), ("queries", self.queries)):
            if not texts:
                raise ValueError(f"Collection {self.name!r} has no {kind}.")
            for key, text in texts.items():
                _check_entry(f"{kind} of {self.name!r}", key, text)
        blank_query = next((key for key, text in self.queries.items() if not text.strip()), None)
        if blank_query is not None:
            raise ValueError(
                f"Query {blank_query!r} of {self.name!r} has no text. Remove it from the queries and the judgements."
            )
        blank = [key for key, text in self.documents.items() if not text.strip()]
        if blank:
            warnings.warn(
                f"{len(blank):,} of {len(self.documents):,} documents of {self.name!r} have no text "
                f"(the first is {blank[0]!r}). They can be neither found nor used for training.",
                stacklevel=3,
            )
        object.__setattr__(self, "qrels", _check_qrels(self, missing))

    def __repr__(self) -> str:
        """Return the sizes, not the texts."""
        splits = ", ".join(f"{split}: {len(judged):,} judged queries" for split, judged in self.qrels.items())
        return (
            f"Collection({self.name!r}, {len(self.documents):,} documents, {len(self.queries):,} queries"
            f"{', ' + splits if splits else ''})"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex hash of documents, queries and judgements. The name and the order of entries do not matter."""
        digest = hashlib.blake2b(digest_size=16)

        def add(*parts: str) -> None:
            for part in parts:
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)

        for kind, texts in (("documents", self.documents), ("queries", self.queries)):
            add(kind)
            for key in sorted(texts):
                add(key, texts[key])
        for split in sorted(self.qrels):
            add("qrels", split)
            for query_id in sorted(self.qrels[split]):
                for document_id, gain in sorted(self.qrels[split][query_id].items()):
                    add(query_id, document_id, str(gain))
        if self.leaves_out_own:
            add("ignore_identical_ids")  # other lists and other scores
        return digest.hexdigest()

    @cached_property
    def leaves_out_own(self) -> bool:
        """Whether the document of a query's own id is left out, see `ignore_identical_ids`."""
        if self.ignore_identical_ids is not None:
            return self.ignore_identical_ids
        own = sum(map(self.is_own, self.queries))
        if 2 * own <= len(self.queries):
            return False
        warnings.warn(
            f"{own:,} of {len(self.queries):,} queries of {self.name!r} are documents of the same id and text. "
            "A query's own document is left out of its candidates, its list and its results, as MTEB does; "
            "ignore_identical_ids=False (--keep-identical-ids) keeps it.",
            stacklevel=2,
        )
        return True

    def is_own(self, query_id: str) -> bool:
        """Return whether a query is a document of the same id and text."""
        return query_id in self.documents and is_own_text(self.queries[query_id], self.documents[query_id])

    def judgements(self, split: str) -> dict[str, dict[str, int]]:
        """Return `{query_id: {document_id: gain}}` of one split.

        Raises:
            ValueError: The collection has no such split; the message lists those it has.
        """
        if split not in self.qrels:
            raise ValueError(
                f"Collection {self.name!r} has no split {split!r}; it has {', '.join(map(repr, self.qrels)) or 'none'}."
            )
        return self.qrels[split]

    def positives(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of one split with a gain above 0, without the queries that have none."""
        relevant = {
            query_id: {document_id: gain for document_id, gain in judged.items() if gain > 0}
            for query_id, judged in self.judgements(split).items()
        }
        return {query_id: judged for query_id, judged in relevant.items() if judged}

    @classmethod
    def from_beir(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        missing: Missing = "raise",
        ignore_identical_ids: bool | None = None,
    ) -> Self:
        """Read a folder in the layout of the BEIR benchmark.

        Args:
            path: Folder with `corpus.jsonl`, `queries.jsonl` (either may end in `.gz`) and `qrels/<split>.tsv` (or
                `.csv`, `.txt`, `.jsonl`, `.parquet`). Numeric ids become text, as they are in the judgements. A
                judgements file holds `query-id corpus-id score` with or without a header, or the four columns of TREC.
            name: Name of the collection, by default the folder's.
            missing: See `Collection`.
            ignore_identical_ids: See `Collection`.

        Raises:
            FileNotFoundError: A file of the layout is missing.
            ValueError: A line cannot be read or an id occurs twice; the message names file and line.

        Example:
            >>> collection = Collection.from_beir("datasets/nfcorpus")  # doctest: +SKIP
        """
        folder = Path(path).expanduser()
        documents, queries, qrels = read_beir(folder)
        name = name or folder.resolve().name
        return cls(name, documents, queries, qrels, missing=missing, ignore_identical_ids=ignore_identical_ids)

    @classmethod
    def from_hub(
        cls,
        repo_id_or_folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        revision: str | None = None,
        missing: Missing = "raise",
        ignore_identical_ids: bool | None = None,
    ) -> Self:
        """Read a dataset in MTEB's retrieval layout from the Hub or from a folder.

        The configs are `corpus` and `queries` (or `query`) with `_id`, `title`, `text`, and `default` (or `qrels`) with
        `query-id`, `corpus-id`, `score`; the splits of the latter become the splits of the collection.

        Args:
            repo_id_or_folder: Dataset id such as `"mteb/nfcorpus"`, or a folder whose README.md names the configs.
            name: Name of the collection, by default the id or the folder's name.
            revision: Branch, tag or commit on the Hub.
            missing: See `Collection`.
            ignore_identical_ids: See `Collection`. `None` of a dataset of the Hub, or of its copy in the Hub's cache,
                also asks whether an MTEB task on it says so.

        Raises:
            FileNotFoundError: There is no such dataset, or the Hub cannot be reached.
            ValueError: A config or a column is missing, or the contents are invalid.

        Example:
            >>> collection = Collection.from_hub("mteb/nfcorpus")  # doctest: +SKIP
        """
        folder = Path(repo_id_or_folder).expanduser()
        name = name or (folder.resolve().name if folder.is_dir() else str(repo_id_or_folder))
        found = folder if folder.is_dir() else download(str(repo_id_or_folder), revision)
        documents, queries, qrels = read_mteb(found)
        if ignore_identical_ids is None and task_ignores_identical_ids(found):
            ignore_identical_ids = True
        return cls(name, documents, queries, qrels, missing=missing, ignore_identical_ids=ignore_identical_ids)

    @classmethod
    def load(
        cls,
        source: Collection | str | os.PathLike[str],
        *,
        revision: str | None = None,
        missing: Missing = "raise",
        ignore_identical_ids: bool | None = None,
    ) -> Collection:
        """Return the collection that `source` means: itself, a BEIR folder, a folder or a Hub dataset as MTEB lays out.

        Args:
            source: A collection, a folder, or a Hub id with its organisation, such as `"mteb/nfcorpus"`.
            revision: Branch, tag or commit, for a Hub id.
            missing: See `Collection`; of no meaning for a collection.
            ignore_identical_ids: See `Collection`, a copy of which is returned if it says something else.

        Raises:
            FileNotFoundError: Neither a folder of either layout nor a dataset that can be fetched.
        """
        if isinstance(source, Collection):
            if ignore_identical_ids in (None, source.ignore_identical_ids):
                return source
            return replace(source, missing="raise", ignore_identical_ids=ignore_identical_ids)
        options: dict[str, Any] = {"missing": missing, "ignore_identical_ids": ignore_identical_ids}
        folder = Path(source).expanduser()
        if folder.is_dir():
            return (cls.from_hub if "corpus" in config_names(folder) else cls.from_beir)(folder, **options)
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder nor a Hub id. Give a BEIR folder (corpus.jsonl, queries.jsonl, "
                'qrels/) or a dataset id with its organisation, e.g. "mteb/nfcorpus".'
            )
        return cls.from_hub(str(source), revision=revision, **options)


def _check_entry(where: str, key: object, text: object) -> None:
    if not isinstance(key, str) or not isinstance(text, str):
        what = "id" if not isinstance(key, str) else "text"
        wrong = key if what == "id" else text
        remedy = "Remove the entry, or give it a text."
        if str(wrong) in ("nan", "<NA>", "NaT"):
            remedy += " pandas reads empty cells, NA and null as that, unless it is told keep_default_na=False."
        elif isinstance(wrong, int | float):
            remedy = f"Use str({wrong!r})."
        raise TypeError(f"In the {where}, entry {key!r}: the {what} is {wrong!r}, not text (str). {remedy}")
    if not key:
        raise ValueError(f"In the {where}, an id is empty (its text begins {text[:60]!r}). Every id needs a character.")
    if not (key.isascii() and text.isascii()):
        try:
            (key + text).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"In the {where}, entry {key!r} holds half a character (a lone surrogate), which no tokenizer reads. "
                'Repair it with text.encode("utf-8", "replace").decode().'
            ) from error


def _check_qrels(collection: Collection, missing: Missing) -> Qrels:
    kept: Qrels = {}
    dropped = {"documents": 0, "queries": 0}
    first = ""
    for split, queries in collection.qrels.items():
        kept[split] = {}
        for query_id, judged in queries.items():
            where = f"split {split!r} of {collection.name!r}, query {query_id!r}"
            if not isinstance(query_id, str):
                raise TypeError(f"In {where}: ids are text (str). Use str(id).")
            for document_id, gain in whole_gains(judged, where).items():
                if query_id not in collection.queries or document_id not in collection.documents:
                    dropped["documents" if query_id in collection.queries else "queries"] += 1
                    first = first or f"{where}, document {document_id!r}"
                    continue
                kept[split].setdefault(query_id, {})[document_id] = gain
    if any(dropped.values()):
        message = (
            f"Collection {collection.name!r} has judgements of what it does not hold: {dropped['documents']:,} of "
            f"absent documents, {dropped['queries']:,} of absent queries. The first is {first}."
        )
        if missing == "raise":
            raise ValueError(
                f'{message} Check that the files belong together, or pass missing="drop" (build and evaluate: '
                "--missing drop; collection.missing in a configuration)."
            )
        warnings.warn(f"{message} They are dropped.", stacklevel=4)
    for split, queries in kept.items():
        if not queries:
            raise ValueError(f"Split {split!r} of {collection.name!r} has no judgements. Remove the split.")
    return kept
