"""What every sub-command shares: its options, and how its answer and its errors reach the user."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from st_wkl import _processes
from st_wkl.files import expanded, owned
from st_wkl.ranges import OptionError, check_options

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars and no log lines.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the models' repositories. Read it before.")
]
MissingOption = Annotated[
    Literal["raise", "drop"], typer.Option(help="Judgements of documents or queries that are not there.")
]
StoreOption = Annotated[Path | None, typer.Option(help="SQLite file of teacher scores. Default: the user's cache.")]
IdenticalOption = Annotated[
    bool | None,
    typer.Option(
        "--ignore-identical-ids/--keep-identical-ids",
        help="Leave out the document of a query's own id, or not. Default: if most queries are documents.",
    ),
]
# The commands that several processes of `torchrun` do together.
_TOGETHER = ("train", "run")
# The commands that keep what they have done so far.
_GOES_ON = ("build", "demo", "run", "train", "import_")
# Where a command works, under whatever name it has that; and arguments of Python that a flag has another name for.
_PLACES = ("path", "folder", "output")
_SAME = {"per_device_train_batch_size": "batch_size", "num_train_epochs": "epochs", "output_dir": "output"}
# What a command has to say: as an object for `--json`, and as text for people.
Answer = tuple[dict[str, Any], str]


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Print a command's answer; turn an error that a user can act on into one line and exit code 1.

    Whatever else is printed meanwhile, by the trainer for one, goes to standard error, so that standard output holds
    the answer alone.
    """

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> None:
        flags = flags_of(command)
        _log_to_stderr(quiet or not _processes.is_first(), flags)
        try:
            if _processes.launched() > 1 and command.__name__ not in _TOGETHER:
                raise ValueError(f"torchrun is for {' and '.join(_TOGETHER)}; start {command.__name__} as one process.")
            with _hushed() if quiet else contextlib.redirect_stdout(sys.stderr):
                given = {name: _expanded(value) for name, value in kwargs.items()}
                _check(given)
                with _alone(given):
                    value, text = command(*args, as_json=as_json, quiet=quiet, **given)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            typer.echo(f"error: {as_typed(str(error), flags)}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            kept = command.__name__ in _GOES_ON or kwargs.get("cache") is not None
            again = "goes on from here" if kept else "starts anew"
            typer.echo(f"stopped; the same command {again}", err=True)
            raise typer.Exit(130) from None
        finally:
            _processes.leave()
        if _processes.is_first():
            _print(json.dumps(value, ensure_ascii=False) if as_json else text)

    return run


def _alone(given: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Make sure that no other process is at work in what a command writes, or reads as a whole."""
    place = next((given[name] for name in _PLACES if given.get(name) is not None), None)
    return owned(place) if place is not None and _processes.is_first() else contextlib.nullcontext()


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """Return the flags of a command by the arguments of Python that they stand for."""
    flags = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, typer.models.OptionInfo):
                said = (info.default, *(info.param_decls or ()))  # in an annotation, the first name is its "default"
                flags[name] = next((flag for flag in said if isinstance(flag, str)), f"--{name.replace('_', '-')}")
    return flags | {name: flags[option] for name, option in _SAME.items() if option in flags}


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """Return a message that speaks of Python's arguments with a command's flags in their place."""

    def both(found: re.Match[str]) -> str:  # what stands in both spellings already; a configuration has keys
        return found[3] if found[3] in flags.values() else f"{found[1]}: {found[2].lower()}"

    def typed(found: re.Match[str]) -> str:
        name, equals = found.groups()
        flag = flags.get(name)
        if flag is None or (equals is None and "_" not in name):
            return found[0]
        return f"{flag} " if equals == "=" and message[found.end() : found.end() + 1].strip(" .,;") else flag

    message = re.sub(r"(\w+)=(\w+) \(`(--[\w-]+)`\)", both, message)
    message = re.sub(r", as in default_arguments\([^)]*\)", "", message)
    message = re.sub(r"\b(?:default_arguments\(student, output_dir|evaluate\(\.\.\.), ([^)]*)\)", r"\1", message)
    return re.sub(r"(?<![\w./-])([a-z_]+)\b(=(?:True\b)?)?", typed, message)


# What libraries read when they are imported, which commands do late.
_HUSH = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep libraries from printing and from showing bars."""
    before = {name: os.environ.get(name) for name in _HUSH}
    os.environ.update(_HUSH)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _check(options: dict[str, Any]) -> None:
    """Stop at a flag out of range before anything heavy is imported or loaded."""
    try:
        check_options(**options)
    except OptionError as error:
        raise ValueError(f"--{error.option.replace('_', '-')} {error.told}") from None


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise  # typer ends quietly where a reader such as `head` has gone
    except OSError as error:
        typer.echo(f"error: all is done, but the answer cannot be written to standard output: {error}", err=True)
        raise typer.Exit(1) from error


def _expanded(value: Any) -> Any:
    """Return what a flag or argument means where it begins with `~`: a shell leaves that in `--output=~/here`."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(expanded(value))
    return value


class _Typed(logging.Formatter):
    def __init__(self, flags: Mapping[str, str]) -> None:
        super().__init__("%(message)s")
        self.flags = flags

    def format(self, record: logging.LogRecord) -> str:
        return as_typed(super().format(record), self.flags)


def _log_to_stderr(quiet: bool, flags: Mapping[str, str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Typed(flags))
    logging.basicConfig(handlers=[handler], level=logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("st_wkl").setLevel(logging.ERROR if quiet else logging.INFO)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # One line per warning: the source line that Python adds means nothing to someone who runs a command.
        if not quiet and not issubclass(category, (FutureWarning, DeprecationWarning)):
            typer.echo(as_typed(str(message), flags), err=True)

    warnings.showwarning = show  # type: ignore[assignment]


def invocation(context: typer.Context) -> str:
    """Return the running command as it would be typed, with names in place of the folders of this machine."""
    words = context.command_path.split()[1:]
    for param in context.command.params:
        value = context.params.get(str(param.name))
        if param.name in ("as_json", "quiet") or value == param.get_default(context) or value is None:
            continue
        if param.param_type_name == "option":
            for one in value if isinstance(value, (list, tuple)) else [value]:
                flag = [(param.opts if one else param.secondary_opts or param.opts)[0]]
                words += flag if getattr(param, "is_flag", False) else [param.opts[0], _portable(one)]
        else:
            words.append(_portable(value))
    return shlex.join(["st-wkl", *words])


def _portable(value: Any) -> str:
    return Path(str(value)).name if Path(str(value)).is_absolute() else str(value)
