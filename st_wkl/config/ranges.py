"""Which values options may have: one table by name, for Python, the command line and configurations alike."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Tokenizers without a limit of their own say 1e30; no reranker reads this many tokens on purpose.
NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have; never NaN or infinity.

    Args:
        low: The smallest one.
        high: The largest one; None for no bound.
        above: Whether `low` itself is left out.
        whole: Whether it counts something.
    """

    low: float
    high: float | None = None
    above: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Tell whether a value is one of the numbers."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        number = float(value)
        return (number > self.low if self.above else number >= self.low) and (self.high is None or number <= self.high)

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:,}" + ("" if self.high is None else f", up to {self.high:,}")
        return f"{self.low:,} or more" if self.high is None else f"from {self.low:,} to {self.high:,}"


# A count below 1 would be a slice from the end.
_COUNTS = """
    limit top_k num_negatives pool_size max_positives pairs_per_query chunk_size batch_size batch_tokens workers
    mini_batch_size max_queries max_documents patience rounds every gradient_accumulation_steps
    per_device_train_batch_size per_device_eval_batch_size
""".split()  # noqa: SIM905
_SEED, _SHARE, _POSITIVE, _FROM_ZERO = (
    Range(0, 2**32 - 1, whole=True),
    Range(0, 1, above=True),
    Range(0, above=True),
    Range(0),
)
RANGES = {
    **dict.fromkeys(_COUNTS, Range(1, whole=True)),
    "max_length": Range(8, NO_LIMIT, whole=True),
    "training.max_length": Range(1, NO_LIMIT, whole=True),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(("relative_margin", "near_duplicates"), _SHARE),
    **dict.fromkeys(("student_temperature", "teacher_temperature", "temperature"), _POSITIVE),
    **dict.fromkeys(("absolute_margin", "in_batch", "weight", "gamma", "alpha", "k1"), _FROM_ZERO),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "num_train_epochs", "epochs"), _FROM_ZERO),
    **dict.fromkeys(("b", "warmup_ratio"), Range(0, 1)),
    "learning_rate": Range(0, 10**6),
}
_PUSHES = ("push_to_hub", "hub_")


def check_options(**options: Any) -> None:
    """Stop at a value that an option of its name cannot have; None stands for an option that is not given.

    Raises:
        ValueError: With name, value and range.

    Example:
        >>> check_options(top_k=10, seed=None)
    """
    for name, value in options.items():
        if value is not None and name in RANGES and not RANGES[name].holds(value):
            raise ValueError(f"{name} must be {RANGES[name]}, got {value!r}.")


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
        allowed = RANGES.get(path) or RANGES.get(path.rpartition(".")[2])
        if value is not None and allowed is not None and group != "lora" and not allowed.holds(value):
            raise ValueError(f"{path} is {value}; it has to be {allowed}.")
    training = config.get("training") or {}
    if training.get("eval_strategy") not in (None, "no", False) and not config.get("dev"):
        raise ValueError(
            f"training.eval_strategy is {training['eval_strategy']!r}, and there is no `dev` to evaluate on."
        )


def pushes(path: str) -> str:
    """Say why an argument by which a trainer sends a student to the Hub is refused."""
    return (
        f"{path}: a run sends nothing to the Hub, and would make a public repository here. Leave it out; "
        "`st-wkl push FOLDER REPOSITORY`, or st_wkl.push_student, sends the finished student, private unless you say "
        "otherwise."
    )


def check_arguments(arguments: Any, evaluates: bool) -> None:
    """Stop at training arguments with which no run can begin, and at those that would send the student away.

    What is out of range but no count, such as an infinite learning rate, shows at the first step.

    Args:
        arguments: Those of a trainer, a dataclass.
        evaluates: Whether there is something to evaluate on.

    Raises:
        ValueError: With the argument's name.
    """
    for entry in dataclasses.fields(arguments):
        name, value = entry.name, getattr(arguments, entry.name, None)
        if name.startswith(_PUSHES) and value not in (None, False, entry.default):
            raise ValueError(pushes(f"args.{name}"))
        allowed = RANGES.get(f"training.{name}") or RANGES.get(name)
        if isinstance(value, int | float) and allowed is not None and allowed.whole and not allowed.holds(value):
            raise ValueError(f"args.{name} is {value}; it has to be {allowed}.")
    strategy = getattr(arguments, "eval_strategy", "no")
    if strategy != "no" and not evaluates:
        named = getattr(strategy, "value", strategy)
        raise ValueError(f"args.eval_strategy is {named!r}, and there is nothing to evaluate on: give eval=.")


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{where}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
