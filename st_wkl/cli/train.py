"""From a dataset and a student to a trained student."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from st_wkl._processes import is_first
from st_wkl._versions import check_adapters
from st_wkl.cli._answers import Answer, IdenticalOption, JsonOption, QuietOption, TrustOption, answering

logger = logging.getLogger(__name__)

# By name here, so that `--help` needs no torch; a test compares them with `st_wkl.training.LOSSES`.
LOSS_NAMES = (
    "kl, weighted-kl, margin-kl, pair-distill, adaptive-margin, pearson, margin-mse, rank-net, regularised-kl, "
    "list-contrastive, in-batch"
)


@answering
def train(
    dataset: Annotated[Path, typer.Argument(help="Folder that `st-wkl build` made.")],
    student: Annotated[str, typer.Option(help="Student: Hub id, folder, or packaged:potion-base-8M.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained student.")],
    loss: Annotated[
        str | None, typer.Option(help=f"One of: {LOSS_NAMES}. Default: kl with an in-batch contrastive term.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="Strength of the weights of weighted-kl. Default: 5.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength of its rank bias. Default: 1.")] = None,
    student_temperature: Annotated[float | None, typer.Option(help="Default: 0.05 for cosine, else 1.")] = None,
    teacher_temperature: Annotated[float | None, typer.Option(help="Default: 1, or the teacher report's.")] = None,
    in_batch: Annotated[
        float | None,
        typer.Option(help="Weight of an in-batch contrastive term beside the loss. Default: 1 without --loss, else 0."),
    ] = None,
    parameter: Annotated[list[str] | None, typer.Option(help="Other parameter of the loss, name=value.")] = None,
    mini_batch_size: Annotated[int | None, typer.Option(help="Texts embedded at once. Default: 32.")] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Text before each query. Default: the student's own.")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Text before each document; it is kept with the student, as the other one is.")
    ] = None,
    pair_prompt: Annotated[str | None, typer.Option(help="Text before each pair of a cross-encoder.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter in place of all weights.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter; it is kept in OUTPUT-adapter.")] = False,
    dev: Annotated[str | None, typer.Option(help="Collection whose dev split chooses the best checkpoint.")] = None,
    dev_split: Annotated[str, typer.Option(help="Split of --dev; not the one that is reported.")] = "dev",
    ignore_identical_ids: IdenticalOption = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without gain.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Goes without saying: the same command goes on.", hidden=True)
    ] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the dataset.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Queries per step and process.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by model class, see `distill`.")] = None,
    report_to: Annotated[str, typer.Option(help="Where the trainer logs: none, tensorboard, wandb, …")] = "none",
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 42,
    trust_remote_code: TrustOption = False,
    save_dtype: Annotated[
        str | None, typer.Option(help="Round the student to bfloat16 or float16. Default: as trained, float32.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Train a student on a distillation dataset and save it with its card and the record of its making.

    Stopped at any moment, the same command goes on at its last checkpoint; a complete student is left as it is.

    On several GPUs or machines: `torchrun --nproc-per-node 2 -m st_wkl train …`.
    """
    from dataclasses import asdict

    del resume  # of earlier versions
    if merge and not lora:
        raise ValueError("--merge merges an adapter: add --lora.")
    check_adapters(lora)
    if patience is not None and dev is None:
        raise ValueError("--patience needs a dev split to look at: add --dev.")
    given = {
        "gamma": gamma,
        "alpha": alpha,
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
    }
    parameters = {**_parameters(parameter or []), **{name: value for name, value in given.items() if value is not None}}
    settings: dict[str, Any] = {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size, "seed": seed}
    settings |= {"disable_tqdm": quiet or not is_first(), "report_to": [report_to]}
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.models import load_model, set_prompts
    from st_wkl.packaged import named
    from st_wkl.training import default_arguments, distill, make_loss
    from st_wkl.training.lora import merge as merge_adapter

    data = DistillationDataset.load_from_disk(dataset)
    source, name = named(student)
    model: Any = load_model(source, trust_remote_code=trust_remote_code)[0]
    prompts = {"query": query_prompt, "document": document_prompt, "pair": pair_prompt}
    set_prompts(model, {side: prompt for side, prompt in prompts.items() if prompt is not None})
    chosen = make_loss(
        model,
        loss,
        in_batch=in_batch,
        mini_batch_size=mini_batch_size,
        report=data.provenance.get("report"),
        **parameters,
    )
    folder = output.with_name(f"{output.name}-adapter") if merge else output
    record = distill(
        model,
        data,
        chosen,
        default_arguments(model, folder, lora=lora, **settings),
        output_dir=folder,
        lora=lora,
        evaluator=None if dev is None else _evaluator(model, dev, dev_split, ignore_identical_ids),
        callbacks=_callbacks(patience),
        resume=True,
        base_name=name,
        trust_remote_code=trust_remote_code,
        save_dtype=None if merge else save_dtype,
    ).record
    if merge and is_first() and not _is_merged(output, record):
        merge_adapter(folder, output, trust_remote_code=trust_remote_code, save_dtype=save_dtype)
    lines = [f"The student is in {output}, trained in {record.seconds:.0f} s."]
    if record.dev:
        lines.append(f"nDCG@10 on the dev split: {record.dev['before']:.4f} before, {record.dev['after']:.4f} after.")
    return asdict(record), "\n".join(lines)


def _is_merged(output: Path, record: Any) -> bool:
    """Tell whether a folder holds this very student, merged before."""
    from st_wkl.record import RECORD_FILE, TrainingRecord

    return (output / RECORD_FILE).is_file() and TrainingRecord.load(output).run == record.run


def _parameters(settings: list[str]) -> dict[str, Any]:
    import yaml

    from st_wkl.ranges import check_options

    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--parameter takes name=value, got {setting!r}.")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    check_options(**found)
    return found


def _callbacks(patience: int | None) -> list[Any]:
    if patience is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(patience)]


def _evaluator(student: Any, source: str, split: str, ignore_identical_ids: bool | None) -> Any:
    """Make the dev evaluation; a cross-encoder reranks BM25's candidates."""
    from sentence_transformers import CrossEncoder

    from st_wkl.data.candidates import bm25_candidates
    from st_wkl.data.collection import Collection
    from st_wkl.training.dev import GradedEvaluator

    collection = Collection.load(source, ignore_identical_ids=ignore_identical_ids)
    if split == "test":
        logger.warning(
            "--dev-split is 'test': what chooses the checkpoint looks better than it is when it is reported."
        )
    candidates = None
    if isinstance(student, CrossEncoder):
        candidates = bm25_candidates(collection, list(collection.judgements(split)), top_k=50)
    return GradedEvaluator.of(collection, split, candidates=candidates)
