"""The entry that MTEB gets must be true and complete, and its results must pass where pull requests are checked."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mteb
import pytest
from datasets import Dataset
from mteb.models import ModelMeta
from sentence_transformers import SentenceTransformer

from st_wkl.cli import app
from st_wkl.evaluation.identity import identified
from st_wkl.models import model_revision
from st_wkl.publish.leaderboard import collect, model_code, prepare
from st_wkl.publish.leaderboard_model import known_training_datasets, model_meta
from st_wkl.training import TrainingRecord
from tests.helpers.command import CliRunner
from tests.helpers.fake_hub import Commit, FakeHub
from tests.helpers.students import CLASSES, make_student

COMMIT = "0123456789" * 4
TASK = "NanoSciFactRetrieval"
FIELDS: dict[str, Any] = {"name": "lab/tiny", "revision": COMMIT, "license": "mit", "training_datasets": {"SciFact"}}


CARD = """---
configs:
- {config_name: corpus, data_files: [{split: train, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: train, path: queries.jsonl}]}
- {config_name: qrels, data_files: [{split: train, path: qrels.jsonl}]}
---
"""
NANO = {
    "README.md": CARD.encode(),
    "corpus.jsonl": b'{"_id": "d1", "text": "cats purr"}\n{"_id": "d2", "text": "dogs bark"}\n',
    "queries.jsonl": b'{"_id": "q1", "text": "who purrs"}\n',
    "qrels.jsonl": b'{"query-id": "q1", "corpus-id": "d1", "score": 1}\n',
}


# In one process, as each one imports torch.
WHOLE_WAY = """
import os, runpy, sys
from st_wkl.publish.leaderboard import prepare
student = sys.argv[1]
prepare(student, org="lab", output="one", mock=False)
os.chdir("one")
sys.path.insert(0, ".")
sys.argv = ["evaluate.py", "NanoSciFactRetrieval"]
runpy.run_path("evaluate.py", run_name="__main__")
os.chdir("..")
prepare(student, ["one/mteb-cache"], org="lab", output="two", mock=False)
"""


def record(**changes: Any) -> TrainingRecord:
    values: dict[str, Any] = {
        "student": "minishlab/potion-base-8M",
        "loss": "WeightedKLDistillationLoss",
        "loss_config": {},
        "loss_citation": "",
        "teacher": {"model": "cross-encoder/ms-marco-MiniLM-L12-v2", "backend": "onnx"},
        "dataset": {"collection": {"name": "mteb/scifact"}},
        "arguments": {},
        "seconds": 1.0,
        "versions": {},
    }
    return TrainingRecord(**{**values, **changes})


def run_mteb(model: Any, cache: Path, name: str, revision: str) -> Path:
    """Run one real MTEB task on three documents, and return the cache."""
    task = mteb.get_task(TASK)
    texts = {"d1": "cats purr", "d2": "dogs bark", "d3": "fish swim"}
    task.dataset = {
        "default": {
            "train": {
                "corpus": Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
                "queries": Dataset.from_dict({"id": ["q1"], "text": ["which animal purrs"]}),
                "relevant_docs": {"q1": {"d1": 1}},
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    wrapped = identified(model, name=name, revision=revision)
    mteb.evaluate(wrapped, task, cache=mteb.ResultCache(cache), show_progress_bar=False, co2_tracker=False)
    return cache


@pytest.fixture(scope="module")
def student(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student with a card and a record."""
    folder = tmp_path_factory.mktemp("students") / "tiny"
    make_student("dense", tiny_bert_path).save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n", encoding="utf-8")
    record().save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return MTEB's cache with the student's results, under the name that a local evaluation gives."""
    model = SentenceTransformer(str(student))
    return run_mteb(model, tmp_path_factory.mktemp("cache"), "local/tiny", model_revision(model))


@pytest.fixture
def cache(measured: Path, tmp_path: Path) -> Path:
    """Return a copy of the results that a test may damage."""
    return Path(shutil.copytree(measured, tmp_path / "cache"))


@pytest.fixture(scope="module")
def meta(student: Path) -> ModelMeta:
    """Return the student's entry."""
    return model_meta(SentenceTransformer(str(student)), **FIELDS)


def executed(code: str) -> ModelMeta:
    """Return the entry that a model file defines."""
    names: dict[str, Any] = {}
    exec(compile(code, "models.py", "exec"), names)
    (meta,) = [value for value in names.values() if isinstance(value, ModelMeta)]
    return meta


@pytest.mark.parametrize("kind", CLASSES)
def test_the_entry_of_each_class_is_what_the_model_is(kind: str, tiny_bert_path: Path) -> None:
    """MTEB loads the student by this file: a wrong loader or type gives another model's numbers."""
    model = make_student(kind, tiny_bert_path)
    meta = model_meta(model, **FIELDS)
    expected = {
        "dense": ("SentenceTransformerEncoderWrapper", "dense", "cosine"),
        "sparse": ("SparseEncoderWrapper", "sparse", "dot"),
        "multi-vector": ("MultiVectorWrapper", "late-interaction", "MaxSim"),
        "cross-encoder": ("CrossEncoderWrapper", "cross-encoder", None),
    }[kind]
    similarity = meta.similarity_fn_name.value if meta.similarity_fn_name else None
    assert (meta.loader.__name__, *meta.model_type, similarity) == expected
    assert meta.n_parameters == sum(weight.numel() for weight in model.parameters())
    assert meta.n_embedding_parameters == len(model.tokenizer) * 32
    assert meta.memory_usage_mb == 1
    assert (meta.embed_dim is None) == (kind == "cross-encoder")
    again = executed(model_code(meta))
    assert again.to_dict() == meta.to_dict()
    assert again.loader is meta.loader


def test_a_static_student_has_no_limit_and_is_all_embeddings(static_student_path: Path) -> None:
    """Its length is infinite, which Python writes as no Python, and all its weights are a table of tokens."""
    meta = model_meta(SentenceTransformer(str(static_student_path)), **FIELDS)
    assert meta.max_tokens == math.inf
    assert meta.n_embedding_parameters == meta.n_parameters == 7_559_168
    assert executed(model_code(meta)).max_tokens == math.inf


def test_an_adapter_counts_with_its_base_and_names_what_loads_it(tiny_bert_path: Path) -> None:
    """Its own file is small, but a query costs what the base costs; without peft MTEB could not load it."""
    from peft import LoraConfig, TaskType

    model = make_student("dense", tiny_bert_path)
    before = model_meta(model, **FIELDS)
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"]))
    meta = model_meta(model, **FIELDS)
    assert meta.n_parameters == before.n_parameters + 2 * 2 * (32 + 32)
    assert meta.n_embedding_parameters == before.n_embedding_parameters
    assert (before.extra_requirements_groups, meta.extra_requirements_groups) == (None, ["peft"])


def test_the_teacher_s_and_the_base_s_data_count_as_the_student_s() -> None:
    """A student whose teacher was trained on MS MARCO is not zero-shot on it; leaving that out is a false claim."""
    seen, notes = known_training_datasets(record())
    assert seen is not None
    base = mteb.get_model_meta("minishlab/potion-base-8M").training_datasets
    assert base
    assert {"SciFact", "MSMARCO", *base} <= seen.keys(), "the collection's, the teacher's and the base's"
    assert [note.split()[0] for note in notes] == ["Collection", "Teacher", "Base"]
    assert any("`mteb/scifact`: the MTEB task SciFact" in note for note in notes)

    two = {
        "a": {"collection": "mteb/nfcorpus", "teacher": {"model": "lab/secret"}},
        "b": {"collection": "mteb/scifact"},
    }
    seen, notes = known_training_datasets(record(dataset={"datasets": two}), [])
    assert seen is not None
    assert {"NFCorpus", "SciFact", "MSMARCO"} <= seen.keys(), "those of all datasets of a mixture"
    assert any("Teacher `lab/secret`: MTEB does not know" in note for note in notes)

    unknown = record(teacher={"kind": "ensemble", "teachers": [{"model": "lab/secret"}, {"model": "lab/other"}]})
    seen, notes = known_training_datasets(unknown)
    assert seen is None, "unknown must not become `nothing`"
    assert sum("MTEB does not know what it was trained on" in note for note in notes) == 2
    declared, _ = known_training_datasets(unknown, ["FEVER"])
    assert declared is not None
    assert {"FEVER", "SciFact", *base} <= declared.keys()
    assert known_training_datasets(None) == (
        None,
        ["The student carries no record of its training, so its training data is not known."],
    )
    with pytest.raises(ValueError, match=r"MTEB has no task 'SciFacts'; did you mean .*SciFact"):
        known_training_datasets(record(), ["SciFacts"])


@pytest.mark.slow
def test_mteb_takes_what_was_prepared(student: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """MTEB's own submission, against a local repository in place of GitHub, is the judge of layout and names."""
    out = tmp_path / "submission"
    done = prepare(student, [cache], org="lab", revision=COMMIT, output=out, mock=False)
    assert done.results == out / "results" / "lab__tiny" / COMMIT
    assert done.tasks == (TASK,)
    meta = executed(done.model_file.read_text(encoding="utf-8"))
    about = json.loads((done.results / "model_meta.json").read_text())
    assert {**about, "training_datasets": set(about["training_datasets"])} == {
        **json.loads(json.dumps(meta.to_dict(), default=str)),
        "training_datasets": meta.training_datasets,
    }
    assert (meta.license, meta.adapted_from) == ("apache-2.0", "minishlab/potion-base-8M")

    origin, seed = tmp_path / "origin.git", tmp_path / "seed"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q", "--bare", origin], check=True)
    subprocess.run([*git, "clone", "-q", origin, seed], check=True, capture_output=True)
    (seed / "results").mkdir()
    (seed / "results" / ".keep").touch()
    for command in (["add", "-A"], ["commit", "-qm", "seed"], ["push", "-q", "origin", "HEAD:main"]):
        subprocess.run([*git, "-C", seed, *command], check=True)
    settings = {
        f"url.file://{origin}.insteadOf": "https://github.com/embeddings-benchmark/results",
        "user.name": "t",
        "user.email": "t@localhost",
    }
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for number, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    answer = mteb.ResultCache(out).submit_results(meta, create_pr=False)
    assert (answer["status"], answer["result_count"]) == ("ready_for_submission", 1)
    committed = subprocess.run(
        ["git", "-C", answer["path"], "show", "--name-only", "--format="], check=True, capture_output=True, text=True
    ).stdout.split()
    folder = f"results/lab__tiny/{COMMIT}"
    assert {f"{folder}/{TASK}.json", f"{folder}/model_meta.json"} <= set(committed)


@pytest.mark.slow
def test_the_script_computes_what_prepare_takes(student: Path, tmp_path: Path) -> None:
    """The whole way against a Hub: entry, MTEB's own loader at that commit, MTEB's own data, results, submission."""
    files = {str(path.relative_to(student)): path.read_bytes() for path in student.rglob("*") if path.is_file()}
    with FakeHub() as hub:
        hub.create("lab/tiny", private=False)
        commit = hub.commit("lab/tiny", files, "Add a student", author="lab")
        data = hub.create("mteb/NanoSciFactRetrieval", "dataset", private=False)
        pinned = mteb.get_task(TASK).metadata.revision
        data.commits[pinned] = Commit("data", "", NANO, None)
        data.refs["main"] = pinned
        environment = hub.environment(tmp_path / "home") | {"MTEB_CACHE": str(tmp_path / "mteb")}

        ran = subprocess.run(
            [sys.executable, "-c", WHOLE_WAY, student], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    results = tmp_path / "two" / "results" / "lab__tiny" / commit
    assert {path.name for path in results.iterdir()} == {f"{TASK}.json", "model_meta.json", "run_settings.jsonl"}
    about = json.loads((results / "model_meta.json").read_text())
    assert (about["name"], about["revision"], about["license"]) == ("lab/tiny", commit, "apache-2.0")
    scores = json.loads((results / f"{TASK}.json").read_text())["scores"]["train"][0]
    assert 0 < scores["main_score"] <= 1


def test_the_page_and_the_script_say_the_two_pull_requests(student: Path, tmp_path: Path) -> None:
    """Without results the way to them is named; the script has to run against the file beside it."""
    done = prepare(
        student, org="lab", revision=COMMIT, output=tmp_path / "submission", contacts=["someone"], mock=False
    )
    page = done.page.read_text(encoding="utf-8")
    assert done.results is None
    for part in (
        "## 1. The model: https://github.com/embeddings-benchmark/mteb",
        "## 2. The results: https://github.com/embeddings-benchmark/results",
        "Run `python evaluate.py` in this folder",
        "Teacher `cross-encoder/ms-marco-MiniLM-L12-v2`: ",
        "% zero-shot",
        "must be public",
    ):
        assert part in page
    script = (done.folder / "evaluate.py").read_text(encoding="utf-8")
    compile(script, "evaluate.py", "exec")
    assert "from lab_models import tiny as meta" in script
    assert done.model_file.name == "lab_models.py"
    again = prepare(student, org="lab", revision=COMMIT, output=tmp_path / "submission", license="mit", mock=False)
    assert again.meta.license == "mit", "what `prepare` wrote, it may replace"


def damage_truncate(cache: Path) -> str:
    file = next(cache.rglob(f"{TASK}.json"))
    file.write_text(file.read_text()[:500])
    return r"NanoSciFactRetrieval.json is damaged or truncated .*evaluate this task again"


def damage_mix(cache: Path) -> str:
    folder = next(cache.rglob("model_meta.json")).parent
    other = Path(shutil.copytree(folder, folder.parent / ("f" * 40)))
    meta = json.loads((other / "model_meta.json").read_text())
    (other / "model_meta.json").write_text(json.dumps({**meta, "revision": "f" * 40}))
    return "results of 2 models, not one: local/tiny at .*local/tiny at ffffffffffff"


def damage_other_weights(cache: Path) -> str:
    file = next(cache.rglob("model_meta.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "e" * 40}))
    return "holds results of local/tiny at eeee.*, not of lab/tiny .*evaluate this student again"


def damage_unknown_task(cache: Path) -> str:
    file = next(cache.rglob(f"{TASK}.json"))
    file.write_text(file.read_text().replace(TASK, "MyCorpus"))
    file.rename(file.with_name("MyCorpus.json"))
    return "MTEB has no task MyCorpus; results of your own collections stay in the card"


def damage_dataset_revision(cache: Path) -> str:
    file = next(cache.rglob(f"{TASK}.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset_revision": "main"}))
    return "computed on dataset revision main, MTEB's is 8c5f7bbe"


def damage_settings(cache: Path) -> str:
    next(cache.rglob("run_settings.jsonl")).unlink()
    return "run_settings.jsonl does not say how train, default was run"


def damage_score(cache: Path) -> str:
    file = next(cache.rglob(f"{TASK}.json"))
    result = json.loads(file.read_text())
    result["scores"]["train"][0]["main_score"] = math.nan
    file.write_text(json.dumps(result))
    return "main_score of train, default is nan"


def damage_no_mteb(cache: Path) -> str:
    next(cache.rglob("model_meta.json")).unlink()
    return "holds no results of MTEB .*run evaluate.py"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_mix,
        damage_other_weights,
        damage_unknown_task,
        damage_dataset_revision,
        damage_settings,
        damage_score,
        damage_no_mteb,
    ],
)
def test_results_that_would_be_refused_are_refused_here(damage: Any, measured: Path, cache: Path, meta: Any) -> None:
    """What a reviewer would find in days is said at once."""
    weights = json.loads(next(measured.rglob("model_meta.json")).read_text())["revision"]
    message = damage(cache)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        collect([cache], meta, weights, cache.parent / "out")


def test_a_refusal_leaves_everything_as_it_was(student: Path, cache: Path, tmp_path: Path) -> None:
    """Neither the results nor an older submission may suffer from a try that fails."""
    out = tmp_path / "out" / "submission"
    out.mkdir(parents=True)
    (out / "PULL_REQUESTS.md").write_text("an older submission")
    message = damage_unknown_task(cache)
    given = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        prepare(student, [cache], org="lab", revision=COMMIT, output=out, mock=False)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == given
    assert [path.name for path in out.parent.rglob("*")] == ["submission", "PULL_REQUESTS.md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "beerware"}, "MTEB does not accept license"),
        ({"revision": "main"}, "revision is 'main'; MTEB needs the 40 hexadecimal digits"),
        ({"languages": ["english"]}, "MTEB does not accept languages"),
        ({"release_date": "tomorrow"}, "Invalid isoformat"),
        ({"output": "."}, "did not write; choose another folder"),
    ],
)
def test_wrong_fields_name_what_is_wanted(
    change: dict[str, Any], message: str, student: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A field that MTEB refuses is found before the pull request, and a foreign folder is not replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    values: dict[str, Any] = {"org": "lab", "revision": COMMIT, "output": "submission", **change}
    with pytest.raises((ValueError, FileExistsError), match=message):
        prepare(student, **values)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_card_without_licence_and_a_student_off_the_hub_say_the_option(student: Path, tmp_path: Path) -> None:
    """Both have a remedy that only the user knows."""
    bare = Path(shutil.copytree(student, tmp_path / "bare"))
    (bare / "README.md").write_text("# bare\n")
    with pytest.raises(ValueError, match=r"names no licence.*--license"):
        prepare(bare, org="lab", revision=COMMIT, output=tmp_path / "out")
    (bare / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(ValueError, match=r"licence is `other`.*--license"):
        prepare(bare, org="lab", revision=COMMIT, output=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"does not tell the commit of lab/tiny .*Push the student first"):
        prepare(student, org="lab", output=tmp_path / "out")


def test_the_command_prepares(student: Path, cache: Path, tmp_path: Path) -> None:
    """The options reach the function; `none` declares that there is nothing beyond what is known."""
    runner = CliRunner()
    arguments = [
        "leaderboard",
        "prepare",
        student,
        cache,
        "--org",
        "lab",
        "--revision",
        COMMIT,
        "--trained-on",
        "none",
        "--no-mock",
    ]
    ran = runner.invoke(app, [*map(str, arguments), "--output", str(tmp_path / "out"), "--json"])
    assert ran.exit_code == 0, ran.output
    value = json.loads(ran.stdout)
    assert (value["model"], value["tasks"]) == ("lab/tiny", [TASK])
    ran = runner.invoke(app, [*map(str, arguments[:2]), str(tmp_path / "absent"), "--org", "lab"])
    assert ran.exit_code == 1
    assert "there is no such folder" in ran.output
