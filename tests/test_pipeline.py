"""`st-wkl run`: stages that are done once, runs that go on after SIGKILL, folders that belong to somebody else."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from st_wkl.config import RunConfig
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.runs import read_run
from st_wkl.data.teachers import CallableTeacher
from st_wkl.models import prompts_of
from st_wkl.pipeline import STAGES, run
from st_wkl.pipeline.stages import ALL, Parts, changed, digest
from st_wkl.pipeline.steps import load_student
from st_wkl.training import TrainingRecord
from tests.helpers.animals import small_collection, write_beir
from tests.helpers.command import st_wkl
from tests.helpers.processes import run_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    collection = small_collection()
    collection.qrels["dev"] = collection.qrels["test"]
    return write_beir(collection, tmp_path_factory.mktemp("run") / "animals")


def settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "collection": {"source": str(folder), "limit": 24},
        "candidates": {"num_negatives": 3},
        "teacher": {"model": "packaged:ms-marco-MiniLM-L12-v2", "max_length": 64, "store": str(folder / "scores.db")},
        "student": {"model": "packaged:potion-base-8M"},
        "training": {"num_train_epochs": 3, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 3},
        **changes,
    }


def config(folder: Path, output: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_dict(settings(folder, output, **changes))


def weights(output: Path) -> dict[str, Any]:
    return load_file(output / "student" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    found, expected = weights(first), weights(second)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    output = folder.parent / "undisturbed"
    result = run(config(folder, output), show_progress=False)
    assert result.done == list(STAGES)
    return output


def test_fused_candidates_keep_their_sources(folder: Path, tmp_path: Path) -> None:
    """The dataset of a run says which retrievers found its candidates, as that of `build` does."""
    candidates = {"sources": ["bm25", "bm25:k1=0.9,b=0.4"], "num_negatives": 3}
    parts = Parts(config(folder, tmp_path / "run", candidates=candidates), show_progress=False)
    parts.output.mkdir()
    ALL[0].work(parts)
    found = [hit for hits in read_run(parts.candidates).values() for hit in hits]
    names = {"bm25", "bm25-k1-0.9-b-0.4"}
    assert {origin.source for hit in found for origin in hit.origins} == names
    dataset = DistillationDatasetBuilder(
        parts.collection,
        CallableTeacher(lambda query, document: float(len(document)), name="length", version="1"),
        candidates=read_run(parts.candidates),
        num_negatives=3,
        store=":memory:",
    ).build(show_progress=False)
    assert set(dataset.provenance["candidates"]["sources"]) == names


def test_a_complete_run_is_not_done_again(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command after a crash, or next week, must cost nothing; and it has to say so."""
    monkeypatch.setattr("st_wkl.data.teachers.CrossEncoderTeacher.score", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr("st_wkl.training.distill", lambda *_, **__: pytest.fail("trained again"))
    again = run(config(folder, undisturbed), show_progress=False)
    assert again.skipped == list(STAGES)
    assert again.before is not None
    assert again.after is not None
    assert again.comparisons["animals"].queries == len(again.after.tasks[0].per_query)
    card = (undisturbed / "student" / "README.md").read_text(encoding="utf-8")
    assert "minishlab/potion-base-8M" in card
    assert "st-wkl run config.yaml" in card
    assert "|  | before | after | BM25 | after − before |" in card
    assert again.bm25 is not None
    assert str(undisturbed) not in card
    saved = RunConfig.load(undisturbed / "config.yaml")
    assert saved == config(folder, undisturbed)
    assert (undisturbed / "student" / "config.yaml").is_file()
    assert not (undisturbed / "student" / "checkpoints").exists()


def test_a_complete_run_loads_nothing(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and MTEB took half a minute to load for a run that has nothing to do; what was touched is looked at."""
    run(config(folder, undisturbed), show_progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "check", lambda _: pytest.fail("loaded"))
        again = run(config(folder, undisturbed), show_progress=False)
        assert again.skipped == list(STAGES)
        assert again.after is not None
        with (undisturbed / "student" / "README.md").open("a") as file:
            file.write("By me.\n")
        with pytest.raises(pytest.fail.Exception):
            run(config(folder, undisturbed), show_progress=False)
    assert run(config(folder, undisturbed), show_progress=False).skipped == list(STAGES)


@pytest.mark.slow
def test_what_changes_is_done_again_and_nothing_is_lost(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A stale student under new settings would be reported as theirs; the old one may have been the better one."""
    output = tmp_path / "run"
    run(config(folder, output), show_progress=False)
    old = weights(output)
    result = run(config(folder, output, loss={"parameters": {"gamma": 2}}), show_progress=False)
    assert result.skipped == ["candidates", "dataset", "before"]
    assert result.done == ["train", "after", "card"]
    assert not all((old[name] == new).all() for name, new in weights(output).items())
    kept = load_file(output / "replaced" / "1-student" / "model.safetensors")
    assert all((old[name] == kept[name]).all() for name in old)


def test_inputs_are_the_same_but_for_what_cannot_matter() -> None:
    """Another way of logging, or an option that a new version brings, had a day of training done again."""
    loss = {"name": None, "in_batch": None, "mini_batch_size": None, "parameters": {}}
    there: dict[str, Any] = {"dataset": "d", "loss": loss, "training": {"logging_steps": 3, "seed": 1}, "dev": None}
    now = there | {"training": {"report_to": "tensorboard", "seed": 1, "save_steps": 9}}
    now["loss"] = {name: value for name, value in loss.items() if name != "in_batch"}
    assert changed(there, now) == changed(now, there) == []
    assert changed(there, there | {"training": {"seed": 1, "prompts": {"query": "q: "}}}) == ["training"]
    assert changed(there, there | {"loss": loss | {"parameters": {"positive_threshold": 2}}}) == ["loss"]
    dev = {"split": "dev", "max_queries": None, "max_documents": None, "patience": None}
    assert changed(there | {"dev": dev}, now | {"dev": dev}) == ["training"], "it chooses another checkpoint"


def test_half_a_card_is_no_other_student(tmp_path: Path) -> None:
    """A process killed while it wrote the card leaves a hidden file, and would have the results made again."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest(tmp_path)
    (tmp_path / ".README.md.5uh9_6hd.part").write_text("# Half")
    assert digest(tmp_path) == before
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert digest(tmp_path) != before


def test_the_student_has_the_prompts_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    """Before and after are the same model before and after training, so both have them."""
    student = {"model": "packaged:potion-base-8M", "prompts": {"query": "query: "}}
    parts = Parts(config(folder, tmp_path / "run", student=student), show_progress=False)
    assert prompts_of(load_student(parts.config.student)[0]) == {"query": "query: "}
    inputs = ALL[3].inputs(parts)
    plain = ALL[3].inputs(Parts(config(folder, tmp_path / "run"), show_progress=False))
    assert changed(plain, inputs) == ["prompts"]
    parts = Parts(config(folder, tmp_path / "run", student=student | {"prompts": {"qurey": "q"}}), show_progress=False)
    with pytest.raises(ValueError, match=r"student\.prompts: .* by the names query, document, got 'qurey'"):
        load_student(parts.config.student)


def work(settings: dict[str, Any]) -> None:
    run(RunConfig.from_dict(settings), show_progress=False)


@pytest.mark.slow
def test_killed_in_each_stage_it_ends_with_the_same_weights(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Machines are taken away without notice; what was done has to count, and nothing may differ in the end."""
    # A server that has the imports done makes a process in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *(__name__, "st_wkl.data.builder", "st_wkl.evaluation", "st_wkl.training.distillation"),
            *("bm25s", "matplotlib.figure", "mteb"),  # what these import when they are called
        ]
    )
    output, killed = tmp_path / "run", set()
    for stage in STAGES:
        process = context.Process(target=work, args=(settings(folder, output),))
        process.start()
        marker = output / ".stages" / f"{stage}.json"
        while process.is_alive():
            there = marker.is_file() and not json.loads(marker.read_text(encoding="utf-8"))["complete"]
            trained = stage != "train" or any(
                (output / "student" / "checkpoints").glob("checkpoint-*/trainer_state.json")
            )
            if there and trained:
                process.kill()
                killed.add(stage)
                break
            time.sleep(0.001)
        process.join()
    assert {"train", "after"} <= killed, "the long stages have to be hit"
    assert run(config(folder, output), show_progress=False).done
    assert_same_weights(output, undisturbed)
    markers = [json.loads(file.read_text(encoding="utf-8")) for file in (output / ".stages").glob("*.json")]
    assert len(markers) == len(STAGES)
    assert all(marker["complete"] for marker in markers)


@pytest.mark.slow
def test_two_processes_of_torchrun_do_one_run(folder: Path, tmp_path: Path) -> None:
    """Two processes that build, train and write at the same place, each for itself, would spoil each other's work."""
    file, output, stages = tmp_path / "config.yaml", tmp_path / "run", ["candidates", "dataset", "train", "card"]
    file.write_text(yaml.safe_dump(settings(folder, output, evaluation=None)), encoding="utf-8")
    first, second = (json.loads(run_module("st_wkl", "run", file, "--json", processes=2)) for _ in range(2))
    assert (first["done"], second["skipped"]) == (stages, stages)
    assert TrainingRecord.load(output / "student").loss == "WeightedSumLoss"


@pytest.mark.slow
def test_other_datasets_are_trained_on_beside(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A mixture from one file: its names are checked before any work, and another dataset trains the student anew."""
    other = tmp_path / "other"
    shutil.copytree(undisturbed / "dataset", other)
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"datasets has 'animals', which the dataset made here is called"):
        run(config(folder, output, datasets=[str(other)]), show_progress=False)
    with pytest.raises(ValueError, match=r"loss.each has 'twin'"):
        run(config(folder, output, loss={"each": {"twin": "mse"}}), show_progress=False)
    given = {"datasets": {"twin": str(other)}, "loss": {"name": "kl", "each": {"twin": "margin-mse"}}}
    assert run(config(folder, output, **given), show_progress=False).done == list(STAGES)
    record = TrainingRecord.load(output / "student")
    assert list(record.datasets) == ["animals", "twin"]
    assert record.loss_config["twin"]["name"] == "MarginMSEDistillLoss"
    assert run(config(folder, output, **given), show_progress=False).done == []
    given["datasets"] = [f"twin={other}"]
    assert run(config(folder, output, **given), show_progress=False).done == [], "a list says the same"
    given["datasets"] = [f"third={other}"]
    given["loss"] = {"name": "kl"}
    assert run(config(folder, output, **given), show_progress=False).done == ["train", "after", "card"]


def test_folders_of_others_are_left_alone(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """An hour of somebody's work must not be mixed with, or replaced by, another run's."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds something that is no run of st-wkl"):
        run(config(folder, tmp_path / "theirs"))
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
    other = config(folder, undisturbed, student={"model": "packaged:all-MiniLM-L6-v2"})
    with pytest.raises(FileExistsError, match="holds another run, with student 'packaged:potion-base-8M'"):
        run(other)


@pytest.mark.slow
def test_adapter_dev_split_and_retriever_from_one_file(folder: Path, tiny_bert_path: Path, tmp_path: Path) -> None:
    """What is one key in the file is another road through training: adapter, best checkpoint, first stage."""
    student = SentenceTransformer(str(tiny_bert_path))
    student.save_pretrained(str(tmp_path / "tiny"))
    path = tmp_path / "config.yaml"
    changes: dict[str, Any] = {
        "candidates": {"sources": ["bm25:k1=0.9,b=0.4", "packaged:potion-base-8M"], "top_k": 8, "num_negatives": 3},
        "student": {"model": str(tmp_path / "tiny")},
        "lora": {"r": 2},
        "dev": {"split": "dev", "max_queries": 8, "patience": 1},
        "evaluation": None,
        "training": {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-2},
    }
    path.write_text(yaml.safe_dump(settings(folder, tmp_path / "run", **changes)), encoding="utf-8")
    code, out, err = st_wkl("run", path, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["done"] == ["candidates", "dataset", "train", "card"]
    made = tmp_path / "run" / "student"
    record = TrainingRecord.load(made)
    assert record.lora["rank"] == 2
    assert record.dev.keys() == {"before", "after"}
    assert (made / "adapter_model.safetensors").is_file()
    assert SentenceTransformer(str(made)).encode("cats").shape == (32,)
    mined = read_run(tmp_path / "run" / "candidates.trec.gz")
    words = bm25_candidates(Collection.load(str(folder)), list(mined), top_k=8, k1=0.9, b=0.4, show_progress=False)
    assert all(len(hits) == 8 for hits in mined.values())
    assert any(
        {hit.document_id for hit in mined[query]} != {hit.document_id for hit in words[query]} for query in mined
    )
    assert any((tmp_path / "run" / "embeddings").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {"target_modules": ["qkv"]}, "student": {"model": "packaged:all-MiniLM-L6-v2"}},
            "targets qkv match no",
        ),
        ({"loss": {"name": "weighted-lk"}}, r"there is no loss 'weighted-lk' \(did you mean 'weighted-kl'\?\)"),
        ({"loss": {"parameters": {"gama": 2}}}, "gama"),
        ({"training": {"learning_rat": 1}}, r"no such argument \(did you mean 'learning_rate'\?\)"),
        ({"training": {"lr_scheduler_type": "lineal"}}, "lineal"),
        ({"student": {"model": "packaged:potion-base-8B"}}, r"no packaged model 'potion-base-8B' \(did you mean"),
        ({"dev": {"split": "validation"}}, "has no split 'validation'"),
        ({"evaluation": {"tasks": ["NoSuchTask"]}}, "NoSuchTask"),
    ],
)
def test_what_cannot_work_is_known_before_any_work(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    """Hours of scoring before a typo in the last stage is found are hours lost."""
    with pytest.raises(ValueError, match=message):
        run(config(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "candidates.trec.gz").exists()
    assert not any(tmp_path.iterdir()), "what has done nothing leaves nothing behind"


def test_init_writes_what_run_does(folder: Path, tmp_path: Path) -> None:
    """The first file that somebody has must run as it is written."""
    path = tmp_path / "first.yaml"
    options = ["--collection", folder, "--teacher", "packaged:ms-marco-MiniLM-L12-v2"]
    code, _, err = st_wkl(
        "init", path, *options, "--student", "packaged:potion-base-8M", "--output", tmp_path / "run", "--quiet"
    )
    assert code == 0, err
    short = ["collection.limit=12", "training.num_train_epochs=1", "training.per_device_train_batch_size=4"]
    short += [f"teacher.store={folder / 'scores.db'}", "candidates.num_negatives=3", "teacher.max_length=64"]
    code, out, err = st_wkl("run", path, *(f"--set={setting}" for setting in short), "--json", "--quiet")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["done"] == list(STAGES)
    assert answer["difference"]["animals"]["queries"] == 40
    code, _, err = st_wkl("init", path)
    assert code == 1
    assert "exists already" in err
