"""Teachers: what gives a (query, document) pair its score. Cross-encoders, any function, and several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.engines import as_scores
from st_wkl.data.lists import EnsembleTeacher, ListTeacher, score_lists
from st_wkl.data.pairwise import CallablePairwiseTeacher, CrossEncoderPairwiseTeacher, PairwiseTeacher
from st_wkl.methods.feedback import FeedbackTeacher

__all__ = [
    "Teacher",
    "CrossEncoderTeacher",
    "CallableTeacher",
    "ListTeacher",
    "EnsembleTeacher",
    "FeedbackTeacher",
    "PairwiseTeacher",
    "CallablePairwiseTeacher",
    "CrossEncoderPairwiseTeacher",
    "score_lists",
]


class Teacher(Protocol):
    """What the builder needs of a teacher. Any object with these two members is one.

    A third is welcome: `token_lengths(pairs)`, the tokens of each pair before anything is cut, int64 of shape (n,), by
    which `score_pairs` sorts and counts cut pairs (those above `identity["max_length"]`).
    """

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Everything that decides a score, in plain JSON values. Two teachers that score differently never share it."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return raw scores, float32 of shape (n,), for n `(query, document)` texts, in their order."""


class CallableTeacher:
    """Any Python function as a teacher.

    A function has no weights to hash, so its name and version are all that tells its scores from others' in the store.

    Args:
        function: `function(query, document)` of two texts, giving a number; or, with `batched`, `function(pairs)` of a
            list of `(query, document)`, giving one number for each.
        name: Name of the teacher.
        version: Changes whenever the function's answers change; otherwise the old ones come out of the store.
        batched: The function takes a list of pairs.

    Raises:
        ValueError: Name or version is empty, or an answer is no number; the message names the pair.

    Example:
        >>> teacher = CallableTeacher(lambda query, document: document.count(query), name="count", version="1")
        >>> teacher.score([("cat", "cat, cat"), ("cat", "dog")])
        array([2., 0.], dtype=float32)
    """

    def __init__(
        self,
        function: Callable[[str, str], float] | Callable[[list[tuple[str, str]]], Sequence[float] | np.ndarray],
        *,
        name: str,
        version: str,
        batched: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}.")
        if not name or not version:
            raise ValueError(f"A function needs a name and a version to be known by, got {name!r} and {version!r}.")
        self._function, self._name, self._version, self._batched = function, name, str(version), batched

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name and version."""
        return {"kind": "callable", "model": self._name, "revision": self._version}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Ask the function about each pair."""
        if self._batched:
            return as_scores(self._function(list(pairs)), pairs)  # type: ignore[call-arg, arg-type]
        scores = np.empty(len(pairs), dtype=np.float32)
        for place, (query, document) in enumerate(pairs):
            answer: Any = self._function(query, document)  # type: ignore[call-arg, arg-type]
            try:
                if isinstance(answer, str | bytes):
                    raise TypeError("text")
                scores[place] = float(answer)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The teacher {self._name!r} returned {answer!r} for query {query[:80]!r} and document "
                    f"{document[:80]!r}; expected a number."
                ) from error
        return scores
