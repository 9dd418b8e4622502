"""How pairs and lists are scored and kept, and what that would cost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from st_wkl.data.engines import score_chunks
from st_wkl.data.plan import Chunks, Plan
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.teacher import (
    Engine,
    Lists,
    ListTeacher,
    Mixture,
    Pair,
    Teacher,
    TextPairs,
    as_scores,
    text_key,
)
from st_wkl.progress import progress
from st_wkl.ranges import check_options

logger = logging.getLogger(__name__)

# What is finished is kept after five seconds, or sooner where a pair costs a teacher more than a commit does: a teacher
# that costs nothing would wait for the disk most of its time.
_SECONDS_OPEN, _SECONDS_A_PAIR = 5.0, 2e-5
# A pair that took longer is on the disk before the next one is begun; others are written while the teacher goes on, in
# commits that take at most a fifth of the time.
_SECONDS_KEPT, _PAUSE = 1e-3, 5


@dataclass(frozen=True)
class Scored:
    """Scores of pairs, and what was learnt on the way, so that nobody has to tokenise again.

    Attributes:
        scores: float32 of shape (n,), in the order of the pairs.
        different: How many of the pairs differ from each other.
        cut: How many of these are longer than the teacher reads; `None` where it does not count tokens.
    """

    scores: np.ndarray
    different: int
    cut: int | None

    def __repr__(self) -> str:
        cut = "" if self.cut is None else f", {self.cut:,} of them cut to the teacher's length"
        return f"Scored({len(self.scores):,} scores of {self.different:,} different pairs{cut})"


def score_pairs(
    teacher: Teacher,
    pairs: Sequence[Pair],
    *,
    store: ScoreStore | None = None,
    show_progress: bool = True,
    chunk_size: int | None = None,
    engine: Engine = "process",
    workers: int | None = None,
) -> np.ndarray:
    """Score text pairs, each different pair once, and keep every score as soon as it is there.

    Pairs are sorted by length across all queries, longest first (little padding; a lack of memory shows at once), and
    handed to the teacher in chunks. A chunk is committed to the store when it is finished, and a teacher with
    `score_parts` (a cross-encoder) commits what it has every 15 seconds: that is what a killed run loses at most, with
    workers a chunk of each. A teacher of 1,000 pairs a second and more does not wait for the disk: its scores are
    written while it goes on, and a killed run may lose those of ten seconds. The next run scores
    nothing twice. A score that was made with another maximum length is taken where neither cuts the pair. The length is
    in tokens where the teacher has `token_lengths`, else in characters.

    Args:
        teacher: Anything with the two members of `Teacher`.
        pairs: n `(query, document)` texts, in any order, repeated or not.
        store: Where scores are looked up and kept; `None` keeps nothing.
        show_progress: Show a bar in tokens (characters where the teacher counts none), with rate and remaining time.
        chunk_size: Pairs in one call of the teacher and one commit. `None` takes 512, about 15 s of a small
            cross-encoder on a CPU: little to lose, and enough for sorted batches; or the teacher's own `chunk_pairs`.
        engine: `"process"` (here), `"pool"` (processes on this machine) or `"ray"` (actors of Ray, extra `ray`); see
            `st_wkl.data.engines.score_chunks`. This process alone writes to the store.
        workers: Workers of the pool or of Ray; `None` takes one for each GPU, 2 where there is none.

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
    options: dict[str, Any] = {"chunk_size": chunk_size, "engine": engine, "workers": workers}
    options |= {"store": store, "show_progress": show_progress}
    return score_candidates(teacher, pairs, None, count_cut=False, **options).scores


def score_lists(teacher: Teacher | ListTeacher, lists: Lists, **options: Any) -> list[np.ndarray]:
    """Score candidate lists with any teacher, of pairs or of lists.

    Args:
        teacher: A `Teacher`, whose pairs of all lists are scored in one sorted run, or a `ListTeacher`.
        lists: `(query, documents)` texts; lists may differ in length.
        options: Those of `score_pairs`: `store`, `show_progress`, `chunk_size`, `engine`, `workers`.

    Returns:
        For each list float32 of shape (number of documents,), in their order.

    Example:
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
        >>> score_lists(teacher, [("a", ["b", "ccc"]), ("a", ["dd"])], show_progress=False)
        [array([1., 3.], dtype=float32), array([2.], dtype=float32)]
    """
    pairs = [(query, document) for query, documents in lists for document in documents]
    sizes = [len(documents) for _, documents in lists]
    return split(score_candidates(teacher, pairs, sizes, count_cut=False, **options).scores, sizes)


def split(flat: np.ndarray, sizes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Cut what belongs to all pairs, list after list, back into lists of these sizes."""
    return np.split(flat, np.cumsum(sizes[:-1], dtype=int)) if len(sizes) else []


def score_candidates(
    teacher: Teacher | ListTeacher,
    pairs: Sequence[Pair],
    sizes: Sequence[int] | np.ndarray | None,
    *,
    count_cut: bool = True,
    show_progress: bool = True,
    **options: Any,
) -> Scored:
    """Score the candidates of all queries, one list after the other, with any teacher, and say what was learnt.

    Args:
        teacher: A `Teacher` or a `ListTeacher`.
        pairs: n `(query, document)` texts, best as `TextPairs.at(queries, documents, query_places, document_places)`,
            which holds each text once.
        sizes: How many of the pairs each list has; they sum to n. `None` where there are no lists.
        count_cut: Count the cut pairs among all, those with a score in the store too.
        show_progress: Show bars.
        options: Those of `score_pairs`: `store`, `chunk_size`, `engine`, `workers`.

    Raises:
        TypeError: As `score_pairs`; or a teacher of lists gets no lists.
        ValueError: As `score_pairs`; or lists and pairs, or the lists of a teacher, do not fit.
        RuntimeError: As `score_pairs`.

    Example:
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
        >>> pairs = TextPairs.at(["a"], ["b", "ccc"], np.array([0, 0, 0]), np.array([0, 1, 1]))
        >>> score_candidates(teacher, pairs, [3], show_progress=False)
        Scored(3 scores of 2 different pairs)
    """
    check_options(**options)
    if sizes is None and not hasattr(teacher, "score"):
        raise TypeError(f"{type(teacher).__name__} scores whole lists: use score_lists.")
    pairs = TextPairs.of(pairs)
    if sizes is not None and len(pairs) != int(np.sum(sizes)):
        raise ValueError(f"The lists have {int(np.sum(sizes)):,} documents, and there are {len(pairs):,} pairs.")
    if sizes is None or not hasattr(teacher, "score_lists"):
        return _score(cast("Teacher", teacher), pairs, count_cut, show_progress, **options)
    if isinstance(teacher, Mixture):  # of teachers each of which keeps its own scores
        options |= {"count_cut": count_cut, "show_progress": show_progress}
        parts = [score_candidates(one, pairs, sizes, **options) for one in teacher.teachers]
        mixed = [teacher.mix(scores) for scores in zip(*(split(part.scores, sizes) for part in parts), strict=True)]
        scores = np.concatenate([np.empty(0, dtype=np.float32), *mixed])
        return Scored(scores, parts[0].different, parts[0].cut if len(parts) == 1 else None)
    store = options.get("store")
    return _score_whole_lists(cast("ListTeacher", teacher), pairs, np.asarray(sizes, dtype=int), show_progress, store)


def _score_whole_lists(
    teacher: ListTeacher, pairs: TextPairs, sizes: np.ndarray, show_progress: bool, store: ScoreStore | None
) -> Scored:
    ends = np.cumsum(sizes)
    asked = [pairs[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True) if size]
    lists = [(part[0][0], [document for _, document in part]) for part in asked]
    found: Sequence[np.ndarray] = []
    if lists and hasattr(teacher, "list_parts"):
        found = _score_kept_lists(teacher, lists, show_progress, store)
    elif lists:
        found = teacher.score_lists(lists, show_progress=show_progress)
    if len(found) != len(lists):
        raise ValueError(f"The teacher returned {len(found)} lists of scores for {len(lists)} lists of documents.")
    scores = [as_scores(output, part) for output, part in zip(found, asked, strict=True)]
    flat = np.concatenate([np.empty(0, dtype=np.float32), *scores])
    return Scored(flat, len(TextPairs.different(pairs)[0]), None)


def _score_kept_lists(teacher: Any, lists: Lists, show_progress: bool, store: ScoreStore | None) -> list[np.ndarray]:
    """Score lists that are finished one by one; a store keeps each as pairs of the query and a key of list and place.

    A key's text is no document, and its teacher none of pairs: such scores meet no others.
    """
    identity = {"kind": "lists", "teacher": teacher.identity}
    keys = [text_key(json.dumps(list(documents))).hex() for _, documents in lists]
    pairs = [
        [(query, f"{key} {place}") for place in range(len(documents))]
        for key, (query, documents) in zip(keys, lists, strict=True)
    ]
    found = [np.full(len(part), np.nan, dtype=np.float32) for part in pairs]
    if store is not None:
        flat = store.get(identity, [pair for part in pairs for pair in part])
        found = split(flat, [len(part) for part in pairs])
    missing = [place for place, scores in enumerate(found) if np.isnan(scores).any()]
    done = len(lists) - len(missing)
    with progress(total=len(lists), initial=done, desc="Ranking", unit=" lists", disable=not show_progress) as bar:
        for at, scores in teacher.list_parts([lists[place] for place in missing]):
            query, documents = lists[missing[at]]
            found[missing[at]] = as_scores(scores, [(query, document) for document in documents])
            if store is not None:
                store.put(identity, pairs[missing[at]], found[missing[at]])
            bar.set_postfix_str(getattr(teacher, "progress", ""), refresh=False)
            bar.update()
    return found


def _score(
    teacher: Teacher,
    pairs: Sequence[Pair],
    count_cut: bool,
    show_progress: bool,
    *,
    store: ScoreStore | None = None,
    chunk_size: int | None = None,
    engine: Engine = "process",
    workers: int | None = None,
) -> Scored:
    if store is not None and hasattr(teacher, "check_stored"):
        teacher.check_stored(store)
    plan = Plan.make(teacher, pairs, store, count_all=count_cut)
    unique, scores, missing = plan.pairs, plan.scores, np.isnan(plan.scores)
    together = getattr(teacher, "chunk_pairs", None)
    chunks = Chunks(unique, missing.copy(), chunk_size or together or 512, whole_queries=together is not None)
    cut_before, left = getattr(teacher, "truncated_pairs", 0), int(missing.sum())
    writer = _Writer(store, plan)
    # Longest first, a pair costs less and less: only tokens tell how long the rest will take.
    with progress(
        total=int(plan.work.sum()),
        initial=int(plan.work[~missing].sum()),
        desc="Scoring",
        unit=" tokens" if plan.in_tokens else " characters" if left else " pairs",
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        try:
            for number, part, output in score_chunks(teacher, chunks, engine=engine, workers=workers):
                places = chunks.places(number)[part]
                scores[places] = as_scores(output, unique.take(places))
                writer.add(places)
                left -= len(places)
                told = [f"{len(unique) - left:,} of {len(unique):,} pairs", getattr(teacher, "progress", "")]
                bar.set_postfix_str(", ".join(filter(None, told)), refresh=False)
                bar.update(int(plan.work[places].sum()))
        finally:
            writer.close()
    cut, of = plan.cut, len(unique)
    if cut is None:
        cut, of = getattr(teacher, "truncated_pairs", 0) - cut_before, len(unique) - plan.known
    if cut:
        logger.warning(
            "%s of %s pairs were longer than the teacher's maximum length and were cut.", f"{cut:,}", f"{of:,}"
        )
    return Scored(scores[plan.places], len(unique), plan.cut)


class _Writer:
    """Keeps what is finished while the teacher goes on: a commit waits for the disk, and the teacher should not."""

    def __init__(self, store: ScoreStore | None, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._path = None if store is None or store.path == ":memory:" else str(Path(store.path).absolute())
        self._places: list[np.ndarray] = []
        self._since = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "st_wkl-store")
        self._writing: Future[float] | None = None
        self._took = 0.0

    def add(self, places: np.ndarray) -> None:
        """Take what is finished, and write it if it is worth a commit."""
        if self._store is None:
            return
        self._places.append(places)
        waiting, passed = sum(map(len, self._places)), time.monotonic() - self._since
        if passed < min(_SECONDS_OPEN, waiting * _SECONDS_A_PAIR):
            return
        aside = self._path is not None and passed < waiting * _SECONDS_KEPT
        if self._writing is not None and self._writing.done():
            self._took = self._finish(self._writing)
        if not aside or passed >= _SECONDS_OPEN or (self._writing is None and passed >= _PAUSE * self._took):
            self._write(aside)

    def close(self) -> None:
        """Write the rest."""
        try:
            self._write(aside=False)
        finally:
            self._thread.shutdown()

    def _write(self, aside: bool) -> None:
        if self._writing is not None:
            self._took = self._finish(self._writing)
        if self._store is not None and self._places:
            places, self._places = np.concatenate(self._places), []
            given = self._plan.identity, self._plan.pairs.take(places), self._plan.scores[places]
            if aside and self._path is not None:
                self._writing = self._thread.submit(_put, self._path, *given)
            else:
                self._store.put(*given)
            self._since = time.monotonic()

    def _finish(self, writing: Future[float]) -> float:
        self._writing = None
        return writing.result()  # an error of the last commit is one of this run


def _put(path: str, identity: dict[str, Any], pairs: TextPairs, scores: np.ndarray) -> float:
    start = time.monotonic()
    with ScoreStore(path) as store:  # a connection of this thread
        store.put(identity, pairs, scores)
    return time.monotonic() - start


@dataclass(frozen=True)
class ScoringEstimate:
    """What scoring would cost, before anything starts."""

    pairs: int  # as given
    different_pairs: int
    known: int  # different pairs that the store has already
    to_score: int  # different pairs that need the teacher
    tokens: int | None  # of `to_score`, after cutting; None where the teacher does not count tokens
    truncated: int | None  # different pairs, known ones included, that are longer than the teacher reads; None likewise
    sampled: int  # pairs that were scored to measure the rate; they are not kept
    seconds: float | None  # expected time of one process on this machine; None if nothing was sampled
    requests: int | None = None  # to a teacher on a server
    cost: float | None = None  # where a price was told

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
            cut = "" if self.truncated is None else f"; {self.truncated:,} pairs are longer than the teacher reads"
            lines.append(f"{self.tokens:,} tokens{cut}")
        if self.requests is not None:
            lines.append(f"{self.requests:,} requests" + ("" if self.cost is None else f", cost {self.cost:,.2f}"))
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
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
        >>> print(estimate_scoring(teacher, [("cat", "a cat"), ("cat", "a cat")], sample_size=0))
        2 pairs, 1 of them different
        0 have a score already, 1 to score
    """
    if sample_size < 0:
        raise ValueError(f"sample_size must be 0 or more, got {sample_size}.")
    plan = Plan.make(teacher, pairs, store, count_all=True, keep=False)
    missing = np.flatnonzero(np.isnan(plan.scores))
    tokens: int | None = int(plan.work[missing].sum()) if plan.in_tokens else None
    remote: Any = teacher if hasattr(teacher, "requests_for") else None
    if remote is not None and sample_size:  # as many as are under way together, or it would look slow
        sample_size = max(sample_size, remote.pairs_at_once)
    sampled, seconds = min(sample_size, len(missing)), None if len(missing) else 0.0
    if sampled > 0:
        places = missing[np.linspace(0, len(missing) - 1, sampled).astype(int)]
        if remote is not None:  # whole queries
            places = missing[(len(missing) - sampled) // 2 :][:sampled]
        sample, counted = list(plan.pairs.take(places)), getattr(remote, "tokens", 0)
        # The first call pays for buffers and compilation, which a long run does not notice.
        as_scores(teacher.score(sample[-1:]), sample[-1:])
        start = time.perf_counter()
        as_scores(teacher.score(sample), sample)
        passed = time.perf_counter() - start
        share = float(plan.work[missing].sum() / max(1.0, plan.work[places].sum()))
        seconds = passed * share
        if remote is not None and remote.tokens > counted:
            first = int(plan.work[places[-1:]].sum())  # the last pair was asked about twice
            whole = float(plan.work[places].sum())
            tokens = int((remote.tokens - counted) * whole / max(1.0, whole + first) * share)
    requests = None if remote is None else remote.requests_for(plan.pairs.take(missing))
    return ScoringEstimate(
        pairs=len(pairs),
        different_pairs=len(plan.pairs),
        known=plan.known,
        to_score=len(missing),
        tokens=tokens,
        truncated=plan.cut,
        sampled=sampled,
        seconds=seconds,
        requests=requests,
        cost=None if requests is None else remote.cost_of(requests, tokens or 0),
    )
