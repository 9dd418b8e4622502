"""Each arrow of the way as a function of its options: what `st-wkl build`, `train`, `evaluate` and `run` all call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder
from transformers import EarlyStoppingCallback, TrainerCallback

from st_wkl import evaluation, training
from st_wkl._processes import is_first
from st_wkl._versions import check_adapters
from st_wkl.data import CrossEncoderPairwiseTeacher, CrossEncoderTeacher, EnsembleTeacher
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import Candidates, find_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.dataset_files import is_saved
from st_wkl.data.importers import convert, holds_lists
from st_wkl.data.judge import ChatListTeacher, ChatPairwiseTeacher
from st_wkl.data.layouts import NAMES
from st_wkl.data.remote import RemoteTeacher
from st_wkl.data.similarity import SimilarityTeacher
from st_wkl.data.texts import EmbeddingDataset, teacher_vectors
from st_wkl.files import expanded, read_json
from st_wkl.models import load_model, set_prompts
from st_wkl.packaged import named
from st_wkl.pipeline.import_options import ImportConfig
from st_wkl.pipeline.options import (
    REQUESTS,
    CollectionConfig,
    DevConfig,
    EvaluationConfig,
    LossConfig,
    StudentConfig,
    TeacherConfig,
)
from st_wkl.publish.model_card import write_model_card
from st_wkl.ranges import OptionError, nearest
from st_wkl.reading import check_training_arguments, read
from st_wkl.record import RECORD_FILE, TrainingRecord, collection_of
from st_wkl.training.cut import cut_layers
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.guard import ProgressLine
from st_wkl.training.lora import merge as merge_adapter
from st_wkl.training.mixture import losses_for
from st_wkl.training.students import kind_of

# Candidates of a dev query that a cross-encoder reranks where no others are given.
_RERANKED = 50


def call(function: Callable[..., Any], *options: Any, **given: Any) -> Any:
    """Call a function with those of the stages' options that it has a parameter for, and with what else is given."""
    parameters = inspect.signature(function).parameters.items()
    names = {name for name, one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    found = {entry.name: getattr(part, entry.name) for part in options for entry in dataclasses.fields(part)}
    return function(**{**{name: value for name, value in found.items() if name in names}, **given})


def load_collection(options: CollectionConfig | DevConfig) -> Collection:
    """Load what is learnt from, or what the dev split is of."""
    collection: Collection = call(Collection.load, options)
    return collection


def import_tables(options: ImportConfig, output: Path, command: str) -> dict[str, int]:
    """Write the dataset or the collection that tables hold, and return how much of what it has."""
    columns = {role: getattr(options, role) for role in NAMES}
    of_lists, of_corpus = (
        next((name for name in names if getattr(options, name)), None)
        for names in (("score", "scores", "collection", "teacher"), ("queries", "judgements", "test_share"))
    )
    if of_lists and of_corpus:
        raise OptionError(of_corpus, f"is for a corpus, and {of_lists} for scores of others: leave one of them out.")
    if of_lists or (not of_corpus and holds_lists(options.source, columns, options.revision)):
        call(convert, options, folder=output, command=command, **columns)
        counts: dict[str, int] = read_json(output / "provenance.json")["counts"]
        return {what: counts[what] for what in ("queries", "pairs", "documents")}
    columns.pop("score")
    collection: Collection = call(Collection.from_tables, options, **columns)
    collection.save(output)
    judged = {f"judged queries of {split}": len(found) for split, found in collection.qrels.items()}
    return {"documents": len(collection.documents), "queries": len(collection.queries), **judged}


def load_teacher(options: TeacherConfig) -> Any:
    """Load who teaches: one cross-encoder, several as one, or what a server has."""
    if options.url is not None:
        given = {"url": options.url, "model": options.model, **{name: getattr(options, name) for name in REQUESTS}}
        if options.api == "chat":
            return call(ChatListTeacher, options, **given)
        return call(RemoteTeacher, options, **given)
    kind: Any = SimilarityTeacher if options.kind == "retriever" else CrossEncoderTeacher
    # A retriever is called in its scores' identity as it is in Python.
    as_named = kind is SimilarityTeacher
    teachers = [call(kind, options, model=model if as_named else named(model)[0]) for model in options.models]
    return teachers[0] if len(teachers) == 1 else call(EnsembleTeacher, options, teachers=teachers)


def make_builder(
    collection: Collection, query_ids: Sequence[str], candidates: Candidates | None, teacher: Any, *options: Any
) -> DistillationDatasetBuilder:
    """Put together what makes the dataset; candidates of None leave BM25, as deep as the lists need, to the builder.

    Args:
        collection: What is learnt from.
        query_ids: Its queries.
        candidates: What was found for them.
        teacher: Who scores it.
        *options: Those of the collection, the candidates, the teacher and the selection.
    """
    pairwise: Any = None
    for part in options:
        if isinstance(part, TeacherConfig) and part.pairwise_url is not None:
            given = {name: getattr(part, name) for name in ("api_key_env", *REQUESTS)}
            pairwise = ChatPairwiseTeacher(part.pairwise_url, part.pairwise, **given)
        elif isinstance(part, TeacherConfig) and part.pairwise is not None:
            judge = call(CrossEncoderTeacher, part, model=named(part.pairwise)[0], revision=None, prompt=None)
            pairwise = CrossEncoderPairwiseTeacher(judge)
    given = {"collection": collection, "teacher": teacher, "query_ids": query_ids, "candidates": candidates}
    selection = next(part for part in options if type(part).__name__ == "Selection")
    builder: DistillationDatasetBuilder = call(
        DistillationDatasetBuilder, *options, pairwise=pairwise, selection=selection, **given
    )
    return builder


def load_student(options: StudentConfig) -> tuple[Any, str]:
    """Load who learns, with the prompts that it is given, and say what it is called."""
    source, name = start_of(options)
    student: Any = load_model(source, trust_remote_code=options.trust_remote_code)[0]
    try:
        set_prompts(student, options.prompts)
    except ValueError as error:
        raise ValueError(f"student.prompts: {error}") from error
    return student, name


def start_of(options: StudentConfig) -> tuple[str, str]:
    """Return folder or Hub id of who learns, as it is before it does, and what it is called."""
    source, name = named(options.model)
    if options.layers is not None:
        source = str(cut_layers(source, options.layers, trust_remote_code=options.trust_remote_code))
        name = f"{name}, {options.layers} layers"
    return source, options.name or name


def make_loss(
    student: Any,
    options: LossConfig,
    dataset: DistillationDataset | EmbeddingDataset | None = None,
    show_progress: bool = False,
) -> Any:
    """Make the loss over a student; a dataset's teacher report has a say in its temperature.

    Without a dataset, to try whether it can be made, an embedding teacher embeds one text.
    """
    report = None if dataset is None else dataset.provenance.get("report")
    vectors = None
    if options.embedding_teacher is not None:
        texts = EmbeddingDataset.of(["A text."]) if dataset is None else dataset
        vectors = teacher_vectors(options.embedding_teacher, texts, show_progress=show_progress)
    told = {"report": report, "vectors": vectors, "name": options.name or getattr(dataset, "loss", None)}
    return call(training.make_loss, options, student=student, **told, **options.parameters)


def named_sources(given: Sequence[str] | Mapping[str, str]) -> list[tuple[str, str]]:
    """Return name and source of datasets; a source that is written without a name has none."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [_named(source) for source in given]
    return [(name, expanded(source)) for name, source in pairs]


def _named(source: str) -> tuple[str, str]:
    name, equals, rest = source.partition("=")
    return (name, rest) if equals and not Path(expanded(source)).exists() else ("", source)


def load_datasets(given: Sequence[str] | Mapping[str, str]) -> dict[str, DistillationDataset]:
    """Load what is trained on, by name: that which is given, or the one of its collection, or of its folder."""
    loaded: dict[str, DistillationDataset] = {}
    for name, source in named_sources(given):
        dataset = DistillationDataset.load(source)
        name = name or collection_of(dataset.provenance) or Path(source).name
        if name in loaded:
            raise ValueError(f"Two datasets are called {name!r}: name one as in {name}-2={source}.")
        loaded[name] = dataset
    return loaded


def make_losses(student: Any, options: LossConfig, datasets: Mapping[str, Any], show_progress: bool = False) -> Any:
    """Make the loss over a student, or one for each dataset where they differ.

    Args:
        student: Who learns.
        options: Those of all, and of each.
        datasets: What is learnt from by name; None for what is not made yet.
        show_progress: Show bars.
    """
    if unknown := [name for name in options.each if name not in datasets]:
        known = ", ".join(map(repr, datasets))
        raise OptionError("loss.each", f"has {unknown[0]!r}{nearest(unknown[0], datasets)}; the datasets are {known}.")
    if options.embedding_teacher is not None and len(datasets) > 1:
        raise OptionError("loss.embedding_teacher", "teaches one dataset: train with several without it.")
    return losses_for(datasets, lambda name, part: make_loss(student, _loss_of(name, options), part, show_progress))


def _loss_of(dataset: str, options: LossConfig) -> LossConfig:
    """Return the options for one dataset; another loss has parameters of its own."""
    if dataset not in options.each:
        return options
    own = options.each[dataset]
    own = own if isinstance(own, Mapping) else {"name": own}
    if of_all := sorted(own.keys() & {"negatives_per_step", "draw", "each", "embedding_teacher"}):
        raise OptionError("loss.each", f"has {of_all[0]} for {dataset}, which is the same for all datasets.")
    kept = {} if "name" in own else options.parameters
    values = {**dataclasses.asdict(options), "each": {}, **own, "parameters": {**kept, **own.get("parameters", {})}}
    return read(LossConfig, values, f"loss.each.{dataset}")


def make_arguments(student: Any, folder: Path, values: Mapping[str, Any], adapted: bool) -> Any:
    """Make the training arguments, with what the user says in place of the defaults."""
    check_training_arguments(values, kind_of(student).arguments)
    args = training.default_arguments(student, folder, lora=adapted)
    # Made anew, so that the class checks and completes what the user says.
    made = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args) if entry.init}
    try:
        return type(args)(**{**made, "disable_tqdm": True, **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error


def make_lora(options: bool | Mapping[str, Any]) -> Any:
    """Return what `distill` takes as `lora`."""
    if isinstance(options, bool):
        return options
    from peft import LoraConfig

    known = [entry.name for entry in dataclasses.fields(LoraConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"lora.{name}: peft's LoraConfig has no such parameter{nearest(name, known)}.")
    return LoraConfig(**options)


def make_evaluator(
    student: Any, options: DevConfig, collection: Collection | None, candidates: Candidates | None = None
) -> GradedEvaluator:
    """Make the dev evaluation; a cross-encoder reranks BM25's candidates where it is given no others."""
    if options.source is not None:
        collection, candidates = load_collection(options), None
    assert collection is not None, "a dev split has a collection"
    if not isinstance(student, CrossEncoder):
        candidates = None
    elif candidates is None:
        queries = list(collection.positives(options.split))
        candidates = find_candidates(collection, queries, top_k=_RERANKED, show_progress=False)
    evaluator: GradedEvaluator = call(GradedEvaluator.of, options, collection=collection, candidates=candidates)
    return evaluator


def train(
    dataset: DistillationDataset | EmbeddingDataset | Path | Mapping[str, DistillationDataset],
    output: Path,
    *,
    student: StudentConfig,
    loss: LossConfig,
    arguments: Mapping[str, Any],
    lora: bool | Mapping[str, Any] = False,
    merge: bool = False,
    dev: DevConfig | None = None,
    collection: Collection | None = None,
    candidates: Candidates | None = None,
    show_progress: bool = True,
    command: str = "",
) -> TrainingRecord:
    """Train a student into a folder, or go on with it; an adapter that is merged is kept beside it.

    Args:
        dataset: What it is taught, or the folder of it; for an embedding teacher also a collection or a file of texts.
            Or several datasets by name.
        output: Folder of the student.
        student: Who learns.
        loss: What is minimised.
        arguments: Training arguments that differ from the defaults.
        lora: Whether an adapter is trained, and which.
        merge: Whether it is merged.
        dev: Evaluation in training.
        collection: Where its split is, unless it names another.
        candidates: What a cross-encoder reranks there. Default: BM25's.
        show_progress: Show bars.
        command: What was typed, for the card.
    """
    check_adapters(lora is not False)
    if isinstance(dataset, Path):
        texts = loss.embedding_teacher is not None and not is_saved(dataset)
        dataset = (EmbeddingDataset if texts else DistillationDataset).load(dataset)
    datasets: Any = dataset if isinstance(dataset, Mapping) else {collection_of(dataset.provenance): dataset}
    model, name = load_student(student)
    folder = adapter_folder(output) if merge else output
    args = make_arguments(model, folder, arguments, lora is not False)
    # With training.disable_tqdm=false the trainer shows its own bar and log.
    callbacks: list[TrainerCallback] = [ProgressLine()] if show_progress and args.disable_tqdm else []
    if dev is not None and dev.patience is not None:
        callbacks.append(EarlyStoppingCallback(dev.patience))
    record = training.distill(
        model,
        next(iter(datasets.values())) if len(datasets) == 1 else datasets,
        make_losses(model, loss, datasets, show_progress),
        args,
        output_dir=folder,
        lora=make_lora(lora),
        negatives_per_step=loss.negatives_per_step,
        draw=loss.draw,
        evaluator=None if dev is None else make_evaluator(model, dev, collection, candidates),
        callbacks=callbacks,
        resume=True,
        base_name=name,
        trust_remote_code=student.trust_remote_code,
        save_dtype=None if merge else student.save_dtype,
        freeze_documents=student.freeze_documents,
    ).record
    merged = (output / RECORD_FILE).is_file() and TrainingRecord.load(output).run == record.run
    if merge and is_first() and not merged:
        merge_adapter(folder, output, trust_remote_code=student.trust_remote_code, save_dtype=student.save_dtype)
    if command and not record.command and is_first():
        record = dataclasses.replace(TrainingRecord.load(output), command=command)
        record.save(output)
        write_model_card(output, record=record, results={})
    return record


def adapter_folder(student: Path) -> Path:
    """Return where the adapter of a merged student is."""
    return student.with_name(f"{student.name}-adapter")


def evaluate(
    model: Any, tasks: Sequence[Any], options: EvaluationConfig, *, dry_run: bool = False, **given: Any
) -> Any:
    """Measure a model, or say how long it would take, as the options say; what else is given goes to `evaluate`."""
    if options.missing == "drop":
        tasks = [
            Collection.load(task, missing="drop") if isinstance(task, str) and _is_collection(task) else task
            for task in tasks
        ]
    told = {"model": model, "tasks": tasks, "top_k": options.top_k or 100}
    return call(evaluation.estimate if dry_run else evaluation.evaluate, options, **told, **given)


def _is_collection(task: str) -> bool:
    return "/" in task or Path(task).is_dir()
