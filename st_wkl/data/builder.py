"""From a collection and a teacher to a distillation dataset, in one call."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from st_wkl.data.candidates import Candidates, bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.score_store import ScoreStore, default_store_path
from st_wkl.data.scoring import score_pairs
from st_wkl.data.teachers import CrossEncoderTeacher, Teacher

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

_PACKAGES = ("st-wkl", "sentence-transformers", "transformers", "torch", "onnxruntime", "datasets", "bm25s", "numba")


class DistillationDatasetBuilder:
    """Mine candidates, add the judged positives, score all of it with a teacher, and lay it out for training.

    A row holds all judged positives of a query (gain above 0), whether the first stage found them or not, and then the
    first `num_negatives` candidates that are not judged relevant. Documents judged as not relevant (gain 0) may be
    among these. Unjudged candidates may be relevant in truth; their teacher scores say how much.

    Args:
        collection: A `Collection`, a BEIR folder, or a folder or Hub dataset in MTEB's layout.
        teacher: A `Teacher`, or what `CrossEncoderTeacher` takes: a Hub id, a folder, a loaded `CrossEncoder`.
        split: Split of the judgements that names queries and positives. Keep the one for evaluation out of training.
        query_ids: Only these queries, in this order; `None` takes all queries of the split.
        candidates: `{query_id: candidates, best first}`, or `None` for BM25.
        num_negatives: Negatives of a row at most. 15 beside a positive is a common size of distillation lists.
        store: Where scores are kept: a file, a `ScoreStore`, or `":memory:"` for nowhere. `None` takes
            `default_store_path()` in the user's cache folder, since scoring is what takes hours.

    Raises:
        ValueError: The split or a query does not exist, or candidates name unknown documents.

    Example:
        >>> teacher = CrossEncoderTeacher("cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> dataset = DistillationDatasetBuilder("mteb/nfcorpus", teacher).build()  # doctest: +SKIP
        >>> dataset.save_to_disk("nfcorpus-distillation")  # doctest: +SKIP
    """

    def __init__(
        self,
        collection: Collection | str | os.PathLike[str],
        teacher: Teacher | str | os.PathLike[str] | CrossEncoder,
        *,
        split: str = "train",
        query_ids: Iterable[str] | None = None,
        candidates: Candidates | None = None,
        num_negatives: int = 15,
        store: ScoreStore | str | os.PathLike[str] | None = None,
    ) -> None:
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be 1 or more, got {num_negatives}: a list of one teaches nothing.")
        self.collection = Collection.load(collection)
        self.split = split
        self.num_negatives = num_negatives
        self.candidates = candidates
        self.store = store
        judged = self.collection.judgements(split)
        self.query_ids = list(judged) if query_ids is None else list(dict.fromkeys(query_ids))
        if absent := [query_id for query_id in self.query_ids if query_id not in self.collection.queries]:
            raise ValueError(
                f"{len(absent):,} of the query ids are not in {self.collection.name!r}; the first is {absent[0]!r}."
            )
        if candidates is not None:
            _check_candidates(candidates, self.query_ids, self.collection)
        is_teacher = hasattr(teacher, "identity") and hasattr(teacher, "score")
        self.teacher: Teacher = teacher if is_teacher else CrossEncoderTeacher(teacher)  # type: ignore[assignment, arg-type]

    def build(self, show_progress: bool = True) -> DistillationDataset:
        """Run all stages. What was scored before, in this run or another, is taken from the store.

        Args:
            show_progress: Show bars.

        Raises:
            ValueError: No query is left, or the teacher returns something that is not a score.
        """
        candidates, source = self._candidates(show_progress)
        rows, dropped = self._select(candidates)
        texts, queries = self.collection.documents, self.collection.queries
        pairs = [(queries[row.query_id], texts[document_id]) for row in rows for document_id in row.document_ids]
        with self._opened_store() as store:
            flat = score_pairs(self.teacher, pairs, store=store, show_progress=show_progress)
        ends = np.cumsum([len(row.document_ids) for row in rows])
        scores = np.split(flat, ends[:-1])
        report = _teacher_report(rows, scores)
        provenance = {
            "collection": {"name": self.collection.name, "fingerprint": self.collection.fingerprint},
            "split": self.split,
            "num_negatives": self.num_negatives,
            "candidates": source,
            "teacher": self.teacher.identity,
            "counts": {"queries": len(rows), "pairs": len(pairs), "different_pairs": len(set(pairs))},
            "dropped": dropped,
            "report": report,
            "versions": _versions(),
        }
        return self._assemble(rows, scores, provenance)

    @contextmanager
    def _opened_store(self) -> Iterator[ScoreStore]:
        if isinstance(self.store, ScoreStore):
            yield self.store
        else:
            with ScoreStore(default_store_path() if self.store is None else self.store) as store:
                yield store

    def _candidates(self, show_progress: bool) -> tuple[Candidates, dict[str, Any]]:
        if self.candidates is None:
            positives = self.collection.positives(self.split)
            most = max((len(positives.get(query_id, ())) for query_id in self.query_ids), default=0)
            # Deep enough even if every positive of a query stands before its negatives.
            parameters: dict[str, Any] = {"top_k": self.num_negatives + most}
            query_ids = [query_id for query_id in self.query_ids if query_id in positives]
            found = bm25_candidates(self.collection, query_ids, show_progress=show_progress, **parameters)
        else:
            found, parameters = self.candidates, {}
        sources = Counter(hit.source for query_id in self.query_ids for hit in found.get(query_id, ()))
        return found, {"sources": dict(sorted(sources.items())), **parameters}

    def _select(self, candidates: Candidates) -> tuple[list[_Row], dict[str, int]]:
        judgements, texts = self.collection.judgements(self.split), self.collection.documents
        dropped = dict.fromkeys(
            ("queries_without_positive", "queries_without_candidate", "queries_without_negative", "empty_documents"), 0
        )
        rows = []
        for query_id in self.query_ids:
            judged = judgements.get(query_id, {})
            ranked = list(dict.fromkeys(hit.document_id for hit in candidates.get(query_id, ())))
            place = {document_id: rank for rank, document_id in enumerate(ranked)}
            relevant = [document_id for document_id, gain in judged.items() if gain > 0]
            relevant.sort(key=lambda document_id: (-judged[document_id], place.get(document_id, len(place))))
            others = [document_id for document_id in ranked if judged.get(document_id, 0) <= 0]
            positives = [document_id for document_id in relevant if texts[document_id].strip()]
            negatives = [document_id for document_id in others if texts[document_id].strip()]
            dropped["empty_documents"] += len(relevant) - len(positives) + len(others) - len(negatives)
            if not positives:
                dropped["queries_without_positive"] += 1
            elif not ranked:
                dropped["queries_without_candidate"] += 1
            elif not negatives:
                dropped["queries_without_negative"] += 1
            else:
                document_ids = positives + negatives[: self.num_negatives]
                rows.append(_Row(query_id, document_ids, [judged.get(document_id, 0) for document_id in document_ids]))
        total = len(self.query_ids)
        lost = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in dropped.items() if count)
        if not rows:
            raise ValueError(
                f"None of {total:,} queries of split {self.split!r} of {self.collection.name!r} can be used: {lost}. "
                "A query needs a document with a gain above 0 and a candidate that is none of these."
            )
        if lost:
            warnings.warn(f"{total - len(rows):,} of {total:,} queries are dropped; in all: {lost}.", stacklevel=3)
        return rows, dropped

    def _assemble(
        self, rows: Sequence[_Row], scores: Sequence[np.ndarray], provenance: dict[str, Any]
    ) -> DistillationDataset:
        from datasets import Dataset

        used = list(dict.fromkeys(document_id for row in rows for document_id in row.document_ids))
        queries, documents = self.collection.queries, self.collection.documents
        columns = {
            "train": {
                "query_id": [row.query_id for row in rows],
                "document_ids": [row.document_ids for row in rows],
                "scores": list(scores),
                "labels": [row.labels for row in rows],
            },
            "queries": {
                "query_id": [row.query_id for row in rows],
                "text": [queries[row.query_id] for row in rows],
            },
            "documents": {"document_id": used, "text": [documents[document_id] for document_id in used]},
        }
        tables = {name: Dataset.from_dict(values, features=features(name)) for name, values in columns.items()}
        provenance["counts"]["documents"] = len(used)
        return DistillationDataset(**tables, provenance=provenance)


@dataclass(frozen=True)
class _Row:
    query_id: str
    document_ids: list[str]
    labels: list[int]


def _check_candidates(candidates: Candidates, query_ids: Iterable[str], collection: Collection) -> None:
    absent = [
        (query_id, hit.document_id)
        for query_id in query_ids
        for hit in candidates.get(query_id, ())
        if hit.document_id not in collection.documents
    ]
    if absent:
        raise ValueError(
            f"{len(absent):,} candidates are not in {collection.name!r}: the first is document {absent[0][1]!r} of "
            f"query {absent[0][0]!r}. Use candidates that were mined from this collection."
        )


def _teacher_report(rows: Sequence[_Row], scores: Sequence[np.ndarray]) -> dict[str, float]:
    """Return how far the teacher agrees with the judgements, and how sharply it tells documents apart."""
    margins, spreads = [], []
    for row, values in zip(rows, scores, strict=True):
        relevant = np.asarray(row.labels) > 0
        margins.append(float(values[relevant].max() - values[~relevant].max()))
        spreads.append(float(values.max() - values.min()))
    everything = np.concatenate(scores)
    constant = sum(spread == 0 for spread in spreads)
    if constant:
        warnings.warn(
            f"The teacher gives all documents of {constant:,} of {len(rows):,} queries one score. Such lists teach "
            "nothing. Check that it is a reranker and that the texts are not cut to nothing.",
            stacklevel=3,
        )
    elif everything.min() >= 0 and everything.max() <= 1:
        warnings.warn(
            "All teacher scores lie between 0 and 1, as after a sigmoid, which flattens the differences between good "
            "documents. Use raw logits, or a low teacher temperature.",
            stacklevel=3,
        )
    report = {
        # A tie counts as wrong: a teacher that gives everything the same score is not right.
        "precision_at_1": float(np.mean([margin > 0 for margin in margins])),
        "mean_spread": float(np.mean(spreads)),
        "mean_margin": float(np.mean(margins)),
        "lowest_score": float(everything.min()),
        "highest_score": float(everything.max()),
    }
    logger.info(
        "The teacher's best document is judged relevant for %.1f %% of %d queries; mean spread of a list %.2f, best "
        "positive minus best negative %.2f.",
        100 * report["precision_at_1"],
        len(rows),
        report["mean_spread"],
        report["mean_margin"],
    )
    return report


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout, or an extra that is not installed
    return versions
