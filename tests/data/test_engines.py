"""Engines: the same scores from this process, a pool and Ray; one writer; errors that name the pair."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_wkl.data import engines
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.scoring import estimate_scoring, score_pairs
from st_wkl.data.teacher import Engine
from st_wkl.data.teachers import CrossEncoderTeacher
from tests.data.test_scoring import BatchTeacher, make_pairs
from tests.data.test_teachers import tiny_cross_encoder
from tests.helpers.workers import CULPRIT, ProcessTeacher

WORKERS: tuple[Engine, ...] = ("pool", "ray")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Start a Ray of two processor cores, or skip."""
    pytest.importorskip("ray")
    import ray

    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Engine:
    """Return an engine, started where it needs that."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


each_engine = pytest.mark.parametrize("engine", WORKERS, indirect=True)


@pytest.mark.slow
@each_engine
def test_same_scores_other_processes_one_writer(engine: Engine, tmp_path: Path) -> None:
    """Workers score, this process writes: chunks come back in any order and still land at their pairs."""
    pairs = make_pairs(90)
    expected = score_pairs(ProcessTeacher(), pairs, show_progress=False)
    with ScoreStore(tmp_path / "scores") as store:
        found = score_pairs(
            ProcessTeacher(), pairs, store=store, engine=engine, workers=2, chunk_size=8, show_progress=False
        )
        assert store.count() == 90
        assert store.get(ProcessTeacher().identity, pairs).tobytes() == expected.tobytes()
    assert found.tobytes() == expected.tobytes()
    ids = score_pairs(ProcessTeacher("pid"), pairs, engine=engine, chunk_size=8, show_progress=False)
    assert os.getpid() not in ids


@pytest.mark.slow
@each_engine
@pytest.mark.parametrize("fault", ["raise", "short", "nan"])
def test_errors_of_workers_name_the_pair(engine: Engine, fault: str) -> None:
    """A traceback from another machine that does not say which text it choked on is worth nothing."""
    pairs = [*make_pairs(60), CULPRIT]
    named = {"raise": "A worker failed at .*too hot", "short": "scores of shape", "nan": "returned nan for"}[fault]
    with ScoreStore(":memory:") as store:
        with pytest.raises((RuntimeError, ValueError), match=named) as error:
            score_pairs(
                ProcessTeacher(fault), pairs, store=store, engine=engine, workers=1, chunk_size=1, show_progress=False
            )
        assert repr(CULPRIT[1]) in str(error.value)
        assert np.isnan(store.get(ProcessTeacher().identity, [CULPRIT])[0])


@pytest.mark.slow
@each_engine
def test_a_killed_workers_pairs_go_to_another(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of eight workers that the system kills at night must not end the week's run, nor cost a pair."""
    pairs = [*make_pairs(60), CULPRIT]
    teacher = ProcessTeacher(f"once:{tmp_path / 'killed'}")
    found = score_pairs(teacher, pairs, engine=engine, workers=2, chunk_size=4, show_progress=False)
    assert (tmp_path / "killed").exists()
    assert found.tobytes() == score_pairs(ProcessTeacher(), pairs, show_progress=False).tobytes()
    assert "A worker died at or near" in caplog.text
    assert "another one takes them" in caplog.text


@pytest.mark.slow
def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers on the first of eight GPUs are slower than one; a device with a number is the user's word."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    teacher, options = ProcessTeacher("device"), {"engine": "pool", "chunk_size": 1, "show_progress": False}
    assert {*score_pairs(teacher, make_pairs(40), **options).tolist()} == {0, 1}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    assert {*score_pairs(teacher, make_pairs(60), workers=3, **options).tolist()} == {7, 5}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for device in ("cpu", "cuda:1", torch.device("cuda", 0)):
        teacher.device = device  # type: ignore[attr-defined]
        assert engines._devices(teacher) == []


@pytest.mark.slow
@each_engine
def test_a_worker_that_dies_again_and_again_is_an_error_and_loses_nothing(engine: Engine) -> None:
    """Out of memory kills a process without a word; waiting for it for ever would be worse than the loss."""
    pairs = [*make_pairs(60), CULPRIT]
    with ScoreStore(":memory:") as store:
        with pytest.raises(
            RuntimeError, match=r"A worker died at or near .* pairs, the first of which is query"
        ) as error:
            score_pairs(
                ProcessTeacher("die"), pairs, store=store, engine=engine, workers=1, chunk_size=1, show_progress=False
            )
        assert repr(CULPRIT[1]) in str(error.value), "another pair is blamed"
        kept = store.count()
        assert kept > 0
        score_pairs(ProcessTeacher(), pairs, store=store, chunk_size=1, show_progress=False)
        assert store.count() == 61


@pytest.mark.slow
def test_what_the_model_is_loaded_with_reaches_workers(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """A worker with another attention, or that may not run the model's code, is another teacher, or none."""
    tiny_cross_encoder(cross_encoder_onnx_path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForSequenceClassification": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = (
        "from transformers import BertForSequenceClassification\nclass Own(BertForSequenceClassification):\n    pass\n"
    )
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    eager: dict[str, Any] = {"model_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True}
    teacher = CrossEncoderTeacher(tmp_path, device="cpu", max_length=32, **eager)
    assert teacher._engine.model.transformers_model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    pairs = make_pairs(12)
    here = score_pairs(teacher, pairs, show_progress=False, chunk_size=4)
    there = score_pairs(teacher, pairs, show_progress=False, chunk_size=4, engine="pool", workers=1)
    assert np.abs(here - there).max() < 1e-5


@pytest.mark.slow
def test_real_teacher_in_a_pool(cross_encoder_onnx_path: Path) -> None:
    """A session of onnxruntime cannot travel; the teacher is made again in each worker, from the same files."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=32)
    pairs = make_pairs(24)
    here = score_pairs(teacher, pairs, show_progress=False, chunk_size=8)
    there = score_pairs(teacher, pairs, show_progress=False, chunk_size=8, engine="pool", workers=2)
    assert np.abs(here - there).max() < 1e-4


def test_errors_here_name_the_pair() -> None:
    """The original error is kept, with a note."""
    with pytest.raises(OverflowError) as error:
        score_pairs(ProcessTeacher("raise"), [*make_pairs(20), CULPRIT], chunk_size=1, show_progress=False)
    assert repr(CULPRIT[1]) in error.value.__notes__[0]


def test_what_cannot_travel_is_refused_at_once() -> None:
    """A local function cannot be pickled: that is said before any process starts."""

    class Local(ProcessTeacher):
        pass

    with pytest.raises(TypeError, match=r"Local cannot be sent to other processes.*engine='process'"):
        score_pairs(Local(), make_pairs(3), engine="pool", show_progress=False)
    with pytest.raises(ValueError, match='engine must be "process", "pool" or "ray"'):
        score_pairs(Local(), make_pairs(3), engine="spark", show_progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        score_pairs(Local(), make_pairs(3), engine="pool", workers=0, show_progress=False)


def test_a_changed_model_is_found_by_the_worker(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """A folder that is overwritten while workers start would mix two teachers under one identity."""
    import pickle
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(cross_encoder_onnx_path, folder)
    travelling = pickle.dumps(CrossEncoderTeacher(folder))
    with (folder / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"The worker loaded .* but the teacher is"):
        pickle.loads(travelling)


def test_two_threads_on_one_store(tmp_path: Path) -> None:
    """Each thread opens the file; both end with all scores."""
    pairs, failures = make_pairs(200), []

    def run() -> None:
        try:
            with ScoreStore(tmp_path / "scores") as store:
                score_pairs(ProcessTeacher(), pairs, store=store, show_progress=False, chunk_size=8)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with ScoreStore(tmp_path / "scores") as store:
        assert store.count() == 200


def test_two_threads_on_one_real_teacher(cross_encoder_onnx_path: Path) -> None:
    """Remembered token ids of one call must not end up in the other's."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=1, max_length=32)
    jobs = [make_pairs(16, seed=seed) for seed in range(2)]
    expected = [score_pairs(teacher, pairs, show_progress=False) for pairs in jobs]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: score_pairs(teacher, jobs[at], show_progress=False)}))
        for at in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at].tobytes() for at in (0, 1)] == [scores.tobytes() for scores in expected]


def test_extreme_texts(cross_encoder_onnx_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Empty texts, lone surrogates and a million characters: a score or a named error, and the cut is counted."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=32)
    pairs = [("", ""), ("cat", " "), ("cat", "a\x00b"), ("cat", "dog " * 250_000)]
    assert np.isfinite(score_pairs(teacher, pairs, show_progress=False)).all()
    assert "1 of 4 pairs were longer" in caplog.text


def test_sorted_by_tokens_across_queries(cross_encoder_onnx_path: Path) -> None:
    """Characters mislead: a chemical name has many tokens, a plain sentence of the same length few."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path)
    calls: list[list[tuple[str, str]]] = []
    honest = teacher.score
    teacher.score = lambda pairs: calls.append(list(pairs)) or honest(pairs)  # type: ignore[method-assign, func-returns-value]
    pairs = [
        (f"q{n}", text) for n, text in enumerate(["x9z8k7q6w5" * 3, "information retrieval understanding", "a"] * 4)
    ]
    score_pairs(teacher, pairs, show_progress=False, chunk_size=4)
    flat = [pair for call in calls for pair in call]
    lengths = teacher.token_lengths(flat)
    assert lengths is not None
    assert list(lengths) == sorted(lengths, reverse=True)
    assert flat[0][1] == "x9z8k7q6w5" * 3


def test_cut_pairs_are_counted_over_all_pairs_of_a_resumed_run(
    cross_encoder_onnx_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The number goes into the dataset's record, and must not depend on where the first run was stopped."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=16)
    pairs = [("cat", "dog " * count) for count in range(1, 25)]
    with ScoreStore(":memory:") as store:
        score_pairs(teacher, pairs[12:], store=store, show_progress=False, chunk_size=4)
        caplog.clear()
        score_pairs(teacher, pairs, store=store, show_progress=False, chunk_size=4)
    assert "12 of 24 pairs were longer" in caplog.text


def test_estimate_counts_everything(cross_encoder_onnx_path: Path) -> None:
    """Pairs, tokens and hours before a week of work starts; and nothing is written."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=16)
    pairs = [("cat", "dog " * count) for count in range(1, 25)]
    with ScoreStore(":memory:") as store:
        score_pairs(teacher, pairs[:4], store=store, show_progress=False)
        estimate = estimate_scoring(teacher, pairs * 2, store=store, sample_size=5)
        assert store.count() == 4
        everything = estimate_scoring(teacher, pairs[:4], store=store)
    assert (estimate.pairs, estimate.different_pairs, estimate.known, estimate.to_score) == (48, 24, 4, 20)
    # [CLS] cat [SEP] dog … [SEP]: 4 tokens and the dogs, cut at 16.
    assert estimate.tokens == sum(min(16, 4 + count) for count in range(5, 25))
    assert estimate.truncated == 12
    assert estimate.sampled == 5
    assert estimate.hours is not None
    assert estimate.hours > 0
    assert re.search(r"48 pairs, 24 of them different\n.*20 to score\n.* 12 pairs are longer.*\nabout", str(estimate))
    assert (everything.to_score, everything.tokens, everything.seconds) == (0, 0, 0.0)


def test_estimate_without_tokens() -> None:
    """A teacher that only has the two members is estimated by characters."""
    estimate = estimate_scoring(BatchTeacher(), make_pairs(30), sample_size=10)
    assert (estimate.tokens, estimate.truncated, estimate.sampled) == (None, None, 10)
    assert estimate.seconds is not None
    assert estimate_scoring(BatchTeacher(), make_pairs(30), sample_size=0).seconds is None
    assert estimate_scoring(BatchTeacher(), []).seconds == 0.0
