"""From a collection and a teacher to a distillation dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, StoreOption, answering

if TYPE_CHECKING:
    pass


@answering
def build(
    collection: Annotated[str, typer.Argument(help="BEIR folder, or Hub id or folder in MTEB's layout.")],
    teacher: Annotated[str, typer.Option(help="Cross-encoder: Hub id or folder, torch or ONNX.")],
    output: Annotated[Path, typer.Option(help="Folder for the distillation dataset.")],
    split: Annotated[str, typer.Option(help="Split of the judgements to learn from.")] = "train",
    num_negatives: Annotated[int, typer.Option(min=1, help="Hard negatives per query.")] = 15,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many judged queries only.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens the teacher reads. Default: its own.")] = None,
    store: StoreOption = None,
    engine: Annotated[str, typer.Option(help="Where pairs are scored: process, pool or ray.")] = "process",
    drop_leaks: Annotated[bool, typer.Option("--drop-leaks", help="Leave out what the test split shares.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many pairs, tokens and hours.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Mine candidates with BM25, score them with the teacher, and save the distillation dataset."""
    from dataclasses import asdict

    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.collection import Collection
    from st_wkl.data.teachers import CrossEncoderTeacher

    if engine not in ("process", "pool", "ray"):
        raise ValueError(f"--engine must be process, pool or ray, got {engine!r}.")
    if output.exists():
        raise FileExistsError(f"{output} exists already. Choose another --output, or delete it if it may go.")
    loaded = Collection.load(collection)
    if split not in loaded.qrels:
        raise ValueError(f"{collection} has no split {split!r}, only {', '.join(sorted(loaded.qrels))}.")
    builder = DistillationDatasetBuilder(
        loaded,
        CrossEncoderTeacher(teacher, max_length=max_length),
        split=split,
        query_ids=list(loaded.qrels[split])[:limit],
        num_negatives=num_negatives,
        store=store,
        drop_leaks=drop_leaks,
        engine=engine,  # type: ignore[arg-type]
    )
    if dry_run:
        estimate = builder.estimate(show_progress=not quiet)
        return {**asdict(estimate), "hours": estimate.hours}, str(estimate)
    dataset = builder.build(show_progress=not quiet)
    dataset.save_to_disk(output)
    return dataset.provenance, f"{len(dataset.train):,} queries with their scored candidates are in {output}."
