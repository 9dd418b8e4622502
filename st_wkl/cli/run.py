"""All stages from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering


@answering
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; `st-wkl init` writes one.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set training.learning_rate=1e-3.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Override the output folder.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Build, train, evaluate and write the card, as one file says; run it again and it goes on where it stopped.

    On several GPUs or machines, which share the output folder: `torchrun --nproc-per-node 2 -m st_wkl run config.yaml`.
    """
    from dataclasses import asdict

    from st_wkl.config import RunConfig
    from st_wkl.pipeline import run as run_all

    wanted = [*(settings or []), *([f"output={output}"] if output is not None else [])]
    result = run_all(RunConfig.load(config).override(wanted), show_progress=not quiet)
    value: dict[str, Any] = {"student": str(result.student), "done": result.done, "skipped": result.skipped}
    lines = []
    if result.before is not None and result.after is not None:
        value["before"] = {task.task: task.metrics for task in result.before.tasks}
        value["after"] = {task.task: task.metrics for task in result.after.tasks}
        value["difference"] = {name: asdict(comparison) for name, comparison in result.comparisons.items()}
        lines += ["before", result.before.table(), "after", result.after.table()]
        lines += [f"{name}: {comparison}" for name, comparison in result.comparisons.items()]
    if result.skipped:
        lines.append(f"Complete before: {', '.join(result.skipped)}.")
    lines.append(f"The student and its card are in {result.student}.")
    return value, "\n".join(lines)
