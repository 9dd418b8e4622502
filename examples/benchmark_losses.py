"""What a step costs with each loss, relative to KL: potion-base-8M, 32 queries with 16 documents each.

Run: python examples/benchmark_losses.py     (a minute on one core; the student comes from the package index)

The losses take turns on the same batches; the median over rounds of the ratio of CPU times within a round is printed. A
static student is the hard case: with a transformer, embedding the texts takes so long that no loss makes a difference.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_dot_score

from st_wkl import ListwiseCollator, losses
from st_wkl.packaged import STATIC_STUDENT, fetch

ROWS, DOCUMENTS, WORDS, ROUNDS = 32, 16, 100, 15


def rows(generator: np.random.Generator) -> list[dict[str, object]]:
    def text(words: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(5_000, size=words))

    made = []
    for _ in range(ROWS):
        scores = generator.normal(scale=4, size=DOCUMENTS).tolist()
        neighbours = [(i, j) for i in range(DOCUMENTS) for j in range(i + 1, min(i + 6, DOCUMENTS))]
        made.append(
            {
                "query": text(8),
                "documents": [text(WORDS) for _ in range(DOCUMENTS)],
                "scores": scores,
                "labels": [1] + [0] * (DOCUMENTS - 1),
                "pairs": [[i, j, float(generator.random())] for i, j in neighbours],
            }
        )
    return made


def step(model: SentenceTransformer, loss: torch.nn.Module, batch: dict[str, object]) -> float:
    features = [
        {name.removeprefix(f"{side}_"): value for name, value in batch.items() if name.startswith(f"{side}_")}
        for side in ("query", "document")
    ]
    labels = batch["label"]
    if isinstance(loss, losses.CoherenceLoss):  # each query once more, as its own paraphrase
        features, labels = [features[0], dict(features[0]), features[1]], None
    model.zero_grad()
    start = time.process_time()
    value = loss(features, labels)
    (sum(value.values()) if isinstance(value, dict) else value).backward()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    model = SentenceTransformer(str(fetch(STATIC_STUDENT)), device="cpu")
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "KL": lambda: losses.WeightedKLDistillationLoss(model, gamma=0, alpha=0),
        "WeightedKLDistillationLoss": lambda: losses.WeightedKLDistillationLoss(model),
        "MarginKL": lambda: losses.MarginKL(model),
        "MarginMSEDistillLoss": lambda: losses.MarginMSEDistillLoss(model),
        "MSEDistillLoss": lambda: losses.MSEDistillLoss(model, similarity_fct=pairwise_dot_score),
        "RankNetDistillLoss": lambda: losses.RankNetDistillLoss(model),
        "RegularisedKLDistillLoss": lambda: losses.RegularisedKLDistillLoss(model),
        "PearsonDistillLoss": lambda: losses.PearsonDistillLoss(model),
        "PairDistillLoss": lambda: losses.PairDistillLoss(model),
        "AdaptiveRelevanceMarginLoss": lambda: losses.AdaptiveRelevanceMarginLoss(model),
        "CoherenceLoss": lambda: losses.CoherenceLoss(model),
        "ListContrastiveLoss": lambda: losses.ListContrastiveLoss(model),
        "InBatchContrastiveLoss": lambda: losses.InBatchContrastiveLoss(model),
    }
    made = {name: make() for name, make in makers.items()}
    collator, generator = ListwiseCollator(model), np.random.default_rng(0)
    ratios: dict[str, list[float]] = {name: [] for name in made}
    for number in range(ROUNDS + 1):
        batch = collator(rows(generator))
        times = {name: step(model, loss, batch) for name, loss in made.items()}
        if number:  # the first round warms up
            for name, seconds in times.items():
                ratios[name].append(seconds / times["KL"])
    for name, values in ratios.items():
        print(f"{name:30} {statistics.median(values):6.2f} × KL")


if __name__ == "__main__":
    main()
