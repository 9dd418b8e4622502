"""A reranker on a server teaches as it does in process, whatever the server and the network do in between."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_wkl.data import DistillationDatasetBuilder, RemoteTeacher, ScoreStore, estimate_scoring, score_pairs
from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.endpoint import ModelChanged, _seconds
from st_wkl.data.teacher import RemoteError
from st_wkl.pipeline import RunConfig
from st_wkl.pipeline.stages import ALL, Parts
from tests.helpers.animals import small_collection, write_beir
from tests.helpers.command import st_wkl
from tests.helpers.score_server import FAULTS, PATHS, ScoreServer

TINY = Path(__file__).resolve().parents[1] / "formats" / "teacher"
KEY = "sk-marker-0123456789abcdef"


def words(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Score as a reranker that counts words, from -4 to 5."""
    return [3.0 * len({*q.lower().split()} & {*d.lower().split()}) - 4 + 0.01 * (len(d) % 97) for q, d in pairs]


def questions(queries: int = 12, documents: int = 20) -> list[tuple[str, str]]:
    return [
        (f"query {q} red", f"document {d} {'red' * (d % 3)} {'x' * d}")
        for q in range(queries)
        for d in range(documents)
    ]


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    with ScoreServer(words) as running:
        yield running


def a_teacher(server: ScoreServer, **options: Any) -> RemoteTeacher:
    given = {"model": server.model, "revision": server.revision, "timeout": 2.0, "give_up_after": 20.0}
    return RemoteTeacher(server.url, **given | {"api": server.api} | options)


@pytest.fixture(scope="module")
def tiny() -> CrossEncoderTeacher:
    return CrossEncoderTeacher(TINY)


@pytest.mark.parametrize("api", PATHS)
def test_a_build_through_each_protocol_is_the_one_in_process(
    api: str, tiny: CrossEncoderTeacher, tmp_path: Path
) -> None:
    """A teacher that moves to a server must not become another one, and each API has fields and orders of its own."""
    here = DistillationDatasetBuilder(small_collection(), tiny, store=tmp_path / "here.db").build(False)
    with ScoreServer(tiny.score, api) as server:
        teacher = a_teacher(server)
        there = DistillationDatasetBuilder(small_collection(), teacher, store=tmp_path / "there.db").build(False)
    assert there.train["document_ids"] == here.train["document_ids"]
    assert np.allclose(np.concatenate(there.train["scores"]), np.concatenate(here.train["scores"]), atol=1e-5)
    assert {count for pair, count in server.answered.items() if pair[0] in small_collection().queries.values()} == {1}
    assert "127.0.0.1" not in json.dumps(there.provenance), "where it was is not what it was"
    assert there.provenance["teacher"]["model"] == server.model


def test_what_a_server_says_of_itself_is_its_identity() -> None:
    """By the address alone, scores of tomorrow's model would be taken for today's."""
    with ScoreServer(words, "tei") as tei, ScoreServer(words) as vllm:
        first = RemoteTeacher(tei.url + "/rerank")
        told = {"kind": "remote", "model": "small-reranker", "revision": "1234abcd", "api": "tei", "dtype": "float32"}
        assert first.identity == {**told, "max_length": 512, "activation": "identity"}
        second = RemoteTeacher(vllm.url + "/v1/", revision="7", concurrency=2, timeout=9)
        assert second.identity["model"] == "small-reranker"
        assert (second.api, second.identity["revision"], second.identity["max_length"]) == ("vllm", "7", 512)
        assert RemoteTeacher(vllm.url, max_length=64).identity["max_length"] == 64
        assert vllm.requests[-1]["truncate_prompt_tokens"] == 64
        with pytest.raises(RemoteError, match=r"no model 'other'\. It has: 'small-reranker'"):
            RemoteTeacher(vllm.url, "other")
        with pytest.raises(RemoteError, match="It has 'small-reranker', not 'other'"):
            RemoteTeacher(tei.url, "other", api="tei")
        with pytest.raises(ValueError, match="revision '1234abcd' of small-reranker, not 'main'"):
            RemoteTeacher(tei.url, revision="main")
        with pytest.raises(ValueError, match="has many models: give model"):
            RemoteTeacher(tei.url, api="cohere")
        with pytest.raises(ValueError, match="max_length cannot be told"):
            RemoteTeacher(tei.url, max_length=64)


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", f"http://user:{KEY}@x", f"https://x?key={KEY}", "http://"])
def test_an_address_with_a_secret_is_refused(url: str) -> None:
    """It would be written down with the address."""
    with pytest.raises(ValueError, match="url must") as caught:
        RemoteTeacher(url, "model", api="cohere")
    assert KEY not in str(caught.value)


def test_activated_scores_are_said_and_turned_back(caplog: pytest.LogCaptureFixture) -> None:
    """Between 0 and 1 little is left of the differences; a server may ignore the flag that asks for raw scores."""
    pairs = questions(2)
    with ScoreServer(words) as server:
        server.activated = True
        teacher = a_teacher(server)
        assert "though raw ones were asked for (use_activation=false): they are turned back into logits" in caplog.text
        assert teacher.identity["activation"] == "sigmoid, inverted"
        assert np.allclose(teacher.score(pairs), words(pairs), atol=1e-5)
        as_they_are = a_teacher(server, activation="identity")
        assert as_they_are.identity["activation"] == "identity"
        assert as_they_are.score(pairs).max() <= 1
        server.activated = False
    with (
        ScoreServer(words, "jina") as server,
        pytest.raises(ValueError, match="activation is sigmoid, and the server gives"),
    ):
        a_teacher(server, activation="sigmoid")
    with ScoreServer(lambda pairs: [40.0 if "red" in d else -1.0 for _, d in pairs], "jina") as server:
        server.activated = True
        teacher = a_teacher(server)
        teacher.score(pairs)
        assert teacher.saturated_scores == sum("red" in document for _, document in pairs)
        assert "scores so far are 0 or 1" in caplog.text


def test_a_strict_server_is_asked_without_flags(caplog: pytest.LogCaptureFixture) -> None:
    """The common API has no flag for raw scores: some servers take one, some refuse the request for it."""
    with ScoreServer(words, "openai-rerank") as server:
        server.strict = True
        assert np.allclose(a_teacher(server).score(questions(1)), words(questions(1)))
        assert "raw_scores" not in server.requests[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_that_passes_is_survived(fault: str, server: ScoreServer, tmp_path: Path) -> None:
    """A night's run must not end at one bad answer, nor take it for one."""
    teacher, pairs = a_teacher(server, concurrency=2, timeout=1.0), questions(3)
    server.faults += [fault, fault]
    with ScoreStore(tmp_path / "scores.db") as store:
        assert np.allclose(score_pairs(teacher, pairs, store=store, show_progress=False), words(pairs))
    assert all(server.answered[pair] == 1 for pair in pairs)


@pytest.mark.parametrize("fault", ["nan", "500", "half", "413", "422", "short"])
def test_a_pair_that_always_fails_is_named_and_the_others_kept(fault: str, server: ScoreServer, tmp_path: Path) -> None:
    """One document in a million that a server fails at: which, and is the rest lost?"""
    teacher, pairs = a_teacher(server, concurrency=2), questions(4)
    pairs[37] = (pairs[37][0], "the document")
    server.poison[pairs[37][1]] = fault
    with ScoreStore(tmp_path / "scores.db") as store:
        with pytest.raises(RemoteError) as caught:
            score_pairs(teacher, pairs, store=store, show_progress=False)
        assert f"It was asked about query {pairs[37][0]!r} and document {pairs[37][1]!r}" in str(caught.value)
        kept = store.get(teacher.identity, pairs)
        answered = [server.answered[pair] == 1 for pair in pairs]
        assert np.isfinite(kept).tolist() == answered
        assert sum(answered) >= 10
        server.poison.clear()
        assert np.allclose(score_pairs(teacher, pairs, store=store, show_progress=False), words(pairs))
    assert all(server.answered[pair] == 1 for pair in pairs), "nothing that was answered was asked twice"


def test_twenty_random_faults(server: ScoreServer, tmp_path: Path) -> None:
    """Faults come together, and at any place."""
    chance, pairs = random.Random(3), questions(60, 10)
    teacher = a_teacher(server, timeout=1.0)
    faults = [chance.choice(FAULTS) for _ in range(20)]
    server.faults += [fault for one in faults for fault in (one, *[""] * chance.randrange(3))]
    with ScoreStore(tmp_path / "scores.db") as store:
        assert np.allclose(score_pairs(teacher, pairs, store=store, show_progress=False), words(pairs))
        assert np.isfinite(store.get(teacher.identity, pairs)).all()
    assert not server.faults
    assert all(server.answered[pair] == 1 for pair in pairs)


def test_too_long_is_said(server: ScoreServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that refuses a long pair must say which; one that cuts it says nothing at all."""
    teacher = a_teacher(server)
    long = [("red", "red " * 2_000), ("red", "short")]
    teacher.score(long)
    assert "1 of 2 pairs have more than 6 characters for each of the 512 tokens" in caplog.text
    server.longest = 1_000
    with pytest.raises(RemoteError, match=r"status 413.*less than 512 tokens.*\(8,000 characters\)"):
        teacher.score(long)


@pytest.mark.parametrize("api", ["vllm", "tei", "jina"])
def test_a_model_that_changes_in_the_middle_stops_the_run(api: str, tmp_path: Path) -> None:
    """Half of a dataset by one model and half by another is worse than none."""
    with ScoreServer(words, api) as server, ScoreStore(tmp_path / "scores.db") as store:
        teacher, pairs = a_teacher(server, concurrency=1), questions()

        def other(asked: Sequence[tuple[str, str]]) -> list[float]:
            return [1.5 - score for score in words(asked)]

        def changing(asked: Sequence[tuple[str, str]]) -> list[float]:
            if len(server.answered) > 60:
                server.score = other
            return words(asked)

        server.score = changing
        with pytest.raises(ModelChanged, match="was changed in the middle"):
            score_pairs(teacher, pairs, store=store, show_progress=False)
        assert np.isnan(store.get(teacher.identity, pairs)).all(), "nothing since the last look is kept"
        server.score, server.model = words, "another"
        if api != "jina":
            with pytest.raises((ModelChanged, RemoteError), match=r"another|It has"):
                teacher.score(pairs)


def test_another_version_under_the_same_name_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Companies renew a model and keep its name: next month's scores would be mixed with this month's."""
    for api, activated in (("jina", False), ("cohere", True)):
        with ScoreServer(words, api) as server, ScoreStore(tmp_path / f"{api}.db") as store:
            server.activated = activated
            score_pairs(a_teacher(server, revision=None), questions(1), store=store, show_progress=False)
            assert "does not say which revision it has" in caplog.text
            score_pairs(a_teacher(server, revision=None), questions(2), store=store, show_progress=False)
            server.score = lambda pairs: [0.5 * score + 1 for score in words(pairs)]
            renewed = a_teacher(server, revision=None)
            with pytest.raises(ModelChanged, match="another version that answered under its name"):
                score_pairs(renewed, questions(3), store=store, show_progress=False)
            score_pairs(a_teacher(server, revision="2"), questions(3), store=store, show_progress=False)


@pytest.mark.slow
def test_a_run_goes_on_when_its_server_is_gone(
    server: ScoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has scored gives the GPU back, and trains: a run must not ask for the server again."""
    folder = write_beir(small_collection(), tmp_path / "animals")
    values = {"collection": {"source": str(folder)}, "student": {"model": "s"}, "output": str(tmp_path / "run")}
    told = {"url": server.url, "give_up_after": 1.0, "store": str(tmp_path / "scores.db")}
    parts = Parts(RunConfig.from_dict(values | {"teacher": told}), show_progress=False)
    parts.output.mkdir()
    for stage in ALL[:2]:
        stage.work(parts)
    inputs = ALL[1].inputs(parts)
    server.__exit__()
    again = Parts(RunConfig.from_dict(values | {"teacher": told}), show_progress=False)
    assert ALL[1].inputs(again) == inputs
    assert "The dataset that is there is taken for its work" in caplog.text
    parts.dataset.rename(tmp_path / "elsewhere")
    with pytest.raises(RemoteError, match="cannot be reached"):
        ALL[1].inputs(Parts(again.config, show_progress=False))


def test_how_long_to_wait() -> None:
    """The header is a number or a date, and servers write other things, too."""
    later = formatdate(time.time() + 90, usegmt=True)
    found = [_seconds(text) for text in ("7", later, formatdate(0), "soon", "-3", None)]
    assert found == [7.0, pytest.approx(90, abs=3), 0.0, 0.0, 0.0, 0.0]


def test_a_key_is_nowhere(
    server: ScoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be in a log, a bug report, or a published dataset."""
    caplog.set_level(logging.DEBUG)
    for name in ("MY_KEY", "HF_TOKEN", "OPENAI_API_KEY", "COHERE_API_KEY", "JINA_API_KEY", "VOYAGE_API_KEY"):
        monkeypatch.setenv(name, f"{name}-{KEY}")
    for api in PATHS:
        with ScoreServer(words, api) as another:
            a_teacher(another).score(questions(1))
            assert another.keys == {""}, "a key of one company is nothing for another's server"
    server.key = f"MY_KEY-{KEY}"
    teacher = a_teacher(server, api_key_env="MY_KEY")
    dataset = DistillationDatasetBuilder(small_collection(), teacher, store=tmp_path / "scores.db").build(False)
    dataset.save(tmp_path / "dataset")
    assert f"Bearer MY_KEY-{KEY}" in server.keys
    server.key = "another"
    said = [repr(teacher), repr(vars(teacher)["_endpoint"]), json.dumps(teacher.identity), teacher.progress]
    began = time.monotonic()
    for options in ({"api_key_env": "MY_KEY"}, {}):
        with pytest.raises(RemoteError, match=r"status 401.*MY_KEY|status 401.*api_key_env") as caught:
            a_teacher(server, **options)
        said.append(str(caught.value))
    assert time.monotonic() - began < 5, "a refused key is not tried again"
    monkeypatch.setenv("MY_KEY", f"{KEY}\nx")
    monkeypatch.delenv("OPENAI_API_KEY")
    for name in ("MY_KEY", "OPENAI_API_KEY"):
        with pytest.raises(ValueError, match=name) as refused:
            a_teacher(server, api_key_env=name)
        said.append(str(refused.value))
    server.key = None
    server.faults += ["redirect"]
    with pytest.raises(RemoteError, match=r"points to http://other.example/score, where no key was sent"):
        teacher.score(questions(1))
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(KEY in text for text in [caplog.text, *said])
    assert not any(KEY.encode() in content for content in files)
    with pytest.raises(TypeError, match="cannot be sent to other processes"):
        score_pairs(teacher, questions(1), engine="pool", show_progress=False)


def test_requests_are_limited_and_counted(server: ScoreServer) -> None:
    """An account has limits and a price."""
    teacher = a_teacher(server, requests_per_minute=600, price_per_1000_requests=2.0, price_per_million_tokens=1000.0)
    began = time.monotonic()
    teacher.score(questions(20, 2))
    assert time.monotonic() - began > 1.5, "20 requests at 10 a second"
    assert teacher.progress.startswith("22 requests, cost ")  # with two looks at the model
    teacher = a_teacher(server, price_per_1000_requests=2.0, price_per_million_tokens=1000.0)
    estimate = estimate_scoring(teacher, questions(200, 2), sample_size=8)
    assert (estimate.requests, estimate.to_score) == (200, 400)
    assert estimate.tokens == pytest.approx(sum(len(json.dumps(body)) for body in server.requests[-200:]), rel=0.2)
    assert estimate.cost == pytest.approx(200 * 0.002 + estimate.tokens * 0.001)
    assert f"200 requests, cost {estimate.cost:,.2f}" in str(estimate)


def test_a_query_is_asked_about_in_one_request(server: ScoreServer) -> None:
    """Sorted by length, as for a local model, each request would have one document; some are billed by request."""
    teacher, pairs = a_teacher(server), questions(30, 40)
    random.Random(0).shuffle(pairs)
    score_pairs(teacher, pairs, chunk_size=100, show_progress=False)
    assert Counter(body["text_1"] for body in server.requests if body["text_1"].endswith("red")) == {
        query: 1 for query, _ in pairs
    }
    assert teacher.requests_for(pairs) == 30
    with ScoreServer(words, "tei") as small:
        small.at_once = 7
        teacher = a_teacher(small)
        assert np.allclose(teacher.score(pairs[:40]), words(pairs[:40]))
        assert max(len(body["texts"]) for body in small.requests) <= 7, "or each request would be refused first"


def test_a_server_that_is_not_there_is_told_soon(unused: int) -> None:
    """A wrong port is no restart."""
    with pytest.raises(RemoteError, match="cannot be reached"):
        RemoteTeacher(f"http://127.0.0.1:{unused}", "model", api="vllm", give_up_after=1.0)


@pytest.fixture
def unused() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_command_line_and_yaml_know_it(server: ScoreServer, tmp_path: Path) -> None:
    """What Python can be told, a command can be told; a dry run asks little and says what the whole would take."""
    folder = write_beir(small_collection(), tmp_path / "animals")
    line = [
        "build",
        folder,
        "--teacher-url",
        server.url,
        "--output",
        tmp_path / "out",
        "--store",
        tmp_path / "scores.db",
    ]
    code, out, err = st_wkl(*line, "--dry-run", "--price-per-1000-requests", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["requests"], told["cost"]) == (40, pytest.approx(0.08))
    code, out, err = st_wkl(*line, "--concurrency", "2")
    assert code == 0, err
    assert "RemoteTeacher(url, 'small-reranker', api='vllm')" not in out
    parts = {"collection": {"source": str(folder)}, "student": {"model": "s"}, "output": str(tmp_path / "run")}
    config = RunConfig.from_dict(parts | {"teacher": {"url": server.url}})
    assert config.teacher.models == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "teacher.model is missing"),
        ({"url": "http://x", "device": "cpu"}, "teacher.device means nothing for a teacher with a url"),
        ({"url": "http://x", "engine": "pool"}, "teacher.engine means nothing for a teacher with a url"),
        ({"url": "http://x", "model": ["a", "b"]}, "teacher.model means nothing for a teacher with a url"),
        ({"model": "m", "timeout": 3}, "teacher.timeout means nothing without a url"),
        ({"model": "m", "api": "tei"}, "teacher.api means nothing without a url"),
        (
            {"url": "http://x", "api": "chat", "max_length": 64},
            "teacher.max_length means nothing for a teacher with a url",
        ),
        ({"model": "m", "pairwise_url": "http://x"}, "teacher.pairwise_url means nothing without the model"),
        ({"url": "http://x", "concurrency": 0}, "teacher.concurrency must be 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(told: dict[str, Any], message: str) -> None:
    """A device for a model that is elsewhere would be ignored without a word."""
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict({"output": "o", "collection": {"source": "c"}, "student": {"model": "s"}, "teacher": told})


@pytest.mark.slow
def test_a_terminated_build_keeps_what_was_answered(server: ScoreServer, tmp_path: Path) -> None:
    """Batch systems and containers say SIGTERM before they kill: what was paid for until then is paid for once."""
    folder, store, output = write_beir(small_collection(), tmp_path / "animals"), tmp_path / "s.db", tmp_path / "out"
    server.seconds = 0.2
    words_of = [sys.executable, "-m", "st_wkl", "build", folder, "--teacher-url", server.url, "--store", store]
    command = [str(word) for word in [*words_of, "--concurrency", 2, "--output", output]]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(server.answered) < 60 and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "stopped; the same command goes on from here" in said
    answered = len(server.answered)
    with ScoreStore(store) as kept:
        assert kept.count() >= answered - 2 * 16, "all but the requests that were under way"
    server.seconds = 0.0
    assert subprocess.run(command, cwd=root, check=False).returncode == 0
    again = [
        pair for pair, count in server.answered.items() if count > 1 and pair[0] != "how many people live in Berlin"
    ]
    assert len(again) <= 2 * 16


@pytest.mark.slow
@pytest.mark.parametrize("api", ["vllm", "tei", "openai-rerank"])
def test_a_server_that_is_killed_and_started_again(
    api: str, unused: int, cross_encoder_onnx_path: Path, tmp_path: Path
) -> None:
    """Servers are restarted under a run of days: nothing is lost, nothing paid for twice, and the scores are equal."""
    model = cross_encoder_onnx_path if api == "vllm" else TINY  # one is enough of that size
    log, arguments = tmp_path / "answered", [api, str(unused), str(model)]
    command = [sys.executable, "-m", "tests.helpers.score_server", *arguments, str(log)]
    start = {"cwd": Path(__file__).resolve().parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    collection = small_collection()
    here = CrossEncoderTeacher(model, batch_size=1)
    expected = DistillationDatasetBuilder(collection, here, store=tmp_path / "here.db").build(False)
    running = [subprocess.Popen(command, **start)]
    try:
        _wait_for(unused)
        options = {"concurrency": 2, "give_up_after": 120, "activation": "identity"}
        teacher = RemoteTeacher(f"http://127.0.0.1:{unused}", **options)

        def kill_and_start() -> None:
            while not log.exists() or len(log.read_text().splitlines()) < 100:
                time.sleep(0.02)
            running[0].send_signal(signal.SIGKILL)
            running[0].wait()
            running.append(subprocess.Popen(command, **start))

        thread = threading.Thread(target=kill_and_start)
        thread.start()
        found = DistillationDatasetBuilder(collection, teacher, store=tmp_path / "there.db").build(False)
        thread.join()
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert len(running) == 2
    assert found.train["document_ids"] == expected.train["document_ids"]
    assert np.allclose(np.concatenate(found.train["scores"]), np.concatenate(expected.train["scores"]), atol=1e-5)
    asked = Counter(map(tuple, map(json.loads, log.read_text().splitlines())))
    again = [pair for pair, count in asked.items() if count > 1 and pair[0] != "how many people live in Berlin"]
    assert len(again) <= 2 * 16, "at most the two requests whose answers the kill met on the way"


def _wait_for(port: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not start")
