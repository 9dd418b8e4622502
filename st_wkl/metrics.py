"""Ranking metrics under MTEB's names, from the library that MTEB scores with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import pytrec_eval

Run: TypeAlias = dict[str, dict[str, float]]

# Those that tables show, in their order.
METRIC_LABELS = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP@1000",
    "mrr_at_10": "MRR@10",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}
# pytrec_eval's names of the measures and MTEB's, and MTEB's ranks.
MEASURES = {"ndcg_cut": "ndcg", "map_cut": "map", "recall": "recall", "P": "precision", "success": "hit_rate"}
_CUTS = (1, 3, 5, 10, 20, 100, 1000)
_PER_QUERY = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")


def score_run(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the mean metrics under MTEB's names, and four of them (nDCG@10, Recall@10, @100, MRR@10) by query.

    The order is that of the scores as they are given; documents with equal scores are ordered as trec_eval does.

    Raises:
        ValueError: If a score is not finite.

    Example:
        >>> score_run({"q1": {"d1": 1}}, {"q1": {"d1": 2.0, "d2": 1.0}})[1]["ndcg_at_10"]
        {'q1': 1.0}
    """
    cuts = ",".join(map(str, _CUTS))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(gains) for query, gains in qrels.items()},
        {f"{measure}.{cuts}" for measure in MEASURES} | {"recip_rank"},
    )
    found = evaluator.evaluate({query: _by_place(hits) for query, hits in checked_run(run).items()})
    values = {
        f"{name}_at_{cut}": {query: scores[f"{measure}_{cut}"] for query, scores in found.items()}
        for measure, name in MEASURES.items()
        for cut in _CUTS
    }
    for cut in _CUTS:  # the first relevant document is within the cut exactly when its reciprocal rank is 1/cut or more
        values[f"mrr_at_{cut}"] = {
            query: scores["recip_rank"] if scores["recip_rank"] >= 1 / cut - 1e-9 else 0.0
            for query, scores in found.items()
        }
    means = {metric: math.fsum(by_query.values()) / len(by_query) for metric, by_query in values.items()}
    return means, {metric: values[metric] for metric in _PER_QUERY}


def checked_run(run: Mapping[str, Any], name: str = "") -> Run:
    """Return a run with its scores as numbers of Python; `Candidates` are a run, too.

    Args:
        run: Query id to document id to score, or to candidates.
        name: What the errors call it.

    Raises:
        TypeError: If it is something else; the message names the query.
        ValueError: If a score is not finite.

    Example:
        >>> checked_run({"q1": [Candidate("d7", 2.0, 1, "bm25")], "q2": {"d2": np.float32(0.5)}})  # doctest: +SKIP
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
            where = f"{label}query {query!r}, document {document!r}"
            if not isinstance(document, str) or not isinstance(query, str):
                raise TypeError(f"{where}: ids are text (str); use str(id)")
            try:
                found[document] = float(score)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{where}: {score!r:.80} is no score") from error
            if not math.isfinite(found[document]):
                raise ValueError(f"{where}: the score is {score}, not a finite number")
        checked[query] = found
    return checked


def _by_place(found: Mapping[str, float]) -> dict[str, float]:
    """Return scores in the same order that trec_eval can tell apart: it rounds to single precision, in silence."""
    places = {score: -float(place) for place, score in enumerate(sorted(set(found.values()), reverse=True))}
    return {document: places[score] for document, score in found.items()}
