"""From a pushed student to the two pull requests of MTEB's leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, TrustOption, answering

if TYPE_CHECKING:
    pass

leaderboard = typer.Typer(help="Get a student onto MTEB's leaderboard.", no_args_is_help=True)


@leaderboard.command()
@answering
def prepare(
    student: Annotated[Path, typer.Argument(help="Folder of the trained student, as it was pushed.")],
    org: Annotated[str, typer.Option(help="User or organisation of the student on the Hub.")],
    results: Annotated[list[Path] | None, typer.Argument(help="Folders with MTEB's own result files.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("submission"),
    name: Annotated[str | None, typer.Option(help="Repository name. Default: the folder's name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit on the Hub. Default: the newest.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence. Default: that of the card.")] = None,
    trained_on: Annotated[
        list[str] | None,
        typer.Option(help="MTEB task whose data student, teacher or base has seen, beyond what MTEB knows, or `none`."),
    ] = None,
    training_data: Annotated[str | None, typer.Option(help="URL of the training data.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language and script. Default: eng-Latn.")] = None,
    release_date: Annotated[str | None, typer.Option(help="YYYY-MM-DD. Default: today.")] = None,
    contact: Annotated[list[str] | None, typer.Option(help="GitHub handle of who answers for the model.")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Write MTEB's entry of the model, its results in the repository's layout, and what to do with both."""
    from st_wkl.publish.leaderboard import prepare as write

    done = write(
        student,
        results or [],
        org=org,
        output=output,
        name=name,
        revision=revision,
        license=license,
        trained_on=[] if trained_on == ["none"] else trained_on,
        training_data=training_data,
        languages=language or ("eng-Latn",),
        release_date=release_date,
        contacts=contact or (),
        trust_remote_code=trust_remote_code,
    )
    value = {
        "model": done.meta.name,
        "revision": done.meta.revision,
        "model_file": str(done.model_file),
        "results": str(done.results) if done.results else None,
        "tasks": list(done.tasks),
        "page": str(done.page),
        "notes": list(done.notes),
    }
    told = f"{len(done.tasks)} results, checked" if done.tasks else "no results yet"
    notes = "\n".join(f"- {note}" for note in done.notes)
    return value, f"{done.model_file} holds the entry of {done.meta.name}; {told}.\n{notes}\nGo on with {done.page}."
