"""Queries' documents on their way to lists: what is scored, and what of it stays once the scores are there."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from st_wkl.data.copies import COPY, NEAR, REPEATED, Texts, find_copies
from st_wkl.data.selection import Selection, choose, false_negatives

# Public collections have queries with 1,400 positives.
LONGEST_LIST = 2_048
# What is counted while the lists are made, in the order in which it happens.
DUPLICATES = {"copies_of_positives": COPY, "near_copies_of_positives": NEAR, "repeated_documents": REPEATED}
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


@dataclass
class Pools:
    """All lists, one after another, each with its positives first; 8 bytes for a document of a list.

    Args:
        query_ids: Queries.
        ids: Different documents.
        lengths: How many documents each list has.
        documents: Which of `ids` they are.
        gains: Their judged gains, 0 for negatives.
        scores: Their teacher scores, once these are there.
    """

    query_ids: list[str]
    ids: list[str]
    lengths: np.ndarray
    documents: np.ndarray
    gains: np.ndarray
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def rows(self) -> np.ndarray:
        """The list of each document."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)

    @property
    def with_negatives(self) -> np.ndarray:
        """Which lists have a negative."""
        return np.bincount(self.rows[self.gains <= 0], minlength=len(self)) > 0

    def spans(self) -> list[slice]:
        """Return where each list stands."""
        ends = np.cumsum(self.lengths).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def take(self, places: np.ndarray, kept: np.ndarray) -> Pools:
        """Return the documents at some places, which stay in their lists, and of the lists those that are kept."""
        rows = self.rows[places]
        places = places[kept[rows]]
        lengths = np.bincount(rows, minlength=len(self))[kept]
        query_ids = [query_id for query_id, keep in zip(self.query_ids, kept.tolist(), strict=True) if keep]
        scores = self.scores[places] if len(self.scores) else self.scores
        return Pools(query_ids, self.ids, lengths, self.documents[places], self.gains[places], scores)


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


def make_pools(
    found: Iterable[tuple[str, Mapping[str, int], Sequence[str]]],
    texts: Mapping[str, str],
    options: Selection,
    num_negatives: int,
    dropped: dict[str, int],
) -> Pools:
    """Return what is to be scored for each query: its positives, and its negatives as far as they matter.

    Args:
        found: Each query with its judgements and its candidates, best first.
        texts: Texts of the documents.
        options: What is left out and chosen.
        num_negatives: Negatives of a list.
        dropped: Counts of what is left out, which grow.
    """
    # Twice the pool is deep enough to fill it; copies further down cannot be chosen.
    gathered = _Gathered(texts, dropped, 2 * options.pool(num_negatives), options.max_positives)
    for query_id, judged, ranked in found:
        gathered.add(query_id, judged, ranked)
    counts, sizes = np.array(gathered.counts, int), np.array(gathered.sizes, int)
    positives, negatives = (np.array(part, np.int32) for part in (gathered.positives, gathered.negatives))
    known = Texts([texts[key] for key in gathered.numbers], options.near_duplicates)
    kind = find_copies(known, negatives, sizes, positives, counts)
    for name, number in DUPLICATES.items():
        dropped[name] += int((kind == number).sum())
    best = _first(counts, np.ones(len(positives), bool), options.max_positives)
    dropped["further_positives"] += int((~best).sum())
    left = _first(sizes, kind == 0, options.pool(num_negatives))
    chosen = np.flatnonzero(left)
    if not options.needs_scores:
        chosen = _chosen(np.repeat(np.arange(len(sizes)), sizes), chosen, gathered.query_ids, options, num_negatives)
    rows = [np.repeat(np.arange(len(part)), part) for part in (counts, sizes)]
    documents = np.concatenate([positives[best], negatives[chosen]])
    gains = np.concatenate([np.array(gathered.gains, np.int32)[best], np.zeros(len(chosen), np.int32)])
    rows_of = np.concatenate([rows[0][best], rows[1][chosen]])
    order = np.argsort(rows_of, kind="stable")
    lengths = np.bincount(rows_of, minlength=len(counts))
    pools = Pools(gathered.query_ids, list(gathered.numbers), lengths, documents[order], gains[order])
    kept = pools.with_negatives
    dropped["queries_without_negative"] += int((~kept).sum())
    return pools if kept.all() else pools.take(np.arange(len(documents)), kept)


class _Gathered:
    """Positives and negatives of all queries as numbers."""

    def __init__(
        self, texts: Mapping[str, str], dropped: dict[str, int], depth: int, max_positives: int | None
    ) -> None:
        self.dropped, self.depth, self.max_positives = dropped, depth, max_positives
        self.blank = {key for key, text in texts.items() if not text or text.isspace()}
        self.numbers: dict[str, int] = {}
        self.query_ids: list[str] = []
        self.counts: list[int] = []
        self.sizes: list[int] = []
        self.positives, self.negatives, self.gains = array("i"), array("i"), array("i")

    def add(self, query_id: str, judged: Mapping[str, int], ranked: Sequence[str]) -> None:
        """Add a query, unless it has no positive or no candidate; count what is left out."""
        dropped, numbers, blank = self.dropped, self.numbers, self.blank
        relevant = [key for key, gain in judged.items() if gain > 0]
        if len(relevant) > 1:
            place = {key: rank for rank, key in enumerate(ranked)}
            relevant.sort(key=lambda key: (-judged[key], place.get(key, len(place))))
        others = [key for key in ranked if key not in judged or judged[key] == 0]
        if any(gain < 0 for gain in judged.values()):
            dropped["unusable_documents"] += sum(key in judged and judged[key] < 0 for key in ranked)
        positives, negatives = relevant, others
        if blank:
            positives, negatives = ([key for key in side if key not in blank] for side in (relevant, others))
        dropped["empty_documents"] += len(relevant) - len(positives) + len(others) - len(negatives)
        if not positives or not ranked:
            dropped["queries_without_candidate" if positives else "queries_without_positive"] += 1
            dropped["further_positives"] += len(positives[self.max_positives or len(positives) :])
            return
        negatives = negatives[: self.depth]
        self.query_ids.append(query_id)
        self.counts.append(len(positives))
        self.sizes.append(len(negatives))
        self.gains.extend(judged[key] for key in positives)
        self.positives.extend([numbers.setdefault(key, len(numbers)) for key in positives])
        self.negatives.extend([numbers.setdefault(key, len(numbers)) for key in negatives])


def _first(sizes: np.ndarray, among: np.ndarray, most: int | None) -> np.ndarray:
    """Return which entries are among the first `most` of those of their row that count at all."""
    if most is None:
        return among
    seen = np.cumsum(among)
    before = np.concatenate([[0], seen])[np.cumsum(sizes) - sizes]
    return among & (seen - np.repeat(before, sizes) <= most)


def _chosen(rows: np.ndarray, places: np.ndarray, keys: list[str], options: Selection, n: int) -> np.ndarray:
    """Choose n of each row's places, by the first stage's order or at random."""
    sizes = np.bincount(rows[places], minlength=len(keys))
    if options.choice == "top":
        return places[_first(sizes, np.ones(len(places), bool), n)]
    chosen = [places[:0]]
    for part, key in zip(np.split(places, np.cumsum(sizes)[:-1]) if len(sizes) else [], keys, strict=True):
        chosen.append(part[choose(len(part), n, options.choice, seed=options.seed, key=key)])
    return np.concatenate(chosen)


def make_lists(pools: Pools, options: Selection, num_negatives: int, dropped: dict[str, int]) -> Pools:
    """Filter and choose by the teacher's scores, if the selection asks for it; lists without a negative go."""
    if not options.needs_scores:
        return pools
    probabilities = bool(len(pools.scores)) and float(pools.scores.min()) >= 0 and float(pools.scores.max()) <= 1
    chosen = []
    for query_id, span in zip(pools.query_ids, pools.spans(), strict=True):
        scores, split = pools.scores[span], int((pools.gains[span] > 0).sum())
        places = np.arange(split, len(scores))
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
        how: dict[str, Any] = {"scores": scores[places], "seed": options.seed, "key": query_id}
        places = places[choose(len(places), num_negatives, options.choice, **how)]
        chosen += [np.arange(split) + span.start, places + span.start]
    every = np.concatenate([np.zeros(0, int), *chosen])
    return pools.take(every, np.bincount(pools.rows[every[pools.gains[every] <= 0]], minlength=len(pools)) > 0)


def correct_labels(pools: Pools, correction: str | None) -> int:
    """Change scores that contradict the judgements, and return in how many lists."""
    if correction is None:
        return 0
    import torch

    from st_wkl.functional import labels

    correct = getattr(labels, correction)
    changed = 0
    pools.scores = pools.scores.copy()
    for span in pools.spans():
        before = torch.from_numpy(pools.scores[span])[None]
        after = correct(before, torch.from_numpy(pools.gains[span])[None] > 0)
        changed += not torch.equal(before, after)
        pools.scores[span] = after[0].numpy()
    return changed
