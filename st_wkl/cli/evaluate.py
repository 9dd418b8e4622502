"""From a model to numbers, and to the difference between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from st_wkl.cli._answers import Answer, IdenticalOption, JsonOption, MissingOption, QuietOption, TrustOption, answering


@answering
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: Hub id, folder, bm25, or bm25:k1=0.9,b=0.4,language=none.")],
    tasks: Annotated[list[str], typer.Argument(help="MTEB tasks by name, or BEIR folders.")],
    output: Annotated[Path | None, typer.Option(help="Results file to write.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to evaluate on. Default: each task's own.")] = None,
    against: Annotated[Path | None, typer.Option(help="Results file of another model to compare with.")] = None,
    missing: MissingOption = "raise",
    teacher: Annotated[Path | None, typer.Option(help="Results file of the teacher: how much of its lead?")] = None,
    first_stage: Annotated[
        str | None, typer.Option(help="What finds the candidates to rerank: bm25, a run file, a retriever.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Candidates of a query, with --first-stage.")] = 100,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep results in, by the model's weights.")] = None,
    efficiency: Annotated[bool, typer.Option("--efficiency", help="Measure speed and index size, too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 32,
    ignore_identical_ids: IdenticalOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Evaluate a model through MTEB, with nDCG@10 per query, and compare it with another by a paired test."""
    from dataclasses import asdict

    from st_wkl.data.collection import Collection
    from st_wkl.evaluation import Results, compare_all, effects_table
    from st_wkl.evaluation import evaluate as run_evaluation
    from st_wkl.evaluation.effects import go_by_p

    given: list[Any] = [
        Collection.load(task, missing=missing) if missing == "drop" and ("/" in task or Path(task).is_dir()) else task
        for task in tasks
    ]
    # Files that cannot be read must be found out before the work.
    other = None if against is None else Results.load(against)
    ceiling = None if teacher is None else Results.load(teacher)
    results = run_evaluation(
        model,
        given,
        split=split,
        output=output,
        first_stage=first_stage,
        top_k=top_k,
        cache=cache,
        efficiency=efficiency,
        batch_size=batch_size,
        ignore_identical_ids=ignore_identical_ids,
        show_progress=not quiet,
        trust_remote_code=trust_remote_code,
    )
    value: dict[str, Any] = {"tasks": {task.task: task.metrics for task in results.tasks}}
    value["groups"] = {task.task: {group: task.mean(group) for group in task.groups} for task in results.tasks}
    lines = [results.table()]
    if efficiency:
        value["efficiency"] = results.model["efficiency"]
        lines.append(", ".join(f"{name}: {number}" for name, number in results.model["efficiency"].items()))
    if other is not None:
        effects = compare_all(other, results, teacher=ceiling)
        value["difference"] = {effect.task: asdict(effect.difference) for effect in effects if effect.group is None}
        value["effects"] = [asdict(effect) for effect in effects]
        lines += [f"against {against}:", effects_table(effects), *filter(None, [go_by_p(effects)])]
    return value, "\n".join(lines)
