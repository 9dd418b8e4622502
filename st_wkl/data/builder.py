"""From a collection and a teacher to a distillation dataset, in one call."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from st_wkl._versions import installed_versions
from st_wkl.data.arrow import as_dataset, lists_of
from st_wkl.data.candidates import Candidates, Source, check_candidates, find_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.dataset_files import IGNORES, features
from st_wkl.data.ensemble import EnsembleTeacher
from st_wkl.data.leaks import UNUSABLE, document_disjoint, document_key, find_leaks, relevant_keys
from st_wkl.data.pairwise import dataset_preferences
from st_wkl.data.pools import (
    DROPPED,
    Pools,
    check_lists,
    correct_labels,
    make_lists,
    make_pools,
    teacher_positives,
)
from st_wkl.data.provenance import python_call
from st_wkl.data.report import report_on_lists
from st_wkl.data.score_store import ScoreStore, default_store_path
from st_wkl.data.scoring import ScoringEstimate, estimate_scoring, score_candidates
from st_wkl.data.selection import Selection, shared_judgements
from st_wkl.data.teacher import Engine, ListTeacher, PairwiseTeacher, Teacher, TextPairs
from st_wkl.ranges import OptionError, check_options
from st_wkl.text import near_texts

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

_PACKAGES = ("st-wkl", "sentence-transformers", "transformers", "torch", "onnxruntime", "datasets", "bm25s", "numba")


class DistillationDatasetBuilder:
    """Mine candidates, add the judged positives, score all of it with a teacher, and lay it out for training.

    A row holds all judged positives of a query (gain above 0), whether the first stage found them or not, and then
    `num_negatives` candidates that are not judged relevant, by default the first ones. Documents judged as not relevant
    (gain 0) may be among these, documents with a gain below 0 are not. Unjudged candidates may be relevant in truth;
    their teacher scores say how much. Copies of a positive and of another candidate are left out.

    Queries without a positive are dropped, unless the selection's `positives` says what becomes of them. A collection
    without a training split has nothing else: its queries that no split judges are learnt from, in lists of
    `num_negatives` + 1 candidates.

    Args:
        collection: A `Collection`, a BEIR folder, or a folder or Hub dataset in MTEB's layout.
        teacher: A `Teacher` of pairs or a `ListTeacher` (several teachers, or feedback), or what `CrossEncoderTeacher`
            takes: a Hub id, a folder, a loaded `CrossEncoder`. A list of these becomes an `EnsembleTeacher` whose
            scores are z-scored in each list, since the logits of two models share no scale.
        split: Split of the judgements that names queries and positives. Keep the one for evaluation out of training.
        query_ids: Only these queries, in this order; `None` takes all queries of the split, and those that no split
            judges where they are kept.
        candidates: `{query_id: candidates, best first}`, or `None` for BM25.
        num_negatives: Negatives of a row at most. 15 beside a positive is a common size of distillation lists.
        store: Where scores are kept: a file, a `ScoreStore`, or `":memory:"` for nowhere. `None` takes
            `default_store_path()` in the user's cache folder, since scoring is what takes hours.
        selection: How negatives are filtered and chosen and labels corrected; `None` for the defaults of `Selection`.
        against: Test split of the collection that the dataset is compared with, see `find_leaks`: the result is
            warned about and kept in the provenance. Where there is no split of the default's name, nothing is compared.
        drop_leaks: Leave out queries that are, or nearly are, queries of `against`, and do not use any document that
            is relevant there as a positive, see `document_disjoint`.
        pairwise: Teacher that is asked which of two neighbouring documents is better, for the `preferences` column that
            `PairDistillLoss` learns from; its answers are kept in the store, too.
        pairs_per_query: Pairs that it is asked about, drawn from those within 5 ranks of each other by the teacher's
            scores; `None` for all of these, about 5 for each document.
        engine: Where pairs are scored: in this process, in a `"pool"` of them, or on `"ray"`; see `score_pairs`.
        workers: Processes of a pool, or actors on Ray; see `score_pairs`.

    Raises:
        ValueError: A split or a query does not exist, candidates name unknown documents, a number is out of range, or
            a list would have thousands of documents, since a query has as many positives; or options are measured
            from positives, and there is none.

    Example:
        >>> teacher = CrossEncoderTeacher("cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> dataset = DistillationDatasetBuilder("mteb/nfcorpus", teacher).build()  # doctest: +SKIP
        >>> dataset.save("nfcorpus-distillation")  # doctest: +SKIP
    """

    def __init__(
        self,
        collection: Collection | str | os.PathLike[str],
        teacher: Teacher | ListTeacher | str | os.PathLike[str] | CrossEncoder | Sequence[Any],
        *,
        split: str = "train",
        query_ids: Iterable[str] | None = None,
        candidates: Candidates | None = None,
        num_negatives: int = 15,
        store: ScoreStore | str | os.PathLike[str] | None = None,
        selection: Selection | None = None,
        against: str | None = "test",
        drop_leaks: bool = False,
        pairwise: PairwiseTeacher | None = None,
        pairs_per_query: int | None = None,
        engine: Engine = "process",
        workers: int | None = None,
    ) -> None:
        check_options(num_negatives=num_negatives, pairs_per_query=pairs_per_query, workers=workers)
        self.collection = Collection.load(collection)
        self.split = split
        self.num_negatives = num_negatives
        self.candidates = candidates
        self.store = store
        self.selection = selection or Selection()
        self._judged = self.collection.learnt_from(split, self.selection.positives)
        if not self._has(split) and self.selection.positives is None:
            self.selection = dataclasses.replace(self.selection, positives="optional")
        self.drop_leaks = drop_leaks
        self.against = None if against == split or (against == "test" and not self._has(against)) else against
        if against == split:
            warnings.warn(
                f"Split {split!r} of {self.collection.name!r} is learnt from, and is the test split too: all of it "
                "leaks, and what is measured on it is no test. Learn from another, or say which one tests (against).",
                stacklevel=2,
            )
        if self.against is not None:
            self.collection.judgements(self.against)  # an error now, not after hours
        elif drop_leaks:
            raise ValueError(f"drop_leaks needs a split of {self.collection.name!r} other than {split!r} as against.")
        self.query_ids = list(self._judged) if query_ids is None else list(dict.fromkeys(query_ids))
        if absent := [query_id for query_id in self.query_ids if query_id not in self.collection.queries]:
            raise ValueError(
                f"{len(absent):,} of the query ids are not in {self.collection.name!r}; the first is {absent[0]!r}."
            )
        check_lists(self._judged, self.query_ids, self.num_negatives, self.selection.max_positives)
        self._check_selection()
        if candidates is not None:
            check_candidates(candidates, self.query_ids, self.collection)
        self.engine, self.workers = engine, workers
        self.pairwise, self.pairs_per_query = pairwise, pairs_per_query
        self.teacher: Teacher | ListTeacher
        if isinstance(teacher, Sequence) and not isinstance(teacher, str):
            self.teacher = EnsembleTeacher([_as_teacher(one) for one in teacher], calibration="z-score")
        else:
            self.teacher = _as_teacher(teacher)

    def build(self, show_progress: bool = True) -> DistillationDataset:
        """Run all stages. What was scored before, in this run or another, is taken from the store.

        Args:
            show_progress: Show bars.

        Raises:
            ValueError: No query is left, or the teacher returns something that is not a score.
        """
        candidates, source = self._candidates(show_progress)
        dropped = dict.fromkeys(DROPPED, 0)
        pools, shared = self._pools(candidates, dropped)
        with self._opened_store() as store:
            scored = score_candidates(
                self.teacher,
                self._pairs(pools),
                pools.lengths,
                store=store,
                show_progress=show_progress,
                engine=self.engine,
                workers=self.workers,
            )
        pools.scores = scored.scores
        rows, unjudged = self._lists(pools, dropped)
        self._say_dropped(len(rows), dropped)
        # The teacher would agree with itself.
        report = report_on_lists(rows.scores, np.where(unjudged, 0, rows.gains), lengths=rows.lengths)
        if useless := report.warning():
            warnings.warn(useless, stacklevel=2)
        logger.info("%s", report)
        preferences, asked = self._preferences(rows, show_progress)
        counts: dict[str, int | None] = {"queries": len(rows), "pairs": len(pools.documents)}
        counts |= {"different_pairs": scored.different, "cut_pairs": scored.cut}
        corrected = correct_labels(rows, self.selection.label_correction)
        if self.selection.label_correction:
            counts["corrected_lists"] = corrected
        if unjudged.any():
            counts["unjudged_queries"] = len(np.unique(rows.rows[unjudged]))
            counts["teacher_positives"] = int((rows.gains[unjudged] > 0).sum())
            self._say_unjudged(counts)
        if shared:
            counts |= {"shared_judgements": sum(shared.values()), "queries_that_share": len(shared)}
        provenance: dict[str, Any] = {
            "collection": {"name": self.collection.name, "fingerprint": self.collection.fingerprint},
            "split": self.split,
            "num_negatives": self.num_negatives,
            "candidates": source,
            "selection": self.selection.to_dict(),
            "teacher": self.teacher.identity,
            "teacher_license": getattr(self.teacher, "license", None),
            "counts": counts,
            "dropped": dropped,
            "report": report.to_dict(),
            "command": self._call(),
            "versions": installed_versions(_PACKAGES),
        }
        if self.collection.ignore_identical_ids is not None:
            provenance[IGNORES] = self.collection.ignore_identical_ids
        dataset = self._assemble(rows, provenance)
        if preferences is not None:
            provenance["preferences"] = asked
            dataset = dataset.with_preferences(preferences)
        if self.against is not None:
            leaks = find_leaks(dataset, self.collection, self.against)
            provenance["leaks"] = leaks.to_dict()
            if leaks:
                warnings.warn(str(leaks), stacklevel=2)
        return dataset

    def _has(self, split: str) -> bool:
        return split in self.collection.qrels

    def estimate(self, show_progress: bool = True) -> ScoringEstimate:
        """Say how many pairs, tokens and hours `build` would still have to score, without keeping anything.

        Args:
            show_progress: Show bars.

        Raises:
            TypeError: The teacher scores lists, of which no sample can be timed.
            ValueError: No query is left.
        """
        if not hasattr(self.teacher, "score"):
            raise TypeError(
                f"{type(self.teacher).__name__} scores whole lists, which cannot be estimated from a sample."
            )
        pools, _ = self._pools(self._candidates(show_progress)[0], dict.fromkeys(DROPPED, 0))
        with self._opened_store() as store:
            return estimate_scoring(self.teacher, self._pairs(pools), store=store)  # type: ignore[arg-type]

    def _call(self) -> str:
        options = {
            "split": (self.split, "train"),
            "num_negatives": (self.num_negatives, 15),
            "selection": (self.selection, Selection()),
            "drop_leaks": (self.drop_leaks, False),
            "pairs_per_query": (self.pairs_per_query, None),
        }
        return python_call(self.collection.name, self.teacher.identity, options)

    def _pairs(self, pools: Pools) -> TextPairs:
        queries, documents = self.collection.queries, self.collection.documents
        asked = [queries[query_id] for query_id in pools.query_ids]
        return TextPairs.at(asked, [documents[key] for key in pools.ids], pools.rows, pools.documents)

    @contextmanager
    def _opened_store(self) -> Iterator[ScoreStore]:
        if isinstance(self.store, ScoreStore):
            yield self.store
        else:
            with ScoreStore(default_store_path() if self.store is None else self.store) as store:
                yield store

    def _candidates(self, show_progress: bool) -> tuple[Candidates, dict[str, Any]]:
        if self.candidates is None:
            found, parameters = self.find_candidates(show_progress=show_progress), {"top_k": self.depth}
        else:
            found, parameters = self.candidates, {}
        used = Candidates({query_id: found[query_id] for query_id in self.query_ids if query_id in found})
        return found, {"sources": used.sources(), **parameters}

    @property
    def depth(self) -> int:
        """Candidates that a list needs, even if every positive of its query and a few copies stand before the rest."""
        most = max((len(self._positives(query_id)) for query_id in self.query_ids), default=0)
        return self.selection.pool(self.num_negatives) + most + 5

    def find_candidates(self, sources: Source | Sequence[Source] = "bm25", **options: Any) -> Candidates:
        """Find candidates for the queries that have a positive or need none, by default as many as the lists need.

        Args:
            sources: What `find_candidates` takes, as the options are: `top_k`, `cache`, `show_progress`, ….
            **options: See `st_wkl.data.candidates.find_candidates`.
        """
        kept = self.selection.keeps_unjudged
        query_ids = [query_id for query_id in self.query_ids if kept or self._positives(query_id)]
        return find_candidates(self.collection, query_ids, sources, **{"top_k": self.depth, **options})

    def _positives(self, query_id: str) -> list[str]:
        return [key for key, gain in self._judged.get(query_id, {}).items() if gain > 0]

    def _check_selection(self) -> None:
        """Stop at what is measured from positives where no query has one."""
        if self.selection.positives == "teacher" or any(map(self._positives, self.query_ids)):
            return
        for name in ("relative_margin", "absolute_margin", "label_correction"):
            if getattr(self.selection, name) is not None:
                raise OptionError(
                    name,
                    f"needs positives, and no query of {self.collection.name!r} that is learnt from has a judged one: "
                    "leave it out, or set positives to teacher.",
                )

    def _lists(self, pools: Pools, dropped: dict[str, int]) -> tuple[Pools, np.ndarray]:
        """Return the lists, and which of their documents stand in one without a judged positive."""
        judged = np.bincount(pools.rows[pools.gains > 0], minlength=len(pools)) > 0
        unjudged = {key for key, has in zip(pools.query_ids, judged.tolist(), strict=True) if not has}
        if unjudged and self.selection.positives == "teacher":
            texts, barred = self.collection.documents, set[str]()
            if self.drop_leaks and self.against is not None:
                relevant = relevant_keys(self.collection, self.against)
                barred = {key for key in pools.ids if document_key(texts[key]) in relevant}
            pools = teacher_positives(pools, texts, self.selection, barred, dropped)
        rows = make_lists(pools, self.selection, self.num_negatives, dropped)
        return rows, np.repeat(np.array([key in unjudged for key in rows.query_ids], bool), rows.lengths)

    def _say_unjudged(self, counts: Mapping[str, int | None]) -> None:
        number, taught = counts["unjudged_queries"], counts["teacher_positives"]
        said = "Their lists have no positive: train with KL, since losses that compare positives learn nothing of them."
        if self.selection.positives == "teacher":
            said = (
                f"The teacher's best document is the positive of {taught:,}, where it is ahead of the next by "
                f"{self.selection.positive_margin:g}; the other lists have none."
            )
        warnings.warn(f"{number:,} of {counts['queries']:,} queries have no judged positive. {said}", stacklevel=3)

    def _judgements(self, dropped: dict[str, int]) -> tuple[list[str], Mapping[str, Mapping[str, int]]]:
        """Return the queries to use and their judgements, without the leaks if these are to be dropped."""
        judgements: Mapping[str, Mapping[str, int]] = self._judged
        if self.selection.keeps_unjudged:
            judgements = {**{key: {} for key in self.query_ids}, **judgements}
        if not self.drop_leaks or self.against is None:
            return self.query_ids, judgements
        texts = self.collection.queries
        test = {query_id: texts[query_id] for query_id in self.collection.judgements(self.against)}
        leaked = {
            query_id for hits in near_texts({key: texts[key] for key in self.query_ids}, test) for query_id in hits
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # counted here, for the queries that are asked for
            disjoint = document_disjoint(self.collection, self.split, self.against) if self._has(self.split) else None
        kept: dict[str, dict[str, int]] = {} if disjoint is None else disjoint.qrels[self.split]
        if self.selection.keeps_unjudged:  # what has lost its last positive is unjudged, and that no negative of it
            for key in judgements.keys() - kept.keys():
                kept[key] = {name: UNUSABLE if gain > 0 else gain for name, gain in judgements[key].items()}
        query_ids = [query_id for query_id in self.query_ids if query_id not in leaked]
        dropped["leaked_queries"] = len(leaked)
        dropped["leaked_positives"] = sum(
            gain > 0 and kept.get(query_id, {}).get(document_id, 0) <= 0
            for query_id in query_ids
            for document_id, gain in judgements.get(query_id, {}).items()
        )
        return query_ids, kept

    def _pools(self, candidates: Candidates, dropped: dict[str, int]) -> tuple[Pools, dict[str, int]]:
        """Return what is to be scored for each query, its positives and its negatives as far as they matter.

        Also return how many judgements queries have from others of the same words.
        """
        query_ids, judgements = self._judgements(dropped)
        judgements, learnt = shared_judgements(self.collection.queries, judgements)
        shared = {query_id: learnt[query_id] for query_id in query_ids if query_id in learnt}
        if shared:
            warnings.warn(
                f"{len(shared):,} queries of split {self.split!r} of {self.collection.name!r} have the words of "
                f"another one and share its judgements ({sum(shared.values()):,}): what answers one is no negative "
                "of the other.",
                stacklevel=3,
            )

        def found() -> Iterator[tuple[str, Mapping[str, int], Sequence[str]]]:
            for query_id in query_ids:
                hits = dict.fromkeys([hit.document_id for hit in candidates.get(query_id, ())])
                own, judged = self.collection.own_document(query_id), judgements.get(query_id, {})
                if own:
                    dropped["own_documents"] += len(hits.keys() & own)
                    judged = {key: gain for key, gain in judged.items() if key not in own}
                yield query_id, judged, [key for key in hits if key not in own] if own else list(hits)

        texts = self.collection.documents
        pools = make_pools(found(), texts, self.selection, self.num_negatives, dropped)
        if not len(pools):
            self._say_dropped(0, dropped)
        return pools, shared

    def _say_dropped(self, kept: int, dropped: Mapping[str, int]) -> None:
        total = len(self.query_ids)
        found = {what.replace("_", " "): count for what, count in dropped.items() if count}
        lost = ", ".join(f"{count:,} {what}" for what, count in found.items())
        if not kept:
            raise ValueError(
                f"None of {total:,} queries of split {self.split!r} of {self.collection.name!r} can be used: {lost}. "
                "A query needs a document with a gain above 0 and a candidate that is none of these, or, with "
                "Selection(positives='optional'), two candidates."
            )
        if lost:
            said = f"{total - kept:,} of {total:,} queries are dropped; in all: {lost}."
            if kept == total:
                said = f"All {total:,} queries stay. Left out of their lists: {lost}."
            if dropped.get("queries_without_positive"):
                said += " Selection(positives='optional') keeps queries without a positive, for KL."
            warnings.warn(said, stacklevel=3)

    def _preferences(self, rows: Pools, show_progress: bool) -> tuple[list[Any] | None, dict[str, Any]]:
        if self.pairwise is None:
            return None, {}
        texts, queries = self.collection.documents, self.collection.queries
        named = [[texts[rows.ids[place]] for place in rows.documents[span].tolist()] for span in rows.spans()]
        with self._opened_store() as store:
            return dataset_preferences(
                self.pairwise,
                [(queries[query_id], documents) for query_id, documents in zip(rows.query_ids, named, strict=True)],
                [rows.scores[span] for span in rows.spans()],
                count=self.pairs_per_query,
                seed=self.selection.seed,
                store=store,
                show_progress=show_progress,
            )

    def _assemble(self, rows: Pools, provenance: dict[str, Any]) -> DistillationDataset:
        queries, documents = self.collection.queries, self.collection.documents
        different, first = np.unique(rows.documents, return_index=True)
        order = different[np.argsort(first)]  # as they come in the lists
        used = [rows.ids[place] for place in order.tolist()]
        places = np.empty(len(rows.ids), np.int32)
        places[order] = np.arange(len(order))
        columns = {
            "train": {
                "query_id": rows.query_ids,
                "document_ids": lists_of(rows.lengths, pa.array(used).take(pa.array(places[rows.documents]))),
                "scores": lists_of(rows.lengths, rows.scores),
                "labels": lists_of(rows.lengths, rows.gains),
            },
            "queries": {"query_id": rows.query_ids, "text": [queries[query_id] for query_id in rows.query_ids]},
            "documents": {"document_id": used, "text": [documents[document_id] for document_id in used]},
        }
        tables = {name: as_dataset(pa.table(values), features(name)) for name, values in columns.items()}
        provenance["counts"]["documents"] = len(used)
        return DistillationDataset(**tables, provenance=provenance)


def _as_teacher(teacher: Any) -> Any:
    is_teacher = hasattr(teacher, "identity") and (hasattr(teacher, "score") or hasattr(teacher, "score_lists"))
    return teacher if is_teacher else CrossEncoderTeacher(teacher)
