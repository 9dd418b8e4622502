"""The command line in this process."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from st_wkl.cli import app


@dataclass
class Result:
    """What a command said."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class CliRunner:
    """Calls a command line and keeps what it says; what is no error of a user is raised."""

    def invoke(self, app: Any, arguments: str | Sequence[object]) -> Result:
        words = shlex.split(arguments) if isinstance(arguments, str) else [str(argument) for argument in arguments]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(words)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
        return Result(code, out.getvalue(), err.getvalue())


def st_wkl(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr
