"""The command line: one sub-command per stage, one file each.

Heavy imports live inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import typer

from st_wkl.cli.build import build
from st_wkl.cli.card import card
from st_wkl.cli.demo import demo
from st_wkl.cli.evaluate import evaluate
from st_wkl.cli.init import init
from st_wkl.cli.leaderboard import leaderboard
from st_wkl.cli.push import push
from st_wkl.cli.report import report
from st_wkl.cli.run import run
from st_wkl.cli.scores import scores
from st_wkl.cli.train import train

app = typer.Typer(
    name="st-wkl",
    help="Teach a small, fast retriever with a strong, slow reranker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for command in (demo, init, run, build, train, evaluate, report, card, push):
    app.command()(command)
app.add_typer(scores, name="scores")
app.add_typer(leaderboard, name="leaderboard")
