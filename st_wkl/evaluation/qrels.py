"""Which queries of a split can be evaluated, and which of them training has touched."""

from __future__ import annotations

import collections.abc
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from st_wkl.evaluation.scores import SHARED, UNSEEN
from st_wkl.text import text_hash

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection
    from st_wkl.record import Exposure


def relevant_qrels(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """Return the judgements of the split's queries that have a relevant document, and warn of the number without.

    Such a query cannot be answered, and MTEB would count it as 0.

    Raises:
        ValueError: If there is no such split, or no query is left.
    """
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
    """Split test queries by what a student's training has seen, by the hashes of its training texts.

    Args:
        qrels: Test query id to document id to gain.
        queries: Query id to text, of the test queries at least.
        documents: Document id to text as MTEB reads it, of the documents with a gain above 0 at least.
        exposure: What the student was trained on.

    Returns:
        `{"shared": ids, "unseen": ids}` without an empty part, and the ids of queries that are training queries, too.

    Example:
        >>> from st_wkl.record import Exposure
        >>> from st_wkl.text import text_hash
        >>> seen = Exposure(frozenset([text_hash("a cat?")]), frozenset([text_hash("Cats purr.")]))
        >>> exposure_groups({"q1": {"d1": 1}}, {"q1": "a cat?"}, {"d1": "Cats purr."}, seen)
        ({'shared': ['q1']}, ['q1'])
    """
    relevant = {document for gains in qrels.values() for document, gain in gains.items() if gain > 0}
    seen = [document for document in relevant if text_hash(documents[document]) in exposure.positives]
    shared, unseen = shared_document_queries(qrels, seen)
    groups = {name: ids for name, ids in ((SHARED, shared), (UNSEEN, unseen)) if ids}
    return groups, [query for query in [*shared, *unseen] if text_hash(queries[query]) in exposure.queries]


def shared_document_queries(
    qrels: Mapping[str, Mapping[str, int]], training_documents: collections.abc.Collection[str]
) -> tuple[list[str], list[str]]:
    """Split test queries by whether training has shown one of their relevant documents as a positive.

    A gain on the shared queries is real only for someone who searches the very corpus that was trained on; a gain on
    the others is one that carries over to new documents.

    Args:
        qrels: Test query id to document id to gain.
        training_documents: Ids of the documents that were positives in training.

    Returns:
        Ids of the queries with a relevant document (gain above 0) among `training_documents`, and of the other queries.
        Queries without any relevant document are in neither, as they are not evaluated either.

    Example:
        >>> shared_document_queries({"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}}, {"d1"})
        (['q1'], ['q2'])
    """
    seen = set(training_documents)
    shared: list[str] = []
    unseen: list[str] = []
    for query, judgements in qrels.items():
        relevant = {document for document, gain in judgements.items() if gain > 0}
        if relevant:
            (shared if relevant & seen else unseen).append(query)
    return shared, unseen
