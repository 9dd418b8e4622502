"""Score finished runs, and tell which queries can be evaluated and which of them training has touched."""

from __future__ import annotations

import warnings
from collections.abc import Collection as Ids
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.data.collection import Collection
from st_wkl.data.selection import without_own
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores, saved
from st_wkl.files import content_hash
from st_wkl.metrics import Run, checked_run, score_run
from st_wkl.text import text_hash

if TYPE_CHECKING:
    from st_wkl.data.candidates import Candidates
    from st_wkl.record import Exposure


def evaluate_run(
    run: Mapping[str, Mapping[str, float]] | Candidates,
    collection: Collection | str | Path,
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
        collection: What the run was made on, or its folder or Hub id.
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
        ValueError: If the run or `query_ids` names what is not in the collection, or a score is not finite.

    Example:
        >>> evaluate_run({"q1": {"d7": 12.3, "d2": 4.5}}, collection, name="BM25").ndcg_at_10  # doctest: +SKIP
    """
    found, collection = checked_run(run, name), Collection.load(collection)
    check_known(found, collection.queries, collection.documents, f"collection {collection.name}", name)
    found = without_own(found, collection.leaves_out_own)
    qrels = relevant_qrels(collection, split)
    if query_ids is not None:
        wanted = list(query_ids)
        unknown = [query for query in wanted if query not in qrels]
        if unknown or not wanted:
            raise ValueError(
                f"query_ids: {len(unknown)} of {len(wanted)} ids have no relevant document in split {split!r} of "
                f"{collection.name} (such as {', '.join(unknown[:5])}); give ids of queries that have one"
            )
        qrels = {query: qrels[query] for query in wanted}
    if missing := [query for query in qrels if not found.get(query)]:
        warnings.warn(
            f"run {name}: {len(missing)} of {len(qrels)} {split} queries of {collection.name} have no documents and "
            f"count as 0, such as {', '.join(missing[:5])}",
            stacklevel=2,
        )
    about = {"task": collection.name, "split": split, "dataset_revision": collection.fingerprint}
    scores = run_scores(found, qrels, collection.queries, collection.documents, exposure, **about)
    model = {"name": name, "revision": content_hash(found), "class": "run"}
    return saved(Results(model=model, tasks=[scores]), output)


def run_scores(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    exposure: Exposure | None,
    **about: Any,
) -> TaskScores:
    """Return a run's scores on the judged queries, under the metrics that `about` has from elsewhere, or its own."""
    metrics, per_query = score_run(qrels, {query: run.get(query, {}) for query in qrels})
    groups, repeated = ({}, []) if exposure is None else exposure_groups(qrels, queries, documents, exposure)
    known: dict[str, Any] = {"subset": "default", "main_metric": "ndcg_at_10", "metrics": metrics, "seconds": 0.0}
    return TaskScores(
        **known | about,
        per_query=per_query.pop("ndcg_at_10"),
        groups=groups,
        training_queries=repeated,
        query_metrics=per_query,
    )


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


def relevant_qrels(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """Return the judgements of the split's queries with a relevant document; MTEB would count those without as 0."""
    judged = collection.judgements(split)
    relevant = {query: dict(gains) for query, gains in judged.items() if any(gain > 0 for gain in gains.values())}
    dropped = [query for query in judged if query not in relevant]
    if not relevant:
        raise ValueError(f"split {split!r} of collection {collection.name} has no query with a relevant document")
    if dropped:
        warnings.warn(
            f"{len(dropped)} of {len(judged)} {split} queries of {collection.name} have no relevant document and are "
            f"left out, such as {', '.join(dropped[:5])}",
            stacklevel=3,
        )
    return relevant


def exposure_groups(
    qrels: Mapping[str, Mapping[str, int]],
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    exposure: Exposure,
) -> tuple[dict[str, list[str]], list[str]]:
    """Return `{"shared": ids, "unseen": ids}` without an empty part, and the ids of queries that training had, too.

    Documents are their texts as MTEB reads them; a judged one that the corpus lacks has not been seen.

    Example:
        >>> from st_wkl.record import Exposure
        >>> from st_wkl.text import text_hash
        >>> seen = Exposure(frozenset([text_hash("a cat?")]), frozenset([text_hash("Cats purr.")]))
        >>> exposure_groups({"q1": {"d1": 1}}, {"q1": "a cat?"}, {"d1": "Cats purr."}, seen)
        ({'shared': ['q1']}, ['q1'])
    """
    relevant = {document for gains in qrels.values() for document, gain in gains.items() if gain > 0}
    seen = [d for d in relevant if d in documents and text_hash(documents[d]) in exposure.positives]
    shared = set(shared_document_queries(qrels, seen)[0])
    parts = {SHARED: [q for q in qrels if q in shared], UNSEEN: [q for q in qrels if q not in shared]}
    repeated = {q for q in qrels if q in queries and text_hash(queries[q]) in exposure.queries}
    return {name: ids for name, ids in parts.items() if ids}, [
        q for ids in parts.values() for q in ids if q in repeated
    ]


def shared_document_queries(
    qrels: Mapping[str, Mapping[str, int]], training_documents: Ids[str]
) -> tuple[list[str], list[str]]:
    """Split test queries by whether training has shown one of their relevant documents as a positive.

    A gain on the shared queries is real only for someone who searches the very corpus that was trained on; a gain on
    the others is one that carries over to new documents.

    Returns:
        Ids of the queries with a relevant document (gain above 0) among `training_documents`, and of the other queries.
        Queries without any relevant document are in neither, as they are not evaluated either.

    Example:
        >>> shared_document_queries({"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}}, {"d1"})
        (['q1'], ['q2'])
    """
    seen = set(training_documents)
    parts: tuple[list[str], list[str]] = ([], [])
    for query, judgements in qrels.items():
        if relevant := {document for document, gain in judgements.items() if gain > 0}:
            parts[not relevant & seen].append(query)
    return parts
