"""YAML to plain values and these to dataclasses: what does not fit is an error that names its place."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from st_wkl.ranges import OptionError, nearest

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
    lines: dict[str, int] = {}
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(entry, tuple):  # of a mapping
            key, entry = entry
            here = key.start_mark.line + line
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, here) != here:
                raise ValueError(f"line {here}: the key {key.value!r} stands in line {lines[key.value]} already.")
        check_keys(entry, line)


def check_training_arguments(values: Mapping[str, Any], arguments: type) -> None:
    """Stop at a training argument that the class `arguments` does not have, or whose value is of another type.

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


def read(kind: type[T], values: Any, where: str = "") -> T:
    """Make a dataclass from plain values.

    Args:
        kind: The dataclass.
        values: Keys and values.
        where: Path of this part in the file, for messages; empty for the whole.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'} has to be keys and values, got {values!r}.")
    hints, before = get_type_hints(kind), f"{where}." if where else ""
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in entries:
            known = f"{nearest(str(name), entries)}. Keys: {', '.join(entries)}."
            raise ValueError(f"{before}{name}: there is no such key{known}")
    for name, entry in entries.items():
        if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise OptionError(f"{before}{name}", "is missing.")
    made = {name: _convert(value, hints[name], f"{before}{name}") for name, value in values.items()}
    try:
        return kind(**made)
    except ValueError as error:
        name, _, told = str(error).partition(" ")
        raise (OptionError(f"{before}{name}", told) if name in entries else error) from None


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return a value as the type that a key has, or say that it cannot be one."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fits = [option for option in options if option is not type(None)]
        return None if value is None and len(fits) < len(options) else _first_that_fits(value, fits, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{path} is {value!r}{nearest(str(value), options)}; it has to be one of {options}.")
        return value
    if dataclasses.is_dataclass(hint):
        return read(hint, value, path)  # type: ignore[arg-type]
    kind, number = origin or hint, not isinstance(value, bool)
    if kind is float and number and (isinstance(value, int | float) or _FLOAT.fullmatch(str(value))):
        return float(value)
    if kind is list and isinstance(value, str):
        value = [value]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} is {value!r}; it has to be of type {kind.__name__}.")
    if origin is list:
        return [_convert(entry, options[0], f"{path}[{number}]") for number, entry in enumerate(value)]
    if origin is dict:
        return {str(key): float(one) if _FLOAT.fullmatch(str(one)) else one for key, one in value.items()}
    return value


def _first_that_fits(value: Any, hints: list[Any], path: str) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint, path)
        except ValueError:
            if len(hints) == 1:
                raise
    names = ", ".join(getattr(get_origin(hint) or hint, "__name__", str(hint)) for hint in hints)
    raise ValueError(f"{path} is {value!r}; it has to be one of these types: {names}.")


def overridden(tree: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Put `path.to.key=value` settings, whose values are YAML, into a tree of plain values."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes path.to.key=value, got {setting!r}.")
        *parents, key = path.strip().split(".")
        place: Any = tree
        if not parents and key not in tree:
            part = f"{nearest(key, tree)}. Say the part, too, as in training.{key}=…."
            raise ValueError(f"--set {setting}: there is no {key!r}{part}")
        for parent in parents:
            if not isinstance(place, dict) or parent not in place:
                choices = place if isinstance(place, dict) else ()
                raise ValueError(f"--set {setting}: there is no {parent!r}{nearest(parent, choices)}.")
            if place[parent] is None or isinstance(place[parent], bool):
                place[parent] = {}  # a part that was left out is put in
            place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f"--set {setting}: {'.'.join(parents)} is {place!r} and has no keys.")
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting}: the value is not valid YAML ({error}).") from error
    return tree
