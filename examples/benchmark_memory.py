"""Memory and time of one training step on long lists: weighted KL with a gradient cache against upstream's KL.

Run: python examples/benchmark_memory.py            (10 minutes on two cores, 12 GB for the rivals)
     python examples/benchmark_memory.py --growth   (how memory and time grow with the number of candidates)

16 queries with 32 documents each, lengths log-normal up to 128 tokens, all-MiniLM-L6-v2, dropout off. Every variant
runs in a process of its own: peak memory is the growth of the resident set over one forward and backward pass, time is
CPU seconds of the same.
"""

import json
import random
import resource
import sys
import time

import torch
from common import in_own_process
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.util import pairwise_cos_sim

from st_wkl import ListwiseCollator, WeightedKLDistillationLoss
from st_wkl.packaged import MINILM, fetch

QUERIES, CANDIDATES, LONGEST = 16, 32, 128


def lists(candidates: int, shared: bool) -> list[tuple[str, list[str], list[float]]]:
    rng = random.Random(0)
    words = "retrieval model query document score teacher student rank loss batch".split()  # noqa: SIM905

    def text() -> str:
        return " ".join(rng.choices(words, k=min(LONGEST - 2, max(4, int(rng.lognormvariate(3.7, 0.6))))))

    # Documents that were mined from one corpus for neighbouring queries: a quarter of the places repeat.
    pool = [text() for _ in range(QUERIES * candidates * 3 // 4)]
    rows = []
    for number in range(QUERIES):
        documents = rng.sample(pool, candidates) if shared else [text() for _ in range(candidates)]
        rows.append((f"query {number} {text()[:30]}", documents, [rng.uniform(-8, 8) for _ in documents]))
    return rows


def measure(variant: str, candidates: int) -> dict[str, float]:
    model = SentenceTransformer(str(fetch(MINILM)))
    model.max_seq_length = LONGEST
    model.eval()
    rows = lists(candidates, shared="shared" in variant)
    if "upstream" in variant:
        if "checkpointing" in variant:
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            model[0].model.gradient_checkpointing_enable()
        loss = DistillKLDivLoss(model, similarity_fct=pairwise_cos_sim, student_temperature=0.05)
        names = ["positive", *(f"negative_{n}" for n in range(1, candidates))]
        data = [{"query": q, **dict(zip(names, texts, strict=True)), "label": s} for q, texts, s in rows]
        batch, sides = BaseDataCollator(model.preprocess)(data), ["query", *names]
    else:
        loss = WeightedKLDistillationLoss(model, gamma=0.0, alpha=0.0, mini_batch_size=32)
        gains = [1] + [0] * (candidates - 1)
        data = [{"query": q, "documents": texts, "scores": s, "labels": gains} for q, texts, s in rows]
        batch, sides = ListwiseCollator(model)(data), ["query", "document"]
    keys = ("input_ids", "attention_mask", "token_type_ids", "modality")
    features = [{key: batch[f"{side}_{key}"] for key in keys if f"{side}_{key}" in batch} for side in sides]
    # Touch what every variant needs once: buffers of the thread pool and the gradients themselves.
    model({key: value[:2] if torch.is_tensor(value) else value for key, value in features[0].items()})[
        "sentence_embedding"
    ].sum().backward()
    model.zero_grad(set_to_none=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    value = loss(features, batch["label"])
    value.backward()
    seconds = time.process_time() - start
    return {"MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "CPU s": seconds}


def main() -> None:
    variants = ["upstream", "upstream, checkpointing", "st_wkl, mini-batches of 32", "st_wkl, shared documents"]
    measured = {variant: in_own_process("--measure", variant, CANDIDATES) for variant in variants}
    print(f"{QUERIES} × {CANDIDATES} documents: peak memory and CPU time, and both relative to the two rivals")
    for variant, found in measured.items():
        relative = [
            f"{found['MB'] / measured[rival]['MB']:.3f}, {found['CPU s'] / measured[rival]['CPU s']:.2f}"
            for rival in variants[:2]
        ]
        print(f"{variant:28} {found['MB']:8.0f} MB {found['CPU s']:7.1f} s {relative[0]:>14} {relative[1]:>14}")


def growth() -> None:
    print("candidates   peak MB   CPU s   CPU s per candidate")
    for candidates in (8, 16, 32, 64, 128, 256):
        found = in_own_process("--measure", "st_wkl", candidates)
        per_candidate = found["CPU s"] / candidates
        print(f"{candidates:10} {found['MB']:9.0f} {found['CPU s']:7.1f} {per_candidate:10.3f}", flush=True)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure(sys.argv[-2], int(sys.argv[-1]))))
    elif "--growth" in sys.argv:
        growth()
    else:
        main()
