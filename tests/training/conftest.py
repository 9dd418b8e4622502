"""A small distillation dataset, quick arguments, and a way to be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.dataset import DistillationDataset
from st_wkl.training import default_arguments
from tests.test_package import small_collection


class WordOverlap:
    """A teacher that counts shared words: no model, yet scores that rank."""

    identity = {"model": "word-overlap"}  # noqa: RUF012

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([3.0 * len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)


class Killed(BaseException):
    """What no handler of the trainer catches, as little as it catches a signal."""


class KillAt(TrainerCallback):
    """Ends the process, as far as the trainer can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


class LogOf(TrainerCallback):
    """Keeps what reporters would be told."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.history.append(dict(logs))


@pytest.fixture(scope="module")
def dataset() -> DistillationDataset:
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    return builder.build(show_progress=False)


def arguments(student: Any, output: Path, **changes: Any) -> Any:
    args = default_arguments(student, output)
    args.per_device_train_batch_size, args.num_train_epochs, args.disable_tqdm = 8, 1, True
    for name, value in changes.items():
        setattr(args, name, value)
    return args
