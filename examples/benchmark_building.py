"""How fast a dataset is built when the teacher costs nothing: pairs a second from an empty and from a full store.

Run: python examples/benchmark_building.py [--queries 20000] [--candidates 16] [--documents 20000] [--words 60]
     python examples/benchmark_building.py --milliseconds 70 [--mine]     (a teacher that sleeps)

Candidates are given and texts are random words, so mining is not measured, unless `--mine` lets the builder search with
BM25. The teacher counts letters, or sleeps so many milliseconds for each 512 pairs beside: 70 are 7,300 pairs a second,
as a small cross-encoder has on an H100; the share of that rate that the whole build reaches is printed, as it was and
as it would be on free cores, where only what this process's main thread computes comes on top. Each way is one
process of its own: cold fills the store, warm finds all scores in it. Memory is the peak above that of the collection
and the candidates, in bytes for each pair. The bytes of both folders are compared.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentence_transformers  # noqa: F401  its import is paid before

from st_wkl import Collection, DistillationDatasetBuilder
from st_wkl.data.candidates import Candidate


class Letters:
    """A teacher that costs nothing, or time alone."""

    identity = {"kind": "letters", "version": 1}  # noqa: RUF012

    def __init__(self, milliseconds: float = 0) -> None:
        self.seconds = milliseconds / 1e3 / 512

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return how much longer the document is than the query."""
        if self.seconds:
            time.sleep(self.seconds * len(pairs))
        return np.fromiter((len(document) - len(query) for query, document in pairs), np.float32, len(pairs)) / 100


def task(
    queries: int, candidates: int, documents: int, words: int, part: slice = slice(None)
) -> tuple[Collection, dict[str, list[Candidate]]]:
    """Return a collection of random words, one positive a query, and random candidates of a part of the queries."""
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{place}" for place in range(20_000)])
    texts = {f"d{place}": " ".join(row) for place, row in enumerate(vocabulary[_zipf(draw, (documents, words))])}
    asked = {
        f"q{place}": f"{place} " + " ".join(row) for place, row in enumerate(vocabulary[_zipf(draw, (queries, 8))])
    }
    found = draw.integers(0, documents, (queries, candidates)).tolist()
    qrels = {"train": {key: {f"d{row[0]}": 1} for key, row in zip(asked, found, strict=True)}}
    hits = [
        [Candidate(f"d{place}", -float(rank), rank, "random") for rank, place in enumerate(row)] for row in found[part]
    ]
    return Collection("random", texts, asked, qrels), dict(zip([*asked][part], hits, strict=True))


def _zipf(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (20_000 ** draw.random(shape)).astype(int) - 1


def build(counts: tuple[int, int, int, int], folder: str, name: str, milliseconds: float, mine: bool) -> None:
    """Build once in this process, and say what it took."""
    collection, candidates = task(*counts)
    store = Path(folder) / "scores.sqlite3"
    before, start, busy = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    alone = time.thread_time()
    builder = DistillationDatasetBuilder(
        *(collection, Letters(milliseconds)),
        candidates=None if mine else candidates,
        num_negatives=counts[1],
        store=store,
        against=None,
    )
    dataset = builder.build(show_progress=False)
    built, alone = time.perf_counter() - start, time.thread_time() - alone
    made = dataset.save(Path(folder) / name)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    pairs = dataset.provenance["counts"]["pairs"]
    slept = dataset.provenance["counts"]["different_pairs"] * milliseconds / 1e3 / 512
    share = f"; the build at {slept / built:.1%} of the teacher's rate, {slept / (slept + alone):.1%} on free cores"
    share = share if slept and name == "cold" else ""
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    digest = hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(made.iterdir())), digest_size=8).hexdigest()
    print(
        f"{name}: {pairs:,} pairs in {seconds:.1f} s (saving {seconds - built:.1f}), {pairs / seconds:,.0f} pairs/s; "
        f"{busy:.1f} s of CPU, {pairs / busy:,.0f} pairs/s; "
        f"{peak / pairs:.0f} bytes a pair above collection and candidates, folder {digest}{share}",
        flush=True,
    )


def main() -> None:
    """Build cold, then warm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 20_000), ("candidates", 16), ("documents", 20_000), ("words", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--milliseconds", type=float, default=0)
    parser.add_argument("--mine", action="store_true")
    options = parser.parse_args()
    counts = (options.queries, options.candidates, options.documents, options.words)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            process = multiprocessing.get_context("spawn").Process(
                target=build, args=(counts, folder, name, options.milliseconds, options.mine)
            )
            process.start()
            process.join()


if __name__ == "__main__":
    main()
