"""Quick arguments, what a trainer logs, and a way to be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from st_wkl.training import default_arguments


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


def arguments(student: Any, output: Path, **changes: Any) -> Any:
    args = default_arguments(student, output)
    args.per_device_train_batch_size, args.num_train_epochs, args.disable_tqdm = 8, 1, True
    for name, value in changes.items():
        setattr(args, name, value)
    return args
