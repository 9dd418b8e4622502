"""Which values options may have: one table by name and one wording, for Python, command line and configurations."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Tokenizers without a limit of their own say 1e30; no reranker reads this many tokens on purpose.
NO_LIMIT = 1_000_000


class OptionError(ValueError):
    """An option that cannot be as it is given; a surface that has another name for it says that instead.

    Args:
        option: Its name, in a tree with its place: `training.seed`.
        told: The rest of the sentence.
    """

    def __init__(self, option: str, told: str) -> None:
        super().__init__(option, told)
        self.option, self.told = option, told

    def __str__(self) -> str:
        return f"{self.option} {self.told}"


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have; never NaN or infinity.

    Args:
        low: The smallest one; None for no bound.
        high: The largest one; None for no bound.
        above: Whether `low` itself is left out.
        whole: Whether it counts something.
    """

    low: float | None
    high: float | None = None
    above: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Tell whether a value is one of the numbers."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        number, low = float(value), -math.inf if self.low is None else self.low
        return (number > low if self.above else number >= low) and (self.high is None or number <= self.high)

    def __str__(self) -> str:
        if self.low is None:
            return "a finite number"
        if self.above:
            return f"above {self.low:,}" + ("" if self.high is None else f", up to {self.high:,}")
        return f"{self.low:,} or more" if self.high is None else f"from {self.low:,} to {self.high:,}"


# A count below 1 would be a slice from the end.
_COUNTS = """
    limit top_k num_negatives pool_size max_positives pairs_per_query chunk_size batch_size batch_tokens workers
    negatives_per_step mini_batch_size max_queries max_documents patience rounds every gradient_accumulation_steps
    per_device_train_batch_size per_device_eval_batch_size concurrency requests_per_minute
""".split()  # noqa: SIM905
RANGES = {
    **dict.fromkeys(_COUNTS, Range(1, whole=True)),
    "max_length": Range(8, NO_LIMIT, whole=True),
    "training.max_length": Range(1, NO_LIMIT, whole=True),
    **dict.fromkeys(("seed", "data_seed"), Range(0, 2**32 - 1, whole=True)),
    **dict.fromkeys(("relative_margin", "near_duplicates"), Range(0, 1, above=True)),
    **dict.fromkeys(("student_temperature", "teacher_temperature", "temperature"), Range(0, above=True)),
    **dict.fromkeys(("absolute_margin", "positive_margin", "in_batch", "weight", "gamma", "alpha", "k1"), Range(0)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "num_train_epochs", "epochs"), Range(0)),
    **dict.fromkeys(("b", "warmup_ratio", "test_share"), Range(0, 1)),
    "learning_rate": Range(0, 10**6),
    "positive_threshold": Range(None),
    "timeout": Range(0, above=True),
    **dict.fromkeys(("give_up_after", "price_per_1000_requests", "price_per_million_tokens"), Range(0)),
}


def check_options(tree: Mapping[str, Any] | None = None, /, **options: Any) -> None:
    """Stop at a value that an option of its name cannot have; None stands for an option that is not given.

    Args:
        tree: Options by name, or parts of these; peft's of a part named `lora` are its own.
        **options: More options.

    Raises:
        OptionError: A `ValueError` with name, range and value.

    Example:
        >>> check_options(top_k=10, seed=None)
        >>> check_options({"training": {"seed": -1}})
        Traceback (most recent call last):
        st_wkl.ranges.OptionError: training.seed must be from 0 to 4,294,967,295, got -1.
    """
    for path, value in _leaves({**(tree or {}), **options}):
        allowed = RANGES.get(path.replace("args.", "training.")) or RANGES.get(path.rpartition(".")[2])
        if value is not None and allowed is not None and not path.startswith("lora.") and not allowed.holds(value):
            raise OptionError(path, f"must be {allowed}, got {value!r}.")


def check_arguments(arguments: Any, evaluates: bool, where: str = "args") -> None:
    """Stop at training arguments with which no run can begin, and at those that would send the student away.

    Args:
        arguments: Those of a trainer, or the ones that differ from its defaults by name.
        evaluates: Whether there is something to evaluate on.
        where: What messages call them.

    Raises:
        OptionError: With the argument's name.
    """
    given = arguments
    if dataclasses.is_dataclass(arguments):
        # What is out of range but no count, such as an infinite learning rate, shows at the first step.
        found = {entry: getattr(arguments, entry.name, None) for entry in dataclasses.fields(arguments)}
        given = {entry.name: value for entry, value in found.items() if value != entry.default}
        given = {name: value for name, value in given.items() if name not in RANGES or RANGES[name].whole}
    for name, value in given.items():
        if name.startswith(("push_to_hub", "hub_")) and value not in (None, False):
            raise ValueError(
                f"{where}.{name}: a run sends nothing to the Hub, and would make a public repository here. Leave it "
                "out; `st-wkl push FOLDER REPOSITORY`, or st_wkl.push_student, sends the finished student, private "
                "unless you say otherwise."
            )
    check_options({where: given})
    strategy = given.get("eval_strategy")
    if strategy not in (None, "no", False) and not evaluates:
        lacks = "nothing to evaluate on: give evaluator=" if where == "args" else "no `dev` to evaluate on"
        raise OptionError(
            f"{where}.eval_strategy", f"is {getattr(strategy, 'value', strategy)!r}, and there is {lacks}."
        )


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest of the right names, nothing if none is near.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "seed"])
        " (did you mean 'learning_rate'?)"
    """
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value
