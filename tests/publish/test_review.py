"""MTEB's own code is the judge of an entry: its registry, its mock tasks, its zero-shot shares and its submission."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
from datasets import Dataset
from mteb.types import OutputDType
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from st_wkl.evaluation.identity import identified
from st_wkl.models import load_model
from st_wkl.publish.leaderboard import Submission, model_code, prepare
from st_wkl.publish.leaderboard_model import model_meta
from st_wkl.training.lora import merge
from tests.helpers.students import make_student
from tests.publish.test_leaderboard import COMMIT, FIELDS, executed, record, run_mteb

KINDS = ("static", "merged", "matryoshka", "router", "sparse", "multi-vector", "cross-encoder")
MATRYOSHKA = {"matryoshka_dims": [32, 16, 8]}
# What MTEB's tests of its models ask of every entry, and that a checkout with our files finds them.
JUDGE = """
import json, sys
import mteb
from mteb.models import ModelMeta
assert mteb.__file__.startswith(sys.argv[1]), mteb.__file__
for kind in sys.argv[2:]:
    name = f"lab-{kind}/student"
    meta = mteb.get_model_meta(name, "0123456789" * 4)
    assert meta.name and meta.revision and meta.name != meta.adapted_from
    assert meta.get_training_datasets()
    assert meta.n_embedding_parameters is not None
    assert meta in mteb.get_model_metas(model_types=meta.model_type, open_weights=True, modalities=["text"])
    again = ModelMeta.model_validate_json_resolved(json.dumps(meta.to_dict()))
    assert again.loader is meta.loader
    meta._check_requirements()
    print(kind, meta.openness_score)
"""


def static(path: Path, seed: int = 0) -> SentenceTransformer:
    return SentenceTransformer(
        modules=[StaticEmbedding(Tokenizer.from_file(str(path / "tokenizer.json")), embedding_dim=32)]
    )


def router(path: Path) -> SentenceTransformer:
    documents = make_student("dense", path)
    return SentenceTransformer(modules=[Router.for_query_document(list(static(path)), list(documents))])


def make(kind: str, path: Path) -> Any:
    if kind in ("static", "matryoshka"):
        return static(path)
    if kind == "router":
        return router(path)
    return make_student("dense" if kind == "merged" else kind, path)


@pytest.fixture(scope="module")
def student(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the folder of a student of a kind, as `distill` leaves it."""

    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "student"
        model = make(kind, tiny_bert_path)
        if kind == "merged":
            model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"]))
            model.save_pretrained(str(folder.with_name("adapter")), create_model_card=False)
            merge(folder.with_name("adapter"), folder)
        else:
            model.save_pretrained(str(folder), create_model_card=False)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a student\n", encoding="utf-8")
        options = MATRYOSHKA if kind == "matryoshka" else {}
        record(loss_config=options, versions={"st-wkl": "0.1.0"}).save(folder)
        return folder

    return build


def measured(model: Any, kind: str, cache: Path) -> Path:
    """Return a cache with the results of one real task of MTEB, under the name and commit of the Hub."""
    name = f"lab-{kind}/student"
    if kind != "cross-encoder":
        return run_mteb(model, cache, name, COMMIT)
    task = mteb.get_task("AskUbuntuDupQuestions")
    texts = {"d1": "cats purr", "d2": "dogs bark", "d3": "fish swim"}
    data = {
        "corpus": Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
        "queries": Dataset.from_dict({"id": ["q1"], "text": ["which animal purrs"]}),
        "relevant_docs": {"q1": {"d1": 1}},
        "top_ranked": {"q1": list(texts)},
    }
    task.dataset, task.data_loaded = {"default": {"test": data}}, True
    wrapped = identified(model, name=name, revision=COMMIT)
    mteb.evaluate(wrapped, task, cache=mteb.ResultCache(cache), show_progress_bar=False, co2_tracker=False)
    return cache


def checkout(folder: Path, submissions: list[Submission]) -> Path:
    """Lay out the installed MTEB as a checkout, with our files among its models."""
    installed = Path(mteb.__file__).parent
    models = folder / "mteb" / "models" / "model_implementations"
    for original, place in (
        (installed, folder / "mteb"),
        (installed / "models", models.parent),
        (installed / "models" / "model_implementations", models),
    ):
        place.mkdir(parents=True, exist_ok=True)
        for entry in original.iterdir():
            if entry.name not in ("models", "model_implementations", "__pycache__") or entry.is_file():
                (place / entry.name).symlink_to(entry)
    for submission in submissions:
        (models / submission.model_file.name).write_text(submission.model_file.read_text())
    return folder


@pytest.mark.slow
def test_mteb_takes_an_entry_of_every_kind(student: Any, tmp_path: Path) -> None:
    """A field that MTEB's tests refuse, or a loader that its mock tasks break, is found by reviewers days later."""
    submissions = []
    for kind in KINDS:
        folder = student(kind)
        cache = measured(load_model(folder)[0], kind, tmp_path / f"cache-{kind}")
        done = prepare(folder, [cache], org=f"lab-{kind}", revision=COMMIT, output=tmp_path / kind)
        told = (done.folder / "mteb_mock_run_results.md").read_text(encoding="utf-8")
        assert f"`lab-{kind}/student`" in told
        broken = [line for line in told.splitlines() if "| ✗ |" in line]
        text = (done.folder / "model_pull_request.md").read_text(encoding="utf-8")
        if kind == "cross-encoder":  # MTEB gives it no candidates there
            assert all("requires top_ranked" in line for line in broken)
            assert any("so every reranker fails them" in question for question in done.questions)
        else:
            assert broken == [], kind
            assert "- [x] `mteb mock-run` passes" in text
        page = (done.folder / "results_pull_request.md").read_text(encoding="utf-8")
        assert "- [x] The results submitted are obtained using the reference implementation" in page
        assert "- [ ] I *solemnly swear*" in page
        assert (done.folder / "evaluation_request.md").is_file() == (kind != "cross-encoder")
        submissions.append(done)
    place = checkout(tmp_path / "checkout", submissions)
    ran = subprocess.run(
        [sys.executable, "-c", JUDGE, str(place), *KINDS], cwd=place, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line.split()[0] for line in ran.stdout.splitlines()] == list(KINDS)
    types = {done.meta.name: done.meta.model_type for done in submissions}
    assert types["lab-router/student"] == ["router"]
    assert types["lab-merged/student"] == ["dense"]


def test_what_an_entry_says_is_what_the_student_is(tiny_bert_path: Path) -> None:
    """A router costs at a query what its query's way costs, and Matryoshka or half-precision students are said so."""
    two = model_meta(router(tiny_bert_path), **FIELDS)
    bert = make_student("dense", tiny_bert_path)
    words = len(bert.tokenizer) * 32
    assert two.n_parameters == words + sum(weight.numel() for weight in bert.parameters())
    assert two.n_embedding_parameters == 2 * words
    assert two.n_active_parameters == 0, "a query is looked up"
    assert two.max_tokens == bert.max_seq_length
    assert model_meta(bert, **FIELDS).n_active_parameters == two.n_parameters - 2 * words

    cut = model_meta(static(tiny_bert_path), **FIELDS, record=record(loss_config=MATRYOSHKA))
    assert cut.embed_dim == [8, 16, 32]
    assert model_meta(static(tiny_bert_path), **FIELDS, record=record()).embed_dim == 32

    half = model_meta(bert.to("cpu").bfloat16(), **FIELDS)
    assert half.output_dtypes == [OutputDType.BF16]
    assert executed(model_code(half)).output_dtypes == [OutputDType.BF16]
    assert model_meta(static(tiny_bert_path), **FIELDS).output_dtypes is None

    made = model_meta(static(tiny_bert_path), **FIELDS, record=record(versions={"st-wkl": "0.1.0"}))
    assert made.public_training_code == "https://pypi.org/project/st-wkl/0.1.0/"
    assert model_meta(static(tiny_bert_path), **FIELDS).public_training_code is None, "nobody knows"


def test_each_task_that_is_not_zero_shot_has_its_reason(student: Any, tmp_path: Path) -> None:
    """The share is MTEB's own number; a reviewer asks which tasks it is not, and which part has seen them."""
    done = prepare(student("static"), org="lab", revision=COMMIT, output=tmp_path / "out", mock=False)
    for row in done.coverage:
        assert row.zero_shot == done.meta.zero_shot_percentage(mteb.get_benchmark(row.name).tasks)
        assert int(100 - 100 * len(row.seen) / len(row.tasks)) == row.zero_shot
    nano = {row.name: row.seen for row in done.coverage}["NanoBEIR"]
    assert nano["NanoMSMARCORetrieval"] == "teacher `cross-encoder/ms-marco-MiniLM-L12-v2` (MSMARCO)"
    assert nano["NanoSciFactRetrieval"] == "collection `mteb/scifact` (SciFact)"
    page = done.page.read_text(encoding="utf-8")
    assert "not zero-shot on NanoMSMARCORetrieval: teacher `cross-encoder/ms-marco-MiniLM-L12-v2` (MSMARCO)" in page


def test_rteb_is_told_apart_and_asked_for(student: Any, tmp_path: Path) -> None:
    """Private tasks cannot be run here; a user who waits for them must know whom to ask, and with what words."""
    done = prepare(student("static"), org="lab", revision=COMMIT, output=tmp_path / "out", mock=False)
    rteb = done.coverage[-1]
    assert rteb.name.startswith("RTEB(eng")
    private = [t.metadata.name for t in mteb.get_benchmark(rteb.name).tasks if not t.metadata.is_public]
    assert list(rteb.private) == private != []
    request = (done.folder / "evaluation_request.md").read_text(encoding="utf-8")
    assert all(f"- {name}\n" in request for name in private)
    assert COMMIT in request
    german = prepare(
        student("static"), org="lab", revision=COMMIT, output=tmp_path / "de", mock=False, languages=["deu-Latn"]
    )
    assert "GermanLegal1Retrieval" in german.coverage[-1].private


def test_what_only_the_owner_knows_stays_open(student: Any, tmp_path: Path) -> None:
    """A box that nobody could tick truly, ticked, is a false statement under the owner's name."""
    folder = student("static")
    (folder / "distillation.json").unlink()
    done = prepare(folder, org="lab", revision=COMMIT, output=tmp_path / "out", mock=False)
    asked = " ".join(done.questions)
    for words in ("--trained-on", "--training-data", "--citation", "--contact", "mock-run", "no record", "not asked"):
        assert words in asked
    assert done.meta.training_datasets is None
    assert [row.zero_shot for row in done.coverage] == [None] * 4
    for name in ("model_pull_request.md", "results_pull_request.md"):
        text = (done.folder / name).read_text(encoding="utf-8")
        assert [line for line in text.splitlines() if "[x]" in line and "model sheet" not in line] == []
    assert not (done.folder / "mteb_mock_run_results.md").exists()

    bib = tmp_path / "paper.bib"
    bib.write_text("@article{kim2026,\n  title = {A paper}\n}\n")
    told = prepare(
        student("static"),
        org="lab",
        revision=COMMIT,
        output=tmp_path / "out",
        mock=False,
        citation=bib,
        contacts=["kim"],
        superseded_by="lab/better",
    )
    entry = executed(told.model_file.read_text(encoding="utf-8"))
    assert entry.citation == bib.read_text()
    assert entry.superseded_by == "lab/better"
    assert len(told.questions) < len(done.questions)
    for words in ("--contact", "--citation", "--trained-on"):
        assert words not in " ".join(told.questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"citation": "@nothing"}, "citation is '@nothing'; MTEB needs BibTeX"),
        ({"superseded_by": "lab/student"}, "superseded_by is 'lab/student'; MTEB needs the id of another model"),
        ({"superseded_by": "better"}, "superseded_by is 'better'"),
    ],
)
def test_wrong_fields_are_refused(change: Any, message: str, student: Any, tmp_path: Path) -> None:
    """They would stand in a public registry."""
    with pytest.raises(ValueError, match=message):
        prepare(student("static"), org="lab", revision=COMMIT, output=tmp_path / "out", mock=False, **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_student_that_the_mock_tasks_break_is_asked_about(student: Any, tmp_path: Path) -> None:
    """What fails there fails in review; it is named, with MTEB's reason, and its box stays open."""
    folder = student("static")
    broken = SentenceTransformer(str(folder))
    broken[0].embedding.weight.data[:] = float("nan")
    broken.save_pretrained(str(folder), create_model_card=False)
    done = prepare(folder, org="lab", revision=COMMIT, output=tmp_path / "out")
    assert any(question.startswith("Mock tasks have failed") and "NaN" in question for question in done.questions)
    assert "- [ ] `mteb mock-run` passes" in (done.folder / "model_pull_request.md").read_text(encoding="utf-8")
