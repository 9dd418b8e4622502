"""From a model to numbers, and to the difference between two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering

if TYPE_CHECKING:
    pass


@answering
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: Hub id or folder.")],
    tasks: Annotated[list[str], typer.Argument(help="MTEB tasks by name, or BEIR folders.")],
    output: Annotated[Path | None, typer.Option(help="Results file to write.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to evaluate on. Default: each task's own.")] = None,
    against: Annotated[Path | None, typer.Option(help="Results file of another model to compare with.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Evaluate a model through MTEB, with nDCG@10 per query, and compare it with another by a paired test."""
    from dataclasses import asdict

    from st_wkl.evaluation import Results, compare
    from st_wkl.evaluation import evaluate as run_evaluation

    other = None if against is None else Results.load(against)
    results = run_evaluation(model, tasks, split=split, output=output, batch_size=batch_size, show_progress=not quiet)
    value: dict[str, Any] = {"tasks": {task.task: task.metrics for task in results.tasks}}
    lines = [results.table()]
    if other is not None:
        comparisons = {task.task: compare(other, results, task=task.task) for task in results.tasks}
        value["difference"] = {name: asdict(comparison) for name, comparison in comparisons.items()}
        lines += [
            f"{name}: {c.mean:+.4f} nDCG@10 against {against}, 95 % interval [{c.low:+.4f}, {c.high:+.4f}], "
            f"p = {c.p_value:.4f}, {c.wins} queries better, {c.losses} worse"
            for name, c in comparisons.items()
        ]
    return value, "\n".join(lines)
