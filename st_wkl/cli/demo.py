"""The whole way on real text, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering

if TYPE_CHECKING:
    pass


@answering
def demo(
    output: Annotated[Path, typer.Option(help="Folder for scores, students and results.")] = Path("demo-output"),
    hub: Annotated[bool, typer.Option("--hub", help="Take models and data from the Hub.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Teach a tiny model one corpus, on real text, in minutes; run it again and it goes on where it stopped."""
    from st_wkl.demo import run_demo

    result = run_demo(output, hub=hub, show_progress=not quiet)
    return result.to_json(), f"\n{result.table()}\n\nThe students and their cards are in {output / 'students'}."
