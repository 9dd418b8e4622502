"""The command line: one sub-command per stage; its flags are the options of `st_wkl.pipeline.options`.

What needs torch is imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from st_wkl import __version__
from st_wkl.cli import results, stages
from st_wkl.cli._flags import help_formatter

_GROUPS = {
    "scores": ("Look after the store of teacher scores.", {
        "info": results.info, "verify": results.verify, "export": results.export, "import": results.import_scores,
    }),
    "leaderboard": ("Get a student onto MTEB's leaderboard.", {"prepare": results.prepare}),
}  # fmt: skip


def _made() -> App:
    made = App(
        name="st-wkl",
        help="Teach a small, fast retriever with a strong, slow reranker.",
        version=__version__,
        default_parameter=Parameter(negative=(), negative_iterable=()),
        help_formatter=help_formatter,
        help_format="plaintext",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for command in (results.demo, stages.init, stages.run, stages.build, stages.train, stages.evaluate):
        made.command(command)
    made.command(stages.import_, name="import")
    for command in (results.report, results.card, results.push):
        made.command(command)
    for group, (told, commands) in _GROUPS.items():
        made.command(inner := App(name=group, help=told))
        for name, command in commands.items():
            inner.command(command, name=name)
    return made


def app(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process: with 0, with 1 for an error in one line, or with 2 for flags that are none.

    Args:
        arguments: What stands after `st-wkl`; None for what was typed.
    """
    code, work = 0, "the answer cannot be written"
    try:
        _made()(sys.argv[1:] if arguments is None else list(arguments))
    except CycloptsError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # a reader such as `head` has gone
        code = 1
    except OSError as error:
        print(f"error: all is done, but {work} to standard output: {error}", file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and code == 0:
            print(f"error: all is done, but {work} to standard output: {error}", file=sys.stderr)
        code = code or 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes once more
    sys.exit(code)
