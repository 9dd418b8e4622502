"""Exact search for candidates: 200,000 × 384 vectors, 1,000 queries, 100 documents for each.

Run: python examples/benchmark_mining.py     (half a minute on two cores; needs `pip install faiss-cpu`)

The rivals take turns, five rounds, and the median of the time ratios within a round is printed, so that what else the
machine does meets all of them. Peak memory is the growth of the resident set beyond the vectors, in a process for each
(Linux only: from /proc/self/status).
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import in_own_process, peak_megabytes
from sentence_transformers.util import semantic_search

from st_wkl.data.search import exact_top_k

DOCUMENTS, QUERIES, DIMENSIONS, TOP_K, ROUNDS = 200_000, 1_000, 384, 100, 5
NAMES = ("st_wkl", "faiss-cpu flat", "semantic_search")


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    documents, queries = torch.randn(DOCUMENTS, DIMENSIONS), torch.randn(QUERIES, DIMENSIONS)
    for tensor in (documents, queries):  # in place, so that the peak before the search is the vectors themselves
        tensor.div_(tensor.norm(dim=1, keepdim=True))
    return queries, documents


def searcher(name: str, queries: torch.Tensor, documents: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that gives the scores of the best documents, (Q, k)."""
    if name == "st_wkl":
        return lambda: exact_top_k(queries, documents, TOP_K)[0]
    if name == "semantic_search":
        return lambda: torch.tensor(
            [[hit["score"] for hit in hits] for hits in semantic_search(queries, documents, top_k=TOP_K)]
        )
    import faiss

    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(documents.numpy())  # not part of the time
    return lambda: torch.from_numpy(index.search(queries.numpy(), TOP_K)[0])


def peak(name: str) -> float:
    """Return the growth of this process beyond the vectors in MB; faiss keeps a copy of them."""
    queries, documents = vectors()
    torch.mm(queries[:64], documents[:64].T)
    before = peak_megabytes()
    searcher(name, queries, documents)()
    return peak_megabytes() - before


def main() -> None:
    queries, documents = vectors()
    search = {name: searcher(name, queries, documents) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(ROUNDS + 1):
        found = {}
        for name in NAMES:
            start = time.perf_counter()
            found[name] = search[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    for name in NAMES[1:]:
        torch.testing.assert_close(found[name], found["st_wkl"], rtol=0, atol=1e-5)
    print(f"{DOCUMENTS:,} × {DIMENSIONS}, {QUERIES:,} queries, top {TOP_K}; equal scores to 1e-5")
    for name in NAMES:
        ratios = [ours / other for ours, other in zip(seconds["st_wkl"], seconds[name], strict=True)]
        megabytes = in_own_process(name)
        print(
            f"{name:16} {statistics.median(seconds[name]):6.2f} s   st_wkl takes {statistics.median(ratios):.2f} of "
            f"its time ({min(ratios):.2f} to {max(ratios):.2f})   {megabytes:6,.0f} MB beyond the vectors"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(sys.argv[1]))
    else:
        main()
