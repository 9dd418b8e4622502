"""Score finished runs with the library that MTEB scores with."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from st_wkl.data.selection import without_own
from st_wkl.evaluation.qrels import exposure_groups, relevant_qrels
from st_wkl.evaluation.results import Results
from st_wkl.evaluation.scores import TaskScores
from st_wkl.files import content_hash

if TYPE_CHECKING:
    from st_wkl.data.candidates import Candidates
    from st_wkl.data.collection import Collection
    from st_wkl.record import Exposure

Run: TypeAlias = dict[str, dict[str, float]]

logger = logging.getLogger(__name__)

# pytrec_eval's names of the measures and MTEB's, and MTEB's ranks.
MEASURES = {"ndcg_cut": "ndcg", "map_cut": "map", "recall": "recall", "P": "precision", "success": "hit_rate"}
_PER_QUERY = {"ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10", "recall_at_100": "recall_100"}
_CUTS = (1, 3, 5, 10, 20, 100, 1000)


def evaluate_run(
    run: Mapping[str, Mapping[str, float]] | Candidates,
    collection: Collection,
    *,
    split: str = "test",
    name: str,
    query_ids: Iterable[str] | None = None,
    exposure: Exposure | None = None,
    output: str | Path | None = None,
) -> Results:
    """Score a finished run, such as BM25's or a teacher's reranked lists, as `evaluate` scores a model.

    Args:
        run: Query id to document id to score, higher is better, or `Candidates`. Queries outside the split are ignored.
        collection: What the run was made on.
        split: Split of the judgements.
        name: Name of the run in the results, such as `"BM25"`.
        query_ids: Score these queries only, for example the sample that was reranked. None for all of the split.
        exposure: What the model behind the run was trained on, if it was.
        output: A `.json` file or a folder (which gets `results.json`) to write the results to.

    Returns:
        Results that compare with those of `evaluate` on the same collection. Queries that the run misses count as 0,
        with a counted warning.

    Raises:
        TypeError: If the run is none.
        ValueError: If the run or `query_ids` names a query or document that is not in the collection, or a score is not
            finite.

    Example:
        >>> evaluate_run({"q1": {"d7": 12.3, "d2": 4.5}}, collection, name="BM25").ndcg_at_10  # doctest: +SKIP
    """
    found = checked_run(run, name)
    check_known(found, collection.queries, collection.documents, f"collection {collection.name}", name)
    found = without_own(found, collection.leaves_out_own)
    qrels = relevant_qrels(collection, split)
    if query_ids is not None:
        qrels = _only(qrels, list(query_ids), f"split {split!r} of {collection.name}")
    missing = [query for query in qrels if not found.get(query)]
    if missing:
        warnings.warn(
            f"run {name}: {len(missing)} of {len(qrels)} {split} queries of {collection.name} have no documents and "
            f"count as 0, such as {', '.join(missing[:5])}",
            stacklevel=2,
        )
    metrics, per_query = score_run(qrels, {query: found.get(query, {}) for query in qrels})
    groups, repeated = (
        ({}, []) if exposure is None else exposure_groups(qrels, collection.queries, collection.documents, exposure)
    )
    scores = TaskScores(
        task=collection.name,
        split=split,
        subset="default",
        main_metric="ndcg_at_10",
        metrics=metrics,
        per_query=per_query.pop("ndcg_at_10"),
        dataset_revision=collection.fingerprint,
        seconds=0.0,
        groups=groups,
        training_queries=repeated,
        query_metrics=per_query,
    )
    about = {"name": name, "revision": content_hash(found), "class": "run"}
    return saved(Results(model=about, tasks=[scores]), output)


def score_run(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the mean metrics under MTEB's names, and some of them for every query.

    The order is that of the scores as they are given; documents with equal scores are ordered as trec_eval does.

    Raises:
        ValueError: If a score is not finite.
    """
    import pytrec_eval

    cuts = ",".join(map(str, _CUTS))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(gains) for query, gains in qrels.items()},
        {f"{measure}.{cuts}" for measure in MEASURES} | {"recip_rank"},
    )
    scores = evaluator.evaluate({query: _by_place(found) for query, found in checked_run(run).items()})
    values = list(scores.values())
    metrics = {
        f"{name}_at_{cut}": math.fsum(v[f"{measure}_{cut}"] for v in values) / len(values)
        for measure, name in MEASURES.items()
        for cut in _CUTS
    }
    for cut in _CUTS:  # the first relevant document is within the cut exactly when its reciprocal rank is 1/cut or more
        within = [v["recip_rank"] for v in values if v["recip_rank"] >= 1 / cut - 1e-9]
        metrics[f"mrr_at_{cut}"] = math.fsum(within) / len(values)
    per_query = {
        name: {query: found[measure] for query, found in scores.items()} for name, measure in _PER_QUERY.items()
    }
    per_query["mrr_at_10"] = {
        query: found["recip_rank"] if found["recip_rank"] >= 1 / 10 - 1e-9 else 0.0 for query, found in scores.items()
    }
    return metrics, per_query


def _only(qrels: Mapping[str, dict[str, int]], wanted: list[str], where: str) -> dict[str, dict[str, int]]:
    """Return the judgements of the wanted queries, each of which must have a relevant document."""
    unknown = [query for query in wanted if query not in qrels]
    if unknown or not wanted:
        raise ValueError(
            f"query_ids: {len(unknown)} of {len(wanted)} ids have no relevant document in {where} (such as "
            f"{', '.join(unknown[:5])}); give ids of queries that have one"
        )
    return {query: qrels[query] for query in wanted}


def _by_place(found: Mapping[str, float]) -> dict[str, float]:
    """Return scores in the same order that trec_eval can tell apart: it rounds to single precision, in silence."""
    places = {score: -float(place) for place, score in enumerate(sorted(set(found.values()), reverse=True))}
    return {document: places[score] for document, score in found.items()}


def checked_run(run: Mapping[str, Mapping[str, float]] | Candidates, name: str = "") -> Run:
    """Return a run with its scores as numbers of Python; `Candidates` are a run, too.

    Args:
        run: Query id to document id to score, or to candidates.
        name: What the errors call it.

    Raises:
        TypeError: If it is something else; the message names the query.
        ValueError: If a score is not finite.

    Example:
        >>> checked_run({"q1": [Candidate("d7", 2.0, 1, "bm25")], "q2": {"d2": np.float32(0.5)}})
        {'q1': {'d7': 2.0}, 'q2': {'d2': 0.5}}
    """
    label, checked = f"run {name}, " if name else "", {}
    takes = "a run maps query ids to document ids to scores, or to candidates"
    if not isinstance(run, Mapping):
        raise TypeError(f"{label or 'run, '}a {type(run).__name__}: {takes}")
    for query, hits in run.items():
        try:
            found = dict(hits if isinstance(hits, Mapping) else ((hit.document_id, hit.score) for hit in hits))
        except (AttributeError, TypeError) as error:
            raise TypeError(f"{label}query {query!r} has {hits!r:.80}: {takes}") from error
        for document, score in found.items():
            if not isinstance(document, str) or not isinstance(query, str):
                raise TypeError(f"{label}query {query!r}, document {document!r}: ids are text (str); use str(id)")
            try:
                found[document] = float(score)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{label}query {query!r}, document {document!r}: {score!r:.80} is no score") from error
            if not math.isfinite(found[document]):
                raise ValueError(
                    f"{label}query {query!r}, document {document!r}: the score is {score}, not a finite number"
                )
        checked[query] = found
    return checked


def check_known(run: Run, queries: Container[str], documents: Container[str], where: str, name: str) -> None:
    """Stop where a run names what a collection does not have."""
    if not run:
        raise ValueError(f"run {name} is empty; it maps query ids to document ids to scores")
    for query, found in run.items():
        if query not in queries:
            raise ValueError(f"run {name}: query {query!r} is not in {where}; wrong collection?")
        for document in found:
            if document not in documents:
                raise ValueError(
                    f"run {name}, query {query!r}: document {document!r} is not in {where}; wrong collection?"
                )


def saved(results: Results, output: str | Path | None) -> Results:
    """Write the results where the caller wants them; scores that cannot be written are shown in the error."""
    if output is not None:
        try:
            logger.info("results written to %s", results.save(output))
        except OSError as error:
            error.add_note(f"The results could not be written to {output}. They are:\n{results.table()}")
            raise
    return results
