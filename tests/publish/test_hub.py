"""Pushing must be private, whole, honest about what is there, and must give back the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_hub import EXPIRED, READING, WRITING, FakeHub

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hub")]


@pytest.fixture(scope="module")
def session(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run hub_session.py against a Hub; return the Hub, what the session reports and what it printed."""
    base = tmp_path_factory.mktemp("hub")
    (base / "work").mkdir()
    with FakeHub() as hub:
        hub.create("me/foreign")
        hub.commit("me/foreign", {"model.safetensors": b"theirs", "README.md": b"# Theirs\n"}, "Add it", "somebody")
        hub.create("other/model", private=False)
        hub.commit("other/model", {"README.md": b"# Theirs\n"}, "Add it", "other")
        hub.create("me/edited", "dataset")
        hub.commit("me/edited", {"README.md": b"# Edited on the web\n"}, "Update README.md", "somebody", "dataset")
        run = subprocess.run(
            [sys.executable, "-m", "tests.helpers.hub_session", str(tiny_bert_path), str(base / "work")],
            env=hub.environment(base / "home"),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        yield hub, json.loads(run.stdout.splitlines()[-1]), run.stdout + run.stderr


@pytest.fixture
def hub(session: Any) -> FakeHub:
    return session[0]


@pytest.fixture
def report(session: Any) -> dict[str, Any]:
    return session[1]


def test_students_come_back_the_same(report: dict[str, Any]) -> None:
    """Whoever loads the student from the Hub must get its very embeddings, whatever form it was pushed in."""
    for kind in ("dense", "sparse", "multi-vector", "reranker", "adapter", "merged"):
        assert report[kind]["same"], kind
    assert report["merged"]["as_adapter"], "and a merged student those of its adapter"
    assert report["adapter"]["differs"], "the adapter must do something, or the test shows nothing"


def test_cards_come_back_the_same(report: dict[str, Any]) -> None:
    """The card on the Hub is the card here, with examples that load from there."""
    assert report["dense"]["card"]
    assert report["dataset"]["card"]
    assert "base_model: me/dense\nbase_model_relation: adapter" in report["adapter"]["card"]


def test_datasets_come_back_the_same(report: dict[str, Any]) -> None:
    """All three configs, through our reader and through plain datasets."""
    dataset = report["dataset"]
    assert dataset["rows"]
    assert dataset["provenance"]
    assert dataset["configs"] == {"train": True, "queries": True, "documents": True}


def test_only_the_model_is_uploaded(hub: FakeHub, report: dict[str, Any]) -> None:
    """Checkpoints, optimizer states and training texts must never leave the machine by accident."""
    files = hub.repos["model", "me/dense"].files()
    assert {"model.safetensors", "modules.json", "README.md", "distillation.json"} <= set(files)
    assert set(report["dense"]["left_out"]) == {
        "checkpoint-10/model.safetensors",
        "notes.txt",
        "optimizer.pt",
        "training_args.bin",
        "triplets.jsonl",
    }
    for repo in hub.repos.values():
        assert not any(b"secret training text" in content for content in repo.files().values())
    assert "## Training Details" in report["reranker"]["card"]
    assert report["dense"]["exposure"], "the hashes must go: whoever evaluates the student needs them"


def test_nothing_of_the_machine_is_uploaded(hub: FakeHub, tiny_bert_path: Path) -> None:
    """The base model of a local student is a path with somebody's name in it, in four different files."""
    for (_, name), repo in hub.repos.items():
        for path, content in repo.files().items():
            assert str(tiny_bert_path.parent).encode() not in content, (name, path)


def test_no_token_is_written_anywhere(session: Any) -> None:
    """A token belongs into the header of a request and nowhere else, at the most talkative log level too."""
    hub, report, output = session
    assert f"Bearer {WRITING}" in hub.authorizations
    for token in (WRITING, READING, EXPIRED):
        assert token not in output
        assert token not in json.dumps(report)
        for repo in hub.repos.values():
            assert not any(token.encode() in content for content in repo.files().values())


def test_private_unless_public(hub: FakeHub, report: dict[str, Any]) -> None:
    """A student may hold what its data's licence does not allow to publish."""
    assert hub.repos["model", "me/dense"].private
    assert hub.repos["dataset", "me/dataset"].private
    assert not hub.repos["model", "me/shown"].private
    assert report["cli"]["private"] is False
    assert report["everybody"].startswith("PermissionError: other/model is public")


def test_the_same_again_is_no_new_commit(hub: FakeHub, report: dict[str, Any]) -> None:
    """A pipeline that runs twice must leave one commit."""
    assert report["dense"]["again"] == report["dense"]["url"]
    assert len(hub.repos["model", "me/dense"].history("main")) == 2


def test_files_of_an_earlier_push_do_not_mix_with_this_one(report: dict[str, Any]) -> None:
    """An adapter left beside the merged weights would be applied to them once more."""
    assert set(report["merged"]["removed"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_work_of_others_is_safe(hub: FakeHub, report: dict[str, Any]) -> None:
    """Neither a repository of somebody else's nor an edit on the web is overwritten; a pull request is the way."""
    for name in ("foreign", "edited"):
        assert report[name].startswith(f"FileExistsError: me/{name} has content that was not pushed with st_wkl")
        assert "--pr" in report[name]
    theirs = hub.repos["model", "me/foreign"]
    assert theirs.files()["model.safetensors"] == b"theirs"
    assert report["pull_request"].endswith("/me/foreign/discussions/1")
    assert theirs.files("refs/pr/1")["model.safetensors"] != b"theirs"
    assert report["elsewhere"].endswith("/other/model/discussions/1")
    assert set(hub.repos["model", "other/model"].files()) == {".gitattributes", "README.md"}
    assert "/datasets/me/dataset/" in report["cli_pull_request"]
    assert hub.repos["dataset", "me/edited"].files()["README.md"] == b"# Edited on the web\n"


def test_refusals_say_what_to_do(hub: FakeHub, report: dict[str, Any]) -> None:
    """An expired token, a read-only one, none, and somebody else's name: each has another remedy."""
    for name, words in {
        "expired": ("PermissionError", "expired", "hf auth login", "nothing was sent"),
        "reading": ("PermissionError", "may not write to me/forbidden", "role `write`", "nothing was sent"),
        "none": ("PermissionError", "not logged in", "hf auth login", "Nothing was sent"),
        "strangers": ("PermissionError", "may not write to other/new", "'other'"),
        "nobody": ("ValueError", "does not exist"),
        "cli_dataset": ("--dataset",),
        "without_base": ("ValueError", "is an adapter of", "--base-model"),
    }.items():
        message = report[name] if name in report else report["adapter"][name]
        for word in words:
            assert word in message, (name, message)
    assert report["files_stay"]
    assert ("model", "me/forbidden") not in hub.repos


def test_what_is_broken_here_never_reaches_the_hub(hub: FakeHub, report: dict[str, Any]) -> None:
    """A card that the Hub refuses would fail after the upload, and half a file would fail at somebody else's."""
    assert "README.md: the front matter cannot be read" in report["broken_card"]
    assert "README.md: the Hub does not accept the front matter" in report["refused_card"]
    assert "license" in report["refused_card"]
    assert "model.safetensors is missing or cut off" in report["cut_weights"]
    assert "training_texts.json holds something other than hashes" in report["no_hashes"]
    assert report["not_stale"] == ""
    assert report["stale"].startswith("ValueError: The results in README.md are of other weights")
    assert report["cut_results"].startswith("ValueError")
    assert "results.json is damaged or incomplete" in report["cut_results"]
    assert ("model", "me/broken") not in hub.repos


def test_a_cut_leaves_nothing_or_something_to_go_on_from(hub: FakeHub, report: dict[str, Any]) -> None:
    """After a broken connection the user must know what the repository holds, and the same command must finish."""
    for name in ("cut_upload", "cut_before_commit"):
        assert report[name].startswith("ConnectionError: The connection to the Hub broke"), report[name]
        assert "nothing of this push is visible in me/cut" in report[name]
        assert "Run the same command again" in report[name]
    assert report["cut_after_commit"] == "", "the commit happened; that its answer was lost is no error"
    assert report["after_cuts"] == {"error": "", "same": True}
    repo = hub.repos["model", "me/cut"]
    assert [commit.title for _, commit in repo.history("main")] == ["Add a student", "initial commit"]
    assert report["short_break"] == "", "huggingface_hub tries again by itself"


def test_large_files_are_sent_once(hub: FakeHub) -> None:
    """What arrived before the cut must not travel again."""
    arrived = [path for method, path in hub.requests if method == "POST" and path.startswith("/_lfs/verify")]
    assert len(arrived) == len(set(arrived)) == len(hub.lfs)
