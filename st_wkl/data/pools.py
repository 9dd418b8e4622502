"""A query's documents on their way to a list: what is scored, and what of it stays once the scores are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from st_wkl.data.selection import Selection, choose, duplicates, false_negatives

# Public collections have queries with 1,400 positives.
LONGEST_LIST = 2_048
# What is counted while the lists are made, in the order in which it happens.
DUPLICATES = ("copies_of_positives", "near_copies_of_positives", "repeated_documents")
DROPPED = (
    "queries_without_positive",
    "queries_without_candidate",
    "queries_without_negative",
    "leaked_queries",
    "leaked_positives",
    "empty_documents",
    "unusable_documents",
    "own_documents",
    *DUPLICATES,
    "further_positives",
    "false_negatives",
)


@dataclass(frozen=True)
class Pool:
    """What is to be scored for a query."""

    query_id: str
    positives: list[str]
    negatives: list[str]
    gains: list[int]


@dataclass
class Row:
    """A scored list, its positives first."""

    query_id: str
    document_ids: list[str]
    labels: list[int]
    scores: np.ndarray
    num_positives: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_positives = sum(label > 0 for label in self.labels)


def check_lists(
    judged: Mapping[str, Mapping[str, int]], query_ids: Sequence[str], num_negatives: int, max_positives: int | None
) -> None:
    """Stop before work where a list would be so long that no batch holds it, unless its length was asked for.

    Raises:
        ValueError: With the query, its number of positives and the option that bounds it.
    """
    if max_positives is not None or not query_ids:
        return
    positives = {query_id: sum(gain > 0 for gain in judged.get(query_id, {}).values()) for query_id in query_ids}
    most = max(positives, key=positives.__getitem__)
    if positives[most] + num_negatives > LONGEST_LIST:
        raise ValueError(
            f"max_positives must be given, since query {most!r} has {positives[most]:,} positives, and so a list of "
            f"{positives[most] + num_negatives:,} documents, all of which a batch embeds; {LONGEST_LIST:,} is the most "
            "without it. It is an option of the selection, and keeps those with the highest gain."
        )


def make_pool(
    query_id: str,
    judged: Mapping[str, int],
    ranked: list[str],
    texts: Mapping[str, str],
    options: Selection,
    num_negatives: int,
    dropped: dict[str, int],
) -> Pool:
    """Return what is to be scored for a query: its positives, and its negatives as far as they matter."""
    place = {document_id: rank for rank, document_id in enumerate(ranked)}
    relevant = [document_id for document_id, gain in judged.items() if gain > 0]
    relevant.sort(key=lambda document_id: (-judged[document_id], place.get(document_id, len(place))))
    others = [document_id for document_id in ranked if judged.get(document_id, 0) == 0]
    dropped["unusable_documents"] += sum(judged.get(document_id, 0) < 0 for document_id in ranked)
    positives = [document_id for document_id in relevant if texts[document_id].strip()]
    negatives = [document_id for document_id in others if texts[document_id].strip()]
    dropped["empty_documents"] += len(relevant) - len(positives) + len(others) - len(negatives)
    if positives:
        # Twice the pool is deep enough to fill it; copies further down cannot be chosen.
        negatives = negatives[: 2 * options.pool(num_negatives)]
        found = duplicates(
            {document_id: texts[document_id] for document_id in negatives},
            {document_id: texts[document_id] for document_id in positives},
            options.near_duplicates,
        )
        for name, ids in zip(DUPLICATES, found, strict=True):
            dropped[name] += len(ids)
        gone = set().union(*found)
        negatives = [document_id for document_id in negatives if document_id not in gone]
    dropped["further_positives"] += len(positives[options.max_positives or len(positives) :])
    positives = positives[: options.max_positives]
    negatives = negatives[: options.pool(num_negatives)]
    if not options.needs_scores:
        chosen = choose(len(negatives), num_negatives, options.choice, seed=options.seed, key=query_id)
        negatives = [negatives[place] for place in chosen]
    return Pool(query_id, positives, negatives, [judged[document_id] for document_id in positives])


def make_row(
    pool: Pool,
    scores: np.ndarray,
    probabilities: bool,
    options: Selection,
    num_negatives: int,
    dropped: dict[str, int],
) -> Row:
    """Filter and choose by the teacher's scores, if the selection asks for it."""
    split = len(pool.positives)
    places = np.arange(len(pool.negatives))
    if options.filters:
        removed = false_negatives(
            scores[split:],
            scores[:split],
            relative_margin=options.relative_margin,
            absolute_margin=options.absolute_margin,
            reference=options.reference,
            probabilities=probabilities,
        )
        dropped["false_negatives"] += int(removed.sum())
        places = places[~removed]
        dropped["queries_without_negative"] += not len(places)
    if options.needs_scores:
        chosen = choose(
            len(places),
            num_negatives,
            options.choice,
            scores=scores[split:][places],
            seed=options.seed,
            key=pool.query_id,
        )
        places = places[chosen]
    return Row(
        pool.query_id,
        [*pool.positives, *(pool.negatives[place] for place in places)],
        [*pool.gains, *[0] * len(places)],
        np.concatenate([scores[:split], scores[split:][places]]),
    )


def correct_labels(rows: Sequence[Row], correction: str | None) -> int:
    """Change scores that contradict the judgements, and return in how many rows."""
    if correction is None:
        return 0
    import torch

    from st_wkl import functional

    correct = getattr(functional, correction)
    changed = 0
    for row in rows:
        before = torch.from_numpy(row.scores)[None]
        after = correct(before, torch.tensor([row.labels]) > 0)
        changed += not torch.equal(before, after)
        row.scores = after[0].numpy()
    return changed
