"""What would another value do: descriptions that are equal if and only if two values are, objects and code included."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
import types
import uuid
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from st_wkl.files import content_hash
from st_wkl.losses.options import constructor_defaults
from st_wkl.models import model_revision

# What using an object leaves on it.
_LEFT_BY_USE = re.compile(
    r"_checked_\w+|_logged|rows_without_\w+|batches_without_\w+|observer|cache|random_states|training|primary_metric|history"
)
_BARE_MODULE = frozenset(vars(nn.Module()))
# Their code is known by the versions of their packages.
_PACKAGES = {"accelerate", "datasets", "numpy", "peft", "sentence_transformers", "st_wkl", "torch", "transformers"}
_NOT_CODE = re.compile(r"__\w+__|_abc_impl")


def is_known(module: str | None) -> bool:
    """Tell whether a module's code is told by the version of a package."""
    home = (module or "builtins").partition(".")[0]
    return home != "__main__" and (home in _PACKAGES or home in sys.stdlib_module_names)


def differences(there: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two descriptions, and return path to the two values of what differs.

    An option that one of two versions does not have counts as its default.
    """
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return {} if there == now else {path: (there, now)}
    if there.get("class") != now.get("class"):
        return {path: (there.get("class", there), now.get("class", now))}
    found: dict[str, tuple[Any, Any]] = {}
    if "options" in there and "options" in now:
        sides = [{**side["defaults"], **side["options"]} for side in (there, now)]
        for name in sorted(sides[0].keys() | sides[1].keys()):
            lacking = [name not in side for side in sides]
            if any(lacking) and name in (now if lacking[0] else there)["defaults"]:
                continue
            found |= differences(sides[0].get(name), sides[1].get(name), f"{path}.{name}".lstrip("."))
    for name in sorted((there.keys() | now.keys()) - {"options", "defaults"}):
        found |= differences(there.get(name), now.get(name), f"{path}.{name}".lstrip("."))
    return found


def told(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Say in one line what differs, grouped by the part of the run."""
    groups: dict[str, list[str]] = {}
    for path, values in found.items():
        part, _, rest = path.partition(".")
        old, new = (_short(value) for value in values)
        groups.setdefault(part, []).append(f"{rest} {old} there, {new} now".lstrip())
    return "; ".join(f"{part}: {', '.join(items)}" for part, items in groups.items())


class Describer:
    """Turns values into JSON that is equal if and only if the values would do the same.

    Args:
        student: What stands for itself wherever it is met.

    `unknown` gathers the places of what cannot be told apart from another of its kind; it is described as nothing else
    ever is.
    """

    def __init__(self, student: nn.Module | None = None) -> None:
        self.student = student
        self.unknown: list[str] = []
        self._path: list[str] = []
        self._open: list[int] = []

    def __call__(self, value: Any) -> Any:
        """Describe a value."""
        if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else f"float {value}"
        if value is self.student:
            return "the student"
        if id(value) in self._open:
            return "see above"
        self._open.append(id(value))
        try:
            return self._plain(value)
        finally:
            self._open.pop()

    def part(self, name: str, value: Any) -> Any:
        """Describe a part of the run, by whose name `unknown` calls what is in it."""
        return self._at(name, value)

    def _at(self, name: Any, value: Any) -> Any:
        self._path.append(str(name))
        try:
            return self(value)
        finally:
            self._path.pop()

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value if isinstance(value.value, (str, int)) else value.name
        if isinstance(value, Mapping):
            return {str(key): self._at(key, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._at(number, item) for number, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted((self(item) for item in value), key=repr)
        if isinstance(value, np.generic):
            return self(value.item())
        if isinstance(value, (Tensor, np.ndarray)):
            return _array(value)
        if isinstance(value, (Path, torch.dtype, re.Pattern, bytes, complex, range, slice)):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, torch.device):
            return "a device"
        return self._code_or_object(value)

    def _code_or_object(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, functools.partial):
            return {"class": "partial", **{name: self(getattr(value, name)) for name in ("func", "args", "keywords")}}
        if isinstance(value, types.MethodType):
            return {"class": "method", "of": self(value.__self__), "name": self(value.__func__)}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType) or type(value).__name__ == "method_descriptor":
            return f"{value.__module__ or ''}.{value.__qualname__}".lstrip(".")
        return self._object(value)

    def _function(self, function: types.FunctionType) -> Any:
        name = f"{function.__module__}.{function.__qualname__}"
        if is_known(function.__module__) and "<" not in name:
            return name
        code = function.__code__
        named = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
        return {
            "class": name,
            "code": _code(code),
            "around": self(
                [function.__defaults__, function.__kwdefaults__, *map(_content, function.__closure__ or ())]
            ),
            "globals": self(named),
        }

    def _class(self, kind: type) -> Any:
        name = f"{kind.__module__}.{kind.__qualname__}"
        own = [part for part in kind.__mro__ if not is_known(part.__module__)]
        if not own:
            return name
        members = [
            self({key: _bare(item) for key, item in sorted(vars(part).items()) if not _is_machinery(key)})
            for part in own
        ]
        return f"{name} {content_hash(members, size=8)}"

    def _object(self, value: Any) -> Any:
        """Describe an object by its class and state, apart where it has the value that its constructor gives it."""
        if isinstance(value, nn.Module) and hasattr(value, "model_card_data"):
            return {"class": type(value).__name__, "model": model_revision(value)}  # type: ignore[arg-type]
        if not hasattr(value, "__dict__"):
            self.unknown.append(".".join(self._path) or type(value).__name__)
            return {"class": type(value).__name__, "unlike any other": uuid.uuid4().hex}
        state = {
            name: item
            for name, item in vars(value).items()
            if not _LEFT_BY_USE.fullmatch(name) and not (isinstance(value, nn.Module) and name in _BARE_MODULE)
        }
        if isinstance(value, nn.Module):
            state |= dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
            state |= value._modules  # every child, also one that stands at two places
        signature = constructor_defaults(type(value))
        options: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for name, item in state.items():
            found = self._at(name, item)
            at_default = name in signature and found == Describer(self.student)(signature[name])
            (defaults if at_default else options)[name] = found
        return {"class": self(type(value)), "options": options, "defaults": defaults}


def _array(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        kind, data = str(value.dtype), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        kind, data = str(value.dtype), repr(value.tolist()).encode()
    return {"class": kind, "shape": list(value.shape), "hash": hashlib.blake2b(data, digest_size=16).hexdigest()}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def _code(code: types.CodeType) -> str:
    """Return a hash of what a function does, wherever it stands and however it is laid out."""
    digest = hashlib.blake2b(code.co_code, digest_size=16)
    digest.update(repr((code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            digest.update(_code(constant).encode())
        else:
            digest.update(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())
    return digest.hexdigest()


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_machinery(name: str) -> bool:
    return bool(_NOT_CODE.fullmatch(name)) and name not in ("__init__", "__call__")


def _bare(item: Any) -> Any:
    """Return the function inside of what a class makes of one."""
    return item.fget if isinstance(item, property) else getattr(item, "__func__", item)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
