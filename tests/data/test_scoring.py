"""Scoring: each pair once, in batches that do not depend on luck, and nothing lost when it stops."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_wkl.data import engines, scoring
from st_wkl.data.score_store import ScoreStore, ScoreStoreError
from st_wkl.data.scoring import estimate_scoring, score_candidates, score_pairs
from st_wkl.data.teachers import CallableTeacher, CrossEncoderTeacher, EnsembleTeacher, score_lists

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings", "fast", "slow"]


def make_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Make different pairs of many lengths in random order."""
    chance = random.Random(seed)
    return [
        (f"query {i % 7}", " ".join(chance.choices(WORDS, k=chance.randint(1, 30))) + f" {i}") for i in range(count)
    ]


class BatchTeacher:
    """A teacher whose scores depend on the whole batch, as those of dynamic int8 models do."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.calls: list[int] = []
        self.stop_after = stop_after

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name it."""
        return {"model": "batch-teacher"}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length, shifted by the mean of the batch."""
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.update(pairs)
        self.calls.append(len(pairs))
        lengths = np.array([len(query) + 2 * len(document) for query, document in pairs], dtype=np.float32)
        return lengths + lengths.mean() / 7

    @property
    def lengths(self) -> list[int]:
        """Lengths of the pairs in the order in which they came."""
        return [len(query) + len(document) for query, document in self.seen]


def test_scores_come_back_in_order_and_once() -> None:
    """Repeated pairs cost one pass and keep their places."""
    pairs = make_pairs(40)
    teacher = BatchTeacher()
    scores = score_pairs(teacher, pairs + pairs[::-1], show_progress=False)
    assert scores.dtype == np.float32
    assert scores.tolist() == scores.tolist()[::-1]
    assert max(teacher.seen.values()) == 1
    shift = scores[0] - (len(pairs[0][0]) + 2 * len(pairs[0][1]))
    assert np.allclose(scores[:40], [len(query) + 2 * len(document) + shift for query, document in pairs])


def test_chunks_are_sorted_by_length() -> None:
    """Padding is the waste of scoring: pairs of all queries go in by length, the longest first, where memory shows."""
    teacher = BatchTeacher()
    score_pairs(teacher, make_pairs(50), show_progress=False, chunk_size=20)
    assert teacher.calls == [20, 20, 10]
    assert teacher.lengths == sorted(teacher.lengths, reverse=True)


def test_second_run_scores_nothing(tmp_path: Path) -> None:
    """This is what the store is for."""
    pairs = make_pairs(50)
    with ScoreStore(tmp_path / "scores") as store:
        first = score_pairs(BatchTeacher(), pairs, store=store, show_progress=False)
    with ScoreStore(tmp_path / "scores") as store:
        teacher = BatchTeacher()
        second = score_pairs(teacher, pairs, store=store, show_progress=False)
    assert teacher.calls == []
    assert first.tobytes() == second.tobytes()


def test_more_pairs_later_score_only_the_new_ones() -> None:
    """Twice the queries next week must not cost three times the work."""
    pairs = make_pairs(60)
    teacher = BatchTeacher()
    with ScoreStore(":memory:") as store:
        first = score_pairs(teacher, pairs[:20], store=store, show_progress=False, chunk_size=8)
        both = score_pairs(teacher, pairs, store=store, show_progress=False, chunk_size=8)
    assert max(teacher.seen.values()) == 1
    assert both[:20].tobytes() == first.tobytes()


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5])
def test_interrupted_run_ends_with_the_same_bits(stop_after: int) -> None:
    """The teacher's scores depend on the batch, so a restart must meet the batches of an undisturbed run."""
    pairs = make_pairs(50)
    undisturbed = score_pairs(BatchTeacher(), pairs, show_progress=False, chunk_size=8)
    first, second = BatchTeacher(stop_after), BatchTeacher()
    with ScoreStore(":memory:") as store:
        with pytest.raises(KeyboardInterrupt):
            score_pairs(first, pairs, store=store, show_progress=False, chunk_size=8)
        assert store.count() == 8 * stop_after
        shuffled = random.Random(1).sample(pairs, len(pairs))
        score_pairs(second, shuffled, store=store, show_progress=False, chunk_size=8)
        again = store.get(first.identity, pairs)
    assert again.tobytes() == undisturbed.tobytes()
    assert max((first.seen + second.seen).values()) == 1


@pytest.mark.slow
def test_real_int8_teacher_killed_and_restarted(tmp_path: Path, cross_encoder_onnx_path: Path) -> None:
    """The same with SIGKILL and a real dynamic int8 model, whose scores do depend on their batch."""
    pairs = make_pairs(48)
    code = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from test_scoring import make_pairs\n"
        "from st_wkl.data import CrossEncoderTeacher, ScoreStore, score_pairs\n"
        "teacher = CrossEncoderTeacher(sys.argv[1], max_length=64)\n"
        "honest, calls = teacher.score, []\n"
        "def score(pairs):\n"
        "    calls.append(pairs)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return honest(pairs)\n"
        "teacher.score = score\n"
        "score_pairs(teacher, make_pairs(48), store=ScoreStore(sys.argv[2]), show_progress=False, chunk_size=8)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-c",
        code,
        str(cross_encoder_onnx_path),
        str(tmp_path / "scores"),
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=64)
    with ScoreStore(tmp_path / "scores") as store:
        assert store.count() == 24
        resumed = score_pairs(teacher, pairs, store=store, show_progress=False, chunk_size=8)
    undisturbed = score_pairs(teacher, pairs, show_progress=False, chunk_size=8)
    one_by_one = score_pairs(teacher, pairs, show_progress=False, chunk_size=1)
    assert resumed.tobytes() == undisturbed.tobytes()
    assert one_by_one.tobytes() != undisturbed.tobytes(), "batches no longer matter: this test proves nothing"


class Faulty(BatchTeacher):
    """A teacher that goes wrong at the third chunk."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return nonsense at the third chunk."""
        scores = super().score(pairs)
        if len(self.calls) == 3:
            if isinstance(self.output, float):
                scores[1] = self.output
            else:
                scores = np.zeros(self.output)  # type: ignore[call-overload]
        return scores


@pytest.mark.parametrize("output", [float("nan"), float("inf"), 7, (8, 1), (8, 2)])
def test_wrong_output_names_the_pair_and_loses_nothing(output: object) -> None:
    """NaN in one score trains a model of NaNs; the chunks before it are kept, the bad one is not."""
    pairs = make_pairs(50)
    culprit = sorted(pairs, key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))[
        17 if isinstance(output, float) else 16
    ]
    with ScoreStore(":memory:") as store:
        with pytest.raises(ValueError, match=r"The teacher returned") as error:
            score_pairs(Faulty(output), pairs, store=store, show_progress=False, chunk_size=8)
        assert repr(culprit[1][:80]) in str(error.value)
        assert store.count() == 16


@pytest.mark.parametrize("pair", [("query", None), (1, "document"), ("query",), ("a", "b", "c")])
def test_pairs_must_be_two_texts(pair: object) -> None:
    """A null text would be scored as the word None by some tokenizers."""
    with pytest.raises(TypeError, match=r"Pair 1 is .*; expected two texts"):
        score_pairs(BatchTeacher(), [("query", "document"), pair], show_progress=False)  # type: ignore[list-item]


def test_no_pairs() -> None:
    """Nothing to score is no reason to crash."""
    with ScoreStore(":memory:") as store:
        assert score_pairs(BatchTeacher(), [], store=store, show_progress=False).shape == (0,)


def test_cut_pairs_are_reported(caplog: pytest.LogCaptureFixture, cross_encoder_onnx_path: Path) -> None:
    """A teacher that reads only the first sentence of every document must not stay unnoticed."""
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=32)
    with caplog.at_level(logging.WARNING):
        score_pairs(teacher, [("query", "short"), ("query", "long " * 50)], show_progress=False)
    assert "1 of 2 pairs were longer than the teacher's maximum length" in caplog.text


class LoggingTeacher:
    """A teacher of batch-dependent scores that writes down what it scores, and takes a moment for it."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name it."""
        return {"model": "logging-teacher"}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length, shifted by the mean of the batch."""
        time.sleep(0.01)
        scores = BatchTeacher().score(pairs)
        with self.log.open("a", encoding="utf-8") as file:
            file.writelines(f"{query}\t{document}\n" for query, document in pairs)
        return scores


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """SIGKILL anywhere, in the middle of a commit too: what was committed stays, is not scored again, and fits."""
    pairs, chance = make_pairs(1_600), random.Random(0)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.data.test_scoring import LoggingTeacher, make_pairs\n"
        "from st_wkl.data.score_store import ScoreStore\n"
        "from st_wkl.data.scoring import score_pairs\n"
        "teacher, store = LoggingTeacher(Path(sys.argv[1])), ScoreStore(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "score_pairs(teacher, make_pairs(1_600), store=store, show_progress=False, chunk_size=8)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    path, identity, kills = tmp_path / "scores", LoggingTeacher(tmp_path).identity, 0
    for run in range(20):
        with ScoreStore(path) as store:
            known = {pair for pair, score in zip(pairs, store.get(identity, pairs), strict=True) if np.isfinite(score)}
        log = tmp_path / f"log-{run}"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(log), str(path)], env=env, stdout=subprocess.PIPE
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            # Half of the kills wait for work to be under way, which on a busy machine takes longer than any fixed time.
            while run % 2 and not log.exists():
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.08 if run % 2 else 0.15))
            worker.kill()
            kills += worker.wait() == -signal.SIGKILL
        scored = {tuple(line.split("\t")) for line in log.read_text("utf-8").splitlines()} if log.exists() else set()
        assert not scored & known, "a committed pair was scored again"
    assert kills == 20
    assert 0 < len(known) < len(pairs), "the kills came too early or too late to prove anything"
    with ScoreStore(path) as store:
        resumed = score_pairs(LoggingTeacher(tmp_path / "log"), pairs, store=store, show_progress=False, chunk_size=8)
    undisturbed = score_pairs(BatchTeacher(), pairs, show_progress=False, chunk_size=8)
    assert resumed.tobytes() == undisturbed.tobytes()


def test_a_score_serves_every_length_that_cuts_nothing(cross_encoder_onnx_path: Path) -> None:
    """One teacher at 64 and at 128 tokens reads a short pair alike: scoring it twice is waste, a long one is not."""
    pairs = [("cat", "a cat"), ("cat", "dog " * 100)]
    short, long = (CrossEncoderTeacher(cross_encoder_onnx_path, max_length=length) for length in (64, 128))
    with ScoreStore(":memory:") as store:
        first = score_pairs(short, pairs, store=store, show_progress=False)
        estimate = estimate_scoring(long, pairs, store=store, sample_size=0)
        assert (estimate.known, estimate.to_score) == (1, 1)
        assert np.isnan(store.get(long.identity, pairs)).all(), "an estimate keeps nothing"
        second = score_pairs(long, pairs, store=store, show_progress=False)
        assert first[0] == second[0]
        assert first[1] != second[1]
        assert np.isfinite(store.get(long.identity, pairs)).all()
        assert estimate_scoring(short, [*pairs, ("cat", "new")], store=store, sample_size=0).to_score == 1


def test_a_chunk_is_kept_in_parts(cross_encoder_onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 long pairs are minutes of a CPU: what is finished is kept; the rest gets the bits of an undisturbed run."""
    monkeypatch.setattr(engines, "_SECONDS_AT_ONCE", 0.0)
    pairs = [("cat", "dog " * number) for number in range(1, 40)]
    teacher = CrossEncoderTeacher(cross_encoder_onnx_path, batch_size=4)
    undisturbed = score_pairs(teacher, pairs, show_progress=False)
    forward, calls = teacher._engine._forward, []

    def dies(rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(rows)

    monkeypatch.setattr(teacher._engine, "_forward", dies)
    with ScoreStore(":memory:") as store:
        with pytest.raises(KeyboardInterrupt):
            score_pairs(teacher, pairs, store=store, show_progress=False)
        assert store.count() == 16
        assert score_pairs(teacher, pairs, store=store, show_progress=False).tobytes() == undisturbed.tobytes()
        assert sum(calls[5:]) == len(pairs) - 16


def test_what_was_learnt_is_told(cross_encoder_onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that counts cut pairs itself tokenises all of them again; a warm store must not change the number."""
    teacher, calls = CrossEncoderTeacher(cross_encoder_onnx_path, max_length=32), []
    count = teacher.token_lengths
    monkeypatch.setattr(teacher, "token_lengths", lambda pairs: calls.append(len(pairs)) or count(pairs))
    pairs = [("query", "short"), ("query", "long " * 50), ("query", "short")]
    with ScoreStore(":memory:") as store:
        for number in (1, 2):
            found = score_candidates(teacher, pairs, [1, 2], store=store, show_progress=False)
            assert (found.different, found.cut, calls) == (2, 1, [2] * number)
            assert repr(found) == "Scored(3 scores of 2 different pairs, 1 of them cut to the teacher's length)"
        score_pairs(teacher, pairs, store=store, show_progress=False)
        assert len(calls) == 2, "nobody asked"
    with pytest.raises(ValueError, match="The lists have 2 documents, and there are 3 pairs"):
        score_candidates(teacher, pairs, [1, 1], show_progress=False)


def test_a_fast_teacher_waits_for_few_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit for each chunk took ten times as long as a teacher that costs nothing; a slow one keeps each chunk."""
    teacher = CallableTeacher(lambda query, document: len(document), name="length", version="1")
    commits = []
    with ScoreStore(":memory:") as store:
        put = store.put
        monkeypatch.setattr(store, "put", lambda *given: commits.append(len(given[2])) or put(*given))
        monkeypatch.setattr(scoring, "_SECONDS_A_PAIR", 1.0)  # or a busy machine makes any teacher slow
        score_pairs(teacher, make_pairs(80), store=store, show_progress=False, chunk_size=8)
        assert commits == [80]
        monkeypatch.setattr(scoring, "_SECONDS_A_PAIR", 0.0)
        score_pairs(teacher, make_pairs(80, seed=1), store=store, show_progress=False, chunk_size=8)
        assert commits == [80] + [8] * 10


def test_a_quick_teacher_goes_on_while_its_scores_are_written(tmp_path: Path) -> None:
    """The disk cost a GPU a tenth of its time; all is there in the end, and an error of the disk is one of the run."""
    pairs, seen = make_pairs(4_000), []

    class Quick(BatchTeacher):
        def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            time.sleep(4e-4 * len(pairs))
            seen.append({thread.name for thread in threading.enumerate()})
            if len(self.calls) == 6:
                with sqlite3.connect(tmp_path / "scores") as other:
                    other.execute("DROP TABLE scores")
            return super().score(pairs)

    with ScoreStore(tmp_path / "scores") as store:
        expected = score_pairs(Quick(), pairs[:200], store=store, show_progress=False, chunk_size=40)
        assert store.get(Quick().identity, pairs[:200]).tobytes() == expected.tobytes()
        assert any("st_wkl-store" in name for names in seen for name in names), "written in between"
        with pytest.raises(ScoreStoreError, match="no such table"):
            score_pairs(Quick(), pairs, store=store, show_progress=False, chunk_size=8)
        assert len(seen) < 250, "the run went on without its store"


def test_lists_of_a_teacher_must_be_as_many() -> None:
    """One list less, and all that follow would have the scores of their neighbours."""
    teacher = Lists([1.0, 2.0])
    teacher.score_lists = lambda lists, **_: [[1.0, 2.0]]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returned 1 lists of scores for 2 lists of documents"):
        score_lists(teacher, [("a", ["b", "c"]), ("none", []), ("b", ["b", "c"])], show_progress=False)
    with pytest.raises(TypeError, match="EnsembleTeacher scores whole lists: use score_lists"):
        score_pairs(EnsembleTeacher([teacher, BatchTeacher()]), [("a", "b")], show_progress=False)  # type: ignore[arg-type]


class Constant:
    """A teacher that returns what it is given."""

    identity = {"model": "constant"}  # noqa: RUF012

    def __init__(self, output: Any) -> None:
        self.output = output

    def score(self, pairs: Sequence[tuple[str, str]]) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (["1.0", "2.0"], "np.str_('1.0')"),
        (np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"), "datetime64"),
        (np.array([1, 2], dtype="timedelta64[s]"), "timedelta64"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), "a masked value"),
        (np.array([1 + 1j, 2]), "complex128"),
        (torch.tensor([1 + 1j, 2]), "complex64"),
        ([None, 1.0], "None"),
        ({1.0, 2.0}, "set"),
        ([[1.0], [1.0, 2.0]], "list"),
        ([1.7e9 + 1, 1.0], "1700000001"),
        ([-1e4, 1.0], "-10000"),
        ([float(torch.finfo(torch.float32).min), 1.0], "-3.4028234663"),
    ],
    ids=["text", "dates", "times", "masked", "complex", "tensor", "none", "set", "ragged", "large", "mask", "lowest"],
)
def test_what_is_no_score_is_named(output: Any, shown: str) -> None:
    """NumPy makes numbers of most things; a date, a masked value or 1.7e9 in float32 is no score of that pair."""
    batched = CallableTeacher(lambda _: output, name="constant", version="1", batched=True)
    for teacher in (Constant(output), batched):
        with pytest.raises(ValueError, match=r"query 'a' and document 'b'|for 2 pairs") as error:
            score_pairs(teacher, [("a", "b"), ("a", "c")], show_progress=False)
        assert shown in str(error.value)
    with ScoreStore(":memory:") as store:
        if shown in ("-10000", "1700000001"):
            store.put(Constant.identity, [("a", "b")], np.array(output[:1], np.float32))
            with pytest.raises(ValueError, match="query 'a' and document 'b'"):
                score_pairs(Constant([0.0, 0.0]), [("a", "b"), ("a", "c")], store=store, show_progress=False)


@pytest.mark.parametrize("kind", ["bfloat16", "gradient", "items", "object", "int"])
def test_scores_of_every_number_type_are_taken(kind: str) -> None:
    """A teacher on a GPU returns what its model computes in; numpy has no bfloat16, and refuses a gradient."""
    outputs: dict[str, Any] = {
        "bfloat16": torch.tensor([1.5, 2.0], dtype=torch.bfloat16),
        "gradient": torch.tensor([1.5, 2.0], requires_grad=True),
        "items": [torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(2.0, requires_grad=True)],
        "object": np.array([1.5, np.float64(2.0)], dtype=object),
        "int": [1, 2],
    }
    found = score_pairs(Constant(outputs[kind]), [("a", "b"), ("a", "c")], show_progress=False)
    assert found.tolist() == ([1.0, 2.0] if kind == "int" else [1.5, 2.0])
    lists = score_lists(Lists(outputs[kind]), [("a", ["b", "c"])], show_progress=False)
    assert lists[0].tolist() == found.tolist()


class Lists(Constant):
    """The same as a teacher of lists."""

    def score_lists(self, lists: Any, **_: Any) -> Any:
        return [self.output for _ in lists]
