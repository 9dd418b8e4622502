"""From results files to one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering


@answering
def report(
    results: Annotated[list[str], typer.Argument(help="Results files, plain or as LABEL=FILE; the first is before.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    before: Annotated[str | None, typer.Option(help="Label of the undistilled student. Default: the first.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Label of the teacher, whose lead is the gap to close.")] = None,
    collection: Annotated[list[str] | None, typer.Option(help="Collections to take the texts of queries from.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the differences to write, too (PNG, SVG).")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Write one HTML page with scores, differences and their intervals, efficiency, and single queries."""
    from dataclasses import asdict

    from st_wkl.data.collection import Collection
    from st_wkl.evaluation import compare_all
    from st_wkl.evaluation.effects import effects_table, go_by_p
    from st_wkl.evaluation.plots import plot_effects
    from st_wkl.evaluation.report import labelled_results, write_report

    found = labelled_results(results)
    loaded = [Collection.load(source) for source in collection or ()]
    path = write_report(output, found, before=before, teacher=teacher, collections=loaded)
    base = before or next(iter(found))
    rivals = {label: entry for label, entry in found.items() if label not in (base, teacher)}
    ceiling = found[teacher] if teacher else None
    effects = compare_all(found[base], rivals, teacher=ceiling) if rivals else []
    if plot is not None:
        plot_effects(effects, plot)
    value = {"report": str(path), "effects": [asdict(effect) for effect in effects]}
    return value, "\n".join(
        [*([effects_table(effects)] if effects else []), *filter(None, [go_by_p(effects)]), f"report written to {path}"]
    )
