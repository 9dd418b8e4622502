"""A build that is killed again and again ends with the files of one that was left alone."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import numpy as np
import pytest

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import Candidate
from st_wkl.data.collection import Collection
from st_wkl.data.score_store import ScoreStore

pytestmark = pytest.mark.slow

QUERIES, CANDIDATES = 1_500, 20  # 58 chunks, of which twenty killed runs commit about half


class SlowTeacher:
    """A teacher that takes its time, so that it can be killed at work, and writes down what it scores."""

    @property
    def identity(self) -> dict[str, str]:
        """Name it."""
        return {"model": "slow-teacher"}

    def __init__(self, log: Path, calls: Semaphore | None = None) -> None:
        self.log, self.calls = log, calls

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length, shifted by the batch as real models in low precision are."""
        if self.calls is not None:
            self.calls.release()
        time.sleep(0.02)
        lengths = np.array([len(query) + len(document) for query, document in pairs], dtype=np.float32)
        with self.log.open("a", encoding="utf-8") as file:
            file.writelines(f"{query}\t{document}\n" for query, document in pairs)
        return lengths + lengths.mean() / 1e3


def a_builder(log: Path, store: Path, calls: Semaphore | None = None) -> DistillationDatasetBuilder:
    documents = {f"d{place}": f"document {'x' * (place % 97)} {place}" for place in range(2_000)}
    queries = {f"q{place}": f"query {place}" for place in range(QUERIES)}
    qrels = {"train": {f"q{place}": {f"d{place}": 1} for place in range(QUERIES)}}
    candidates = {
        f"q{place}": [Candidate(f"d{(place * 31 + rank) % 2_000}", -rank, rank, "run") for rank in range(1, CANDIDATES)]
        for place in range(QUERIES)
    }
    collection = Collection("made up", documents, queries, qrels)
    return DistillationDatasetBuilder(collection, SlowTeacher(log, calls), candidates=candidates, store=store)


def build(log: Path, store: Path, output: Path, calls: Semaphore) -> None:
    builder = a_builder(log, store, calls)
    calls.release()
    builder.build(show_progress=False).save_to_disk(output)


def scored(log: Path) -> list[str]:
    return log.read_text("utf-8").splitlines() if log.exists() else []


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Whoever loses a machine twenty times gets the same bytes, and pays for no committed pair twice."""
    # A server that has the imports done makes a worker in milliseconds, of which the kills can then hit any.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "st_wkl.data.builder", "st_wkl.data.leaks", "st_wkl.data.report"])
    chance, store, output = random.Random(0), tmp_path / "scores.sqlite3", tmp_path / "dataset"
    builder, at_work = a_builder(tmp_path / "none", tmp_path / "none"), 0
    pairs = [
        (builder.collection.queries[query], builder.collection.documents[hit.document_id])
        for query, hits in (builder.candidates or {}).items()
        for hit in hits
    ]
    for attempt in range(20):
        known: set[str] = set()
        if store.exists():
            with ScoreStore(store) as opened:
                found = opened.get(builder.teacher.identity, pairs)
            known = {"\t".join(pair) for pair, score in zip(pairs, found, strict=True) if np.isfinite(score)}
        log, calls = tmp_path / f"log-{attempt}", context.Semaphore(0)
        worker = context.Process(target=build, args=(log, store, output, calls))
        worker.start()
        # Counted in calls of the teacher and not in seconds alone, of which a busy machine needs others: 0 is before
        # or while the store is opened, 2 after the first commit.
        for _ in range(1 + chance.randrange(4)):
            assert calls.acquire(timeout=60)
        time.sleep(chance.uniform(0, 0.03))
        worker.kill()
        worker.join()
        at_work += worker.exitcode == -signal.SIGKILL
        assert not known & set(scored(log)), "a committed pair was scored again"
        assert not output.exists(), "half a dataset stands where a whole one is expected"
    assert at_work == 20, "some builds were over before they were killed"
    assert 0 < len(known) < len(pairs), "the kills came too early or too late to prove anything"
    for log, kept, folder in (("last", store, output), ("undisturbed", tmp_path / "other", tmp_path / "expected")):
        a_builder(tmp_path / log, kept).build(show_progress=False).save_to_disk(folder)
    assert files(output) == files(tmp_path / "expected")
