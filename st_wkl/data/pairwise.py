"""Pairwise teachers: which of two documents is better for a query, and which pairs are worth asking about."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from st_wkl.data.score_store import ScoreStore
from st_wkl.data.scoring import score_pairs
from st_wkl.data.teacher import Lists, Pair, PairwiseTeacher, Teacher, as_numbers


class CallablePairwiseTeacher:
    """Any function that compares two documents, such as a call of a duo reranker or of a language model.

    Args:
        prefer: `prefer(query, first, second)` of three texts, giving the probability that the first is better.
        name: Name of the teacher.
        version: Changes whenever the function's answers change.

    Example:
        >>> teacher = CallablePairwiseTeacher(lambda q, a, b: float(len(a) < len(b)), name="shorter", version="1")
        >>> teacher.prefer(["q"], ["ab"], ["abc"])
        array([1.], dtype=float32)
    """

    def __init__(self, prefer: Callable[[str, str, str], float], *, name: str, version: str) -> None:
        self._prefer, self._name, self._version = prefer, name, version

    def __repr__(self) -> str:
        return f"CallablePairwiseTeacher(name={self._name!r}, version={self._version!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """Name and version."""
        return {"kind": "pairwise callable", "model": self._name, "revision": self._version}

    def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Ask the function about each triple."""
        return np.array([self._prefer(*triple) for triple in zip(query, first, second, strict=True)], dtype=np.float32)


class CrossEncoderPairwiseTeacher:
    """Preferences from a pointwise teacher's scores: P(first is better) = σ((a − b) / temperature).

    For those who have no duo reranker. It adds no knowledge to the scores; a pairwise loss on it is soft RankNet.

    Args:
        teacher: A `CrossEncoderTeacher`, or any other `Teacher` of raw logits.
        temperature: Above 1 the preferences are softer, below 1 harder.
        store: Where the pointwise scores are looked up and kept.

    Example:
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
        >>> CrossEncoderPairwiseTeacher(teacher).prefer(["q"], ["ab"], ["ab"])
        array([0.5], dtype=float32)
    """

    def __init__(self, teacher: Teacher, *, temperature: float = 1.0, store: ScoreStore | None = None) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.teacher, self.temperature, self.store = teacher, temperature, store

    def __repr__(self) -> str:
        return f"CrossEncoderPairwiseTeacher({self.teacher!r}, temperature={self.temperature})"

    @property
    def identity(self) -> dict[str, Any]:
        """The pointwise teacher's identity and the temperature."""
        known = self.teacher.identity
        return {"kind": "pairwise from pointwise", "teacher": known, "temperature": self.temperature}

    def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Score both documents of each triple, each different pair once, and compare."""
        pairs = [*zip(query, first, strict=True), *zip(query, second, strict=True)]
        left, right = np.split(score_pairs(self.teacher, pairs, store=self.store, show_progress=False), 2)
        # tanh does not overflow: σ(x) = (1 + tanh(x / 2)) / 2.
        margin = (left.astype(np.float64) - right) / self.temperature
        return (0.5 * (1 + np.tanh(margin / 2))).astype(np.float32)


def sample_pairs(
    scores: Sequence[float] | np.ndarray, *, window: int = 5, count: int | None = None, seed: int = 0
) -> np.ndarray:
    """Choose which candidates of one query to compare: near neighbours in the pointwise ranking.

    Far ones are told apart by the pointwise scores already. As PairDistill does (arXiv 2410.01383): pairs of ranks
    i < j ≤ i + `window`, drawn uniformly without repetition, asked in one direction.

    Args:
        scores: Pointwise scores of the N candidates, finite.
        window: How many ranks apart at most.
        count: How many pairs; `None` takes all, and where there are fewer than `count`, all of them are taken.
        seed: Of the draw. Use another one for each query, or all lists of a length are sampled alike.

    Returns:
        int64 of shape (P, 2): places in `scores`, the better ranked first.

    Raises:
        ValueError: A score is not finite, or `window` or `count` is not positive.

    Example:
        >>> sample_pairs([0.1, 3.0, 2.0], window=1).tolist()
        [[1, 2], [2, 0]]
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("Pairs are sampled from a list of finite scores.")
    if window < 1 or (count is not None and count < 1):
        raise ValueError(f"window and count must be positive, got {window} and {count}.")
    order = np.argsort(-values, kind="stable")
    ranks = [(i, j) for i in range(len(values)) for j in range(i + 1, min(len(values), i + window + 1))]
    if count is not None and count < len(ranks):
        chosen = np.random.default_rng(seed).choice(len(ranks), size=count, replace=False)
        ranks = [ranks[at] for at in sorted(chosen)]
    return order[np.array(ranks, dtype=np.int64).reshape(-1, 2)]


def pointwise_preferences(scores: Sequence[float] | np.ndarray, *, window: int = 5) -> list[dict[str, float]]:
    """Say what a list's pointwise scores imply about near neighbours in its ranking: the sigmoid of their difference.

    `PairDistillLoss` learns from these where no pairwise teacher is at hand. They add no knowledge, but a loss of
    neighbours pulls harder where the list's softmax is flat.

    Args:
        scores: Raw logits of the N candidates, finite. Probabilities would give preferences near a half.
        window: How many ranks apart at most.

    Returns:
        `{"first", "second", "probability"}` of each pair, places in `scores`, the better ranked first.

    Raises:
        ValueError: A score is not finite, or `window` is not positive.

    Example:
        >>> pointwise_preferences([0.0, 2.0])
        [{'first': 1, 'second': 0, 'probability': 0.8807970779778823}]
    """
    values = np.asarray(scores, dtype=np.float64)
    pairs = sample_pairs(values, window=window).tolist()
    return [
        {"first": first, "second": second, "probability": float(1 / (1 + np.exp(values[second] - values[first])))}
        for first, second in pairs
    ]


def preferences(
    teacher: PairwiseTeacher,
    lists: Lists,
    scores: Sequence[np.ndarray],
    *,
    window: int = 5,
    count: int | None = None,
    seed: int = 0,
    store: ScoreStore | None = None,
    chunk_size: int = 512,
    show_progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample pairs of each list's candidates and ask a pairwise teacher about them.

    Args:
        teacher: The pairwise teacher.
        lists: `(query, documents)` texts.
        scores: Pointwise scores of each list's documents, which say what near neighbours are.
        window: See `sample_pairs`.
        count: Pairs of each query; see `sample_pairs`.
        seed: Of the draws, which differ from query to query.
        store: Where preferences are looked up and kept, beside the scores and under the teacher's own identity: a run
            that is killed continues where it stopped. `None` keeps nothing.
        chunk_size: Triples in one call of the teacher and one commit.
        show_progress: Show a bar.

    Returns:
        Pairs, int64 of shape (P, 3), rows of (place of the list, place of the first, place of the second document),
        and the probabilities that the first is better, float32 of shape (P,).

    Raises:
        ValueError: Lists and scores do not fit, or an answer is no probability; the message names the documents.
    """
    if len(lists) != len(scores):
        raise ValueError(f"Got {len(lists)} lists and {len(scores)} lists of scores.")
    parts = [np.empty((0, 3), dtype=np.int64)]
    for row, ((query, documents), values) in enumerate(zip(lists, scores, strict=True)):
        if len(documents) != len(values):
            raise ValueError(f"List {row} has {len(documents)} documents and {len(values)} scores.")
        # By the query's text, not its place: other queries in the same run must not change what is asked about this.
        sampled = sample_pairs(values, window=window, count=count, seed=(seed << 32) + zlib.crc32(query.encode()))
        parts.append(np.column_stack([np.full(len(sampled), row), sampled]))
    pairs = np.concatenate(parts)
    if not len(pairs):
        return pairs, np.empty(0, dtype=np.float32)
    judge = _Judge(teacher)
    asked = [judge.question(lists[row][0], lists[row][1][i], lists[row][1][j]) for row, i, j in pairs.tolist()]
    if isinstance(teacher, CrossEncoderPairwiseTeacher) and teacher.store is None:
        # Its pointwise scores are most likely in the store already, as those of the lists.
        judge.teacher = CrossEncoderPairwiseTeacher(teacher.teacher, temperature=teacher.temperature, store=store)
    answers = score_pairs(judge, asked, store=store, chunk_size=chunk_size, show_progress=show_progress)
    return pairs, answers


class _Judge:
    """A pairwise teacher as a teacher of pairs, so that `score_pairs` can order, ask and keep.

    A question is a query and the key of two documents. Which two a key stands for is written down when it is made, and
    never read out of it; its form is that of the keys in the stores that people have.
    """

    def __init__(self, teacher: PairwiseTeacher) -> None:
        self.teacher = teacher
        self.documents: dict[str, Pair] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Never that of a pointwise teacher, whose scores mean something else."""
        return {"kind": "preference", "teacher": self.teacher.identity}

    def question(self, query: str, first: str, second: str) -> Pair:
        key = json.dumps([first, second], ensure_ascii=False)
        self.documents[key] = first, second
        return query, key

    def score_parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the places of questions and the answers to them, as a teacher with `prefer_parts` gives them."""
        if not hasattr(self.teacher, "prefer_parts"):
            yield np.arange(len(pairs)), self.score(pairs)
            return
        documents = [self.documents[key] for _, key in pairs]
        query, first, second = [text for text, _ in pairs], [one for one, _ in documents], [two for _, two in documents]
        yield from self.teacher.prefer_parts(query, first, second)

    @property
    def progress(self) -> str:
        """What the teacher says of its work."""
        return getattr(self.teacher, "progress", "")

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Ask about the two documents of each question."""
        query, keys = (list(texts) for texts in zip(*pairs, strict=True))
        first, second = (list(texts) for texts in zip(*map(self.documents.__getitem__, keys), strict=True))

        def shown(place: int) -> str:
            texts = (text[place][:80] for text in (query, first, second))
            return "query {!r} and documents {!r} and {!r}".format(*texts)

        answers = as_numbers(self.teacher.prefer(query, first, second), pairs).astype(np.float32)
        if answers.shape != (len(pairs),):
            raise ValueError(
                f"The pairwise teacher returned shape {answers.shape} for {len(pairs)} triples, the first of which is "
                f"{shown(0)}."
            )
        wrong = np.flatnonzero(~((answers >= 0) & (answers <= 1)))
        if wrong.size:
            raise ValueError(
                f"The pairwise teacher returned {answers[wrong[0]]} for {shown(int(wrong[0]))}. It must return the "
                "probability, between 0 and 1, that the first document is better."
            )
        return answers


def dataset_preferences(
    teacher: PairwiseTeacher,
    lists: Lists,
    scores: Sequence[np.ndarray],
    *,
    count: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[list[list[dict[str, float]]], dict[str, Any]]:
    """Make the `preferences` column of a `DistillationDataset`, and what its provenance says of it.

    Args:
        teacher: The pairwise teacher.
        lists: `(query, documents)` texts of the rows.
        scores: Pointwise scores of each row's documents, as the teacher gave them.
        count: Pairs of each query; `None` for all within 5 ranks, as PairDistill takes them.
        seed: Of the draws.
        options: `store`, `chunk_size` and `show_progress` of `preferences`.

    Returns:
        For each row `{"first", "second", "probability"}` of each pair, places in the row's documents; and the
        teacher's identity, settings and counts.
    """
    pairs, answers = preferences(teacher, lists, scores, count=count, seed=seed, **options)
    column: list[list[dict[str, float]]] = [[] for _ in lists]
    for (row, first, second), answer in zip(pairs.tolist(), answers.tolist(), strict=True):
        column[row].append({"first": first, "second": second, "probability": answer})
    said = {"teacher": teacher.identity, "window": 5, "pairs_per_query": count, "seed": seed, "pairs": len(pairs)}
    if asked := getattr(teacher, "order_bias", None):
        said["order_bias"] = asked  # of those that were not in the store
    return column, {**said, "rows_without_pairs": sum(not row for row in column)}
