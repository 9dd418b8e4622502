"""A model with code of its own: trusted on request only, wherever it is loaded or loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_wkl.config import RunConfig
from st_wkl.data.collection import Collection
from st_wkl.data.dense import retriever_candidates
from st_wkl.evaluation import evaluate
from st_wkl.models import load_model, model_revision
from st_wkl.publish.hub import push_student
from st_wkl.publish.model_card import write_model_card
from st_wkl.training import default_arguments, distill
from st_wkl.training.lora import merge
from tests.helpers.command import st_wkl

CODE = """from transformers import BertConfig, BertModel
class Cfg(BertConfig):
    model_type = 'own'
class Mod(BertModel):
    config_class = Cfg
"""


@pytest.fixture(scope="module")
def own(tiny_bert_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a retriever whose transformer is a class of its own."""
    folder = tmp_path_factory.mktemp("remote") / "own"
    SentenceTransformer(str(tiny_bert_path), device="cpu").save_pretrained(str(folder))
    (folder / "own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "architectures": ["Mod"]}
    config["auto_map"] = {"AutoConfig": "own.Cfg", "AutoModel": "own.Mod"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def rows() -> Dataset:
    """Return eight training lists."""
    return Dataset.from_list(
        [{"query": f"q{i}", "positive": f"q{i} a", "negative_1": "b c", "label": [3.0, 0.0]} for i in range(8)]
    )


def arguments(student: Any, folder: Path, **options: Any) -> Any:
    """Return arguments of one step."""
    return default_arguments(student, folder, max_steps=1, per_device_train_batch_size=4, use_cpu=True, **options)


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_with_its_own_code_is_trained_resumed_and_merged(
    own: Path, rows: Dataset, tmp_path: Path, lora: bool
) -> None:
    """It was trained for hours, and then could be loaded nowhere."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        distill(str(own), rows, output_dir=tmp_path / "no")
    student, _ = load_model(own, trust_remote_code=True)
    args = arguments(student, tmp_path, lora=lora)
    trained = distill(student, rows, "kl", args, output_dir=tmp_path / "out", lora=lora)
    again = distill(
        str(own), rows, "kl", args, output_dir=tmp_path / "out", lora=lora, resume=True, trust_remote_code=True
    )
    assert model_revision(again.student) == model_revision(trained.student)
    if lora:
        merge(tmp_path / "out", tmp_path / "merged", trust_remote_code=True)
    stored = [file.read_text(encoding="utf-8") for file in (tmp_path / "out").rglob("*.json")]
    assert not any('"trust_remote_code": true' in text for text in stored)


def test_it_is_searched_measured_and_checked(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """First stage, evaluation and a card's check of weights load a model, too."""
    collection = Collection("own", {"d": "a b", "e": "c"}, {"q": "a"}, {"test": {"q": {"d": 1}}})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        retriever_candidates(collection, own, show_progress=False)
    assert len(retriever_candidates(collection, own, show_progress=False, trust_remote_code=True)["q"]) == 2
    results = evaluate(own, collection, first_stage=own, trust_remote_code=True, show_progress=False)
    assert results.name == "own"
    write_model_card(own, record=None, results={"after": results}, trust_remote_code=True)
    assert "could not be checked" not in caplog.text
    with pytest.raises(ValueError, match=r"holds code that the model is loaded with: own\.py"):
        push_student(own, "me/own")


class Scaled(torch.nn.Module):
    """A module of this test, which nobody who loads the student has."""

    def __init__(self, folder: str = "") -> None:
        super().__init__()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Halve the embedding."""
        features["sentence_embedding"] = features["sentence_embedding"] / 2
        return features

    def save(self, folder: str, **_: Any) -> None:
        """Save nothing."""

    @staticmethod
    def load(folder: str) -> Any:
        """Fail, as a class that is not there would."""
        raise OSError("no such class")


def test_what_cannot_be_loaded_again_is_refused_before_training(
    static_student_path: Path, rows: Dataset, tmp_path: Path
) -> None:
    """Found after training, hours would be lost."""
    plain = SentenceTransformer(str(static_student_path), device="cpu")
    student = SentenceTransformer(modules=[plain[0], Scaled()], device="cpu")
    with pytest.raises(ValueError, match=r"(?s)code of its own \(.*Scaled.*Nothing was trained"):
        distill(student, rows, "kl", arguments(student, tmp_path), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_and_a_configuration_say_it_too(own: Path, tmp_path: Path) -> None:
    """And a run's own copy of the configuration, which is read back, never holds it."""
    parts = {"collection": {"source": "c"}, "teacher": {"model": "t"}, "student": {"model": "s"}, "output": "o"}
    config = RunConfig.from_dict(parts).override([f"{part}.trust_remote_code=true" for part in ("student", "teacher")])
    assert config.student.trust_remote_code
    saved = yaml.safe_load(config.save(tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert not saved["student"]["trust_remote_code"]
    assert not saved["teacher"]["trust_remote_code"]
    for command in ("build", "train", "evaluate", "card", "push"):
        assert "--trust-remote-code" in st_wkl(command, "--help")[1]
