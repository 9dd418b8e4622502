"""A collection of twelve documents, and what several tests do with it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import mteb
import torch

from st_wkl.data.collection import Collection
from st_wkl.evaluation.tasks import CollectionTask

DOCUMENTS = {
    "d1": "Cats sleep for most of the day and purr when they are content.",
    "d2": "Dogs bark at strangers and love long walks.",
    "d3": "The stock market fell sharply after the bank raised its interest rate.",
    "d4": "Inflation makes bread and milk more expensive every year.",
    "d5": "A football team has eleven players on the field.",
    "d6": "Tennis is played with a racket and a ball on a court.",
    "d7": "Paris is the capital of France and lies on the Seine.",
    "d8": "Berlin is the capital of Germany and has many lakes.",
    "d9": "The heart pumps blood through the body.",
    "d10": "Vitamin C in oranges supports the immune system.",
    "d11": "",
    "d12": "Rain falls when clouds cool down.",
}
QUERIES = {
    "q1": "which pet purrs",
    "q2": "why do prices rise",
    "q3": "how many people play in a soccer team",
    "q4": "capital city on a river",
    "q5": "what keeps blood moving",
    "q6": "what causes rain",
}
GAINS = {
    "q1": {"d1": 2, "d2": 1},
    "q2": {"d4": 2, "d3": 1, "d9": 0},
    "q3": {"d5": 1, "d6": 0},
    "q4": {"d7": 2, "d8": 1},
    "q5": {"d9": 1},
    "q6": {"d12": 1},
}


def collection(name: str = "tiny", **qrels: Any) -> Collection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the empty document, which is there on purpose
        return Collection(name, dict(DOCUMENTS), dict(QUERIES), qrels or {"test": GAINS})


def scrambled(model: Any) -> Any:
    """Return the model with its tokens' embeddings in a random order, which no longer retrieves anything."""
    other = copy.deepcopy(model)
    weight = other[0].embedding.weight.data
    weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    return other


def plain_mteb(model: Any, task: Any, cache: mteb.ResultCache | None) -> float:
    """Return what a user of MTEB's defaults gets."""
    found = mteb.evaluate(model, task, cache=cache, show_progress_bar=False, co2_tracker=False)
    return float(found.task_results[0].get_score())


def reranking_task(student: Any, folder: Path, top_k: int) -> Any:
    mteb.evaluate(
        student, CollectionTask(collection(), "test"), cache=None, prediction_folder=folder, show_progress_bar=False
    )
    return CollectionTask(collection(), "test").convert_to_reranking(folder, top_k=top_k)
