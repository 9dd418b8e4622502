"""The stages: from a collection to a dataset, a student, numbers, or all of it from one file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from st_wkl.cli._answers import Answer, Asked, answering
from st_wkl.data.selection import Selection
from st_wkl.files import holds_nothing, write_text
from st_wkl.pipeline.import_options import ImportConfig
from st_wkl.pipeline.init import template
from st_wkl.pipeline.options import (
    CandidatesConfig,
    CollectionConfig,
    DevConfig,
    EvaluationConfig,
    LossConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)

if TYPE_CHECKING:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.dataset import DistillationDataset

_EVALUATION = EvaluationConfig(split=None)


@answering
def init(
    asked: Asked,
    path: Path = Path("config.yaml"),
    *,
    collection: str = "mteb/nfcorpus",
    teacher: str = "cross-encoder/ms-marco-MiniLM-L12-v2",
    student: str = "minishlab/potion-base-8M",
    output: Path = Path("run"),
) -> Answer:
    """Write a commented configuration for `st-wkl run`: every option with its default and what it means.

    Args:
        path: YAML file to write.
        collection: BEIR folder, or Hub id or folder in MTEB's layout.
        teacher: Cross-encoder: Hub id, folder, or packaged:ms-marco-MiniLM-L12-v2.
        student: Hub id, folder, or packaged:potion-base-8M.
        output: Folder for everything that the run makes.
    """
    text = template(path.name, collection=collection, teacher=teacher, student=student, output=str(output))
    if path.exists() and path.read_bytes() != text.encode():
        raise FileExistsError(f"{path} exists already. Choose another name, or delete it if it may go.")
    write_text(path, text)
    return {"config": str(path)}, f"{path} is ready: look at it, then `st-wkl run {path}`."


@answering
def run(asked: Asked, config: Path, *, set: list[str] | None = None, output: Path | None = None) -> Answer:
    """Build, train, evaluate and write the card, as one file says; run it again and it goes on where it stopped.

    On several GPUs or machines, which share the output folder: `torchrun --nproc-per-node 2 -m st_wkl run config.yaml`.

    Args:
        config: YAML file; `st-wkl init` writes one.
        set: Override a key: --set training.learning_rate=1e-3; repeatable.
        output: Override the output folder.
    """
    from st_wkl.pipeline.runner import run as run_all

    wanted = [*(set or []), *([f"output={output}"] if output is not None else [])]
    result = run_all(RunConfig.load(config).override(wanted), show_progress=not asked.quiet)
    value: dict[str, Any] = {"student": str(result.student), "done": result.done, "skipped": result.skipped}
    lines = []
    if result.before is not None and result.after is not None:
        value["before"] = {task.task: task.metrics for task in result.before.tasks}
        value["after"] = {task.task: task.metrics for task in result.after.tasks}
        value["difference"] = {name: asdict(comparison) for name, comparison in result.comparisons.items()}
        lines.append(result.table())
        lines += [f"{name}: {comparison}" for name, comparison in result.comparisons.items()]
    if result.skipped:
        lines.append(f"Complete before: {', '.join(result.skipped)}.")
    lines.append(f"The student and its card are in {result.student}.")
    return value, "\n".join(lines)


@answering
def build(
    asked: Asked,
    *,
    collection: CollectionConfig,
    teacher: TeacherConfig,
    output: Path,
    candidates: CandidatesConfig,
    run: list[Path] | None = None,
    retriever: list[str] | None = None,
    bm25: bool = False,
    selection: Selection,
    dry_run: bool = False,
    plot: Path | None = None,
) -> Answer:
    """Mine candidates, score them with the teacher, and save the distillation dataset.

    Killed at any moment, the same command goes on where it was: what was scored is in the store.

    Args:
        output: Folder for the distillation dataset.
        run: TREC run file in place of BM25; repeatable, as retrievers are: all are fused.
        retriever: Retriever in place of BM25: the student, or bm25:k1=0.9,b=0.4.
        bm25: BM25 beside runs and retrievers.
        dry_run: Only say how many pairs, tokens and hours; a sample of pairs is scored for it, and not kept.
        plot: PNG file for the report on the teacher.
    """
    if not (output / "provenance.json").is_file() and not holds_nothing(output):
        raise FileExistsError(f"{output} exists already. Choose another --output, or delete it if it may go.")
    sources = [*map(str, run or ()), *(retriever or ()), *(["bm25"] if bm25 else ())]
    if absent := [path for path in run or () if not path.is_file()]:
        raise FileNotFoundError(f"--run {absent[0]}: there is no such file.")
    from st_wkl.data.pools import check_lists
    from st_wkl.data.report import plot_report
    from st_wkl.pipeline import steps

    loaded = steps.load_collection(collection)
    judged = loaded.learnt_from(collection.split, selection.positives)
    query_ids = list(judged)[: collection.limit]
    # Before teachers are loaded.
    check_lists(judged, query_ids, candidates.num_negatives, selection.max_positives)
    options = (collection, candidates, teacher, selection)
    builder = steps.make_builder(loaded, query_ids, None, steps.load_teacher(teacher), *options)
    there = None if dry_run else _there(output, builder)
    # Nothing said, the builder searches with BM25, as deep as the lists need.
    if sources or {"candidates.top_k", "settings"} & asked.given:
        deep = candidates.top_k if "candidates.top_k" in asked.given else max(candidates.top_k, builder.depth)
        builder.candidates = builder.find_candidates(
            sources or candidates.sources,
            top_k=deep,
            show_progress=not asked.quiet,
            trust_remote_code=candidates.trust_remote_code,
        )
    if dry_run:
        estimate = builder.estimate(show_progress=not asked.quiet)
        return {**asdict(estimate), "hours": estimate.hours}, str(estimate)
    dataset = builder.build(show_progress=not asked.quiet)
    dataset.provenance["command"] = asked.line
    if there is None:
        dataset.save(output)
    elif not _same_rows(there, dataset):
        raise _other(output, "from other queries, candidates or scores")
    if plot is not None:
        plot_report(dataset, plot)
    counts = dataset.provenance["counts"]
    cut = f", {counts['cut_pairs']:,} of them cut to the teacher's length" if counts["cut_pairs"] else ""
    text = f"{len(dataset.train):,} queries with {counts['pairs']:,} scored documents{cut} are in {output}."
    if unjudged := counts.get("unjudged_queries"):
        text += f" {unjudged:,} have no judged positive, and {counts['teacher_positives']:,} the teacher's best as one."
    return dataset.provenance, text


def _there(output: Path, builder: DistillationDatasetBuilder) -> DistillationDataset | None:
    """Return the dataset that a folder holds, None if there is none.

    Raises:
        FileExistsError: If it was made of something else.
    """
    from st_wkl.data.dataset import DistillationDataset

    if not output.exists() or not any(output.iterdir()):
        return None
    there = DistillationDataset.load(output)
    told = {
        "collection": {"name": builder.collection.name, "fingerprint": builder.collection.fingerprint},
        "split": builder.split,
        "num_negatives": builder.num_negatives,
        "selection": builder.selection.to_dict(),
        "teacher": builder.teacher.identity,
    }
    for name, value in json.loads(json.dumps(told)).items():
        if there.provenance.get(name) != value:
            raise _other(output, f"with another {'--num-negatives' if name == 'num_negatives' else name}")
    return there


def _other(output: Path, how: str) -> FileExistsError:
    return FileExistsError(
        f"{output} holds a dataset that was made {how}. Choose another --output, or delete it if it may go."
    )


def _same_rows(first: DistillationDataset, second: DistillationDataset) -> bool:
    from st_wkl.training.identity import dataset_fingerprint

    return dataset_fingerprint(first) == dataset_fingerprint(second)


@answering
def import_(asked: Asked, *, tables: ImportConfig, output: Path) -> Answer:
    """Make a distillation dataset of scores that others have made, or a BEIR folder of a corpus of your own.

    The columns tell which of the two: scores make a dataset for `st-wkl train`, all else a collection for `build`.

    Args:
        output: Folder for the dataset or the collection.
    """
    from st_wkl.pipeline import steps

    made = steps.import_tables(tables, output, asked.line)
    told = ", ".join(f"{count:,} {what}" for what, count in made.items())
    return {"path": str(output), **made}, f"{told} are in {output}."


@answering
def train(
    asked: Asked,
    dataset: list[str],
    *,
    student: StudentConfig,
    output: Path,
    loss: LossConfig,
    training: dict[str, Any],
    lora: bool = False,
    merge: bool = False,
    dev: DevConfig | None = None,
    resume: Annotated[bool, Parameter(show=False)] = False,
) -> Answer:
    """Train a student on a distillation dataset and save it with its card and the record of its making.

    Stopped at any moment, the same command goes on at its last checkpoint; a complete student is left as it is.

    On several GPUs or machines: `torchrun --nproc-per-node 2 -m st_wkl train …`.

    Args:
        dataset: Folder that `st-wkl build` made; several, as in `nq=FOLDER squad=FOLDER`, are trained on together. For
            --embedding-teacher also a BEIR folder or a file of texts.
        output: Folder for the trained student.
        lora: Train an adapter in place of all weights; --set lora.r=8 has other parameters of peft's LoraConfig.
        merge: Merge the adapter; it is kept in OUTPUT-adapter.
        resume: Goes without saying: the same command goes on.
    """
    if merge and lora is False:
        raise ValueError("--merge merges an adapter: add --lora.")
    if dev is not None and dev.source is None:
        told = min((place.partition(".")[2] for place in asked.given if place.startswith("dev.")), default="set")
        raise ValueError(f"--{told.replace('_', '-')} needs a dev split to look at: add --dev.")
    from st_wkl.pipeline import steps

    record = steps.train(
        Path(dataset[0]) if len(dataset) == 1 else steps.load_datasets(dataset),
        output,
        student=student,
        loss=loss,
        arguments=training,
        lora=lora,
        merge=merge,
        dev=dev,
        show_progress=not asked.quiet,
        command=asked.line,
    )
    lines = [f"The student is in {output}, trained in {record.seconds:.0f} s."]
    if record.dev:
        lines.append(f"nDCG@10 on the dev split: {record.dev['before']:.4f} before, {record.dev['after']:.4f} after.")
    return asdict(record), "\n".join(lines)


@answering
def evaluate(
    asked: Asked,
    model: str,
    tasks: list[str] | None = None,
    *,
    benchmark: list[str] | None = None,
    output: Path | None = None,
    evaluation: EvaluationConfig = _EVALUATION,
    name: str | None = None,
    revision: str | None = None,
    against: Path | None = None,
    teacher: Path | None = None,
    truncate_dim: int | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> Answer:
    """Evaluate a model through MTEB, with nDCG@10 per query, and compare it with another by a paired test.

    Finished tasks of a benchmark are kept in the cache, in the layout of the leaderboard: killed at any moment, the
    same command goes on at the task where it was, the smallest first.

    Args:
        model: Hub id, folder, bm25, or bm25:k1=0.9,b=0.4,language=none.
        tasks: MTEB tasks by name, BEIR folders, or Hub ids in MTEB's layout. Default: the benchmark NanoBEIR.
        benchmark: Benchmark by MTEB's name, such as 'MTEB(eng, v2)'; its cache is mteb-cache by default; repeatable.
        output: Results file to write.
        name: What the results call the model. Default: its folder or Hub id.
        revision: Name of weights that cannot be hashed.
        against: Results file of another model to compare with.
        teacher: Results file of the teacher: how much of its lead?
        truncate_dim: Dimensions to which embeddings are cut. Default: all that the model is used with.
        dry_run: Evaluate the smallest task, which is kept, and only say how long the others will take.
        trust_remote_code: Run code of the models' repositories. Read it before.
    """
    whole = benchmark or ([] if tasks else ["NanoBEIR"])
    if whole and evaluation.cache is None:
        evaluation = replace(evaluation, cache="mteb-cache")
    from st_wkl.evaluation import Results, compare_all, effects_table
    from st_wkl.evaluation.effects import go_by_p
    from st_wkl.pipeline import steps

    # Files that cannot be read must be found out before the work.
    other = None if against is None else Results.load(against)
    ceiling = None if teacher is None else Results.load(teacher)
    given: dict[str, Any] = {
        "name": name,
        "revision": revision,
        "truncate_dim": truncate_dim,
        "trust_remote_code": trust_remote_code,
    }
    given |= {"dry_run": dry_run, "show_progress": not asked.quiet, "output": None if dry_run else output}
    results = steps.evaluate(model, [*(tasks or ()), *whole], evaluation, **given)
    if dry_run:
        return {**asdict(results), "hours": results.hours}, str(results)
    value: dict[str, Any] = {"tasks": {task.task: task.metrics for task in results.tasks}}
    value["groups"] = {task.task: {group: task.mean(group) for group in task.groups} for task in results.tasks}
    lines = [results.table()]
    if evaluation.efficiency:
        value["efficiency"] = results.model["efficiency"]
        lines.append(", ".join(f"{key}: {number}" for key, number in results.model["efficiency"].items()))
    if other is not None:
        effects = compare_all(other, results, teacher=ceiling)
        value["difference"] = {effect.task: asdict(effect.difference) for effect in effects if effect.group is None}
        value["effects"] = [asdict(effect) for effect in effects]
        lines += [f"against {against}:", effects_table(effects), *filter(None, [go_by_p(effects)])]
    return value, "\n".join(lines)
