"""From results files to a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, TrustOption, answering

if TYPE_CHECKING:
    from st_wkl.evaluation import Comparison, Results

_PARTS = {"student": "student", "teacher": "teacher", "data": "training data"}


@answering
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of the student.")],
    results: Annotated[
        list[str], typer.Argument(help="Results files with their columns: before=FILE after=FILE BM25=FILE …")
    ],
    licence: Annotated[
        list[str] | None, typer.Option(help="Licence of a part, such as student=mit or data=cc-by-nc-4.0; repeatable.")
    ] = None,
    command: Annotated[str | None, typer.Option(help="The command that makes this student.")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Write a student's card from its record and results; what its owner wrote there stays."""
    from st_wkl.evaluation import Results
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.record import RECORD_FILE, TrainingRecord

    columns = {label: Results.load(path) for label, path in _pairs(results, "before=results.json").items()}
    licences = _pairs(licence or [], "student=mit")
    if unknown := sorted(licences.keys() - _PARTS.keys()):
        raise ValueError(f"--licence {unknown[0]}=…: name one of {', '.join(_PARTS)}.")
    path = write_model_card(
        folder,
        record=TrainingRecord.load(folder) if (folder / RECORD_FILE).is_file() else None,
        results=columns,
        comparison=_comparison(columns),
        command=command,
        trust_remote_code=trust_remote_code,
        licences={_PARTS[part]: stated for part, stated in licences.items()} or None,
    )
    return {"card": str(path)}, f"The card is {path}."


def _pairs(items: list[str], example: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        label, equals, value = item.partition("=")
        if not (label and equals and value):
            raise ValueError(f"{item!r} must be a name and a value, such as {example}.")
        if label in pairs:
            raise ValueError(f"{label!r} is given twice.")
        pairs[label] = value
    return pairs


def _comparison(columns: dict[str, Results]) -> Comparison | None:
    """Compare after with before where both are there and share one task."""
    from st_wkl.evaluation import compare

    before, after = columns.get("before"), columns.get("after")
    if before is None or after is None:
        return None
    shared = {scores.task for scores in before.tasks} & {scores.task for scores in after.tasks}
    return compare(before, after) if len(shared) == 1 else None
