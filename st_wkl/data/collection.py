"""A test collection in the sense of information retrieval: documents, queries and judgements, validated once."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from st_wkl.data.collection_files import (
    ABOUT_FILE,
    By,
    Qrels,
    config_names,
    document_text,
    download,
    fetched,
    is_collection,
    read_beir,
    read_mteb,
    task_ignores_identical_ids,
    whole_gains,
    write_beir,
)
from st_wkl.data.own_corpus import advice, held_out, read_corpus, read_queries
from st_wkl.data.selection import Positives, is_own_text, own_result
from st_wkl.files import holds_nothing, replacing_folder

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

    def own_document(self, query_id: str) -> set[str]:
        """Return the id of a query's own document, which is no negative of it and no result for it, in a set; or none.

        Where the collection leaves such documents out, by its option or since most of its queries are documents, the
        id decides; elsewhere the text has to be the query's, too.
        """
        recognised = self.ignore_identical_ids is None and self.is_own(query_id)
        return own_result(query_id, self.leaves_out_own or recognised)

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

    def learnt_from(self, split: str, positives: Positives | None = None) -> dict[str, dict[str, int]]:
        """Return the judgements of the queries to learn from, nothing of one that no split judges.

        Args:
            split: Split whose queries they are.
            positives: Whether those that no split judges are among them, see `Selection`.
        """
        judged_somewhere = {query_id for judged in self.qrels.values() for query_id in judged}
        unjudged: dict[str, dict[str, int]] = {key: {} for key in self.queries if key not in judged_somewhere}
        if split not in self.qrels and split == "train" and unjudged and positives != "judged":
            return unjudged
        judged = self.judgements(split)
        return {**judged, **unjudged} if positives in ("optional", "teacher") else judged

    def with_queries(self, queries: Any) -> Collection:
        """Return the collection with other queries to learn from, unjudged, in place of those of its split `train`.

        Args:
            queries: As for `load`.
        """
        qrels = {split: judged for split, judged in self.qrels.items() if split != "train"}
        kept = {key: self.queries[key] for judged in qrels.values() for key in judged}
        # A query that another split judges stays one of that, and is asked here, too: a leak, which is said.
        asked = {f"{key}-asked" if key in kept else key: text for key, text in read_queries(queries).items()}
        out = True if self.leaves_out_own else self.ignore_identical_ids
        return replace(self, queries={**kept, **asked}, qrels=qrels, missing="raise", ignore_identical_ids=out)

    def positives(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of one split with a gain above 0, without the queries that have none."""
        relevant = {
            query_id: {document_id: gain for document_id, gain in judged.items() if gain > 0}
            for query_id, judged in self.judgements(split).items()
        }
        return {query_id: judged for query_id, judged in relevant.items() if judged}

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        missing: Missing = "raise",
        ignore_identical_ids: bool | None = None,
        queries: Any = None,
        judgements: Any = None,
        test_share: float = 0.0,
        by: By = "query",
        seed: int = 0,
        **columns: str | None,
    ) -> Collection:
        """Return the collection that `source` means: itself, a folder, a dataset of the Hub, or own tables.

        A BEIR folder has `corpus.jsonl`, `queries.jsonl` (either may end in `.gz`) and `qrels/<split>.tsv` (or `.csv`,
        `.txt`, `.jsonl`, `.parquet`), `query-id corpus-id score` with or without a header, or the four columns of TREC.
        A dataset in MTEB's layout has the configs `corpus` and `queries` (or `query`) with `_id`, `title`, `text`, and
        `default` (or `qrels`) with `query-id`, `corpus-id`, `score`. Numeric ids become text.

        A table of your own is one of documents (`id`, `text`, `title`), where a column `query` is what each answers; of
        queries (`query_id`, `query`); or of judgements (`query_id` or `query`, `id`, and a gain, such as clicks:
        `label`). Names that are common are recognised, others are told, as in `Collection.load("faq.csv", id="nr",
        text="answer", query="asked")`. It comes as JSON lines, CSV, TSV, Parquet, a folder of these, a data frame or a
        `datasets.Dataset`. Ids of any type become text, a text without one gets a hash. `save` makes a BEIR folder.

        Args:
            source: A collection, a folder, a Hub id with its organisation, such as `"mteb/nfcorpus"`, or tables.
            name: Name of the collection. Default: the id, what `save` wrote, or the folder's name.
            revision: Branch, tag or commit, for a Hub id.
            missing: See `Collection`; of no meaning for a collection.
            ignore_identical_ids: See `Collection`, a copy of which is returned if it says something else. `None` of a
                dataset of the Hub, or of its copy in the Hub's cache, also asks whether an MTEB task on it says so.
            queries: Queries, where they are not beside the documents: a table, a text file with one in a line (`.txt`
                or `.log`), or a list of texts. They need no judgements: see `positives` of `Selection`. Of a folder or
                dataset with judgements they take the place of the queries of its split `train`.
            judgements: Table of judgements; all judged documents are relevant where it has no gains.
            test_share: Share of the queries of own tables that become the split `test`; all others are `train`.
            by: Whether these are drawn one by one, or by `"document"`: no query of one side has a relevant document of
                the other. The latter is for numbers that hold for new documents, too.
            seed: Of the draw.
            **columns: Names of columns of own tables that are not recognised: `id`, `text`, `title`, `query`,
                `query_id`, `label`.

        Raises:
            FileNotFoundError: Neither a folder of either layout nor a dataset that can be fetched; a file is missing.
            ValueError: A row cannot be read or an id occurs twice; the message names file and line.

        Example:
            >>> collection = Collection.load("mteb/nfcorpus")  # doctest: +SKIP
            >>> faq = {"nr": [1, 2], "answer": ["Cats purr.", "Dogs bark."], "asked": ["who purrs", "who barks"]}
            >>> import pandas as pd
            >>> Collection.load(pd.DataFrame(faq), name="faq", id="nr", text="answer", query="asked")
            Collection('faq', 2 documents, 2 queries, train: 2 judged queries)
        """
        if isinstance(source, Collection):
            if ignore_identical_ids in (None, source.ignore_identical_ids):
                return source
            return replace(source, missing="raise", ignore_identical_ids=ignore_identical_ids)
        options: dict[str, Any] = {"name": name, "missing": missing, "ignore_identical_ids": ignore_identical_ids}
        folder = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
        own = {"queries": queries, "judgements": judgements, "test_share": test_share or None, **columns}
        own = {name: value for name, value in own.items() if value is not None}
        if folder is not None and own.keys() == {"queries"} and is_collection(fetched(folder, revision)):
            return cls.load(source, revision=revision, **options).with_queries(queries)
        if folder is None or folder.is_file() or own:
            own = {"revision": revision, **own, **({"by": by, "seed": seed} if test_share else {})}
            return cls.from_tables(source, **own, **options)
        if folder.is_dir():
            return (cls.from_hub if "corpus" in config_names(folder) else cls.from_beir)(folder, **options)
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder nor a Hub id. Give a BEIR folder (corpus.jsonl, queries.jsonl, "
                'qrels/) or a dataset id with its organisation, e.g. "mteb/nfcorpus".'
            )
        return cls.from_hub(str(source), revision=revision, **options)

    @classmethod
    def from_tables(
        cls,
        source: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        missing: Missing = "raise",
        ignore_identical_ids: bool | None = None,
        queries: Any = None,
        judgements: Any = None,
        test_share: float = 0.0,
        by: By = "query",
        seed: int = 0,
        **columns: str | None,
    ) -> Self:
        """Make a collection of own tables, as `load` does."""
        told = {"queries": queries, "judgements": judgements, "revision": revision}
        documents, asked, judged = read_corpus(source, columns, **told)
        qrels = held_out(documents, judged, test_share, by, seed)
        if name is None:
            name = Path(source).name.partition(".")[0] if isinstance(source, str | os.PathLike) else "my-collection"
        return cls(name, documents, asked, qrels, missing=missing, ignore_identical_ids=ignore_identical_ids)

    @classmethod
    def from_beir(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        ignore_identical_ids: bool | None = None,
        **how: Any,
    ) -> Self:
        """Read a BEIR folder, as `load` does."""
        folder = Path(path).expanduser()
        try:
            documents, queries, qrels, about = read_beir(folder)
        except FileNotFoundError as error:
            told = None if any(folder.glob("corpus.jsonl*")) else advice(folder)
            raise FileNotFoundError(" ".join(filter(None, [str(error), told]))) from error
        if ignore_identical_ids is None:
            ignore_identical_ids = about.get("ignore_identical_ids")
        name = name or about.get("name") or folder.resolve().name
        return cls(name, documents, queries, qrels, ignore_identical_ids=ignore_identical_ids, **how)

    @classmethod
    def from_hub(
        cls,
        source: str | os.PathLike[str],
        *,
        name: str | None = None,
        revision: str | None = None,
        ignore_identical_ids: bool | None = None,
        **how: Any,
    ) -> Self:
        """Read a dataset in MTEB's layout from the Hub or from a folder, as `load` does."""
        folder = Path(source).expanduser()
        name = name or (folder.resolve().name if folder.is_dir() else str(source))
        found = folder if folder.is_dir() else download(str(source), revision)
        documents, queries, qrels = read_mteb(found)
        if ignore_identical_ids is None and task_ignores_identical_ids(found):
            ignore_identical_ids = True
        return cls(name, documents, queries, qrels, ignore_identical_ids=ignore_identical_ids, **how)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a BEIR folder, from which `load` makes the same collection, and return it.

        Args:
            folder: New or empty folder, or one that holds a saved collection, which is replaced.

        Raises:
            FileExistsError: The folder holds something else.
            ValueError: The name of a split cannot be that of a file.

        Example:
            >>> collection = Collection("mine", {"d1": "Cats purr."}, {"q1": "who purrs"}, {"test": {"q1": {"d1": 1}}})
            >>> Collection.load(collection.save("mine")) == collection
            True
        """
        folder = Path(folder).expanduser()
        if not holds_nothing(folder) and not (folder / ABOUT_FILE).is_file():
            raise FileExistsError(f"{folder} holds something other than a saved collection. Give another folder.")
        if wide := [key for key, text in self.documents.items() if text != text.strip()]:
            warnings.warn(
                f"{len(wide):,} documents of {self.name!r} begin or end with white space (the first is {wide[0]!r}), "
                "which MTEB's layout leaves out: without it they are another text, and this another collection.",
                stacklevel=2,
            )
        with replacing_folder(folder) as new:
            about = {"name": self.name, "ignore_identical_ids": self.ignore_identical_ids}
            write_beir(new, self.documents, self.queries, self.qrels, about)
        return folder


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
