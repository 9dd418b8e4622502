"""Tiny students of the four model classes, and ragged lists for them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from torch import Tensor, nn

from st_wkl.data.collator import ListwiseCollator
from st_wkl.losses.scoring import embed

CLASSES: dict[str, Any] = {
    "dense": SentenceTransformer,
    "sparse": SparseEncoder,
    "multi-vector": MultiVectorEncoder,
    "cross-encoder": CrossEncoder,
}
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()  # noqa: SIM905


TRAINERS: dict[str, Any] = {
    "dense": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "sparse": (SparseEncoderTrainer, SparseEncoderTrainingArguments),
    "multi-vector": (MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments),
    "cross-encoder": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
}


def make_student(kind: str, path: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)  # for the heads that are new
    return CLASSES[kind](str(path), **({"num_labels": 1} if kind == "cross-encoder" else {})).train()


def ragged_rows(n: int = 6, seed: int = 0, shortest: int = 2, longest: int = 7) -> list[dict[str, Any]]:
    """Rows whose lists differ in length, share documents, and hold zero to three positives of graded gain."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    pool = [text(rng.randint(1, 30)) for _ in range(12)]
    rows = []
    for row in range(n):
        documents = rng.sample(pool, rng.randint(shortest, longest))
        positives = row % 4 if n > 1 else 1
        gains = [rng.choice([1, 2]) if place < positives else 0 for place in range(len(documents))]
        rows.append(
            {
                "query": text(rng.randint(1, 6)),
                "documents": documents,
                "scores": [rng.uniform(-8, 8) for _ in documents],
                "labels": gains,
            }
        )
    return rows


def column_rows(n: int = 4, candidates: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of query, positive, negative_1, … with a label list, as stock trainers take them."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))

    names = ["positive", *(f"negative_{place}" for place in range(1, candidates))]
    return [
        {"query": text(), **{name: text() for name in names}, "label": [rng.uniform(-8, 8) for _ in names]}
        for _ in range(n)
    ]


def features_and_labels(trainer_like: Any, rows: list[dict[str, Any]], kind: str, model: Any) -> tuple[Any, Tensor]:
    """Collate rows with `trainer_like` and split them as the trainer of the model class does."""
    batch = trainer_like(rows)
    labels = batch.pop("label")
    if kind == "cross-encoder":
        return list(batch.values()), labels
    names = list(dict.fromkeys(key.removesuffix("input_ids") for key in batch if key.endswith("_input_ids")))
    return [{k.removeprefix(name): v for k, v in batch.items() if k.startswith(name)} for name in names], labels


def listwise_batch(model: Any, kind: str, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Tensor]:
    return features_and_labels(ListwiseCollator(model, **options), rows, kind, model)


def gradients(loss: nn.Module, model: nn.Module, features: Any, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Run a loss forward and backward, and return its value and the gradient of every parameter."""
    model.zero_grad()
    value = loss([dict(f) if isinstance(f, dict) else f for f in features], labels)
    total = sum(value.values()) if isinstance(value, dict) else value
    total.backward()
    return total.item(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    largest = max(gradient.abs().max().item() for gradient in first.values())
    assert largest > 0
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=0, atol=tolerance * max(largest, 1.0), msg=name)


EXACT = dict.fromkeys(CLASSES, 1e-9) | {"multi-vector": 1e-6}


def one_score(model: Any, kind: str, query: str, document: str) -> Tensor:
    """Score one document for one query in batches of one, so that nothing is padded, merged or shared."""
    if kind == "cross-encoder":
        return model(model.preprocess([(query, document)]))["scores"].view(())
    output = "tokens" if kind == "multi-vector" else "embedding"
    q = embed(model, {**model.preprocess([query], task="query"), "task": "query"}, output)[0]
    d = embed(model, {**model.preprocess([document], task="document"), "task": "document"}, output)[0]
    if kind == "dense":
        return q @ d / (q.norm() * d.norm())
    if kind == "sparse":
        return q @ d
    q, d = q[q[:, -1] > 0, :-1], d[d[:, -1] > 0, :-1]
    return (q @ d.T).max(dim=1).values.sum()


def trained(kind: str, model: Any, loss: Any, folder: Path, dataset: Any, **options: Any) -> Any:
    trainer_class, arguments_class = TRAINERS[kind]
    arguments = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options.pop("arguments", {}),
    }
    trainer = trainer_class(
        model=model,
        args=arguments_class(output_dir=str(folder), **arguments),
        train_dataset=dataset,
        loss=loss,
        **{"data_collator": ListwiseCollator(model), **options},
    )
    trainer.train()
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items())


def paired_rows(n: int = 6) -> list[dict[str, Any]]:
    """Ragged rows with preferences between neighbours; every third row has none."""
    rows = ragged_rows(n)
    for number, row in enumerate(rows):
        neighbours = itertools.pairwise(range(len(row["documents"])))
        row["pairs"] = [] if number % 3 == 2 else [[i, j, 0.1 + 0.8 * (i % 2)] for i, j in neighbours]
    return rows


def rows_with_paraphrases(missing: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    rows = column_rows(5, candidates=2)
    return [
        {
            "query": row["query"],
            "paraphrase": "" if number in missing else " ".join(reversed(row["query"].split())) + " so",
            "positive": row["positive"],
            "negative_1": row["negative_1"],
            "label": float(number not in missing),
        }
        for number, row in enumerate(rows)
    ]
