"""The command line: one sub-command per stage. Heavy imports live inside the commands, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from st_wkl.data.score_store import ScoreStore

app = typer.Typer(
    name="st-wkl",
    help="Teach a small, fast retriever with a strong, slow reranker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars and no log lines.")]
StoreOption = Annotated[Path | None, typer.Option(help="SQLite file of teacher scores. Default: the user's cache.")]
# What a command has to say: as an object for `--json`, and as text for people.
Answer = tuple[dict[str, Any], str]


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """Print a command's answer; turn an error that a user can act on into one line and exit code 1.

    Whatever else is printed meanwhile, by the trainer for one, goes to standard error, so that standard output holds
    the answer alone.
    """

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> None:
        _log_to_stderr(quiet)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                value, text = command(*args, as_json=as_json, quiet=quiet, **kwargs)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        typer.echo(json.dumps(value, ensure_ascii=False) if as_json else text)

    return run


def _log_to_stderr(quiet: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("st_wkl").setLevel(logging.ERROR if quiet else logging.INFO)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # One line per warning: the source line that Python adds means nothing to someone who runs a command.
        if not quiet and not issubclass(category, (FutureWarning, DeprecationWarning)):
            typer.echo(str(message), err=True)

    warnings.showwarning = show  # type: ignore[assignment]


@app.command()
@answering
def demo(
    output: Annotated[Path, typer.Option(help="Folder for scores, students and results.")] = Path("demo-output"),
    hub: Annotated[bool, typer.Option("--hub", help="Take models and data from the Hub.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Teach a tiny model one corpus, on real text, in minutes; run it again and it goes on where it stopped."""
    from st_wkl.demo import run_demo

    result = run_demo(output, hub=hub, show_progress=not quiet)
    return result.to_json(), f"\n{result.table()}\n\nThe students and their cards are in {output / 'students'}."


@app.command()
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


@app.command()
@answering
def train(
    dataset: Annotated[Path, typer.Argument(help="Folder that `st-wkl build` made.")],
    student: Annotated[str, typer.Option(help="Student: Hub id or folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained student.")],
    loss: Annotated[str, typer.Option(help="weighted-kl or margin-kl.")] = "weighted-kl",
    gamma: Annotated[float, typer.Option(help="Strength of the weights of weighted-kl; 0 and --alpha 0 is KL.")] = 5.0,
    alpha: Annotated[float, typer.Option(help="Strength of the rank bias of weighted-kl.")] = 1.0,
    student_temperature: Annotated[float | None, typer.Option(help="Default: 0.05 for cosine, else 1.")] = None,
    teacher_temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the dataset.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries per step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 3e-2 for static students, else 2e-5.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 42,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Train a student on a distillation dataset and save it with its card and the record of its making."""
    from dataclasses import asdict

    from sentence_transformers import SentenceTransformer

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.losses import MarginKL, WeightedKLDistillationLoss
    from st_wkl.training import TrainingRecord, default_arguments, distill

    if loss not in ("weighted-kl", "margin-kl"):
        raise ValueError(f"--loss must be weighted-kl or margin-kl, got {loss!r}.")
    data = DistillationDataset.load_from_disk(dataset)
    model = SentenceTransformer(student)
    temperatures: dict[str, Any] = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
    }
    chosen = (
        WeightedKLDistillationLoss(model, gamma, alpha, **temperatures)
        if loss == "weighted-kl"
        else MarginKL(model, **temperatures)
    )
    args = default_arguments(model, output)
    args.num_train_epochs, args.per_device_train_batch_size, args.seed = epochs, batch_size, seed
    args.learning_rate = args.learning_rate if learning_rate is None else learning_rate
    args.disable_tqdm = quiet
    name = Path(student).name if Path(student).exists() else student
    distill(model, data, chosen, args, output_dir=output, base_name=name)
    record = TrainingRecord.load(output)
    return asdict(record), f"The student is in {output}, trained in {record.seconds:.0f} s."


@app.command()
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


scores_app = typer.Typer(help="Look after the store of teacher scores.", no_args_is_help=True)
app.add_typer(scores_app, name="scores")


@scores_app.command()
@answering
def info(store: StoreOption = None, as_json: JsonOption = False, quiet: QuietOption = False) -> Answer:
    """Say which teachers' scores the store holds, and how many."""
    from dataclasses import asdict

    with _opened(store) as opened:
        found = opened.info()
    return asdict(found), str(found)


@scores_app.command()
@answering
def verify(store: StoreOption = None, as_json: JsonOption = False, quiet: QuietOption = False) -> Answer:
    """Read every score; a damaged file is named and set aside."""
    with _opened(store) as opened:
        count = opened.verify()
        return {"path": str(opened.path), "scores": count}, f"{opened.path} is sound: {count:,} scores."


@scores_app.command()
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


def _opened(store: Path | None) -> ScoreStore:
    from st_wkl.data.score_store import ScoreStore, default_store_path

    path = default_store_path() if store is None else store
    if not path.is_file():
        raise FileNotFoundError(f"There is no score store at {path}. `st-wkl build` makes one.")
    return ScoreStore(path)
