"""Teachers that judge whole candidate lists: several teachers in one, and the call that scores any teacher's lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from st_wkl.data.calibration import Calibration, FittedCalibration, calibrate, check_weights, combine
from st_wkl.data.engines import Engine, as_scores
from st_wkl.data.scoring import score_pairs

if TYPE_CHECKING:
    from st_wkl.data.score_store import ScoreStore
    from st_wkl.data.teachers import Teacher

Lists = Sequence[tuple[str, Sequence[str]]]


class ListTeacher(Protocol):
    """A teacher whose score of a document depends on the other candidates of the query."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides a score, in plain JSON values."""

    def score_lists(
        self, lists: Lists, *, store: ScoreStore | None = None, show_progress: bool = True, **options: Any
    ) -> list[np.ndarray]:
        """Return for each `(query, documents)` the scores of its documents, float32 of shape (number of documents,)."""


def score_lists(
    teacher: Teacher | ListTeacher,
    lists: Lists,
    *,
    store: ScoreStore | None = None,
    show_progress: bool = True,
    engine: Engine = "process",
    workers: int | None = None,
) -> list[np.ndarray]:
    """Score candidate lists with any teacher, of pairs or of lists.

    Args:
        teacher: A `Teacher`, whose pairs of all lists are scored in one sorted run, or a `ListTeacher`.
        lists: `(query, documents)` texts; lists may differ in length.
        store: Where scores of pairs are looked up and kept.
        show_progress: Show bars.
        engine: See `score_pairs`.
        workers: See `score_pairs`.

    Returns:
        For each list float32 of shape (number of documents,), in their order.

    Example:
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
        >>> score_lists(teacher, [("a", ["b", "ccc"]), ("a", ["dd"])], show_progress=False)
        [array([1., 3.], dtype=float32), array([2.], dtype=float32)]
    """
    if hasattr(teacher, "score_lists"):
        found = teacher.score_lists(lists, store=store, show_progress=show_progress, engine=engine, workers=workers)
        if len(found) != len(lists):
            raise ValueError(f"The teacher returned {len(found)} lists of scores for {len(lists)} lists of documents.")
        return [
            as_scores(scores, [(query, document) for document in documents])
            for scores, (query, documents) in zip(found, lists, strict=True)
        ]
    pairs = [(query, document) for query, documents in lists for document in documents]
    flat = score_pairs(teacher, pairs, store=store, show_progress=show_progress, engine=engine, workers=workers)
    return split(flat, lists)


def split(flat: np.ndarray, lists: Lists) -> list[np.ndarray]:
    """Cut the scores of all pairs back into lists."""
    ends = np.cumsum([len(documents) for _, documents in lists], dtype=int)
    return np.split(flat, ends[:-1]) if len(lists) else []


class EnsembleTeacher:
    """Several teachers as one: each scores the pairs, and the lists of scores are calibrated and mixed.

    A calibration needs a query's whole list, so this is a teacher of lists. Each teacher's raw scores are kept in the
    store under its own identity: weights and calibration may change without scoring anything again.

    Args:
        teachers: Two or more teachers of pairs.
        weights: One for each teacher, not negative; `None` weighs all alike.
        calibration: `"none"`, `"z-score"`, `"min-max"` or `"rank"`, for each query's list. `"none"` suits only teachers
            whose scores have one scale: otherwise the one with the widest scores decides alone.
        certainty: Weigh each teacher for each query by how sure it is of it (MUKA, arXiv 2112.07327): by 1 minus the
            normalised entropy of the softmax over its raw scores.
        temperature: Of that softmax.

    Raises:
        ValueError: Fewer than two teachers, one teacher twice, or weights that do not fit.

    Example:
        >>> from st_wkl.data.teachers import CallableTeacher
        >>> words = CallableTeacher(lambda q, d: len({*q.split()} & {*d.split()}), name="overlap", version="1")
        >>> short = CallableTeacher(lambda q, d: -len(d), name="short", version="1")
        >>> both = EnsembleTeacher([words, short], weights=[2, 1], calibration="min-max")
        >>> both.score_lists([("red cat", ["a red cat", "dog"])], show_progress=False)[0].round(2)
        array([0.67, 0.33], dtype=float32)
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        weights: Sequence[float] | None = None,
        calibration: Calibration = "none",
        certainty: bool = False,
        temperature: float = 1.0,
    ) -> None:
        if len(teachers) < 2:
            raise ValueError(f"An ensemble needs two teachers or more, got {len(teachers)}.")
        identities = [teacher.identity for teacher in teachers]
        for place, identity in enumerate(identities):
            if identity in identities[:place]:
                raise ValueError(f"Teacher {place} is the same as one before: {identity}. Give it a larger weight.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        calibrate([], calibration)
        self.teachers, self.calibration = list(teachers), calibration
        self.weights = check_weights(weights, len(teachers)).tolist()
        self.certainty, self.temperature = certainty, temperature

    @property
    def identity(self) -> dict[str, Any]:
        """The teachers' identities, weights, calibration and certainty."""
        return {
            "kind": "ensemble",
            "teachers": [teacher.identity for teacher in self.teachers],
            "weights": self.weights,
            "calibration": self.calibration,
            "certainty": self.certainty,
            "temperature": self.temperature if self.certainty else None,
        }

    def score_lists(
        self, lists: Lists, *, store: ScoreStore | None = None, show_progress: bool = True, **options: Any
    ) -> list[np.ndarray]:
        """Return the mixed scores of each list; `options` (engine, workers) go to `score_pairs`."""
        by_teacher = [
            score_lists(teacher, lists, store=store, show_progress=show_progress, **options)
            for teacher in self.teachers
        ]
        return [
            combine(
                scores,
                self.weights,
                certainty=self.certainty,
                calibration=self.calibration,
                temperature=self.temperature,
            )
            for scores in zip(*by_teacher, strict=True)
        ]


class CalibratedTeacher:
    """A teacher whose scores go through a calibration that was fitted on judged lists.

    The store keeps the raw scores under the teacher's own identity: another calibration scores nothing again.

    Args:
        teacher: A teacher of raw logits.
        calibration: What `st_wkl.data.calibration.fit_calibration` found.

    Example:
        >>> fitted = fit_calibration(dev.train["scores"], dev.train["labels"])  # doctest: +SKIP
        >>> DistillationDatasetBuilder(collection, CalibratedTeacher(teacher, fitted)).build()  # doctest: +SKIP
    """

    def __init__(self, teacher: Teacher | ListTeacher, calibration: FittedCalibration) -> None:
        self.teacher, self.calibration = teacher, calibration

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's identity and the calibration."""
        return {"kind": "calibrated", "teacher": self.teacher.identity, "calibration": asdict(self.calibration)}

    def score_lists(
        self, lists: Lists, *, store: ScoreStore | None = None, show_progress: bool = True, **options: Any
    ) -> list[np.ndarray]:
        """Return the calibrated scores of each list; `options` (engine, workers) go to `score_pairs`."""
        found = score_lists(self.teacher, lists, store=store, show_progress=show_progress, **options)
        return [self.calibration(scores) for scores in found]
