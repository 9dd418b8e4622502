"""Which values a configuration may have, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from st_wkl.data.selection import Selection
from st_wkl.model_checks import NO_LIMIT

# Smallest and largest value of a key by its path; None is no bound. A count below 1 would be a slice from the end.
_RANGES: dict[str, tuple[float, float | None]] = {
    "collection.limit": (1, None),
    "candidates.top_k": (1, None),
    "candidates.num_negatives": (1, None),
    "teacher.max_length": (8, NO_LIMIT),
    "selection.seed": (0, 2**32 - 1),
    "loss.in_batch": (0, None),
    "loss.mini_batch_size": (1, None),
    "dev.max_queries": (1, None),
    "dev.max_documents": (1, None),
    "dev.patience": (1, None),
    "evaluation.batch_size": (1, None),
    "training.seed": (0, 2**32 - 1),
    "training.data_seed": (0, 2**32 - 1),
    "training.learning_rate": (0, 1e6),
    "training.gradient_accumulation_steps": (1, None),
    "training.per_device_train_batch_size": (1, None),
    "training.per_device_eval_batch_size": (1, None),
    "training.max_grad_norm": (0, None),
    "training.warmup_ratio": (0, 1),
    "training.weight_decay": (0, None),
}
_PUSHES = ("push_to_hub", "hub_")


def check_ranges(config: Mapping[str, Any]) -> None:
    """Stop at a value that no run can have, and at arguments that would send the student away.

    Args:
        config: The tree as plain values.

    Raises:
        ValueError: With key, value and range.
    """
    for path, value in _leaves(config):
        group, _, name = path.partition(".")
        if group == "training" and name.startswith(_PUSHES) and value not in (None, False):
            raise ValueError(pushes(path))
        if path not in _RANGES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high = _RANGES[path]
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            bounds = f"{low:,} or more" if high is None else f"from {low:,} to {high:,}"
            raise ValueError(f"{path} is {value}; it has to be {bounds}.")
    try:
        Selection(**config["selection"])
    except ValueError as error:
        raise ValueError(f"selection.{error}") from error
    training = config.get("training") or {}
    if training.get("eval_strategy") not in (None, "no") and not config.get("dev"):
        raise ValueError(
            f"training.eval_strategy is {training['eval_strategy']!r}, and there is no `dev` to evaluate on."
        )


def pushes(path: str) -> str:
    """Say why an argument by which a trainer sends a student to the Hub is refused."""
    return (
        f"{path}: a run sends nothing to the Hub, and would make a public repository here. Leave it out; "
        "`st-wkl push FOLDER REPOSITORY`, or st_wkl.hub.push_student, sends the finished student, private unless you "
        "say otherwise."
    )


def check_arguments(arguments: Any) -> None:
    """Stop at training arguments with which no run can begin, and at those that would send the student away.

    Args:
        arguments: Those of a trainer, a dataclass.

    Raises:
        ValueError: With the argument's name.
    """
    for entry in dataclasses.fields(arguments):
        value, (low, _) = getattr(arguments, entry.name, None), _RANGES.get(f"training.{entry.name}", (0, None))
        if entry.name.startswith(_PUSHES) and value not in (None, False, entry.default):
            raise ValueError(pushes(f"args.{entry.name}"))
        if low == 1 and isinstance(value, int) and value < low:
            raise ValueError(f"args.{entry.name} is {value}; it has to be {low} or more.")


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{where}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
