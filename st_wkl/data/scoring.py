"""Which pairs still need a score, in which batches, and how they are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from st_wkl.data.cross_encoder import former_identity
from st_wkl.data.engines import Engine, as_scores, check_bounds, score_parts
from st_wkl.data.pairs import TextPairs
from st_wkl.ranges import check_options

if TYPE_CHECKING:
    from st_wkl.data.pairs import Pair
    from st_wkl.data.score_store import ScoreStore
    from st_wkl.data.teachers import Teacher

logger = logging.getLogger(__name__)


def score_pairs(
    teacher: Teacher,
    pairs: Sequence[tuple[str, str]],
    *,
    store: ScoreStore | None = None,
    show_progress: bool = True,
    chunk_size: int = 512,
    engine: Engine = "process",
    workers: int | None = None,
) -> np.ndarray:
    """Score text pairs, each different pair once, and keep every score as soon as it is there.

    Pairs are sorted by length across all queries, longest first (little padding; a lack of memory shows at once), and
    handed to the teacher in chunks. A chunk is committed to the store when it is finished, and a teacher with
    `score_parts` (a cross-encoder) commits what it has every 15 seconds: that is what a killed run loses at most, with
    workers a chunk of each, and the next run scores nothing twice. A score that was made with another maximum length is
    taken where neither cuts the pair. The length is in tokens where the teacher has
    `token_lengths`, else in characters.

    Args:
        teacher: Anything with the two members of `Teacher`.
        pairs: n `(query, document)` texts, in any order, repeated or not.
        store: Where scores are looked up and kept; `None` keeps nothing.
        show_progress: Show a bar in tokens (characters where the teacher counts none), with rate and remaining time.
        chunk_size: Pairs in one call of the teacher and one commit. 512 are about 15 s of a small cross-encoder on a
            CPU: little to lose, and enough for sorted batches.
        engine: `"process"` (here), `"pool"` (processes on this machine) or `"ray"` (Ray Data, extra `ray`); see
            `st_wkl.data.engines.score_chunks`. This process alone writes to the store.
        workers: Workers of the pool or of Ray; `None` takes 2, on a Ray cluster with GPUs one for each GPU.

    Returns:
        Raw scores, float32 of shape (n,), in the order of `pairs`.

    Raises:
        TypeError: A pair is not two texts, or the teacher cannot be sent to the workers.
        ValueError: The teacher returns the wrong number of scores, or what is none (text, dates, masked or complex
            numbers, NaN, infinity, mask values such as -1e4, anything beyond 1e6); the message names the pair. Chunks
            that were finished before are in the store.
        RuntimeError: A worker failed or died; the message names the pair.

    Example:
        >>> class WordOverlap:
        ...     identity = {"model": "word-overlap"}
        ...     def score(self, pairs):
        ...         return np.array([len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)
        >>> score_pairs(WordOverlap(), [("red cat", "a red cat"), ("dog", "a cat")], show_progress=False)
        array([2., 0.], dtype=float32)
    """
    check_options(chunk_size=chunk_size, workers=workers)
    plan = _Plan.make(teacher, pairs, store)
    unique, scores = plan.pairs, plan.scores
    chunks = _Chunks(unique, np.isnan(scores), chunk_size)
    cut_before = getattr(teacher, "truncated_pairs", 0)
    missing = np.isnan(scores)
    # Longest first, a pair costs less and less: only tokens tell how long the rest will take.
    with tqdm(
        total=int(plan.work.sum()),
        initial=int(plan.work[~missing].sum()),
        desc="Scoring",
        unit=" tokens" if plan.in_tokens else " characters" if missing.any() else " pairs",
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        for number, part, output in score_parts(teacher, chunks, engine=engine, workers=workers):
            places = chunks.places(number)[part]
            pairs_of_part = list(unique.take(places))
            scores[places] = as_scores(output, pairs_of_part)
            missing[places] = False
            if store is not None:
                store.put(teacher.identity, pairs_of_part, scores[places])
            bar.set_postfix_str(f"{len(unique) - int(missing.sum()):,} of {len(unique):,} pairs", refresh=False)
            bar.update(int(plan.work[places].sum()))
    cut, of = plan.truncated, len(unique)
    if cut is None:
        cut, of = getattr(teacher, "truncated_pairs", 0) - cut_before, len(unique) - plan.known
    if cut:
        logger.warning(
            "%s of %s pairs were longer than the teacher's maximum length and were cut.", f"{cut:,}", f"{of:,}"
        )
    return scores[plan.places]


@dataclass(frozen=True)
class ScoringEstimate:
    """What scoring would cost, before anything starts.

    Attributes:
        pairs: Pairs as given.
        different_pairs: Pairs that differ from each other.
        known: Different pairs that the store has already.
        to_score: Different pairs that need the teacher.
        tokens: Tokens of `to_score` after cutting; `None` where the teacher does not count tokens.
        truncated: Different pairs, known ones included, that are longer than the teacher reads; `None` likewise.
        sampled: Pairs that were scored to measure the rate; they are not kept.
        seconds: Expected time of one process on this machine; `None` if nothing was sampled.
    """

    pairs: int
    different_pairs: int
    known: int
    to_score: int
    tokens: int | None
    truncated: int | None
    sampled: int
    seconds: float | None

    @property
    def hours(self) -> float | None:
        """Expected hours of one process on this machine."""
        return None if self.seconds is None else self.seconds / 3600

    def __str__(self) -> str:
        lines = [
            f"{self.pairs:,} pairs, {self.different_pairs:,} of them different",
            f"{self.known:,} have a score already, {self.to_score:,} to score",
        ]
        if self.tokens is not None:
            lines.append(f"{self.tokens:,} tokens; {self.truncated:,} pairs are longer than the teacher reads")
        if self.seconds is not None:
            rate = self.to_score / self.seconds if self.seconds else 0.0
            lines.append(f"about {self.seconds / 3600:.2f} hours ({rate:,.1f} pairs/s, timed on {self.sampled} pairs)")
        return "\n".join(lines)


def estimate_scoring(
    teacher: Teacher,
    pairs: Sequence[tuple[str, str]],
    *,
    store: ScoreStore | None = None,
    sample_size: int = 64,
) -> ScoringEstimate:
    """Say how many pairs, tokens and hours `score_pairs` would need, from a short timed sample.

    The sample is drawn at even steps of the sorted lengths, so that long and short pairs have their share, and the
    time grows with the tokens. Nothing is stored: what a score is must not depend on whether it was estimated first.

    Args:
        teacher: Anything with the two members of `Teacher`.
        pairs: n `(query, document)` texts.
        store: Where known scores are looked up.
        sample_size: Pairs to score for the timing; 0 counts only.

    Raises:
        TypeError: A pair is not two texts.
        ValueError: The teacher returns something that is not a score.

    Example:
        >>> class WordOverlap:
        ...     identity = {"model": "word-overlap"}
        ...     def score(self, pairs):
        ...         return np.array([len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)
        >>> print(estimate_scoring(WordOverlap(), [("cat", "a cat"), ("cat", "a cat")], sample_size=0))
        2 pairs, 1 of them different
        0 have a score already, 1 to score
    """
    if sample_size < 0:
        raise ValueError(f"sample_size must be 0 or more, got {sample_size}.")
    plan = _Plan.make(teacher, pairs, store, count_all=True)
    missing = np.flatnonzero(np.isnan(plan.scores))
    lengths = plan.work
    sampled, seconds = min(sample_size, len(missing)), None if len(missing) else 0.0
    if sampled > 0:
        places = missing[np.linspace(0, len(missing) - 1, sampled).astype(int)]
        sample = list(plan.pairs.take(places))
        # The first call pays for buffers and compilation, which a long run does not notice.
        as_scores(teacher.score(sample[-1:]), sample[-1:])
        start = time.perf_counter()
        as_scores(teacher.score(sample), sample)
        passed = time.perf_counter() - start
        seconds = passed * float(lengths[missing].sum() / max(1.0, lengths[places].sum()))
    return ScoringEstimate(
        pairs=len(pairs),
        different_pairs=len(plan.pairs),
        known=plan.known,
        to_score=len(missing),
        tokens=int(lengths[missing].sum()) if plan.in_tokens else None,
        truncated=plan.truncated,
        sampled=sampled,
        seconds=seconds,
    )


class _Chunks(Sequence[list["Pair"]]):
    """The missing pairs of each chunk that has any, made when they are asked for."""

    def __init__(self, pairs: TextPairs, missing: np.ndarray, size: int) -> None:
        self.pairs, self.missing, self.size = pairs, missing, size
        self.starts = [start for start in range(0, len(pairs), size) if missing[start : start + size].any()]

    def __len__(self) -> int:
        return len(self.starts)

    def places(self, number: int) -> np.ndarray:
        start = self.starts[number]
        return start + np.flatnonzero(self.missing[start : start + self.size])

    def __getitem__(self, number: Any) -> Any:
        return list(self.pairs.take(self.places(number)))


@dataclass
class _Plan:
    """All different pairs in the order of scoring, with what is known of them, and the places of the given ones."""

    pairs: TextPairs
    places: np.ndarray
    lengths: np.ndarray
    in_tokens: bool
    scores: np.ndarray
    known: int
    truncated: int | None
    work: np.ndarray

    @classmethod
    def make(cls, teacher: Teacher, pairs: Sequence[Pair], store: ScoreStore | None, count_all: bool = False) -> _Plan:
        unique, given = TextPairs.different(pairs)
        scores = (
            np.full(len(unique), np.nan, dtype=np.float32) if store is None else store.get(teacher.identity, unique)
        )
        known = int(np.isfinite(scores).sum())
        if store is not None:
            check_bounds(scores, unique)
            logger.info("%s of %s pairs have a score in %s", f"{known:,}", f"{len(unique):,}", store.path)
            _say_former(teacher, unique, scores, store)
        if known == len(unique) and not count_all:
            return cls(unique, given, np.zeros(len(unique)), False, scores, known, None, np.ones(len(unique)))
        # Batches decide bits: padding, and the activation scales of int8 models, depend on the other pairs of a batch.
        # So the chunks are cut from all pairs of this call, sorted by content, and only then thinned out by what is
        # known. A chunk is committed as a whole, hence a run that was interrupted meets each chunk untouched or
        # complete, and scores the rest in the very batches of an undisturbed run: results are equal to the last bit.
        count = getattr(teacher, "token_lengths", None)
        lengths = count(unique) if count is not None else None
        limit = teacher.identity.get("max_length")
        # Over all pairs, so that a resumed run reports what an undisturbed one does.
        truncated = None if lengths is None or limit is None else int((lengths > float(limit)).sum())
        in_tokens = lengths is not None
        if lengths is None:
            sizes = (len(query) + len(document) for query, document in unique)
            lengths = np.fromiter(sizes, dtype=np.int64, count=len(unique))
        if store is not None and in_tokens and limit is not None:
            known += _uncut_elsewhere(teacher, unique, lengths, scores, store, keep=not count_all)
        order = np.argsort(-lengths, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        pairs_in_order, given = unique.take(order), places[given]
        lengths = lengths[order]
        work = np.minimum(lengths, float(limit)) if in_tokens and limit is not None else lengths
        return cls(pairs_in_order, given, lengths, in_tokens, scores[order], known, truncated, work)


def _uncut_elsewhere(
    teacher: Teacher, pairs: TextPairs, lengths: np.ndarray, scores: np.ndarray, store: ScoreStore, *, keep: bool
) -> int:
    """Take scores that were made with another maximum length where neither cuts the pair, and return their number."""
    limit, found = teacher.identity["max_length"], 0
    for other in store.other_lengths(teacher.identity):
        places = np.flatnonzero(np.isnan(scores) & (lengths <= min(float(limit or 0), other["max_length"])))
        there = store.get(other, list(pairs.take(places)))
        places, there = places[np.isfinite(there)], there[np.isfinite(there)]
        if len(places):
            scores[places] = there
            if keep:
                store.put(teacher.identity, list(pairs.take(places)), there)
            logger.info(
                "%s scores were made with a maximum length of %s, and no pair of these is cut at %s either.",
                f"{len(places):,}",
                other["max_length"],
                limit,
            )
            found += len(places)
    return found


def _say_former(teacher: Teacher, pairs: TextPairs, scores: np.ndarray, store: ScoreStore) -> None:
    """Say that a store has scores under a key of this teacher that no longer counts, and what can be done."""
    former = former_identity(teacher.identity)
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
