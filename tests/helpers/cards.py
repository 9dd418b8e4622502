"""What a card is written from."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.report import report_on_lists
from st_wkl.evaluation.results import Results, TaskScores
from st_wkl.record import TrainingRecord

CITATION = """@misc{someone2026loss,
  title = {A Loss},
}"""


def results(name: str, ndcg: float, **changes: Any) -> Results:
    values: dict[str, Any] = {
        "task": "squad-dev",
        "split": "test",
        "subset": "default",
        "main_metric": "ndcg_at_10",
        "metrics": {"ndcg_at_10": ndcg, "recall_at_100": 0.9, "precision_at_3": 0.1},
        "per_query": {"q1": ndcg, "q2": ndcg},
        "dataset_revision": "abc",
        "seconds": 1.0,
    }
    return Results(model={"name": name, "revision": "r"}, tasks=[TaskScores(**{**values, **changes})])


def record(**changes: Any) -> TrainingRecord:
    values: dict[str, Any] = {
        "student": "potion-base-8M",
        "loss": "WeightedKLDistillationLoss",
        "loss_config": {"gamma": 2.0, "alpha": 1.0, "beta": None},
        "loss_citation": CITATION,
        "teacher": {"model": "ms-marco|L12", "backend": "onnx", "max_length": 256, "activation": "identity"},
        "dataset": {
            "collection": {"name": "squad-dev", "fingerprint": "f00"},
            "split": "train",
            "teacher": {"model": "ms-marco|L12"},
            "counts": {"queries": 700, "pairs": 5600},
            "dropped": {"queries_without_positive": 0, "empty_documents": 3},
            "report": {"precision_at_1": 0.8843},
            "versions": {"bm25s": "1"},
        },
        "arguments": {"learning_rate": 0.03, "num_train_epochs": 8},
        "seconds": 9.84,
        "versions": {"st-wkl": "0.1.0"},
    }
    return TrainingRecord(**{**values, **changes})


PROVENANCE: dict[str, Any] = {
    "collection": {"name": "mteb/scifact", "fingerprint": "f00"},
    "split": "train",
    "num_negatives": 15,
    "candidates": {"sources": {"bm25": 30}, "top_k": 18},
    "selection": {"choice": "top", "absolute_margin": 3.0, "seed": 0},
    "teacher": {"model": "cross-encoder/ms-marco|L12", "revision": "abc", "max_length": 512},
    "teacher_license": "apache-2.0",
    "license": "cc-by-nc-4.0",
    "counts": {"queries": 1, "pairs": 2},
    "dropped": {"false_negatives": 4, "empty_documents": 0},
    "report": report_on_lists([[3.0, 1.0]], [[1, 0]]).to_dict(),
    "leaks": {
        "test": "scifact, test",
        "test_queries": 300,
        "queries_with_shared_documents": 196,
        "share_of_judgements": 0.637,
        "equal_queries": 2,
        "near_queries": 12,
    },
    "command": "st-wkl build mteb/scifact --store /home/someone/scores.sqlite3",
    "versions": {"st-wkl": "0.1.0"},
}


def dataset(provenance: dict[str, Any]) -> DistillationDataset:
    """Return a dataset of one list."""
    return DistillationDataset(
        Dataset.from_list(
            [{"query_id": "q", "document_ids": ["1", "2"], "scores": [3.0, 1.0], "labels": [1, 0]}],
            features=features("train"),
        ),
        Dataset.from_list([{"query_id": "q", "text": "query"}]),
        Dataset.from_list([{"document_id": "1", "text": "one"}, {"document_id": "2", "text": "two"}]),
        provenance,
    )
