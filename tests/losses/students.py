"""Tiny students of the four model classes, and ragged lists for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from torch import Tensor, nn

from st_wkl.data.collator import ListwiseCollator

CLASSES: dict[str, Any] = {
    "dense": SentenceTransformer,
    "sparse": SparseEncoder,
    "multi-vector": MultiVectorEncoder,
    "cross-encoder": CrossEncoder,
}
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()  # noqa: SIM905


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


def listwise_batch(model: Any, kind: str, rows: list[dict[str, Any]]) -> tuple[Any, Tensor]:
    return features_and_labels(ListwiseCollator(model), rows, kind, model)


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
