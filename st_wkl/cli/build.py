"""From a collection and a teacher to a distillation dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from st_wkl.cli._answers import (
    Answer,
    IdenticalOption,
    JsonOption,
    MissingOption,
    QuietOption,
    StoreOption,
    TrustOption,
    answering,
    invocation,
)

if TYPE_CHECKING:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.dataset import DistillationDataset

# Panels of `--help`: nobody reads thirty options in a row.
_CANDIDATES, _TEACHER, _LISTS, _LEAKS = "Candidates", "Teacher", "Lists", "Leaks"


@answering
def build(
    context: typer.Context,
    collection: Annotated[str, typer.Argument(help="BEIR folder, or Hub id or folder in MTEB's layout.")],
    teacher: Annotated[list[str], typer.Option(help="Cross-encoder, Hub id or folder. Several: z-scored and mixed.")],
    output: Annotated[Path, typer.Option(help="Folder for the distillation dataset.")],
    split: Annotated[str, typer.Option(help="Split of the judgements to learn from.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use the first so many judged queries only.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the report on the teacher.")] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="TREC run file in place of BM25.", rich_help_panel=_CANDIDATES)
    ] = None,
    retriever: Annotated[
        list[str] | None,
        typer.Option(help="Retriever in place of BM25: the student, bm25:k1=0.9,b=0.4.", rich_help_panel=_CANDIDATES),
    ] = None,
    bm25: Annotated[
        bool,
        typer.Option("--bm25", help="BM25 beside runs and retrievers; all are fused.", rich_help_panel=_CANDIDATES),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens the teacher reads. Default: its own.", rich_help_panel=_TEACHER)
    ] = None,
    backend: Annotated[Literal["auto", "torch", "onnx", "openvino"], typer.Option(rich_help_panel=_TEACHER)] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: the model's own; auto: bfloat16 where it is fast.", rich_help_panel=_TEACHER),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one forward pass.", rich_help_panel=_TEACHER)
    ] = None,
    engine: Annotated[
        Literal["process", "pool", "ray"], typer.Option(help="Where pairs are scored.", rich_help_panel=_TEACHER)
    ] = "process",
    workers: Annotated[
        int | None, typer.Option(help="Processes of the pool, or actors on Ray.", rich_help_panel=_TEACHER)
    ] = None,
    store: StoreOption = None,
    num_negatives: Annotated[int, typer.Option(help="Hard negatives per query.", rich_help_panel=_LISTS)] = 15,
    max_positives: Annotated[int | None, typer.Option(help="Default: all.", rich_help_panel=_LISTS)] = None,
    choice: Annotated[
        Literal["top", "random", "quantiles"], typer.Option(help="How negatives are drawn.", rich_help_panel=_LISTS)
    ] = "top",
    seed: Annotated[int, typer.Option(help="Seed of that draw.", rich_help_panel=_LISTS)] = 0,
    relative_margin: Annotated[
        float | None, typer.Option(help="Leave out negatives above this share of the positive.", rich_help_panel=_LISTS)
    ] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="Leave out negatives nearer to the positive.", rich_help_panel=_LISTS)
    ] = None,
    near_duplicates: Annotated[
        float, typer.Option(help="Jaccard coefficient that makes a copy; 1 for exact ones.", rich_help_panel=_LISTS)
    ] = 0.9,
    label_correction: Annotated[
        Literal["raise_positives", "swap_positives"] | None,
        typer.Option(help="Change scores that contradict the judgements.", rich_help_panel=_LISTS),
    ] = None,
    against: Annotated[str, typer.Option(help="Test split to compare with.", rich_help_panel=_LEAKS)] = "test",
    drop_leaks: Annotated[
        bool, typer.Option("--drop-leaks", help="Leave out what that split shares.", rich_help_panel=_LEAKS)
    ] = False,
    ignore_identical_ids: IdenticalOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many pairs, tokens and hours.")] = False,
    missing: MissingOption = "raise",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Mine candidates, score them with the teacher, and save the distillation dataset.

    Killed at any moment, the same command goes on where it was: what was scored is in the store.
    """
    from dataclasses import asdict

    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.collection import Collection
    from st_wkl.data.pools import check_lists
    from st_wkl.data.report import plot_report
    from st_wkl.data.selection import Selection
    from st_wkl.data.teachers import CrossEncoderTeacher
    from st_wkl.files import holds_nothing

    if not (output / "provenance.json").is_file() and not holds_nothing(output):
        raise FileExistsError(f"{output} exists already. Choose another --output, or delete it if it may go.")
    selection = Selection(
        choice=choice,
        relative_margin=relative_margin,
        absolute_margin=absolute_margin,
        label_correction=label_correction,
        max_positives=max_positives,
        near_duplicates=near_duplicates,
        seed=seed,
    )
    loaded = Collection.load(collection, missing=missing, ignore_identical_ids=ignore_identical_ids)
    if split not in loaded.qrels:
        raise ValueError(f"{collection} has no split {split!r}, only {', '.join(sorted(loaded.qrels))}.")
    query_ids = list(loaded.qrels[split])[:limit]
    check_lists(loaded.qrels[split], query_ids, num_negatives, max_positives)  # before teachers are loaded
    options: dict[str, Any] = {
        "max_length": max_length,
        "backend": backend,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "trust_remote_code": trust_remote_code,
    }
    teachers = [CrossEncoderTeacher(model, **options) for model in teacher]
    builder = DistillationDatasetBuilder(
        loaded,
        teachers if len(teachers) > 1 else teachers[0],
        split=split,
        query_ids=query_ids,
        num_negatives=num_negatives,
        store=store,
        selection=selection,
        against=against,
        drop_leaks=drop_leaks,
        engine=engine,
        workers=workers,
    )
    there = None if dry_run else _there(output, builder)
    if run or retriever:
        sources = [*(run or []), *(retriever or []), *(["bm25"] if bm25 else [])]
        options = {"show_progress": not quiet, "trust_remote_code": trust_remote_code}
        builder.candidates = builder.find_candidates(sources, top_k=max(100, builder.depth), **options)
    if dry_run:
        estimate = builder.estimate(show_progress=not quiet)
        return {**asdict(estimate), "hours": estimate.hours}, str(estimate)
    dataset = builder.build(show_progress=not quiet)
    dataset.provenance["command"] = invocation(context)
    if there is None:
        dataset.save_to_disk(output)
    elif not _same_rows(there, dataset):
        raise _other(output, "from other queries, candidates or scores")
    if plot is not None:
        plot_report(dataset, plot)
    counts = dataset.provenance["counts"]
    cut = f", {counts['cut_pairs']:,} of them cut to the teacher's length" if counts["cut_pairs"] else ""
    text = f"{len(dataset.train):,} queries with {counts['pairs']:,} scored documents{cut} are in {output}."
    return dataset.provenance, text


def _there(output: Path, builder: DistillationDatasetBuilder) -> DistillationDataset | None:
    """Return the dataset that a folder holds, None if there is none.

    Raises:
        FileExistsError: If it was made of something else.
    """
    from dataclasses import asdict

    from st_wkl.data.dataset import DistillationDataset

    if not output.exists() or not any(output.iterdir()):
        return None
    there = DistillationDataset.load_from_disk(output)
    asked = {
        "collection": {"name": builder.collection.name, "fingerprint": builder.collection.fingerprint},
        "split": builder.split,
        "num_negatives": builder.num_negatives,
        "selection": asdict(builder.selection),
        "teacher": builder.teacher.identity,
    }
    for name, value in json.loads(json.dumps(asked)).items():
        if there.provenance.get(name) != value:
            raise _other(output, f"with another {name}")
    return there


def _other(output: Path, how: str) -> FileExistsError:
    return FileExistsError(
        f"{output} holds a dataset that was made {how}. Choose another --output, or delete it if it may go."
    )


def _same_rows(first: DistillationDataset, second: DistillationDataset) -> bool:
    from st_wkl.training.identity import dataset_fingerprint

    return dataset_fingerprint(first) == dataset_fingerprint(second)
