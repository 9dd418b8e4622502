"""What a loss is made with: the arguments of its constructor, spelled out, checked, and told on the card."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from sentence_transformers.util import similarity_fct_name
from torch import Tensor, nn

from st_wkl.functional._scores import check_at_least_zero, check_positive, is_number

Kind = TypeVar("Kind", bound=type)

# What an option may be, by its name.
POSITIVE = {"student_temperature", "teacher_temperature"}
AT_LEAST_ZERO = {"gamma", "alpha", "beta", "pair_weight", "in_batch_weight", "embedding_weight", "margin_weight"}
YES_OR_NO = {"detach_weights", "own_negatives", "gather_across_devices", "in_batch"}
WORDS: dict[str, tuple[str, ...]] = {
    "without_positive": ("all-negative", "skip"),
    "ranks": ("student", "dataset"),
    "several_positives": ("best", "first"),
    "reduction": ("batchmean", "mean"),
    "pairs": ("positive-negative", "all"),
    "error": ("l2", "l1", "soft"),
    "target": ("adaptive", "distributed"),
    "distance_metric": ("cosine", "mse", "l2", "relational"),
    "projection": ("pca", "learned"),
}
_ENTRY = re.compile(r"^ {8}(\w+): .*\n(?: {12}.*\n)*", re.MULTILINE)


@dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
def spelled_out(kind: Kind) -> Kind:
    """Make a constructor of a loss's fields, those of its parents included, and a docstring that describes all.

    Whatever is given under a name or in a place of upstream's is answered in words, and a name of the release before
    is taken, with a warning.
    """
    if "__init__" not in vars(kind):
        dataclasses.dataclass(eq=False, repr=False)(kind)
    made = vars(kind)["__init__"]

    @functools.wraps(made)
    def construct(self: nn.Module, *values: Any, **options: Any) -> None:
        nn.Module.__init__(self)
        _check_upstream(type(self), values[1:], options)
        for entry in dataclasses.fields(kind):
            if not entry.init:  # an option of its parents that makes no difference to it
                setattr(self, entry.name, entry.default)
        for old, new in getattr(kind, "renamed", {}).items():
            if old in options:
                _say_renamed(kind.__name__, old, new)
                options[new] = options.pop(old)
        made(self, *values, **options)

    kind.__init__ = construct  # type: ignore[misc]
    kind.__doc__ = _described(kind)
    return kind


def former(kind: str, old: str, new: str) -> property:
    """Let an attribute be read under the name that it had in the release before."""

    def read(self: Any) -> Any:
        _say_renamed(kind, old, new)
        return getattr(self, new)

    return property(read)


def _say_renamed(kind: str, old: str, new: str) -> None:
    warnings.warn(f"{kind}: {old} is called {new} now; the next release knows no {old}.", FutureWarning, stacklevel=4)


def _described(kind: type) -> str | None:
    """Let the entries of a docstring be those of the whole signature: what a class does not say, its parents do."""
    texts: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        texts |= {found[1]: found[0] for found in _ENTRY.finditer(part.__dict__.get("__doc__") or "")}
    names = [name for name in inspect.signature(kind).parameters if name in texts]
    own = [found for found in _ENTRY.finditer(kind.__doc__ or "") if found[1] in names]
    if not own:
        return kind.__doc__
    doc = own[0].string
    return "".join([doc[: own[0].start()], *(texts[name] for name in names), doc[own[-1].end() :]])


def _check_upstream(kind: type, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Stop at what a loss of upstream would take, and this one takes under another name or by name alone."""
    known = constructor_defaults(kind)
    for value in values:
        if callable(value):
            name = getattr(value, "__name__", type(value).__name__)
            how = f"its similarity by name: similarity_fct={name}." if "similarity_fct" in known else f"no {name}."
            raise TypeError(f"{kind.__name__} takes {how}")
    if "temperature" in options and "temperature" not in {**known, **getattr(kind, "renamed", {})}:
        names = [f"{name}=" for name in ("student_temperature", "teacher_temperature") if name in known]
        raise TypeError(
            f"{kind.__name__} has no option temperature={options['temperature']!r}"
            + (f"; upstream's one for both sides is {' and '.join(names)} here." if names else ".")
        )


def check_values(made: object) -> None:
    """Stop at an option that is out of its range, or a word that it does not know.

    Raises:
        ValueError: With the option, the value and what it may be.
    """
    name_of = type(made).__name__
    for name in constructor_defaults(type(made)):
        value = vars(made).get(name)
        if value is None:
            continue
        if name in POSITIVE:
            check_positive(**{name: value})
        elif name in AT_LEAST_ZERO:
            check_at_least_zero(**{name: value})
        elif name == "positive_threshold" and not is_number(value):
            raise ValueError(f"{name_of}: {name} must be a finite number, got {value!r}.")
        elif name in YES_OR_NO and not isinstance(value, bool):
            raise ValueError(f"{name_of}: {name} must be True or False, got {value!r}.")
        elif name in WORDS and not (isinstance(value, str) and value in WORDS[name]):
            if name == "target" and is_number(value):
                continue
            *others, last = map(repr, WORDS[name])
            raise ValueError(f"{name_of}: {name} must be {', '.join(others)} or {last}, got {value!r}.")
        elif name == "similarity_fct" and not callable(value):
            raise ValueError(
                f"{name_of}: similarity_fct must be a function, such as "
                f"sentence_transformers.util.pairwise_dot_score, got {value!r}."
            )
        elif name == "mini_batch_size" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"mini_batch_size must be at least 1, got {value!r}.")


def constructor_defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a constructor's parameters, with those that it passes on to its parents as `**options`."""
    found: dict[str, Any] = {}
    for part in kind.__mro__:
        if "__dataclass_fields__" in vars(part):
            entries = (entry for entry in dataclasses.fields(part) if entry.init and not is_required(entry))
            return {**{entry.name: field_default(entry) for entry in entries}, **found}
        if not isinstance(made := vars(part).get("__init__"), types.FunctionType):
            continue
        parameters = inspect.signature(made).parameters.values()
        known = {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}
        found = {**known, **found}
        if not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters):
            break
    return found


def is_required(entry: dataclasses.Field[Any]) -> bool:
    """Tell whether a dataclass's field has no default."""
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def field_default(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass's field, None where it has none."""
    if is_required(entry):
        return None
    return entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()  # type: ignore[misc,operator]


def options_of(made: object, always: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return constructor arguments of an object for a card: those that differ from their defaults, and some always.

    Args:
        made: The object, which keeps its arguments under their names.
        always: Those that are returned at their defaults, too, unless they are None.
    """
    state, defaults = vars(made), constructor_defaults(type(made))
    names = dict.fromkeys((*always, *defaults))
    values = {name: state[name] for name in names if name in state and not isinstance(state[name], nn.Module | Tensor)}
    return {
        name: shown(value)
        for name, value in values.items()
        if value is not None and (name in always or shown(value) != shown(defaults[name]))
    }


def shown(value: Any) -> Any:
    """Return a value as a card shows it, in JSON values and without addresses."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): shown(item) for key, item in value.items()}
    return similarity_fct_name(value) if callable(value) else type(value).__name__
