"""A command's flags, made from the dataclasses of the stages that it does: each field is one, with its docstring."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from cyclopts import Parameter

from st_wkl.files import expanded
from st_wkl.pipeline.options import described
from st_wkl.ranges import check_options
from st_wkl.reading import overridden, read

# Where a flag is not called as its field, by place in the configuration; without dashes it is an argument, and None
# has flags of its own, below or in the command.
_NAMES: dict[str, str | None] = {
    "collection.source": "collection",
    "candidates.sources": None,
    "teacher.model": "--teacher",
    **{f"teacher.{name}": f"--teacher-{name}" for name in ("kind", "revision", "url", "api", "activation", "timeout")},
    "teacher.model_kwargs": "--model-kwarg",
    "student.model": "--student",
    "student.prompts": None,
    "loss.name": "--loss",
    "loss.parameters": "--parameter",
    "loss.each": "--loss-of",
    "dev.source": "--dev",
    **{f"dev.{name}": f"--dev-{name.replace('_', '-')}" for name in ("split", "seed", "batch_size")},
    "evaluation.tasks": None,
    "tables.source": "source",
}
# Flags for what is an entry of a dictionary in the configuration: name, type and help.
_ENTRIES: dict[str, tuple[str, Any, str]] = {
    "student.prompts.query": ("--query-prompt", str, "Text before each query. Default: the student's own."),
    "student.prompts.document": ("--document-prompt", str, "Text before each document; kept with the student, too."),
    "student.prompts.pair": ("--pair-prompt", str, "Text before each pair of a cross-encoder."),
    "loss.parameters.gamma": ("--gamma", float, "Strength of the weights of weighted-kl. Default: 5."),
    "loss.parameters.alpha": ("--alpha", float, "Strength of its rank bias. Default: 1."),
    "loss.parameters.student_temperature": ("--student-temperature", float, "Default: 0.05 for cosine, else 1."),
    "loss.parameters.teacher_temperature": (
        *("--teacher-temperature", float),
        "Default: 1, or what the teacher report suggests.",
    ),
    "training.num_train_epochs": ("--epochs", float, "Passes over the dataset. Default: 3."),
    "training.per_device_train_batch_size": ("--batch-size", int, "Queries per step and process. Default: 32."),
    "training.learning_rate": ("--learning-rate", float, "Default: by model class, see `st_wkl.distill`."),
    "training.multi_dataset_batch_sampler": (
        *("--sampling", Literal["proportional", "round_robin"]),
        "Draw from several datasets in proportion to their sizes, or in turns. Default: proportional.",
    ),
    "training.report_to": ("--report-to", str, "Where the trainer logs: tensorboard, wandb, … Default: none."),
    "training.seed": ("--seed", int, "Seed of the order of the data. Default: 42."),
}
_NEGATIVE = {"--ignore-identical-ids": "--keep-identical-ids"}
_SET = "Another key of the configuration, such as training.warmup_ratio=0.1 or lora.r=8; repeatable."


@dataclass(frozen=True)
class Flag:
    """One flag or argument of a command.

    Args:
        name: What is typed; without dashes an argument that is known by its place.
        places: Where its value goes in the configuration, such as `teacher.max_length`.
        parameter: The same for the library that reads the command line.
    """

    name: str
    places: tuple[str, ...]
    parameter: inspect.Parameter


class Flags:
    """The flags of a command, whose parameters are dataclasses of options, dictionaries of these, or plain.

    Args:
        command: The function; its first parameter is how it was asked.
        common: Parameters that are added to it.
    """

    def __init__(self, command: Callable[..., Any], common: Mapping[str, Any]) -> None:
        hints = get_type_hints(command, include_extras=True)
        self.parts: dict[str, Any] = {}
        self.tree: dict[str, Any] = {}
        found: dict[str, Flag] = {}
        for name, own in list(inspect.signature(command).parameters.items())[1:]:
            default = None if own.default is own.empty else own.default
            if kind := _part(hints[name]):
                self.parts[name] = kind
                optional = type(None) in get_args(hints[name])
                self.tree[name] = None if optional else _defaults(kind, default)
                for flag in _flags_of(name, kind, default):
                    there = found.get(flag.name)
                    found[flag.name] = replace(there, places=there.places + flag.places) if there else flag
            else:
                self.tree[name] = default
                by_place = own.kind is not own.KEYWORD_ONLY
                label = name if by_place else f"--{name.replace('_', '-')}"
                kind = own.POSITIONAL_ONLY if by_place else own.KEYWORD_ONLY
                found[label] = Flag(label, (name,), own.replace(annotation=hints[name], kind=kind))
        if self.parts:
            found["--set"] = _flag("--set", "settings", list[str], [], _SET, None)
        for name, hint in common.items():
            made = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
            found[name] = Flag(name, (), made)
        self.all = {flag.parameter.name: flag for flag in found.values()}
        # Arguments by place first, in the order of the command; then what is required.
        parameters = [flag.parameter for flag in found.values()]
        parameters.sort(key=lambda one: (one.kind, one.default is not one.empty))
        self.signature = inspect.Signature(parameters)

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the command is called with.

        Raises:
            ValueError: If a value is out of range or of another type; with the flag's name.
        """
        tree = copy.deepcopy(self.tree)
        for name, value in given.items():
            for place in self.all[name].places:
                part, _, rest = place.partition(".")
                if rest:
                    if tree[part] is None:
                        tree[part] = _defaults(self.parts[part], None)
                    _put(tree[part], rest, value)
                else:
                    tree[place] = value
        check_options(overridden(tree, tree.pop("settings", ())))
        for part, kind in self.parts.items():
            if kind is not dict and tree[part] is not None:
                tree[part] = read(kind, tree[part], part)
        return tree

    def places(self, given: Mapping[str, Any]) -> frozenset[str]:
        """Return the places in the configuration that flags give a value."""
        return frozenset(place for name in given for place in self.all[name].places)

    def spelled(self, error: BaseException) -> str:
        """Return an error with the flag's name where it is about an option, with whose name it begins then."""
        option, _, told = str(error).partition(" ")
        named = [(place, flag.name) for flag in self.all.values() for place in flag.places]
        same = [name for place, name in named if place == option]
        same += [name for place, name in named if place.rpartition(".")[2] == option.rpartition(".")[2]]
        return f"{same[0]} {told}" if same and told else str(error)

    def invocation(self, command: str, given: Mapping[str, Any]) -> str:
        """Return the command as it would be typed, with names in place of the folders of this machine."""
        words = ["st-wkl", command]
        for parameter in self.signature.parameters.values():
            value, flag = given.get(parameter.name), self.all[parameter.name]
            if value is None or value == parameter.default or parameter.name in ("as_json", "quiet"):
                continue
            for one in value if isinstance(value, list | tuple) else [value]:
                if flag.name.startswith("-"):
                    words.append(_NEGATIVE.get(flag.name, flag.name) if one is False else flag.name)
                if not isinstance(one, bool):
                    words.append(Path(str(one)).name if Path(str(one)).is_absolute() else str(one))
        return shlex.join(words)


# Defaults that go without saying.
_UNSAID = (None, "None", "False", "[]")


def help_formatter(console: Any, options: Any, panel: Any) -> None:
    """Show options one below the other, whatever the width: a table cuts their names where there is little room."""
    if panel.entries:
        console.print(f"{panel.title}:", highlight=False, markup=False)
    width = min(max(shutil.get_terminal_size().columns, 40), 110)
    for entry in panel.entries:
        notes = [f"One of: {', '.join(entry.choices)}."] if entry.choices else []
        notes += ["Required."] if entry.required else []
        notes += [f"Default: {entry.default}."] if entry.default not in _UNSAID else []
        text = " ".join([*_plain(entry.description, console).split(), *notes])
        names = ", ".join(entry.display_labels_with_metavar)
        wrapped = textwrap.wrap(text, width - 6)
        lines = [f"  {names}", *(f"      {line}" for line in wrapped)]
        if panel.format == "command":
            lines = textwrap.wrap(f"{names:12} {text}", width, initial_indent="  ", subsequent_indent=" " * 15)
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    console.print()


def _plain(text: Any, console: Any) -> str:
    return "".join(segment.text for segment in console.render(text)) if text else ""


def _part(hint: Any) -> Any:
    """Return the dataclass, or the dictionary, that a parameter takes options in; None for a plain one."""
    kinds = [get_origin(kind) or kind for kind in (hint, *get_args(hint))]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), dict if kinds[0] is dict else None)


def _flags_of(part: str, kind: Any, options: Any) -> Iterator[Flag]:
    panel = part.capitalize()
    if kind is not dict:
        told, hints, defaults = described(kind), get_type_hints(kind), _defaults(kind, options)
        for name in hints:
            place = f"{part}.{name}"
            if (flag := _NAMES.get(place, f"--{name.replace('_', '-')}")) is not None:
                default = defaults.get(name, inspect.Parameter.empty)
                yield _flag(flag, place, hints[name], default, told[name], panel)
    for place, (flag, hint, text) in _ENTRIES.items():
        if place.startswith(f"{part}."):
            yield _flag(flag, place, hint | None, None, text, panel)


def _flag(name: str, place: str, hint: Any, default: Any, text: str, panel: str | None) -> Flag:
    kinds = [hint, *get_args(hint)]
    if any((get_origin(kind) or kind) is dict for kind in kinds):
        hint, text, default = list[str] | None, f"{text} As name=value; repeatable.", None
    elif lists := [kind for kind in kinds if get_origin(kind) is list]:
        hint = lists[0] | None
    by_place, required = not name.startswith("-"), default is inspect.Parameter.empty
    shown: dict[str, Any] = {} if required or panel is None else {"group": panel}
    about = Parameter(
        name=None if by_place else name,
        negative=_NEGATIVE.get(name, ()),
        help=text,
        show_default=not required and bool(default) and not isinstance(default, list | dict),
        **shown,
    )
    kind = inspect.Parameter.POSITIONAL_ONLY if by_place else inspect.Parameter.KEYWORD_ONLY
    label = name if by_place else place.replace(".", "__")
    return Flag(name, (place,), inspect.Parameter(label, kind, default=default, annotation=Annotated[hint, about]))


def _defaults(kind: Any, options: Any) -> dict[str, Any]:
    """Return the values that stand where nothing is said, of a dataclass or of an instance of it."""
    if kind is dict or options is not None:
        return {} if options is None else dataclasses.asdict(options)
    entries = dataclasses.fields(kind)
    found = {entry.name: entry.default_factory() for entry in entries if callable(entry.default_factory)}
    return found | {entry.name: entry.default for entry in entries if entry.default is not dataclasses.MISSING}


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    """Put a flag's value where a configuration has it."""
    *parents, name = place.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    if flag := {"parameters": "--parameter", "model_kwargs": "--model-kwarg", "each": "--loss-of"}.get(name):
        for setting in value:
            key, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"{flag} takes name=value, got {setting!r}.")
            key = key if name == "each" else key.replace("-", "_")  # else it is a dataset's
            values[name] = {**(values.get(name) or {}), key: yaml.safe_load(text)}
    else:
        values[name] = value[0] if name == "model" and isinstance(value, list) and len(value) == 1 else value


def expanded_all(value: Any) -> Any:
    """Return what a flag or argument means where it begins with `~`: a shell leaves that in `--output=~/here`."""
    if isinstance(value, list | tuple):
        return type(value)(map(expanded_all, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(expanded(value))
    return value
