"""Teachers: what gives a (query, document) pair its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from st_wkl.data.cross_encoder import CrossEncoderTeacher

__all__ = ["Teacher", "CrossEncoderTeacher"]


class Teacher(Protocol):
    """What the builder needs of a teacher. Any object with these two members is one."""

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Everything that decides a score, in plain JSON values. Two teachers that score differently never share it."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return raw scores, float32 of shape (n,), for n `(query, document)` texts, in their order."""
