"""What a loss was made with: the arguments of its constructor, checked and for the card."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers.util import similarity_fct_name
from torch import Tensor, nn


def check_choices(owner: object, **parameters: tuple[Any, tuple[str, ...]]) -> None:
    """Stop at a word that an option does not know; as a string it would pass for the other choice.

    Args:
        owner: Whose options they are; its class is named.
        **parameters: `name=(value, choices)`.

    Raises:
        ValueError: With the option, the value and the choices.
    """
    for name, (value, choices) in parameters.items():
        if not isinstance(value, str) or value not in choices:
            *others, last = map(repr, choices)
            raise ValueError(f"{type(owner).__name__}: {name} must be {', '.join(others)} or {last}, got {value!r}.")


def check_similarity(owner: object, similarity_fct: Any) -> None:
    """Stop where a similarity is named but not given, as a configuration file would do."""
    if similarity_fct is not None and not callable(similarity_fct):
        raise ValueError(
            f"{type(owner).__name__}: similarity_fct must be a function, such as "
            f"sentence_transformers.util.pairwise_dot_score, got {similarity_fct!r}."
        )


def check_options(kind: type, values: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Stop at what a loss of upstream would take, and this one takes under another name or by name alone.

    Args:
        kind: The class of the loss.
        values: What stands behind the model.
        options: What is given by name.

    Raises:
        TypeError: With what to write.
    """
    known = constructor_defaults(kind)
    for value in values:
        if callable(value):
            name = getattr(value, "__name__", type(value).__name__)
            how = f"its similarity by name: similarity_fct={name}." if "similarity_fct" in known else f"no {name}."
            raise TypeError(f"{kind.__name__} takes {how}")
    if "temperature" in options and "temperature" not in known:
        names = [f"{name}=" for name in ("student_temperature", "teacher_temperature") if name in known]
        raise TypeError(
            f"{kind.__name__} has no option temperature={options['temperature']!r}"
            + (f"; upstream's one for both sides is {' and '.join(names)} here." if names else ".")
        )


def constructor_defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a constructor's parameters, with those that it passes on to its parents as `**options`."""
    if dataclasses.is_dataclass(kind):
        return {entry.name: field_default(entry) for entry in dataclasses.fields(kind) if entry.init}
    found: dict[str, Any] = {}
    for part in kind.__mro__:
        if not isinstance(made := vars(part).get("__init__"), types.FunctionType):
            continue
        parameters = inspect.signature(made).parameters.values()
        known = {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}
        found = {**known, **found}
        if not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters):
            break
    return found


def field_default(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass's field, None where it has none."""
    if entry.default is not dataclasses.MISSING:
        return entry.default
    return None if entry.default_factory is dataclasses.MISSING else entry.default_factory()


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
