"""What 20 million pairs cost beside the teacher: scored in shards, each into a store of its own, merged, built at last.

Run: python examples/benchmark_shards.py [--queries 200000] [--shards 4] [--documents 100000] [--folder FOLDER]

The way of several machines on one: each shard is a process that builds its part of the queries and exports its store;
then one store imports all, and one build finds every score in it. The teacher costs nothing (see benchmark_building.py,
whose collection this is), so all that is measured is this package. CPU seconds and the peak of
memory are those of each process, with the making of its collection.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_building import Letters, task

from st_wkl import DistillationDatasetBuilder
from st_wkl.data import ScoreStore

CANDIDATES, WORDS = 100, 60


def score(folder: Path, queries: int, documents: int, shard: int, shards: int) -> None:
    """Score a part of the queries, and export the store."""
    collection, candidates = task(queries, CANDIDATES, documents, WORDS, slice(shard, None, shards))
    store = folder / f"shard-{shard}.sqlite3"
    start = time.perf_counter()
    _builder(collection, candidates, store).build(show_progress=False)
    built = time.perf_counter()
    with ScoreStore(store) as opened:
        pairs = opened.export_parquet(folder / f"shard-{shard}.parquet", show_progress=False)
    rates = f"{pairs / (built - start):,.0f} pairs/s; exported in {time.perf_counter() - built:.0f} s"
    print(f"shard {shard}: {pairs:,} pairs in {built - start:.0f} s, {rates}", end="; ")


def merge(folder: Path, shards: int) -> None:
    """Import all shards into one store."""
    start, pairs = time.perf_counter(), 0
    with ScoreStore(folder / "all.sqlite3") as store:
        for shard in range(shards):
            pairs += store.import_parquet(folder / f"shard-{shard}.parquet", show_progress=False)
    seconds = time.perf_counter() - start
    print(f"import: {pairs:,} pairs in {seconds:.0f} s, {pairs / seconds:,.0f} pairs/s", end="; ")


def build(folder: Path, queries: int, documents: int) -> None:
    """Build the whole dataset from the merged store."""
    collection, candidates = task(queries, CANDIDATES, documents, WORDS)
    start = time.perf_counter()
    dataset = _builder(collection, candidates, folder / "all.sqlite3").build(show_progress=False)
    built = time.perf_counter()
    dataset.save(folder / "dataset")
    pairs, seconds = dataset.provenance["counts"]["pairs"], time.perf_counter() - start
    rates = f"{pairs / seconds:,.0f} pairs/s (saving {time.perf_counter() - built:.0f} s)"
    print(f"build: {pairs:,} pairs in {seconds:.0f} s, {rates}", end="; ")


def _builder(collection: Any, candidates: Any, store: Path) -> DistillationDatasetBuilder:
    options: dict[str, Any] = {"num_negatives": CANDIDATES, "store": store, "against": None}
    return DistillationDatasetBuilder(collection, Letters(), query_ids=candidates, candidates=candidates, **options)


def alone(work: Callable[..., None], *values: Any) -> None:
    """Do one part in a process of its own, and say how much memory it took."""
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(work, *values))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _measured(work: Callable[..., None], *values: Any) -> None:
    work(*values)
    busy = f"{time.process_time():.0f} s of CPU"
    print(f"{busy}, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB", flush=True)


def main() -> None:
    """Score, merge, build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 200_000), ("documents", 100_000), ("shards", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--folder", help="where to put the files, some 5 GB for 20 million pairs; default: a temporary one"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for shard in range(given.shards):
            alone(score, folder, given.queries, given.documents, shard, given.shards)
        alone(merge, folder, given.shards)
        alone(build, folder, given.queries, given.documents)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            print(f"{file.relative_to(folder)}: {file.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
