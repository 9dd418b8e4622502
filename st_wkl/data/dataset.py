"""The distillation dataset: teacher scores of candidate lists, as ids beside the texts they point to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.data.selection import is_own_text, shared_judgements
from st_wkl.files import replacing_folder

if TYPE_CHECKING:
    from datasets import Dataset, Features

_TABLES = ("train", "queries", "documents")
_PROVENANCE = "provenance.json"
_PREFERENCES = "preferences"
# Where the provenance keeps what the collection was told about documents of a query's id; absent if nothing.
IGNORES = "ignore_identical_ids"


def features(table: str, *, preferences: bool = False) -> Features:
    """Return the `datasets.Features` of one of the three tables, `"train"`, `"queries"` or `"documents"`.

    Args:
        table: Name of the table.
        preferences: With the column of a pairwise teacher, which only `"train"` may have.
    """
    from datasets import Features, List, Value

    text = Value("string")
    if table == "train":
        lists = Features(
            query_id=text, document_ids=List(text), scores=List(Value("float32")), labels=List(Value("int32"))
        )
        place = Value("int32")
        pair = {"first": place, "second": place, "probability": Value("float32")}
        return Features({**lists, _PREFERENCES: List(pair)}) if preferences else lists
    return Features({"query_id" if table == "queries" else "document_id": text, "text": text})


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
        >>> dataset = DistillationDataset.load_from_disk("nfcorpus-distillation")  # doctest: +SKIP
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
        for name in _TABLES:
            found = getattr(self, name).column_names
            expected = list(features(name, preferences=_PREFERENCES in found))
            if sorted(expected) != sorted(found):
                raise ValueError(f"The table {name!r} has the columns {found}, expected {expected}.")
        texts = {"query": self._texts("queries"), "document": self._texts("documents")}
        for kind, table in (("query", self.queries), ("document", self.documents)):
            if len(texts[kind]) != len(table):
                raise ValueError(f"The {kind} ids are not unique: {len(table)} rows, {len(texts[kind])} ids.")
        for row in self._rows():
            where = f"The row of query {row['query_id']!r}"
            lengths = {column: len(row[column]) for column in ("document_ids", "scores", "labels")}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"{where} has lists of different lengths: {lengths}.")
            if not all(score is not None and math.isfinite(score) for score in row["scores"]):
                raise ValueError(f"{where} has a score that is not finite: {row['scores']}. Score it again.")
            for pair in row.get(_PREFERENCES) or []:
                if not _fits(pair, len(row["document_ids"])):
                    raise ValueError(
                        f"{where} has the preference {pair}, which names no two of its {lengths['document_ids']} "
                        "documents (places count from 0) or is no probability. Drop it, or ask the pairwise teacher "
                        "again."
                    )
            for kind, ids in (("query", [row["query_id"]]), ("document", row["document_ids"])):
                if absent := [key for key in ids if key not in texts[kind]]:
                    raise ValueError(f"{where} names the {kind} {absent[0]!r}, which has no text in this dataset.")

    def __len__(self) -> int:
        """Return the number of rows (queries)."""
        return len(self.train)

    def __repr__(self) -> str:
        """Return the sizes, not the contents."""
        name = self.provenance.get("collection", {}).get("name", "?")
        return (
            f"DistillationDataset({name!r}, {len(self.train):,} rows, {len(self.queries):,} queries, "
            f"{len(self.documents):,} documents)"
        )

    def positives(self) -> dict[str, dict[str, int]]:
        """Return `{query_id: {document_id: gain}}` of all documents with a gain above 0."""
        relevant: dict[str, dict[str, int]] = {}
        for row in self._rows():
            judged = zip(row["document_ids"], row["labels"], strict=True)
            relevant.setdefault(row["query_id"], {}).update((key, gain) for key, gain in judged if gain > 0)
        return relevant

    def to_columns(self, n: int | None = None) -> Dataset:
        """Return the columns that sentence-transformers' stock trainers and distillation losses take.

        The positive is the document with the highest gain, and among those the highest teacher score. Other positives
        are left out of the row; they are never negatives. Rows with too few negatives are dropped, counted and warned
        about, since columns need lists of one length; `to_lists` keeps everything.

        Args:
            n: Documents in a row, the positive included. `None` takes one more than the builder's `num_negatives`.

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
        queries, documents = self._texts("queries"), self._texts("documents")
        names = ["query", "positive", *(f"negative_{place}" for place in range(1, n))]
        columns: dict[str, list[Any]] = {name: [] for name in [*names, "label"]}
        largest, without = 0, 0
        for row in self._settled():
            entries = list(zip(row["labels"], row["scores"], row["document_ids"], strict=True))
            positives = [entry for entry in entries if entry[0] > 0]
            negatives = [entry for entry in entries if entry[0] <= 0]
            if not positives or len(negatives) < n - 1:
                largest = max(largest, 1 + len(negatives) if positives else 0)
                without += not positives
                continue
            chosen = [max(positives, key=lambda entry: entry[:2]), *negatives[: n - 1]]
            texts = [queries[row["query_id"]], *(documents[entry[2]] for entry in chosen)]
            for name, text in zip(names, texts, strict=True):
                columns[name].append(text)
            columns["label"].append([entry[1] for entry in chosen])
        dropped = len(self.train) - len(columns["query"])
        why = f"{dropped - without:,} have fewer than {n - 1} negatives, {without:,} no positive"
        if not columns["query"]:
            remedy = f"The largest n that works is {largest}." if largest > 1 else "No n works: build it again."
            raise ValueError(f"None of {len(self.train):,} rows can be used with n={n}: {why}. {remedy}")
        if dropped:
            warnings.warn(f"{dropped:,} of {len(self.train):,} rows are dropped: {why}.", stacklevel=2)
        from datasets import Dataset, Features, List, Value

        schema = Features({**{name: Value("string") for name in names}, "label": List(Value("float32"))})
        return Dataset.from_dict(columns, features=schema)

    def to_lists(self) -> Dataset:
        """Return `query`, `documents`, `scores`, `labels`: one row for a query, all its documents, ragged.

        Where the dataset has preferences, also `pairs`: lists of [first, second, probability], as `ListwiseCollator`
        reads them; where queries are documents of the same id and text, also `own`: that document, or nothing.

        What is no negative is none here, whoever made the dataset: the query's own document is left out of its list,
        what answers another query of the same words has that one's label. Both are counted in a warning.
        """
        from datasets import Dataset, Features, List, Value

        queries, documents = self._texts("queries"), self._texts("documents")
        columns: dict[str, list[Any]] = {"query": [], "documents": [], "scores": [], "labels": []}
        rows = self._settled()
        for row in rows:
            columns["query"].append(queries[row["query_id"]])
            columns["documents"].append([documents[document_id] for document_id in row["document_ids"]])
            columns["scores"].append(row["scores"])
            columns["labels"].append(row["labels"])
        text = Value("string")
        schema = Features(query=text, documents=List(text), scores=List(Value("float32")), labels=List(Value("int32")))
        if _PREFERENCES in self.train.column_names:
            names = ("first", "second", "probability")
            columns["pairs"] = [[[float(pair[name]) for name in names] for pair in row[_PREFERENCES]] for row in rows]
            schema = Features({**schema, "pairs": List(List(Value("float32")))})
        if own := self._own_documents(queries, documents):
            columns["own"] = [documents[row["query_id"]] if row["query_id"] in own else "" for row in rows]
            schema = Features({**schema, "own": text})
        return Dataset.from_dict(columns, features=schema)

    def with_preferences(self, preferences: list[list[dict[str, float]]]) -> DistillationDataset:
        """Return this dataset with a pairwise teacher's preferences.

        Args:
            preferences: For each row the `{first, second, probability}` of its pairs, as
                `st_wkl.data.pairwise.dataset_preferences` makes them; an empty list where there are none.

        Raises:
            ValueError: There is not one list for each row, or one of them does not fit its row.
        """
        from datasets import Dataset

        if len(preferences) != len(self.train):
            raise ValueError(f"Got preferences for {len(preferences):,} rows, but there are {len(self.train):,}.")
        train = {**self.train.with_format(None)[:], _PREFERENCES: preferences}
        schema = features("train", preferences=True)
        return dataclasses.replace(self, train=Dataset.from_dict(train, features=schema))

    def with_pointwise_preferences(self, window: int = 5) -> DistillationDataset:
        """Return this dataset with the preferences that its own scores imply, for `PairDistillLoss`.

        Args:
            window: How many ranks apart two documents are at most, see `st_wkl.data.pairwise.pointwise_preferences`.
        """
        from st_wkl.data.pairwise import pointwise_preferences

        column = [pointwise_preferences(row["scores"], window=window) for row in self._rows()]
        said = {"teacher": "the dataset's own scores", "window": window, "pairs": sum(map(len, column))}
        return dataclasses.replace(self.with_preferences(column), provenance={**self.provenance, "preferences": said})

    def save_to_disk(self, folder: str | os.PathLike[str]) -> Path:
        """Write three parquet files, provenance.json and a README.md that makes the folder a dataset of the Hub.

        Everything is written to a temporary folder that is renamed at the end, so the folder is complete or absent.
        `load_dataset(folder, "train")` reads it, and so does the Hub once it is uploaded.

        Args:
            folder: New or empty folder, or one that holds such a dataset, which is replaced.

        Raises:
            FileExistsError: The folder holds something else.
        """
        return self._save(Path(folder).expanduser(), "path/to/this/folder")

    def _save(self, folder: Path, card_path: str) -> Path:
        from st_wkl.data.dataset_card import dataset_card

        if folder.exists() and not (folder / _PROVENANCE).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} holds something other than a distillation dataset. Give another folder.")
        with replacing_folder(folder) as new:
            for name in _TABLES:
                table = getattr(self, name).with_format(None)
                schema = features(name, preferences=_PREFERENCES in table.column_names)
                table = table.select_columns(list(schema))
                table = table if table.features == schema else table.cast(schema)
                table.to_parquet(new / f"{name}.parquet")
            if absent := [name for name in _TABLES if not (new / f"{name}.parquet").is_file()]:
                raise FileNotFoundError(f"{new} lacks {', '.join(absent)} after all was written. Give another folder.")
            text = json.dumps(self.provenance, indent=2, ensure_ascii=False, allow_nan=False)
            (new / _PROVENANCE).write_text(text + "\n", encoding="utf-8")
            contents = hashlib.blake2b(b"".join(map(_file_digest, sorted(new.iterdir()))), digest_size=16).hexdigest()
            (new / "README.md").write_text(dataset_card(self, contents=contents, path=card_path), encoding="utf-8")
        return folder

    @classmethod
    def load_from_disk(cls, folder: str | os.PathLike[str]) -> DistillationDataset:
        """Read what `save_to_disk` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, or the tables do not belong together.
        """
        import pyarrow.parquet
        from datasets import Dataset

        folder = Path(folder).expanduser()
        for name in (*(f"{table}.parquet" for table in _TABLES), _PROVENANCE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}, so it is no complete distillation dataset. Copy or build it again."
                )
        tables = {}
        for name in _TABLES:
            try:
                # Read directly: `datasets` would first copy the file to its cache.
                tables[name] = Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet"))
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"{folder / name}.parquet is damaged ({error}). Copy or build it again.") from error
        try:
            provenance = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / _PROVENANCE} is damaged ({error}). Copy or build it again.") from error
        return cls(**tables, provenance=provenance)

    def push_to_hub(self, repo_id: str, *, private: bool = True, create_pr: bool = False) -> str:
        """Upload the files of `save_to_disk`, card included, as a dataset of the Hub, in one commit.

        Texts of the collection are part of it: look at their licence before you make it public. You log in with `hf
        auth login` or `HF_TOKEN`; no token passes through here. More on what is checked: `st_wkl.push_dataset`.

        Args:
            repo_id: `"organisation/name"`; new, or pushed by this package before.
            private: Make a new repository private, and refuse one that everybody can see.
            create_pr: Open a pull request instead of writing.

        Returns:
            URL of the commit, or of the pull request.

        Raises:
            FileExistsError: The repository holds what was not pushed with st_wkl.
            PermissionError: No login, or no access.
            ConnectionError: The network broke; the message says what the repository holds.
        """
        from st_wkl.publish.hub import push_dataset

        return push_dataset(self, repo_id, private=private, create_pr=create_pr).url

    @classmethod
    def from_hub(cls, repo_id_or_folder: str | os.PathLike[str], *, revision: str | None = None) -> DistillationDataset:
        """Read a distillation dataset from the Hub, or from a folder. The collection is not needed.

        Args:
            repo_id_or_folder: Dataset id, or a folder that `save_to_disk` wrote.
            revision: Branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: There is no such dataset, the Hub cannot be reached, or a file is missing.
            ValueError: A file is damaged, or the tables do not belong together.

        Example:
            >>> dataset = DistillationDataset.from_hub("me/nfcorpus-distillation")  # doctest: +SKIP
        """
        folder = Path(repo_id_or_folder).expanduser()
        if folder.is_dir():
            return cls.load_from_disk(folder)
        from st_wkl.data._reading import download

        return cls.load_from_disk(download(str(repo_id_or_folder), revision))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.train.with_format(None).iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def _own_documents(self, queries: Mapping[str, str], documents: Mapping[str, str]) -> set[str]:
        """Return the queries that are documents of the same id and text, unless these were to be kept."""
        if self.provenance.get(IGNORES) is False:
            return set()
        return {key for key, text in queries.items() if key in documents and is_own_text(text, documents[key])}

    def _settled(self) -> list[dict[str, Any]]:
        """Return the rows without what is no negative; of what the builder made, these are the rows as they are."""
        queries = self._texts("queries")
        own = self._own_documents(queries, self._texts("documents"))
        rows, judged = list(self._rows()), defaultdict[str, dict[str, int]](dict)
        for row in rows:
            gains = judged[row["query_id"]]
            for key, gain in zip(row["document_ids"], row["labels"], strict=True):
                gains[key] = max(gain, gains.get(key, gain))
        shared, _ = shared_judgements(queries, judged)
        left_out = changed = 0
        settled = []
        for row in rows:
            labels = [shared[row["query_id"]][key] for key in row["document_ids"]]
            mine = {row["query_id"]} & own
            kept = [place for place, key in enumerate(row["document_ids"]) if key not in mine or labels[place] > 0]
            changed += sum(map(int.__ne__, labels, row["labels"]))
            left_out += len(labels) - len(kept)
            settled.append(_at({**row, "labels": labels}, kept))
        if left_out or changed:
            warnings.warn(
                f"{left_out:,} lists hold the query's own document as no answer, and it is left out; {changed:,} "
                "labels are those of another query of the same words. Build the dataset again to settle it.",
                stacklevel=3,
            )
        return settled

    def _texts(self, table: str) -> Mapping[str, str]:
        key, value = features(table)
        columns = getattr(self, table).with_format(None)[:]
        return dict(zip(columns[key], columns[value], strict=True))


def _at(row: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return a row with the documents at some places; its preferences then count these."""
    chosen = {**row, **{name: [row[name][place] for place in kept] for name in ("document_ids", "scores", "labels")}}
    if _PREFERENCES in row:
        places = {place: number for number, place in enumerate(kept)}
        chosen[_PREFERENCES] = [
            {**pair, "first": places[pair["first"]], "second": places[pair["second"]]}
            for pair in row[_PREFERENCES] or []
            if pair["first"] in places and pair["second"] in places
        ]
    return chosen


def _fits(pair: Mapping[str, Any], documents: int) -> bool:
    """Tell whether a preference names two documents of its row and holds a probability."""
    first, second, probability = (pair.get(name) for name in ("first", "second", "probability"))
    if first is None or second is None or probability is None:
        return False
    return 0 <= first < documents and 0 <= second < documents and first != second and 0 <= probability <= 1


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
