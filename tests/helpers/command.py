"""The command line in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from st_wkl.cli import app


def st_wkl(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
