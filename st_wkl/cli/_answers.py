"""What every sub-command shares: its options, and how its answer and its errors reach the user."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from st_wkl import _processes
from st_wkl._files import expanded

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars and no log lines.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the models' repositories. Read it before.")
]
StoreOption = Annotated[Path | None, typer.Option(help="SQLite file of teacher scores. Default: the user's cache.")]
# The commands that several processes of `torchrun` do together.
_TOGETHER = ("train", "run")
# What a command has to say: as an object for `--json`, and as text for people.
Answer = tuple[dict[str, Any], str]


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Print a command's answer; turn an error that a user can act on into one line and exit code 1.

    Whatever else is printed meanwhile, by the trainer for one, goes to standard error, so that standard output holds
    the answer alone.
    """

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> None:
        _log_to_stderr(quiet or not _processes.is_first())
        try:
            if _processes.launched() > 1 and command.__name__ not in _TOGETHER:
                raise ValueError(f"torchrun is for {' and '.join(_TOGETHER)}; start {command.__name__} as one process.")
            with contextlib.redirect_stdout(sys.stderr):
                given = {name: _expanded(value) for name, value in kwargs.items()}
                value, text = command(*args, as_json=as_json, quiet=quiet, **given)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        finally:
            _processes.leave()
        if _processes.is_first():
            _print(json.dumps(value, ensure_ascii=False) if as_json else text)

    return run


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


def _log_to_stderr(quiet: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("st_wkl").setLevel(logging.ERROR if quiet else logging.INFO)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # One line per warning: the source line that Python adds means nothing to someone who runs a command.
        if not quiet and not issubclass(category, (FutureWarning, DeprecationWarning)):
            typer.echo(str(message), err=True)

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
                words += [param.opts[0]] if getattr(param, "is_flag", False) else [param.opts[0], _portable(one)]
        else:
            words.append(_portable(value))
    return shlex.join(["st-wkl", *words])


def _portable(value: Any) -> str:
    return Path(str(value)).name if Path(str(value)).is_absolute() else str(value)
