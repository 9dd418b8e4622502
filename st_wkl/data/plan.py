"""Which pairs still need a score, in which order, and in which chunks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from st_wkl.data.score_store import ScoreStore, former_identity
from st_wkl.data.teacher import Pair, Teacher, TextPairs, check_bounds

logger = logging.getLogger(__name__)


class Chunks(Sequence[list[Pair]]):
    """The missing pairs of each chunk that has any, made when they are asked for."""

    def __init__(self, pairs: TextPairs, missing: np.ndarray, size: int, *, whole_queries: bool = False) -> None:
        self.pairs, self.missing = pairs, missing
        starts = np.arange(0, len(missing), size)
        if whole_queries:  # sorted by query: those of one are not torn apart, which would cost a request
            rows, _ = pairs.places()
            starts = np.unique(np.searchsorted(rows, rows[starts], side="left"))
        self.bounds = [*starts.tolist(), len(missing)]
        self.starts = np.flatnonzero(np.add.reduceat(missing, starts)).tolist() if len(missing) else []

    def __len__(self) -> int:
        return len(self.starts)

    def places(self, number: int) -> np.ndarray:
        """Return the places of a chunk's pairs among all."""
        start, end = self.bounds[self.starts[number] : self.starts[number] + 2]
        return start + np.flatnonzero(self.missing[start:end])

    def __getitem__(self, number: Any) -> Any:
        return list(self.pairs.take(self.places(number)))


@dataclass
class Plan:
    """All different pairs in the order of scoring, with what is known of them, and the places of the given ones."""

    identity: dict[str, Any]
    pairs: TextPairs
    places: np.ndarray
    in_tokens: bool
    scores: np.ndarray
    known: int
    cut: int | None
    work: np.ndarray

    @classmethod
    def make(
        cls,
        teacher: Teacher,
        pairs: Sequence[Pair],
        store: ScoreStore | None,
        *,
        count_all: bool = False,
        keep: bool = True,
    ) -> Plan:
        """Look up what is known, and sort; `count_all` counts tokens even where nothing is left to score."""
        unique, given = TextPairs.different(pairs)
        identity, scores = teacher.identity, np.full(len(unique), np.nan, dtype=np.float32)
        if store is not None:
            scores = store.get(identity, unique)
            check_bounds(scores, unique)
            _say_former(identity, unique, scores, store)
        known = int(np.isfinite(scores).sum())
        if store is not None:
            logger.info("%s of %s pairs have a score in %s", f"{known:,}", f"{len(unique):,}", store.path)
        # Batches decide bits: padding, and the activation scales of int8 models, depend on the other pairs of a batch.
        # So the chunks are cut from all pairs of this call, sorted by content, and only then thinned out by what is
        # known. A chunk is committed as a whole, hence a run that was interrupted meets each chunk untouched or
        # complete, and scores the rest in the very batches of an undisturbed run: results are equal to the last bit.
        count = getattr(teacher, "token_lengths", None)
        if known == len(unique) and (count is None or not count_all):
            return cls(identity, unique, given, False, scores, known, None, np.ones(len(unique)))
        lengths = count(unique) if count is not None else None
        limit = identity.get("max_length")
        # Over all pairs, so that a resumed run reports what an undisturbed one does.
        cut = None if lengths is None or limit is None else int((np.asarray(lengths) > float(limit)).sum())
        in_tokens = lengths is not None
        if lengths is None:
            lengths = unique.sizes(lambda texts: np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
        if store is not None and in_tokens and limit is not None:
            known += _uncut_elsewhere(identity, unique, lengths, scores, store, keep=keep)
        order = np.argsort(-lengths, kind="stable")
        if hasattr(teacher, "chunk_pairs"):
            order = np.arange(len(unique))  # by query, as they are
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        work = np.minimum(lengths, float(limit)) if in_tokens and limit is not None else lengths
        return cls(identity, unique.take(order), places[given], in_tokens, scores[order], known, cut, work[order])


def _uncut_elsewhere(
    identity: dict[str, Any],
    pairs: TextPairs,
    lengths: np.ndarray,
    scores: np.ndarray,
    store: ScoreStore,
    *,
    keep: bool,
) -> int:
    """Take scores that were made with another maximum length where neither cuts the pair, and return their number."""
    limit, found = identity["max_length"], 0
    for other in store.other_lengths(identity):
        places = np.flatnonzero(np.isnan(scores) & (lengths <= min(float(limit or 0), other["max_length"])))
        there = store.get(other, pairs.take(places))
        places, there = places[np.isfinite(there)], there[np.isfinite(there)]
        if len(places):
            scores[places] = there
            if keep:
                store.put(identity, pairs.take(places), there)
            logger.info(
                "%s scores were made with a maximum length of %s, and no pair of these is cut at %s either.",
                f"{len(places):,}",
                other["max_length"],
                limit,
            )
            found += len(places)
    return found


def _say_former(identity: dict[str, Any], pairs: TextPairs, scores: np.ndarray, store: ScoreStore) -> None:
    """Say that a store has scores under a key of this teacher that no longer counts, and what can be done."""
    former = former_identity(identity)
    if former is None or not (missing := np.isnan(scores)).any():
        return
    found = int((np.isfinite(store.get(former, pairs)) & missing).sum())
    if found:
        logger.warning(
            "%s of the missing scores are in %s under the key that earlier versions gave this teacher. It left out "
            "tokenizer, adapters and settings, so they may be another model's: they are not used, and computed again. "
            "If you know that nothing of the model has changed, take them over before: "
            "ScoreStore(%r).adopt(teacher.identity).",
            f"{found:,}",
            store.path,
            store.path,
        )
