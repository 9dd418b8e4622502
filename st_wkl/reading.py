"""Plain values, as YAML holds them, to dataclasses: what does not fit is an error that names its place."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from st_wkl.ranges import nearest

T = TypeVar("T")
# YAML 1.1 wants a dot and a sign in 1.0e-3; what people write is 1e-3.
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load_yaml(content: bytes) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: If it is no UTF-8, no YAML, or names a key twice, of which YAML would take the last.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    try:
        check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"this is not valid YAML: {error}") from error


def check_keys(node: Any, line: int = 1) -> None:
    """Stop at a key that stands twice in a mapping, of which YAML takes the last, and others neither.

    Args:
        node: What `yaml.compose` returned.
        line: Where its text begins in the file.

    Raises:
        ValueError: With both lines.
    """
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            here = key.start_mark.line + line
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, here) != here:
                raise ValueError(f"line {here}: the key {key.value!r} stands in line {lines[key.value]} already.")
            check_keys(value, line)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            check_keys(value, line)


def check_training_arguments(values: Mapping[str, Any], arguments: type) -> None:
    """Stop at a training argument that does not exist, or whose value is of another type.

    Args:
        values: Arguments by name.
        arguments: The class that takes them.

    Raises:
        ValueError: If one is unknown, of another type, or is for the run to decide.
    """
    hints = get_type_hints(arguments)
    known = {entry.name for entry in dataclasses.fields(arguments) if entry.init}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"training.{name}: {arguments.__name__} has no such argument{nearest(name, known)}.")
        if name == "output_dir":
            raise ValueError("training.output_dir: set `output` of the run instead; checkpoints go beside the student.")
        # Others, such as enumerations, are completed by the class, which names what it does not know.
        plain = {part for part in (get_args(hints[name]) or [hints[name]]) if part is not type(None)}
        if value is not None and plain <= {int, float, bool, str}:
            _convert(value, hints[name], f"training.{name}")


def read(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass from plain values.

    Args:
        kind: The dataclass.
        values: Keys and values.
        where: Path of this part in the file, for messages; empty for the whole.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of another type.
    """
    what = f"{where or 'the configuration'}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} has to be keys and values, got {values!r}.")
    hints = get_type_hints(kind)
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    made = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in entries:
            raise ValueError(f"{path}: there is no such key{nearest(str(key), entries)}. Keys: {', '.join(entries)}.")
        made[key] = _convert(value, hints[key], path)
    for name, entry in entries.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise ValueError(f"{f'{where}.{name}' if where else name} is missing.")
    return kind(**made)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return a value as the type that a key has, or say that it cannot be one."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        fitting = [option for option in options if option is not type(None)]
        if len(fitting) == 1:
            return _convert(value, fitting[0], path)
        return _first_that_fits(value, fitting, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{path} is {value!r}{nearest(str(value), options)}; it has to be one of {options}.")
        return value
    if dataclasses.is_dataclass(hint):
        return read(hint, value, path)  # type: ignore[arg-type]
    if hint is float and _is_float(value):
        return float(value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _number(entry) for key, entry in value.items()}
    if origin is list and isinstance(value, str):
        return [value]
    kind = origin or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} is {value!r}; it has to be of type {kind.__name__}.")
    if origin is list:
        return [_convert(entry, options[0], f"{path}[{number}]") for number, entry in enumerate(value)]
    return value


def _first_that_fits(value: Any, options: list[Any], path: str) -> Any:
    for option in options:
        try:
            return _convert(value, option, path)
        except ValueError:
            continue
    names = ", ".join(getattr(get_origin(option) or option, "__name__", str(option)) for option in options)
    raise ValueError(f"{path} is {value!r}; it has to be one of these types: {names}.")


def _is_float(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_FLOAT.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
