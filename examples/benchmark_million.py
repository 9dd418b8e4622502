"""Candidates from a million documents: peak memory and time of BM25 and of exact dense search.

Run: python examples/benchmark_million.py     (10 to 20 minutes on two cores, most of it BM25's index and the encoding)
     python examples/benchmark_million.py --documents 100000

The documents are made up: 56 words each, as long as MS MARCO's passages, drawn from 200,000 words by Zipf's law. Each
miner runs in a process of its own; what is printed is the highest resident set of that process, with everything in it:
Python, libraries, texts, model, index (Linux only: from /proc/self/status).
"""

import argparse
import json
import time

import numpy as np
from common import in_own_process, peak_megabytes

from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.collection import Collection

QUERIES, WORDS, VOCABULARY, TOP_K = 1_000, 56, 200_000, 100
MINERS = ("collection alone", "BM25", "dense")


def collection(documents: int) -> Collection:
    rng = np.random.default_rng(0)
    names = ["".join("abcdefghijklmnopqrstuvwxyz"[int(n) // 26**place % 26] for place in range(5)) for n in
             rng.permutation(26**5)[:VOCABULARY]]  # fmt: skip
    words = np.array(names, dtype=object)

    def text(length: int) -> str:
        # Zipf's law by inversion; the most frequent word is a tenth of the text, as "the" nearly is.
        places = VOCABULARY ** rng.random(length) - 1
        return " ".join(words[places.astype(int)])

    texts = {f"d{place}": text(WORDS) for place in range(documents)}
    return Collection("made up", texts, {f"q{place}": text(6) for place in range(QUERIES)})


def measure(miner: str, documents: int) -> dict[str, float]:
    made = collection(documents)
    start = time.perf_counter()
    found: dict[str, list] = {}
    if miner == "BM25":
        found = bm25_candidates(made, top_k=TOP_K)
    elif miner == "dense":
        from sentence_transformers import SentenceTransformer

        from st_wkl.data import retriever_candidates
        from st_wkl.packaged import STATIC_STUDENT, fetch

        model = SentenceTransformer(str(fetch(STATIC_STUDENT)), device="cpu")
        found = retriever_candidates(made, model, top_k=TOP_K, batch_size=256)
    hits = sum(map(len, found.values()))
    return {"seconds": time.perf_counter() - start, "megabytes": peak_megabytes(), "hits": hits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--miner", choices=MINERS, help="only this one, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.miner:
        print(json.dumps(measure(arguments.miner, arguments.documents)))
        return
    print(f"{arguments.documents:,} documents of {WORDS} words, {QUERIES:,} queries, top {TOP_K}")
    for miner in MINERS:
        run = in_own_process("--documents", arguments.documents, "--miner", miner)
        print(
            f"{miner:16} {run['megabytes']:7,.0f} MB at its peak {run['seconds']:8,.0f} s  {run['hits']:9,} candidates"
        )


if __name__ == "__main__":
    main()
