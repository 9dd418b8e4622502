"""Queries' documents on their way to lists: what is scored, and what of it stays once the scores are there."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from st_wkl.data.copies import COPY, NEAR, REPEATED, Texts, find_copies
from st_wkl.data.selection import Selection, choose, false_negatives, lead

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

    A query without a positive has one negative more, and needs two, to be ranked.

    Args:
        found: Each query with its judgements and its candidates, best first.
        texts: Texts of the documents.
        options: What is left out and chosen.
        num_negatives: Negatives of a list.
        dropped: Counts of what is left out, which grow.
    """
    # Twice the pool is deep enough to fill it; copies further down cannot be chosen.
    gathered = _Gathered(texts, dropped, 2 * options.pool(num_negatives), options)
    for query_id, judged, ranked in found:
        gathered.add(query_id, judged, ranked)
    counts, sizes = np.array(gathered.counts, int), np.array(gathered.sizes, int)
    positives, negatives = (np.array(part, np.int32) for part in (gathered.positives, gathered.negatives))
    known = Texts([texts[key] for key in gathered.numbers], options.near_duplicates)
    kind = find_copies(known, negatives, sizes, positives, counts)
    for name, number in DUPLICATES.items():
        dropped[name] += int((kind == number).sum())
    best = np.ones(len(positives), bool)
    if options.max_positives is not None:
        best = _first(counts, best, np.full(len(counts), options.max_positives))
    dropped["further_positives"] += int((~best).sum())
    more = (counts == 0).astype(int)
    left = _first(sizes, kind == 0, options.pool(num_negatives) + more)
    chosen = np.flatnonzero(left)
    if not options.needs_scores:
        rows_of = np.repeat(np.arange(len(sizes)), sizes)
        chosen = _chosen(rows_of, chosen, gathered.query_ids, options, num_negatives + more)
    rows = [np.repeat(np.arange(len(part)), part) for part in (counts, sizes)]
    documents = np.concatenate([positives[best], negatives[chosen]])
    gains = np.concatenate([np.array(gathered.gains, np.int32)[best], np.zeros(len(chosen), np.int32)])
    rows_of = np.concatenate([rows[0][best], rows[1][chosen]])
    order = np.argsort(rows_of, kind="stable")
    lengths = np.bincount(rows_of, minlength=len(counts))
    pools = Pools(gathered.query_ids, list(gathered.numbers), lengths, documents[order], gains[order])
    kept = pools.with_negatives & (lengths > 1)
    dropped["queries_without_negative"] += int((~kept).sum())
    return pools if kept.all() else pools.take(np.arange(len(documents)), kept)


class _Gathered:
    """Positives and negatives of all queries as numbers."""

    def __init__(self, texts: Mapping[str, str], dropped: dict[str, int], depth: int, options: Selection) -> None:
        self.dropped, self.depth, self.max_positives = dropped, depth, options.max_positives
        self.keeps_unjudged = options.keeps_unjudged
        self.blank = {key for key, text in texts.items() if not text or text.isspace()}
        self.numbers: dict[str, int] = {}
        self.query_ids: list[str] = []
        self.counts: list[int] = []
        self.sizes: list[int] = []
        self.positives, self.negatives, self.gains = array("i"), array("i"), array("i")

    def add(self, query_id: str, judged: Mapping[str, int], ranked: Sequence[str]) -> None:
        """Add a query, unless it has no candidate, or no positive and needs one; count what is left out."""
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
        usable = bool(positives) or self.keeps_unjudged
        if not usable or not ranked:
            dropped["queries_without_candidate" if usable else "queries_without_positive"] += 1
            dropped["further_positives"] += len(positives[self.max_positives or len(positives) :])
            return
        negatives = negatives[: self.depth]
        self.query_ids.append(query_id)
        self.counts.append(len(positives))
        self.sizes.append(len(negatives))
        self.gains.extend(judged[key] for key in positives)
        self.positives.extend([numbers.setdefault(key, len(numbers)) for key in positives])
        self.negatives.extend([numbers.setdefault(key, len(numbers)) for key in negatives])


def _first(sizes: np.ndarray, among: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return which entries are among the first, as many as `most` says of each row, of those that count at all."""
    seen = np.cumsum(among)
    before = np.concatenate([[0], seen])[np.cumsum(sizes) - sizes]
    return among & (seen - np.repeat(before, sizes) <= np.repeat(most, sizes))


def _chosen(rows: np.ndarray, places: np.ndarray, keys: list[str], options: Selection, n: np.ndarray) -> np.ndarray:
    """Choose each row's n of its places, by the first stage's order or at random."""
    sizes = np.bincount(rows[places], minlength=len(keys))
    if options.choice == "top":
        return places[_first(sizes, np.ones(len(places), bool), n)]
    chosen = [places[:0]]
    for part, key, most in zip(np.split(places, np.cumsum(sizes)[:-1]) if len(sizes) else [], keys, n, strict=True):
        chosen.append(part[choose(len(part), int(most), options.choice, seed=options.seed, key=key)])
    return np.concatenate(chosen)


def make_lists(pools: Pools, options: Selection, num_negatives: int, dropped: dict[str, int]) -> Pools:
    """Filter and choose by the teacher's scores, if the selection asks for it; lists without a negative go."""
    if not options.needs_scores:
        return pools
    probabilities = _are_probabilities(pools)
    chosen = []
    for query_id, span in zip(pools.query_ids, pools.spans(), strict=True):
        scores, split = pools.scores[span], int((pools.gains[span] > 0).sum())
        places = np.arange(split, len(scores))
        if options.filters and split:  # the margins are measured from a positive
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
        places = places[choose(len(places), num_negatives + (not split), options.choice, **how)]
        chosen += [np.arange(split) + span.start, places + span.start]
    every = np.concatenate([np.zeros(0, int), *chosen])
    return pools.take(every, np.bincount(pools.rows[every[pools.gains[every] <= 0]], minlength=len(pools)) > 0)


def _are_probabilities(pools: Pools) -> bool:
    return bool(len(pools.scores)) and float(pools.scores.min()) >= 0 and float(pools.scores.max()) <= 1


def teacher_positives(
    pools: Pools, texts: Mapping[str, str], options: Selection, barred: Set[str], dropped: dict[str, int]
) -> Pools:
    """Make the teacher's best document the positive of a list that has none, where it is ahead of the next.

    Args:
        pools: The lists with their scores.
        texts: Texts of the documents.
        options: How far ahead it has to be.
        barred: Documents that may be no positive.
        dropped: Counts of what is left out, which grow: copies of these positives.

    Returns:
        The lists, in which such a positive stands first with a gain of 1.

    Raises:
        ValueError: No list has a positive, judged or made here.
    """
    known = Texts([texts[key] for key in pools.ids], options.near_duplicates)
    probabilities, gains = _are_probabilities(pools), pools.gains.copy()
    leads, order = [], [np.zeros(0, int)]
    for span in pools.spans():
        places = np.arange(span.start, span.stop)
        order.append(places)
        if (gains[span] > 0).any():
            continue
        best = int(places[np.argmax(pools.scores[span])])
        rest = places[places != best]
        sizes = np.array([len(rest)]), np.array([1])
        kind = find_copies(known, pools.documents[rest], sizes[0], pools.documents[best : best + 1], sizes[1])
        leads.append(lead(pools.scores[best], pools.scores[rest[kind == 0]], probabilities=probabilities))
        if not leads[-1] > 0 or leads[-1] < options.positive_margin:
            continue
        if pools.ids[pools.documents[best]] in barred:
            dropped["leaked_positives"] += 1
            continue
        gains[best] = 1
        order[-1] = np.array([best, *rest[kind == 0]])
        for name, number in DUPLICATES.items():
            dropped[name] += int((kind == number).sum())
    if not (gains > 0).any():
        raise ValueError(
            f"The teacher's best document is ahead of the next by {options.positive_margin:g} in none of "
            f"{len(leads):,} lists; the leads are {float(np.median(leads)):.3g} at the median, and {max(leads):.3g} at "
            "most. Lower positive_margin (scores that are stored stay), or set positives to optional and train with KL."
        )
    every = np.concatenate(order)
    return dataclasses.replace(pools, gains=gains).take(every, np.ones(len(pools), bool))


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
