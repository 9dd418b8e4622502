"""Teachers made of other teachers: several whose scores are mixed list by list, and one whose scores are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from st_wkl.data.calibration import Calibration, FittedCalibration, calibrate, check_weights, combine
from st_wkl.data.scoring import score_lists
from st_wkl.data.teacher import Lists, ListTeacher, Teacher


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
        teachers: Sequence[Teacher | ListTeacher],
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

    def __repr__(self) -> str:
        return f"EnsembleTeacher({self.teachers}, weights={self.weights}, calibration={self.calibration!r})"

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

    def mix(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """Return one list's scores out of those of each teacher."""
        options: dict[str, Any] = {"certainty": self.certainty, "temperature": self.temperature}
        return combine(scores, self.weights, calibration=self.calibration, **options)

    def score_lists(self, lists: Lists, **options: Any) -> list[np.ndarray]:
        """Return the mixed scores of each list; `options` are those of `st_wkl.data.score_lists`."""
        return score_lists(self, lists, **options)


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
        self.teachers, self.calibration = [teacher], calibration

    def __repr__(self) -> str:
        return f"CalibratedTeacher({self.teacher!r}, {self.calibration})"

    @property
    def teacher(self) -> Teacher | ListTeacher:
        """The teacher of raw logits."""
        return self.teachers[0]

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's identity and the calibration."""
        return {"kind": "calibrated", "teacher": self.teacher.identity, "calibration": asdict(self.calibration)}

    def mix(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """Return one list's scores, calibrated."""
        return self.calibration(scores[0])

    def score_lists(self, lists: Lists, **options: Any) -> list[np.ndarray]:
        """Return the calibrated scores of each list; `options` are those of `st_wkl.data.score_lists`."""
        return score_lists(self, lists, **options)
