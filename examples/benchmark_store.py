"""How many pairs a second pass through `score_pairs` and its store when the teacher costs nothing.

Run: python examples/benchmark_store.py     (a minute on two cores; --queries 312500 for 5,000,000 pairs)

Texts are held once, as the builder holds them. "cold" scores and keeps all pairs, "warm" finds all in the store.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import st_wkl.functional  # noqa: F401 - with torch, whose import is not measured
from st_wkl.data import ScoreStore
from st_wkl.data.scoring import score_candidates
from st_wkl.data.teacher import TextPairs

CANDIDATES, DOCUMENTS = 16, 20_000


class Free:
    """A teacher that costs nothing."""

    identity = {"model": "free"}  # noqa: RUF012

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return a number for each pair."""
        return np.arange(len(pairs), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    count = parser.parse_args().queries
    rng = np.random.default_rng(0)
    queries = [f"what is question {place} about" for place in range(count)]
    documents = [f"document {place} " + "word " * int(rng.integers(20, 120)) for place in range(DOCUMENTS)]
    found = (rng.integers(DOCUMENTS, size=(count, 1)) + rng.choice(DOCUMENTS, CANDIDATES, replace=False)) % DOCUMENTS
    pairs = TextPairs.at(queries, documents, np.repeat(np.arange(count), CANDIDATES), found.reshape(-1))
    with tempfile.TemporaryDirectory() as folder:
        for run in ("cold", "warm"):
            with ScoreStore(Path(folder) / "scores.sqlite3") as store:
                start, busy = time.perf_counter(), time.process_time()
                score_candidates(Free(), pairs, [CANDIDATES] * count, store=store, show_progress=False)
                wall, busy = time.perf_counter() - start, time.process_time() - busy
            print(f"{run}: {len(pairs) / wall:,.0f} pairs/s, {len(pairs) / busy:,.0f} a second of one core")


if __name__ == "__main__":
    main()
