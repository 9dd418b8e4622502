"""What every sub-command shares: how it is called, and how its answer and its errors reach the user."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from st_wkl import _processes
from st_wkl.cli._flags import Flags, expanded_all
from st_wkl.files import owned

_COMMON = {
    "as_json": Annotated[
        bool, Parameter(name="--json", help="Print one JSON object and nothing else on standard output.")
    ],
    "quiet": Annotated[bool, Parameter(name="--quiet", help="No progress bars and no log lines.")],
}
# The commands that several processes of `torchrun` do together.
_TOGETHER = ("train", "run")
# The commands that keep what they have done so far.
_GOES_ON = ("build", "demo", "run", "train", "import_scores")
# Where a command works, under whatever name it has that.
_PLACES = ("path", "folder", "output")
# What a command has to say: as an object for `--json`, and as text for people.
Answer = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Asked:
    """How a command was asked, which each gets as its first argument.

    Args:
        line: The command as it would be typed, without the folders of this machine.
        given: The places in the configuration that it gave a value.
        quiet: Whether it shall show nothing meanwhile.
    """

    line: str
    given: frozenset[str]
    quiet: bool


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Make a command of a function: with flags, an answer, and errors that a user can act on as one line, exit code 1.

    Whatever else is printed meanwhile, by the trainer for one, goes to standard error, so that standard output holds
    the answer alone.
    """
    name, flags = command.__name__, Flags(command, _COMMON)

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        given = {key: expanded_all(value) for key, value in flags.signature.bind(*args, **kwargs).arguments.items()}
        asked = Asked(flags.invocation(name.rstrip("_"), given), flags.places(given), given.pop("quiet", False))
        as_json = given.pop("as_json", False)
        _log_to_stderr(asked.quiet or not _processes.is_first())
        try:
            if _processes.launched() > 1 and name not in _TOGETHER:
                raise ValueError(f"torchrun is for {' and '.join(_TOGETHER)}; start {name} as one process.")
            with _terminable(), _hushed() if asked.quiet else contextlib.redirect_stdout(sys.stderr):
                options = flags.read(given)
                with _alone(options):
                    value, text = command(asked, **options)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            print(f"error: {flags.spelled(error)}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt as stopped:
            again = "goes on from here" if name in _GOES_ON or given.get("evaluation__cache") else "starts anew"
            print(f"stopped; the same command {again}", file=sys.stderr)
            raise SystemExit(143 if isinstance(stopped, _Terminated) else 130) from None
        finally:
            _processes.leave()
        if _processes.is_first():
            print(json.dumps(_json(value), ensure_ascii=False, allow_nan=False) if as_json else text)

    run.__signature__ = flags.signature  # type: ignore[attr-defined]
    run.__annotations__ = {key: one.annotation for key, one in flags.signature.parameters.items()}
    return run


class _Terminated(KeyboardInterrupt):
    """What a batch system or a container sends before it kills: everything ends as with Ctrl-C, and is kept."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _alone(options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Make sure that no other process is at work in what a command writes, or reads as a whole."""
    place = next((options[name] for name in _PLACES if options.get(name) is not None), None)
    return owned(place) if place is not None and _processes.is_first() else contextlib.nullcontext()


# What libraries read when they are imported, which commands do late.
_HUSH = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


# What libraries say that nobody who runs a command can act on.
_NOISE = ("mtime may not be reliable", "Repo card metadata block was not found", "'pin_memory' argument is set as true")


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


def _is_noise(text: str) -> bool:
    return any(part in text for part in _NOISE)


def _log_to_stderr(quiet: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("st_wkl").setLevel(logging.ERROR if quiet else logging.INFO)
    for name in ("transformers.trainer_utils", "huggingface_hub.repocard"):
        logging.getLogger(name).addFilter(lambda record: not _is_noise(record.getMessage()))
    # Bars of tables that are written in a moment; those of downloads stay.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # bars of others would fill a log; ours write lines there
        os.environ.setdefault("TQDM_DISABLE", "1")

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # One line per warning: the source line that Python adds means nothing to someone who runs a command.
        noise = issubclass(category, (FutureWarning, DeprecationWarning)) or _is_noise(str(message))
        if not (quiet or noise):
            print(message, file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


def _json(value: Any) -> Any:
    """Return values as JSON has them: it knows no infinity, which is the end of an interval that there is not."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
