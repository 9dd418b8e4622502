"""A configuration to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering

if TYPE_CHECKING:
    pass


@answering
def init(
    path: Annotated[Path, typer.Argument(help="YAML file to write.")] = Path("config.yaml"),
    collection: Annotated[
        str, typer.Option(help="BEIR folder, or Hub id or folder in MTEB's layout.")
    ] = "mteb/nfcorpus",
    teacher: Annotated[
        str, typer.Option(help="Cross-encoder: Hub id, folder, or packaged:ms-marco-MiniLM-L12-v2.")
    ] = "cross-encoder/ms-marco-MiniLM-L12-v2",
    student: Annotated[
        str, typer.Option(help="Hub id, folder, or packaged:potion-base-8M.")
    ] = "minishlab/potion-base-8M",
    output: Annotated[Path, typer.Option(help="Folder for everything that the run makes.")] = Path("run"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Write a commented configuration for `st-wkl run`."""
    from st_wkl.config import template
    from st_wkl.files import write_text

    text = template(path.name, collection=collection, teacher=teacher, student=student, output=str(output))
    if path.exists() and path.read_bytes() != text.encode():
        raise FileExistsError(f"{path} exists already. Choose another name, or delete it if it may go.")
    write_text(path, text)
    return {"config": str(path)}, f"{path} is ready: look at it, then `st-wkl run {path}`."
