"""A language model as a judge is asked fairly, answers strictly, and what it answered is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_wkl.data import ChatListTeacher, ChatPairwiseTeacher, DistillationDatasetBuilder, ScoreStore
from st_wkl.data.endpoint import ModelChanged
from st_wkl.data.judge import PAIRWISE_PROMPT
from st_wkl.data.pairwise import dataset_preferences
from st_wkl.data.scoring import score_lists
from st_wkl.data.teacher import RemoteError
from st_wkl.pipeline import RunConfig, steps
from tests.helpers.animals import WordOverlap, small_collection
from tests.helpers.score_server import ScoreServer


def words(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Score by words in common, and by length where these are equal."""
    return [len({*q.lower().split()} & {*d.lower().split()}) - 0.01 * len(d) for q, d in pairs]


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    with ScoreServer(words) as running:
        yield running


def a_judge(server: ScoreServer, **options: Any) -> ChatPairwiseTeacher:
    return ChatPairwiseTeacher(server.url, **{"timeout": 2.0, "give_up_after": 10.0} | options)


LISTS = [
    (f"do cats like {thing}", [f"cats like {other}" for other in ["fish", "meat", "fruit", "water"]]) for thing in "ab"
]


def test_both_orders_are_asked_and_averaged(server: ScoreServer, caplog: pytest.LogCaptureFixture) -> None:
    """Models like what is shown first: by how much has to fall out, and to be known."""
    server.first_place = 1.5
    judge = a_judge(server)
    asked = ("red cat", "a red cat", "a dog that is blue")
    sigmoid = 1 / (1 + np.exp(-(words([asked[:2]])[0] - words([(asked[0], asked[2])])[0] + np.array([1.5, -1.5]))))
    assert judge.prefer(*([text] for text in asked)) == pytest.approx([sigmoid.mean()], abs=1e-6)
    assert judge.order_bias == {
        "asked": 1,
        "reversed": 0,
        "first_place": pytest.approx(sigmoid[0] - sigmoid[1], abs=1e-5),
    }
    prompt = PAIRWISE_PROMPT.format(query=asked[0], first=asked[2], second=asked[1])
    assert prompt in [body["messages"][0]["content"] for body in server.requests]
    assert server.requests[-1] | {"max_tokens": 1, "logprobs": True, "temperature": 0} == server.requests[-1]
    server.first_place = 9.0
    a_judge(server).prefer(["red"] * 20, [f"red {n}" for n in range(20)], [f"red {n}{n}" for n in range(20)])
    assert "answers say more about places than about documents" in caplog.text


def test_preferences_are_kept_one_by_one(server: ScoreServer, tmp_path: Path) -> None:
    """A judge of seconds an answer is killed in a chunk of 512: what it has answered is paid for."""
    judge, scores = a_judge(server, concurrency=1), [np.arange(4.0) for _ in LISTS]
    server.faults += [""] * 7 + ["401"]
    with ScoreStore(tmp_path / "scores.db") as store:
        with pytest.raises(RemoteError, match=r"401.*query 'do cats like .' and documents"):
            dataset_preferences(judge, LISTS, scores, store=store, show_progress=False)
        assert 3 <= store.count() <= 4
        column, said = dataset_preferences(judge, LISTS, scores, store=store, show_progress=False)
    assert (len(column[0]), said["order_bias"]["asked"], said["pairs"]) == (6, 12, 12)
    assert said["teacher"]["prompt"] == PAIRWISE_PROMPT
    kept = {pair: count for pair, count in server.answered.items() if pair[0] == LISTS[0][0]}
    assert sum(count > 1 for count in kept.values()) <= 1, "the one half of a pair whose other half had failed"


def test_an_answer_that_is_neither_is_an_error(server: ScoreServer) -> None:
    """A model that begins to talk has said nothing of the documents."""
    judge = a_judge(server)
    server.faults += ["talk"] * 20
    with pytest.raises(
        RemoteError, match=r"'A' and 'B' have a probability of 0.000 together.*'Sure' 1.00.*query 'red'"
    ):
        judge.prefer(["red"], ["a red"], ["a blue"])
    with pytest.raises(ValueError, match=r"prompt does not have \{second\}"):
        a_judge(server, prompt="{query} {first}")
    with pytest.raises(ValueError, match="prompt cannot be filled in"):
        a_judge(server, prompt="{query} {first} {second} {third}")


def test_a_judge_that_changes_stops(server: ScoreServer) -> None:
    """Preferences of two models are no preferences of one."""
    judge = a_judge(server)
    server.model = "another"
    with pytest.raises(ModelChanged, match="another"):
        judge.prefer(["red"], ["a red"], ["a blue"])


def test_lists_are_ranked_in_windows(server: ScoreServer) -> None:
    """Positives stand first in a builder's lists: shown so, a judge that copies would look perfect."""
    teacher = ChatListTeacher(server.url, window=6, step=3)
    documents = [f"{'red ' * n}{'x' * n}" for n in range(1, 13)]
    query = "red " + " ".join("x" * n for n in range(12))
    (scores,) = teacher.score_lists([(query, documents)], show_progress=False)
    expected = words([(query, document) for document in documents])
    best = np.argsort(-np.array(expected))[:3].tolist()
    assert np.argsort(-scores)[:3].tolist() == best, "one pass brings them up"
    assert sorted(scores) == [-float(n) for n in reversed(range(12))]
    (turned,) = teacher.score_lists([(query, documents[::-1])], show_progress=False)
    assert turned[::-1].tolist() == scores.tolist(), "where a document stands in the list does not matter"
    assert teacher.score_lists([("one", ["alone"]), ("none", [])], show_progress=False)[0].tolist() == [0.0]


def test_what_is_no_permutation_is_asked_again_once(server: ScoreServer, caplog: pytest.LogCaptureFixture) -> None:
    """Repaired in silence, an answer that says nothing would be learnt."""
    teacher = ChatListTeacher(server.url, concurrency=1)
    server.faults += ["talk"]
    found = teacher.score_lists(LISTS[:1], show_progress=False)[0]
    assert (sorted(found), teacher.unparsed, teacher.unranked) == ([-3, -2, -1, 0], 1, 0)
    assert server.requests[-1]["messages"][-1]["content"].startswith("That does not name each of [1] to [4] once")
    server.faults += ["talk", "talk"]
    assert teacher.score_lists(LISTS[:1], show_progress=False)[0].tolist() == [0, 0, 0, 0]
    assert "3 answers were no permutation and asked for again; 1 of 2 lists have no order" in caplog.text
    server.faults += ["talk"] * 100
    with pytest.raises(RemoteError, match=r"ranks .* lists; the last without an order is of query 'do cats"):
        teacher.score_lists(LISTS * 20, show_progress=False)


def test_lists_are_kept(server: ScoreServer, tmp_path: Path) -> None:
    """A listwise judge is the dearest of all teachers, and a store held no lists."""
    teacher = ChatListTeacher(server.url, concurrency=1, timeout=2.0)
    with ScoreStore(tmp_path / "scores.db") as store:
        server.faults += ["", "400"]
        with pytest.raises(RemoteError, match=r"status 400.*query"):
            score_lists(teacher, LISTS, store=store, show_progress=False)
        assert store.count() == 4
        found = score_lists(teacher, LISTS, store=store, show_progress=False)
        asked = len(server.requests)
        assert [one.tolist() for one in score_lists(teacher, LISTS, store=store, show_progress=False)] == [
            one.tolist() for one in found
        ]
        shorter = [(query, documents[:3]) for query, documents in LISTS]
        score_lists(teacher, shorter, store=store, show_progress=False)
    assert len(server.requests) - asked == 2, "another list is another question"
    assert set(server.answered.values()) == {1}


def test_a_build_and_a_configuration_take_both(
    server: ScoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are for datasets, and the command line makes these, too."""
    caplog.set_level(logging.WARNING)
    parts = {"collection": {"source": "c"}, "student": {"model": "s"}, "output": "o"}
    told = {"url": server.url, "api": "chat", "timeout": 9, "pairwise": server.model, "pairwise_url": server.url}
    config = RunConfig.from_dict(parts | {"teacher": told})
    teacher = steps.load_teacher(config.teacher)
    options = (config.collection, config.candidates, config.teacher, config.selection)
    builder = steps.make_builder(small_collection(), ["q0-0", "q1-1"], None, teacher, *options)
    builder.store = tmp_path / "scores.db"
    dataset = builder.build(False)
    assert dataset.provenance["teacher"]["kind"] == "listwise chat"
    assert dataset.provenance["preferences"]["teacher"]["kind"] == "pairwise chat"
    assert dataset.provenance["preferences"]["order_bias"]["asked"] > 0
    plain = DistillationDatasetBuilder(small_collection(), WordOverlap(), query_ids=["q0-0"], pairwise=a_judge(server))
    plain.store = ":memory:"
    assert plain.build(False).train["preferences"][0]
