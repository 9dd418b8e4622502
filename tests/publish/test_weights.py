"""A card's numbers belong to the weights beside it: a student that was trained on must not keep its old results."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer

from st_wkl.evaluation import Results, evaluate
from st_wkl.publish.model_card import write_model_card
from st_wkl.publish.saved import check_published
from st_wkl.training.lora import merge
from tests.helpers.students import CLASSES, make_student
from tests.helpers.tiny import collection


def changed(folder: Path) -> None:
    """Train the student in place, as far as anybody can tell."""
    model: Any = SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[3] += 0.01
    model.save_pretrained(str(folder), create_model_card=False)


@pytest.fixture(scope="module")
def evaluated(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student with the card of its results."""
    folder = tmp_path_factory.mktemp("evaluated") / "student"
    make_student("dense", tiny_bert_path).save_pretrained(str(folder))
    write_model_card(folder, record=None, results={"after": evaluate(folder, collection(), show_progress=False)})
    return folder


@pytest.fixture
def folder(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "student"))


def test_the_card_is_not_written_with_results_of_other_weights(folder: Path) -> None:
    """Evaluate, train on, write the card: the numbers would be of a student that no longer exists."""
    results = {"after": evaluate(folder, collection(), show_progress=False)}
    first = write_model_card(folder, record=None, results=results).read_bytes()
    changed(folder)
    message = r"results of 'student' are of other weights \([0-9a-f]{8}…\) than those in .*student.*Evaluate it again"
    with pytest.raises(ValueError, match=message):
        write_model_card(folder, record=None, results=results)
    assert (folder / "README.md").read_bytes() == first
    again = {"before": results["after"], "after": evaluate(folder, collection(), show_progress=False)}
    assert "| before | after |" in write_model_card(folder, record=None, results=again).read_text()


@pytest.mark.parametrize("where", ["README.md", "results.json"])
def test_they_are_not_published_either(where: str, folder: Path) -> None:
    """Whoever trains on in the folder and pushes would publish the old numbers, in the card or beside it."""
    check_published(folder)
    if where == "results.json":
        evaluate(folder, collection(), output=folder, show_progress=False)
        (folder / "README.md").write_text("# Mine\n")
        check_published(folder)
    changed(folder)
    with pytest.raises(ValueError, match=rf"results in {where} are of other weights.*Evaluate it again"):
        check_published(folder)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_student_in_memory_is_the_one_that_is_saved(kind: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Saving must not look like training, for any model class."""
    model = make_student(kind, tiny_bert_path).eval()
    stages: Any = {"first_stage": "bm25"} if kind == "cross-encoder" else {}
    results = evaluate(model, collection(), show_progress=False, **stages)
    model.save_pretrained(str(tmp_path / "student"))
    write_model_card(tmp_path / "student", record=None, results={"after": results})
    check_published(tmp_path / "student")


def test_an_adapter_and_its_merged_model_have_results_of_their_own(tiny_bert_path: Path, tmp_path: Path) -> None:
    """The same embeddings to 1e-5 are not the same numbers."""
    make_student("dense", tiny_bert_path).save_pretrained(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    model.add_adapter(LoraConfig(TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    results = {"after": evaluate(tmp_path / "adapter", collection(), show_progress=False)}
    write_model_card(tmp_path / "adapter", record=None, results=results)
    check_published(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="of other weights"):
        write_model_card(merged, record=None, results=results)


def test_what_cannot_be_checked_is_said(
    folder: Path, tiny_bert_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A student that does not load here may still be right; silence would look like a check."""
    results = evaluate(folder, collection(), show_progress=False)
    (folder / "modules.json").write_text("[]")
    with caplog.at_level(logging.WARNING):
        write_model_card(folder, record=None, results={"after": results})
    assert "could not be checked" in caplog.text
    with_random_pooler = make_student("dense", tiny_bert_path)
    with_random_pooler.add_adapter(LoraConfig(TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"]))
    with_random_pooler.save_pretrained(str(tmp_path / "adapter"))
    write_model_card(tmp_path / "adapter", record=None, results={"after": results})
    assert "part of them are random" in caplog.text
    old = Results(model={"name": "x", "revision": "r"}, tasks=results.tasks)
    write_model_card(folder, record=None, results={"after": old})
    assert "st-wkl:weights" not in (folder / "README.md").read_text()


def test_other_prompts_are_noticed(folder: Path) -> None:
    """The same weights with another prompt, or cut shorter, are another student; the weights alone do not show it."""
    results = evaluate(folder, collection(), output=folder, show_progress=False)
    check_published(folder)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "query: ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other settings than those in .*prompts \{'query': 'query: '\}"):
        write_model_card(folder, record=None, results={"after": results})
    with pytest.raises(ValueError, match="Evaluate it again"):
        check_published(folder)
    results.versions["transformers"] = "5.6.0"  # which may write settings in other words
    write_model_card(folder, record=None, results={"after": results})
