"""The store of teacher scores: what it holds, whether it is sound, and its way out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, StoreOption, answering

if TYPE_CHECKING:
    from st_wkl.data.score_store import ScoreStore


scores = typer.Typer(help="Look after the store of teacher scores.", no_args_is_help=True)


@scores.command()
@answering
def info(store: StoreOption = None, as_json: JsonOption = False, quiet: QuietOption = False) -> Answer:
    """Say which teachers' scores the store holds, and how many."""
    from dataclasses import asdict

    with _opened(store) as opened:
        found = opened.info()
    return asdict(found), str(found)


@scores.command()
@answering
def verify(store: StoreOption = None, as_json: JsonOption = False, quiet: QuietOption = False) -> Answer:
    """Read every score; a damaged file is named and set aside."""
    with _opened(store) as opened:
        count = opened.verify()
        return {"path": str(opened.path), "scores": count}, f"{opened.path} is sound: {count:,} scores."


@scores.command()
@answering
def export(
    output: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Write all scores to a parquet file, which other stores can import."""
    with _opened(store) as opened:
        count = opened.export_parquet(output, show_progress=not quiet)
    return {"path": str(output), "scores": count}, f"{count:,} scores are in {output}."


@scores.command("import")
@answering
def import_(
    source: Annotated[Path, typer.Argument(help="Parquet file that `st-wkl scores export` wrote.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Take the scores of a parquet file into the store, which is made if there is none; scores it has stay."""
    from st_wkl.data.score_store import ScoreStore, default_store_path

    with ScoreStore(default_store_path() if store is None else store) as opened:
        count = opened.import_parquet(source, show_progress=not quiet)
        return {"path": str(opened.path), "scores": count}, f"{count:,} scores of {source} are in {opened.path}."


def _opened(store: Path | None) -> ScoreStore:
    from st_wkl.data.score_store import ScoreStore, default_store_path

    path = default_store_path() if store is None else store
    if not path.is_file():
        raise FileNotFoundError(f"There is no score store at {path}. `st-wkl build` makes one.")
    return ScoreStore(path)
