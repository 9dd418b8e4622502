"""The distillation dataset: teacher scores of candidate lists, as ids beside the texts they point to."""

from __future__ import annotations

import dataclasses
import importlib
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from st_wkl.data.arrow import Ragged, SharedTexts, as_dataset, columns, lists_of, places_of
from st_wkl.data.collection import Collection, Missing
from st_wkl.data.collection_files import fetched
from st_wkl.data.dataset_files import (
    IGNORES,
    PREFERENCES,
    TABLES,
    check_free,
    describe,
    features,
    is_saved,
    read_tables,
)
from st_wkl.data.exporters import LAYOUTS
from st_wkl.data.importers import convert
from st_wkl.data.pairwise import pointwise_preferences
from st_wkl.data.selection import NOTHING_RELEVANT, WITHOUT_POSITIVES
from st_wkl.data.settled import Lists, fit, settled
from st_wkl.files import replacing_folder

_LISTS = ("document_ids", "scores", "labels")


@dataclass(repr=False)
class DistillationDataset:
    """Candidate lists with teacher scores, in the three-table layout that sentence-transformers resolves by id.

    Args:
        train: `query_id`, `document_ids: list[str]`, `scores: list[float32]` (raw teacher scores), `labels:
            list[int32]` (judged gains, 0 where unjudged). Positives first, then negatives in candidate order; ragged.
            Where a pairwise teacher took part also `preferences`, a list of `{first, second, probability}`: that
            document `first` of the row is better than document `second`, places counting from 0.
        queries: `query_id`, `text`.
        documents: `document_id`, `text`.
        provenance: Where everything comes from, in JSON values: collection, candidates, teacher, counts, report.

    Raises:
        ValueError: A column is missing, lists of a row differ in length, a score is not finite, an id has no text, or a
            preference names no two documents of its row or is no probability.

    Example:
        >>> dataset = DistillationDataset.load("nfcorpus-distillation")  # doctest: +SKIP
        >>> dataset.to_columns()  # for a stock SentenceTransformerTrainer  # doctest: +SKIP

        The same from its folder or from the Hub, without this package:

        >>> from datasets import load_dataset  # doctest: +SKIP
        >>> from sentence_transformers.util import resolve_ids  # doctest: +SKIP
        >>> train, queries, documents = (
        ...     load_dataset("nfcorpus-distillation", name, split="train") for name in ("train", "queries", "documents")
        ... )  # doctest: +SKIP
        >>> train.set_transform(resolve_ids(
        ...     {"query_id": queries, "document_ids": documents}, keep_columns=("scores",), output_format="lists"
        ... ))  # doctest: +SKIP
    """

    train: Dataset
    queries: Dataset
    documents: Dataset
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate."""
        for name in TABLES:
            found = getattr(self, name).column_names
            expected = list(features(name, preferences=PREFERENCES in found))
            if sorted(expected) != sorted(found):
                raise ValueError(f"The table {name!r} has the columns {found}, expected {expected}.")
        for kind, table in (("query", self.queries), ("document", self.documents)):
            held = columns(table)
            if (ids := pc.count_distinct(held[f"{kind}_id"], mode="all").as_py()) != len(table):
                raise ValueError(f"The {kind} ids are not unique: {len(table)} rows, {ids} ids.")
            if held["text"].null_count:
                key = held[f"{kind}_id"].filter(pc.is_null(held["text"]))[0]
                raise ValueError(f"The {kind} {key.as_py()!r} has no text (null). Drop it, or give it one.")
        self._check_rows()

    def _check_rows(self) -> None:
        train = columns(self.train)
        parts = {name: Ragged(train[name]) for name in _LISTS}

        def where(row: int) -> str:
            return f"The row of query {train['query_id'][row].as_py()!r}"

        lengths = np.stack([part.lengths for part in parts.values()])
        for row in np.flatnonzero((lengths != lengths[0]).any(axis=0))[:1].tolist():
            told = dict(zip(parts, lengths[:, row].tolist(), strict=True))
            raise ValueError(f"{where(row)} has lists of different lengths: {told}.")
        finite = pc.fill_null(pc.is_finite(parts["scores"].values), False).to_numpy()
        for place in np.flatnonzero(~finite)[:1].tolist():
            row = parts["scores"].row_of(place)
            raise ValueError(
                f"{where(row)} has a score that is not finite: {train['scores'][row].as_py()}. Score it again."
            )
        if PREFERENCES in train.column_names:
            pairs = Ragged(train[PREFERENCES])
            for place in np.flatnonzero(~fit(pairs, lengths[0]))[:1].tolist():
                row = pairs.row_of(place)
                raise ValueError(
                    f"{where(row)} has the preference {pairs.values[place].as_py()}, which names no two of its "
                    f"{lengths[0, row]} documents (places count from 0) or is no probability. Drop it, or ask the "
                    "pairwise teacher again."
                )
        for kind, ids, row_of in (
            ("query", train["query_id"], int),
            ("document", parts["document_ids"].values, parts["document_ids"].row_of),
        ):
            held = columns(self.queries if kind == "query" else self.documents)
            for place in np.flatnonzero(places_of(ids, held[f"{kind}_id"]) < 0)[:1].tolist():
                absent = f"the {kind} {ids[place].as_py()!r}"
                raise ValueError(f"{where(row_of(place))} names {absent}, which has no text in this dataset.")

    def __len__(self) -> int:
        """Return the number of rows (queries)."""
        return len(self.train)

    def __repr__(self) -> str:
        """Return the sizes, the teacher and the collection, not the contents."""
        pairs = int(pc.sum(pc.list_value_length(columns(self.train)["document_ids"])).as_py() or 0)
        collection = self.provenance.get("collection", {})
        name = collection.get("name", "?") if isinstance(collection, dict) else collection
        split = f", split {self.provenance['split']!r}" if self.provenance.get("split") else ""
        teacher = self.provenance.get("teacher")
        teacher = (teacher.get("model") or teacher.get("kind")) if isinstance(teacher, dict) else teacher
        told = [f"DistillationDataset({name!r}{split}, teacher {teacher or '?'!r},"]
        told += [f"    {len(self.train):,} rows, {pairs:,} pairs, {len(self.queries):,} queries, "]
        return "\n".join(told) + f"{len(self.documents):,} documents)"

    def positives(self) -> dict[str, dict[str, int]]:
        """Return `{query_id: {document_id: gain}}` of all documents with a gain above 0."""
        train = columns(self.train)
        labels, ids = Ragged(train["labels"]), Ragged(train["document_ids"])
        relevant: dict[str, dict[str, int]] = {key: {} for key in train["query_id"].to_pylist()}
        above = pc.greater(labels.values, 0)
        queries = train["query_id"].take(pa.array(labels.rows[above.to_numpy()]))
        found = (queries, ids.values.filter(above), labels.values.filter(above))
        for query_id, document_id, gain in zip(*(column.to_pylist() for column in found), strict=True):
            relevant[query_id][document_id] = gain
        return relevant

    def seen_as_relevant(self) -> set[str]:
        """Return the ids of documents that a training takes for good ones: judged, or the teacher's best of a list."""
        train = columns(self.train)
        ids, scores = Ragged(train["document_ids"]), Ragged(train["scores"])
        judged = self.positives()
        without = np.array([not judged[key] for key in train["query_id"].to_pylist()], bool) & (ids.lengths > 0)
        values = scores.values.to_numpy()
        rows = zip(ids.starts[without], ids.lengths[without], strict=True)
        places = [start + int(np.argmax(values[start : start + length])) for start, length in rows]
        best = ids.values.take(pa.array(places, pa.int64())).to_pylist()
        return {document_id for gains in judged.values() for document_id in gains} | {*best}

    def unjudged(self) -> dict[str, int]:
        """Return how many queries have no judged positive, and for how many the teacher's best stands as one."""
        taught = int((self.provenance.get("counts") or {}).get("teacher_positives") or 0)
        without = sum(not judged for judged in self.positives().values())
        return {"unjudged_queries": without + taught, "teacher_positives": taught}

    def to_columns(self, n: int | None = None, *, copied: bool = False) -> Dataset:
        """Return the columns that sentence-transformers' stock trainers and distillation losses take.

        The positive is the document with the highest gain, and among those the highest teacher score. Other positives
        are left out of the row; they are never negatives. Rows with too few negatives are dropped, counted and warned
        about, since columns need lists of one length; `to_lists` keeps everything.

        Args:
            n: Documents in a row, the positive included. `None` takes one more than the builder's `num_negatives`.
            copied: As for `to_lists`.

        Returns:
            `query`, `positive`, `negative_1` ... `negative_{n-1}`, and `label`: n float32 teacher scores, the
            positive's first.

        Raises:
            ValueError: `n` is below 2, or no row has enough negatives; the message names the largest `n` that works.
        """
        if n is None:
            n = 1 + int(self.provenance.get("num_negatives", 0))
        if n < 2:
            raise ValueError(f"n counts the positive and its negatives: give a number from 2 on, got {n}.")
        lists = self._settled()
        rows, relevant = np.repeat(np.arange(len(lists.lengths)), lists.lengths), lists.labels > 0
        negatives = np.bincount(rows[~relevant], minlength=len(lists.lengths))
        # Each row's positives, the highest gain first, then the highest score, then the first.
        order = np.flatnonzero(relevant)
        order = order[np.lexsort((-lists.scores[order], -lists.labels[order], rows[order]))]
        has_positive, first = np.unique(rows[order], return_index=True)
        kept = has_positive[negatives[has_positive] >= n - 1]
        without = len(lists.lengths) - len(has_positive)
        dropped = len(lists.lengths) - len(kept)
        why = f"{dropped - without:,} have fewer than {n - 1} negatives, {without:,} no positive"
        if not len(kept):
            largest = 1 + int(negatives[has_positive].max(initial=0))
            remedy = f"The largest n that works is {largest}." if largest > 1 else "No n works: build it again."
            remedy = (
                remedy
                if len(has_positive)
                else f"{NOTHING_RELEVANT.format('this dataset')}, and columns begin with one. {WITHOUT_POSITIVES}"
            )
            raise ValueError(f"None of {len(self.train):,} rows can be used with n={n}: {why}. {remedy}")
        if dropped:
            warnings.warn(f"{dropped:,} of {len(self.train):,} rows are dropped: {why}.", stacklevel=2)
        begin = np.cumsum(negatives) - negatives
        chosen = np.empty((len(kept), n), np.int64)
        chosen[:, 0] = order[first[np.isin(has_positive, kept)]]
        chosen[:, 1:] = np.flatnonzero(~relevant)[begin[kept][:, None] + np.arange(n - 1)]
        documents = SharedTexts(columns(self.documents)["text"])
        found = {"query": SharedTexts(columns(self.queries)["text"]).at(lists.queries[kept])}
        for place in range(n):
            name = f"negative_{place}" if place else "positive"
            found[name] = documents.at(lists.documents[chosen[:, place]])
        found["label"] = lists_of(np.full(len(kept), n), lists.scores[chosen.ravel()])
        return _texts_dataset(found, copied)

    def to_lists(self, *, copied: bool = False) -> Dataset:
        """Return `query`, `documents`, `scores`, `labels`: one row for a query, all its documents, ragged.

        Where the dataset has preferences, also `pairs`: lists of [first, second, probability], as `ListwiseCollator`
        reads them; where queries are documents of the same id and text, also `own`: that document, or nothing.

        What is no negative is none here, whoever made the dataset: the query's own document is left out of its list,
        what answers another query of the same words has that one's label. Both are counted in a warning.

        Args:
            copied: Texts are held once, and each place where one stands takes 16 bytes (Arrow's `string_view`), in
                workers, in iterable datasets (`to_lists().shuffle(0).to_iterable_dataset(64)`) and after `select` or
                `map`. Arrow cannot sort such columns, shuffle an iterable dataset of them, or make data frames or
                JSON of them: True copies each text to each place, as plain strings, for that.
        """
        lists = self._settled()
        documents = SharedTexts(columns(self.documents)["text"])
        found = {
            "query": SharedTexts(columns(self.queries)["text"]).at(lists.queries),
            "documents": lists_of(lists.lengths, documents.at(lists.documents)),
            "scores": lists_of(lists.lengths, lists.scores),
            "labels": lists_of(lists.lengths, lists.labels),
        }
        if lists.pairs is not None:
            numbers, lengths = lists.pairs
            found["pairs"] = lists_of(lengths, lists_of(np.full(len(numbers), 3), numbers.ravel()))
        if (lists.own >= 0).any():
            found["own"] = documents.at(lists.own[lists.queries])
        return _texts_dataset(found, copied)

    def with_preferences(self, preferences: list[list[dict[str, float]]]) -> DistillationDataset:
        """Return this dataset with a pairwise teacher's preferences.

        Args:
            preferences: For each row the `{first, second, probability}` of its pairs, as
                `st_wkl.data.pairwise.dataset_preferences` makes them; an empty list where there are none.

        Raises:
            ValueError: There is not one list for each row, or one of them does not fit its row.
        """
        if len(preferences) != len(self.train):
            raise ValueError(f"Got preferences for {len(preferences):,} rows, but there are {len(self.train):,}.")
        schema = features("train", preferences=True)
        column = pa.array(preferences, schema.arrow_schema.field(PREFERENCES).type)
        train = columns(self.train).select(list(features("train"))).append_column(PREFERENCES, column)
        return dataclasses.replace(self, train=as_dataset(train, schema))

    def with_pointwise_preferences(self, window: int = 5) -> DistillationDataset:
        """Return this dataset with the preferences that its own scores imply, for `PairDistillLoss`.

        Args:
            window: How many ranks apart two documents are at most, see `st_wkl.data.pairwise.pointwise_preferences`.
        """
        column = [pointwise_preferences(scores.as_py(), window=window) for scores in columns(self.train)["scores"]]
        said = {"teacher": "the dataset's own scores", "window": window, "pairs": sum(map(len, column))}
        return dataclasses.replace(self.with_preferences(column), provenance={**self.provenance, "preferences": said})

    def save(self, folder: str | os.PathLike[str], *, layout: str | None = None) -> Path:
        """Write three parquet files, provenance.json and a README.md that makes the folder a dataset of the Hub.

        Everything is written to a temporary folder that is renamed at the end, so the folder is complete or absent.
        `DistillationDataset.load(folder)` reads it, so does `load_dataset(folder, "train")`, and the Hub once it is
        uploaded.

        Args:
            folder: New or empty folder, or one that holds such a dataset, which is replaced.
            layout: `"flagembedding"` or `"pylate"` for the files that these train on, from which `load` makes the same
                lists; they have no place for preferences and provenance.

        Raises:
            FileExistsError: The folder holds something else.
            ValueError: There is no such layout.
        """
        folder = Path(folder).expanduser()
        check_free(folder)
        if layout is not None:
            return self._export(folder, layout)
        with replacing_folder(folder) as new:
            for name in TABLES:
                table = getattr(self, name).with_format(None)
                schema = features(name, preferences=PREFERENCES in table.column_names)
                table = table.select_columns(list(schema))
                table = table if table.features == schema else table.cast(schema)
                table.to_parquet(new / f"{name}.parquet")
            if absent := [name for name in TABLES if not (new / f"{name}.parquet").is_file()]:
                raise FileNotFoundError(f"{new} lacks {', '.join(absent)} after all was written. Give another folder.")
            describe(new, self.provenance)
        return folder

    def _export(self, folder: Path, layout: str) -> Path:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; it has to be one of {', '.join(LAYOUTS)}.")
        if PREFERENCES in self.train.column_names:
            warnings.warn(f"{layout} has no place for preferences, which are left out.", stacklevel=3)
        with replacing_folder(folder) as new:
            LAYOUTS[layout](new, *(columns(getattr(self, name)) for name in TABLES))
        return folder

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        revision: str | None = None,
        collection: Collection | str | os.PathLike[str] | None = None,
        split: str = "train",
        scores: Any = None,
        teacher: str | None = None,
        missing: Missing = "raise",
        **columns: str | None,
    ) -> DistillationDataset:
        """Read a distillation dataset from a folder that `save` wrote, from the Hub, or scores that others have made.

        Read are, by the names of their columns: FlagEmbedding's lines (`query, pos, neg, pos_scores, neg_scores`),
        PyLate's tables (train, queries, documents), Tevatron's lines, rows of `query, positive, negative_1, …` with a
        list of scores, lists and pairs of `query, document, score`, hard negatives by id, and runs of TREC; as JSON
        lines, CSV, TSV, Parquet, a folder of these, a data frame, a `datasets.Dataset` or an iterable one. Rows of one
        query become one list, positives first. Ids of any type become text, texts without ids get a hash for one.

        What is not there is said, not made up: a gain that nobody gives stays 0, a list without scores is refused. Of
        a pair that comes twice the first score and the higher gain count, scores that differ by more than rounding are
        an error. `st_wkl.data.importers.convert` does the same from disk to disk.

        Args:
            source: Folder, file, frame or dataset; or id of a dataset on the Hub, such as `"me/nfcorpus-distillation"`.
            revision: Branch, tag or commit on the Hub.
            collection: Collection whose texts and judgements belong to ids; see `Collection.load`.
            split: Split of its judgements.
            scores: Scores of lists that have none: pairs or lists by the same ids, anything that `source` can be.
            teacher: Name of the model that made the scores, for the card.
            missing: `"raise"` an error for a pair without a text or a finite score, or `"drop"` it, counted.
            **columns: Names of columns that are not recognised, by role: `query`, `query_id`, `text` and `title` (of
                the document), `id` (its id), `score`, `label` (the gain).

        Raises:
            FileNotFoundError: There is no such folder or dataset, the Hub cannot be reached, or a file is missing.
            ValueError: A file is damaged, the tables do not belong together, or a value cannot be used; the message
                names file, row and value.

        Example:
            >>> rows = {"query": ["who purrs"] * 2, "document": ["Cats purr.", "Dogs bark."], "score": [4.5, -2.0]}
            >>> import warnings
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")
            ...     DistillationDataset.load(Dataset.from_dict(rows), teacher="my-reranker").train[0]["scores"]
            [4.5, -2.0]
        """
        folder = fetched(source, revision) if isinstance(source, str | os.PathLike) else None
        told = {"collection": collection, "scores": scores, "teacher": teacher, **columns}
        if folder is None or (folder.exists() and not is_saved(folder)):
            with tempfile.TemporaryDirectory() as place:
                convert(source if folder is None else folder, place, split=split, missing=missing, **told)
                return cls.load(place)
        if given := [name for name, value in told.items() if value is not None]:
            raise ValueError(f"{folder} is a distillation dataset already, for which {given[0]}= means nothing.")
        tables, provenance = read_tables(folder)
        return cls(**tables, provenance=provenance)

    def save_to_disk(self, folder: str | os.PathLike[str]) -> Path:
        """Do what `save` does; this name of the first edition goes in the release after this one."""
        _say_renamed("save_to_disk", "save")
        return self.save(folder)

    @classmethod
    def load_from_disk(cls, folder: str | os.PathLike[str]) -> DistillationDataset:
        """Do what `load` does; this name of the first edition goes in the release after this one."""
        _say_renamed("load_from_disk", "load")
        return cls.load(Path(folder).expanduser().absolute())

    @classmethod
    def from_hub(cls, repo_id_or_folder: str | os.PathLike[str], *, revision: str | None = None) -> DistillationDataset:
        """Do what `load` does; this name of the first edition goes in the release after this one."""
        _say_renamed("from_hub", "load")
        return cls.load(repo_id_or_folder, revision=revision)

    def _settled(self) -> Lists:
        keeps_own = self.provenance.get(IGNORES) is False
        return settled(columns(self.train), columns(self.queries), columns(self.documents), keeps_own=keeps_own)

    def push_to_hub(self, repo_id: str, *, private: bool = True, create_pr: bool = False) -> str:
        """Upload the files of `save`, card included, as a dataset of the Hub, and return the commit's URL.

        It is `st_wkl.push_dataset`, which says what is checked, and where a network that breaks leaves the repository.
        Texts of the collection are part of it: look at their licence before you make it public.

        Args:
            repo_id: `"organisation/name"`; new, or pushed by this package before.
            private: Make a new repository private, and refuse one that everybody can see.
            create_pr: Open a pull request instead of writing.
        """
        hub: Any = importlib.import_module("st_wkl.publish.hub")  # a floor above, which this one does not stand on
        return str(hub.push_dataset(self, repo_id, private=private, create_pr=create_pr).url)


def _texts_dataset(found: dict[str, pa.Array], copied: bool) -> Dataset:
    """Return columns as a dataset: lists of numbers and of texts as they are named elsewhere."""
    text = Value("string" if copied else "string_view")
    known = {"documents": List(text), "scores": List(Value("float32")), "labels": List(Value("int32"))}
    known |= {"label": known["scores"], "pairs": List(known["scores"])}
    return as_dataset(pa.table(found), Features({name: known.get(name, text) for name in found}))


def _say_renamed(old: str, new: str) -> None:
    warnings.warn(f"DistillationDataset.{old} is {new} now, and goes in the next release.", DeprecationWarning, 3)
