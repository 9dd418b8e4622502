"""A teacher for workers. It imports little: each worker imports it, and what a test needs besides takes seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CULPRIT = ("query 3", "red cat 45")


class ProcessTeacher:
    """A teacher that can be sent to workers, says in which process it ran, and fails at one pair in a chosen way."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name it."""
        return {"model": "process-teacher"}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length, or by process."""
        if self.fault == "pid":
            return np.full(len(pairs), os.getpid(), dtype=np.float32)
        scores = np.array([len(query) + 2 * len(document) for query, document in pairs], dtype=np.float32)
        if self.fault == "device":
            return np.full(len(pairs), int(os.environ.get("CUDA_VISIBLE_DEVICES", "-1")), dtype=np.float32)
        if CULPRIT in pairs:
            if self.fault.startswith("once:") and not Path(self.fault[5:]).exists():
                Path(self.fault[5:]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "raise":
                raise OverflowError("too hot")
            if self.fault == "die":
                os._exit(3)
            if self.fault == "short":
                return scores[:-1]
            if self.fault == "nan":
                scores[list(pairs).index(CULPRIT)] = np.nan
        return scores
