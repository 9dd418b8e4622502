"""Stored embeddings of a teacher: the same as fresh ones, whatever happens to process, disk and teacher."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_wkl.data.embedding_teacher import EmbeddingTeacher
from st_wkl.data.vectors import TeacherVectors, VectorStore
from st_wkl.models import set_prompts
from tests.helpers.students import make_student
from tests.helpers.vectors import Numbers

TEXTS = [f"text {place} {'x' * (place % 31)}" for place in range(1_300)]


def embed(folder: Path, teacher: Any, documents: Sequence[str] = TEXTS, **options: Any) -> TeacherVectors:
    return VectorStore(folder).embed(teacher, {"document": documents}, show_progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", ["static", "transformer"])
def test_stored_vectors_are_the_fresh_ones(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What is cached is what encode says, with the prompt of each side, to the last digits of another batch."""
    model = SentenceTransformer(
        str(request.getfixturevalue("static_student_path" if kind == "static" else "minilm_path"))
    )
    set_prompts(model, {"query": "query: ", "document": "passage: "})
    texts = TEXTS[:70] if kind == "transformer" else TEXTS
    store = VectorStore(tmp_path)
    found = store.embed(model, {"query": texts[:9], "document": texts}, show_progress=False)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert np.abs(found.of(shuffled, "document") - model.encode_document(shuffled)).max() < 1e-6
    assert np.abs(found.of(texts[:9], "query") - model.encode_query(texts[:9])).max() < 1e-6
    assert np.abs(found.of(texts[:9], "query") - found.of(texts[:9], "document")).max() > 1e-3
    again = pickle.loads(pickle.dumps(store.embed(model, {"document": texts}, show_progress=False)))
    assert (again.of(shuffled, "document") == found.of(shuffled, "document")).all()
    half = store.embed(model, {"document": texts}, stored="float16", show_progress=False)
    assert 0 < np.abs(half.of(texts, "document") - found.of(texts, "document")).max() < 1e-2
    with pytest.raises(ValueError, match="no vector of the query 'never seen'"):
        found.of(["never seen"], "query")


def test_a_text_is_embedded_once_for_each_teacher(tmp_path: Path) -> None:
    """Computed again it would cost hours, and found under another teacher it would teach another's vectors."""
    teacher = Numbers()
    embed(tmp_path, teacher, TEXTS[:600])
    embed(tmp_path, teacher, [*TEXTS[500:], *TEXTS[500:700]])
    assert sorted(teacher.asked) == sorted(TEXTS)
    other = Numbers(version=2)
    embed(tmp_path, other, TEXTS[:20])
    assert other.asked == TEXTS[:20]
    files_of_each = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(files_of_each) == 2


def test_a_teacher_that_changes_is_another_one(tmp_path: Path, tiny_bert_path: Path) -> None:
    """Prompts and weights decide a vector: one of before would be served for another model, silently."""
    model = make_student("dense", tiny_bert_path).eval()
    teacher = EmbeddingTeacher(model)
    first = embed(tmp_path, teacher, TEXTS[:3])
    set_prompts(model, {"document": "passage: "})
    with pytest.raises(ValueError, match="was changed after it became a teacher"):
        embed(tmp_path, teacher, TEXTS[:5])
    second = embed(tmp_path, model, TEXTS[:3])
    assert first.teacher != second.teacher
    assert np.abs(first.of(TEXTS[:3], "document") - second.of(TEXTS[:3], "document")).max() > 1e-4
    for kind in ("sparse", "multi-vector", "cross-encoder"):
        with pytest.raises(TypeError, match="whose embeddings no student can be compared with"):
            EmbeddingTeacher(make_student(kind, tiny_bert_path))


@pytest.mark.parametrize(("value", "stored"), [(np.nan, "float32"), (-np.inf, "float32"), (1e6, "float16")])
def test_a_vector_that_is_no_number_is_refused(value: float, stored: Any, tmp_path: Path) -> None:
    """One NaN makes every weight of the student NaN; the text tells where to look, and what was done is kept."""

    class Broken(Numbers):
        def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
            found = super().embed(texts, side)
            found[[text == TEXTS[700] for text in texts], 3] = value
            return found

    with pytest.raises(ValueError, match=r"text 700 .*What was embedded before is safe"):
        embed(tmp_path, Broken(), stored=stored)
    teacher = Numbers()
    embed(tmp_path, teacher, stored=stored)
    assert len(teacher.asked) == len(TEXTS) - 512
    with pytest.raises(ValueError, match="document is None, not a text"):
        embed(tmp_path, teacher, [None])  # type: ignore[list-item]

    class Wider(Numbers):
        def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
            return np.ones((len(texts), 7))

    with pytest.raises(ValueError, match="gave vectors of 7 dimensions, and those of before have 32"):
        embed(tmp_path, Wider(), ["new"], stored=stored)


@pytest.mark.parametrize("damage", ["a bit", "a tail", "both tails", "half an entry", "a stranger"])
def test_damaged_files_are_noticed_and_mended(damage: str, tmp_path: Path) -> None:
    """Copies break off, disks change bits: what is not what was written is computed again, and that is said."""
    wanted = embed(tmp_path, Numbers()).of(TEXTS, "document")
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    vectors, texts = folder / "vectors.bin", folder / "texts.bin"
    if damage == "a bit":
        data = bytearray(vectors.read_bytes())
        data[40 * 128 + 5] ^= 16
        vectors.write_bytes(data)
    if "tail" in damage:
        os.truncate(vectors, 1_000 * 128 + 60)
    if damage in ("both tails", "half an entry"):
        os.truncate(texts, 900 * 20 + 7)
    if damage == "a stranger":
        (folder / "about.json").write_text("{}")
    teacher = Numbers()
    said = {"a bit": "1 vectors in .* are not what was written", "a tail": "300 of 1,300 vectors are gone"}
    if damage in said or damage == "a stranger":
        with pytest.warns(UserWarning, match=said.get(damage, "holds no vectors of this teacher; it is set aside")):
            found = embed(tmp_path, teacher)
    else:
        found = embed(tmp_path, teacher)
    anew = {"a bit": 1, "a tail": 300, "both tails": 400, "half an entry": 400, "a stranger": 1_300}[damage]
    assert len(teacher.asked) == anew
    assert (found.of(TEXTS, "document") == wanted).all()


def test_a_vector_that_breaks_while_it_is_used_stops_training(tmp_path: Path) -> None:
    """A changed bit in an exponent teaches 10^38."""
    found = embed(tmp_path, Numbers(), TEXTS[:40])
    file = next(tmp_path.rglob("vectors.bin"))
    data = bytearray(file.read_bytes())
    data[7 * 128 + 5] ^= 16
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"the vector of 'text 7 .*is not what was written"):
        found.of(TEXTS[:40], "document")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """What is half written is taken back, so that the next process begins after the last whole vector."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700 * 128, limit[1]))
        with pytest.raises(OSError, match="what was embedded before is safe: free some space"):
            embed(tmp_path, Numbers())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert next(tmp_path.rglob("vectors.bin")).stat().st_size == 512 * 128
    teacher = Numbers()
    whole = embed(tmp_path, teacher)
    assert len(teacher.asked) == len(TEXTS) - 512
    embed(tmp_path / "other", Numbers())
    assert files(next(tmp_path.glob("*[0-9a-f]"))) == files(next((tmp_path / "other").iterdir()))
    assert len(whole) == len(TEXTS)


def test_texts_of_one_half_of_a_hash_are_told_apart(tmp_path: Path) -> None:
    """Sorted by 64 bits, two texts could share a vector once in a life; nobody would find out why."""
    found = embed(tmp_path, Numbers(), TEXTS[:5])
    held = found._held["document"]
    held.keys["high"] = 7
    held.keys.sort(order=["high", "low"])
    keys = held.keys[[3, 0, 4, 1]].copy()
    assert held.find(keys).tolist() == [3, 0, 4, 1]
    keys["low"] += 1
    assert held.find(keys).tolist() == [-1] * 4


def test_principal_directions_keep_what_they_can(tmp_path: Path) -> None:
    """Of all projections of rank k, those of the singular value decomposition are the closest; and no run differs."""
    found = embed(tmp_path, Numbers())
    axes = found.principal(5)
    assert np.abs(axes.T @ axes - np.eye(5)).max() < 1e-6
    vectors = found.of(TEXTS, "document").astype(np.float64)
    expected = np.linalg.svd(vectors, full_matrices=False)[2][:5]
    assert np.abs(np.abs((expected @ axes).diagonal()) - 1).max() < 1e-5
    other = embed(tmp_path / "other", Numbers(), TEXTS[::-1]).principal(5)
    assert (other == axes).all()


class SlowNumbers(Numbers):
    """Takes its time, so that it can be killed at work."""

    def __init__(self, calls: Semaphore | None = None) -> None:
        super().__init__()
        self.calls = calls

    def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
        """Count a call, and wait."""
        if self.calls is not None:
            self.calls.release()
        time.sleep(0.01)
        found = super().embed(texts, side)
        return found + found.mean() / 1e3  # as real models, a batch shifts its vectors


def work(folder: Path, calls: Semaphore) -> None:
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    embed(folder, SlowNumbers(calls), texts)


@pytest.mark.slow
def test_killed_five_times_it_ends_equal(tmp_path: Path) -> None:
    """Whoever loses a machine five times gets the bytes of a run that was left alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance, killed = random.Random(0), 0
    for attempt in range(6):
        calls = context.Semaphore(0)
        process = context.Process(target=work, args=(tmp_path / "killed", calls))
        process.start()
        if attempt < 5:
            for _ in range(3):
                calls.acquire()
            time.sleep(chance.uniform(0, 0.05))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join(120)
    assert process.exitcode == 0
    work(tmp_path / "alone", context.Semaphore(0))
    found, wanted = (
        files(next(path for path in (tmp_path / name).iterdir() if path.is_dir())) for name in ("killed", "alone")
    )
    assert found == wanted
    assert killed == 5
