"""Speed of the teacher: st_wkl's batches against one global `CrossEncoder.predict` of the same model, in one run.

Run: python examples/benchmark_scoring.py                                        (int8 ONNX alone, packaged)
     python examples/benchmark_scoring.py --model ms-marco-MiniLM-L12-v2         (against torch: a folder or Hub id)
     python examples/benchmark_scoring.py --model ... --data ../shared/data/scifact

The packaged reranker is an int8 ONNX file, which torch cannot load, so the comparison with `predict` needs the torch
weights of the same model. All rivals score the same pairs of mixed lengths; they take turns, and the best of the
rounds counts, so that a busy machine disturbs them alike. Quality is the Spearman correlation of each query's list with
`predict`'s. The share is useful arithmetic (no padding) over what a plain 2048³ product reaches in that type.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

from st_wkl.data import CrossEncoderTeacher, ScoreStore, bm25_candidates, score_pairs
from st_wkl.data.collection import Collection
from st_wkl.packaged import CROSS_ENCODER, fetch

Pairs = list[tuple[str, str]]
Clock = Callable[[], float]


def lists_of_pairs(data: str | None, queries: int, candidates: int) -> Pairs:
    if data is not None:
        collection = Collection.load(data)
        query_ids = list(collection.judgements("test"))[:queries]
        found = bm25_candidates(collection, query_ids, top_k=candidates, show_progress=False)
        return [(collection.queries[q], collection.documents[hit.document_id]) for q in query_ids for hit in found[q]]
    chance = random.Random(0)
    words = "retrieval model query document score teacher student rank loss batch cell gene cat".split()  # noqa: SIM905

    def text(mean: float) -> str:
        return " ".join(chance.choices(words, k=max(3, int(chance.lognormvariate(mean, 0.6)))))

    return [(query, text(4.9)) for query in (text(2.3) for _ in range(queries)) for _ in range(candidates)]


def multiplication_rate(dtype: torch.dtype, clock: Clock) -> float:
    """Return operations per second of a 2048³ product, the best of ten."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = clock()
        left @ right
        seconds.append(clock() - start)
    return 2 * 2048**3 / min(seconds)


def operations(model: torch.nn.Module, lengths: np.ndarray) -> float:
    """Return the arithmetic of the matrix products of a BERT for pairs of these lengths."""
    config = model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    linear = 2 * lengths * (4 * hidden * hidden + 2 * hidden * inner)
    return float(config.num_hidden_layers * (linear + 4 * lengths**2 * hidden).sum())


def agreement(pairs: Pairs, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the mean and the lowest Spearman correlation over the queries' lists."""
    places = defaultdict(list)
    for place, (query, _) in enumerate(pairs):
        places[query].append(place)
    found = [spearmanr(ours[at], theirs[at]).statistic for at in places.values() if len(at) > 2]
    return float(np.mean(found)), float(min(found))


def in_turns(
    variants: dict[str, Callable[[], np.ndarray]], rounds: int, clock: Callable[[], float]
) -> tuple[dict, dict]:
    seconds: dict[str, list[float]] = defaultdict(list)
    scores = {}
    for number in range(rounds):
        for name, run in variants.items():
            start = clock()
            scores[name] = run()
            seconds[name].append(clock() - start)
            print(f"round {number + 1}: {name:24} {seconds[name][-1]:7.1f} s", file=sys.stderr, flush=True)
    return {name: min(values) for name, values in seconds.items()}, scores


def store_rate(pairs: int) -> float:
    """Return pairs per second of a repeated run, in which every score comes from the store."""

    class Lengths:
        @property
        def identity(self) -> dict[str, str]:
            return {"model": "lengths"}

        def score(self, batch: Pairs) -> np.ndarray:
            return np.array([len(document) for _, document in batch], dtype=np.float32)

    texts = [(f"query {n // 100}", f"a document of some words, number {n}") for n in range(pairs)]
    with ScoreStore(":memory:") as store:
        score_pairs(Lengths(), texts, store=store, show_progress=False)
        start = time.perf_counter()
        score_pairs(Lengths(), texts, store=store, show_progress=False)
        return pairs / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="torch weights of the reranker, a folder or Hub id")
    parser.add_argument("--data", help="BEIR folder; without it texts are generated")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch and onnxruntime; all cores by default")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for a busy machine, with --threads 1")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    logging.getLogger("st_wkl").setLevel(logging.ERROR)
    pairs = lists_of_pairs(arguments.data, arguments.queries, arguments.candidates)
    onnx = CrossEncoderTeacher(fetch(CROSS_ENCODER), backend="onnx")
    whole = onnx.token_lengths(pairs)
    lengths = np.minimum(whole, onnx.identity["max_length"])
    print(
        f"{len(pairs)} pairs of {lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.0f}; "
        f"{(whole > lengths).sum()} cut"
    )
    variants: dict[str, Callable[[], np.ndarray]] = {}
    if arguments.model:
        from sentence_transformers import CrossEncoder

        rival = CrossEncoder(arguments.model, device="cpu", model_kwargs={"dtype": "float32"})
        identity = torch.nn.Identity()
        variants["CrossEncoder.predict"] = lambda: rival.predict(pairs, activation_fn=identity, show_progress_bar=False)
        for dtype in ("float32", "bfloat16"):
            teacher = CrossEncoderTeacher(arguments.model, dtype=dtype, device="cpu")
            variants[f"st_wkl, torch {dtype}"] = lambda teacher=teacher: score_pairs(
                teacher, pairs, show_progress=False
            )
    variants["st_wkl, ONNX int8"] = partial(score_pairs, onnx, pairs, show_progress=False)
    seconds, scores = in_turns(variants, arguments.rounds, clock)

    base = "CrossEncoder.predict"
    work = operations(rival.model, lengths) if arguments.model else 0.0
    print(f"{'':24} {'pairs/s':>8} {'ratio':>6} {'difference':>10} {'Spearman':>8} {'lowest':>7} {'share':>6}")
    for name, passed in seconds.items():
        line = f"{name:24} {len(pairs) / passed:8.1f}"
        if base in seconds:
            difference = np.abs(scores[name] - scores[base]).max()
            mean, lowest = agreement(pairs, scores[name], scores[base])
            line += f" {seconds[base] / passed:6.2f} {difference:10.1e} {mean:8.4f} {lowest:7.4f}"
            if "int8" not in name:
                rate = multiplication_rate(torch.bfloat16 if "bfloat16" in name else torch.float32, clock)
                line += f" {work / passed / rate:6.2f}"
        print(line)
    print(f"a repeated run reads {store_rate(100_000):,.0f} pairs/s from the store")


if __name__ == "__main__":
    main()
