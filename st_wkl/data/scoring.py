"""Which pairs still need a score, in which batches, and how they are kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from st_wkl.data.score_store import Pair, ScoreStore
    from st_wkl.data.teachers import Teacher

logger = logging.getLogger(__name__)


def score_pairs(
    teacher: Teacher,
    pairs: Sequence[tuple[str, str]],
    *,
    store: ScoreStore | None = None,
    show_progress: bool = True,
    chunk_size: int = 512,
) -> np.ndarray:
    """Score text pairs, each different pair once, and keep every score as soon as it is there.

    Pairs are sorted by length across all queries, longest first (little padding; a lack of memory shows at once), and
    handed to the teacher in chunks that are committed to the store one by one. A run that is killed loses one chunk at
    most, and the next run scores nothing twice.

    Args:
        teacher: Anything with the two members of `Teacher`.
        pairs: n `(query, document)` texts, in any order, repeated or not.
        store: Where scores are looked up and kept; `None` keeps nothing.
        show_progress: Show a bar in pairs, with rate and remaining time.
        chunk_size: Pairs in one call of the teacher and one commit. 512 are about 15 s of a small cross-encoder on a
            CPU: little to lose, and enough for sorted batches.

    Returns:
        Raw scores, float32 of shape (n,), in the order of `pairs`.

    Raises:
        TypeError: A pair is not two texts.
        ValueError: The teacher returns the wrong number of scores, or NaN or infinity; the message names the pair.
            Chunks that were finished before are in the store.

    Example:
        >>> class WordOverlap:
        ...     identity = {"model": "word-overlap"}
        ...     def score(self, pairs):
        ...         return np.array([len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)
        >>> score_pairs(WordOverlap(), [("red cat", "a red cat"), ("dog", "a cat")], show_progress=False)
        array([2., 0.], dtype=float32)
    """
    for place, pair in enumerate(pairs):
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise TypeError(f"Pair {place} is {pair!r}; expected two texts (query, document).")
    # Batches decide bits: padding, and the activation scales of int8 models, depend on the other pairs of a batch. So
    # the chunks are cut from all pairs of this call, sorted by content, and only then thinned out by what is known. A
    # chunk is committed as a whole, hence a run that was interrupted meets each chunk untouched or complete, and
    # scores the rest in the very batches of an undisturbed run: the results are equal to the last bit.
    unique = sorted(set(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    scores = np.full(len(unique), np.nan, dtype=np.float32) if store is None else store.get(teacher.identity, unique)
    found = int(np.isfinite(scores).sum())
    if store is not None:
        logger.info("%s of %s pairs have a score in %s", f"{found:,}", f"{len(unique):,}", store.path)
    cut_before = getattr(teacher, "truncated_pairs", 0)
    with tqdm(
        total=len(unique), initial=found, desc="Scoring", unit=" pairs", unit_scale=True, disable=not show_progress
    ) as bar:
        for start in range(0, len(unique), chunk_size):
            missing = start + np.flatnonzero(np.isnan(scores[start : start + chunk_size]))
            if not missing.size:
                continue
            chunk = [unique[place] for place in missing]
            scores[missing] = _checked(teacher.score(chunk), chunk)
            if store is not None:
                store.put(teacher.identity, chunk, scores[missing])
            bar.update(len(chunk))
    if cut := getattr(teacher, "truncated_pairs", 0) - cut_before:
        logger.warning(
            "%s of %s scored pairs were longer than the teacher's maximum length and were cut.",
            f"{cut:,}",
            f"{len(unique) - found:,}",
        )
    places = {pair: place for place, pair in enumerate(unique)}
    return scores[[places[pair] for pair in pairs]]


def _checked(output: np.ndarray, pairs: list[Pair]) -> np.ndarray:
    scores = np.asarray(output, dtype=np.float32)
    if scores.shape != (len(pairs),):
        raise ValueError(
            f"The teacher returned scores of shape {scores.shape} for {len(pairs)} pairs, the first of which is "
            f"{_shown(pairs[0])}. It must return one number for each pair."
        )
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise ValueError(
            f"The teacher returned {scores[wrong[0]]} for {_shown(pairs[wrong[0]])}, and {wrong.size - 1} more scores "
            "that are not finite. Half precision may overflow: load the teacher in float32 or bfloat16, or remove the "
            "document. The scores up to here are kept."
        )
    return scores


def _shown(pair: Pair) -> str:
    return f"query {pair[0][:80]!r} and document {pair[1][:80]!r} ({len(pair[1]):,} characters)"
