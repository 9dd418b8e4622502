"""One YAML for a whole run: typos are errors, numbers are numbers, and what `init` writes is what `run` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from st_wkl.config import RunConfig, check_training_arguments, nearest, template

SMALLEST: dict[str, Any] = {
    "output": "out",
    "collection": {"source": "data"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.from_dict({**SMALLEST, **changes})


def test_what_init_writes_is_the_default() -> None:
    """A template that drifts from the dataclasses teaches wrong defaults; each of its keys has to be one."""
    written = RunConfig.from_dict(yaml.safe_load(template(collection="data: x", teacher="t", student="s", output="o")))
    plain = RunConfig.from_dict({**SMALLEST, "output": "o", "collection": {"source": "data: x"}})
    found, expected = written.to_dict(), plain.to_dict()
    assert (
        found["teacher"].pop("max_length") is None
    )  # one default on all surfaces: a length is part of what a score is
    expected["teacher"].pop("max_length")
    assert found == expected


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    """The resolved file beside a result is its recipe."""
    made = config(training={"learning_rate": 1e-5}, lora={"r": 8}, dev={"patience": 2}, evaluation=None)
    assert RunConfig.load(made.save(tmp_path / "config.yaml")) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colection": {}}, r"colection: there is no such key \(did you mean 'collection'\?\)"),
        ({"loss": {"nam": "kl"}}, r"loss\.nam: there is no such key \(did you mean 'name'\?\)"),
        ({"candidates": {"top_k": "many"}}, "candidates.top_k is 'many'; it has to be of type int"),
        ({"candidates": {"top_k": True}}, "candidates.top_k is True; it has to be of type int"),
        (
            {"selection": {"choice": "tops"}},
            r"selection.choice is 'tops' \(did you mean 'top'\?\); it has to be one of",
        ),
        ({"lora": 3}, "lora is 3; it has to be one of these types: bool, dict"),
        ({"student": {}}, "student.model is missing"),
        ({"student": "s"}, "student has to be keys and values"),
        ({"format": 2}, "has format 2, and this version of st-wkl reads 1. Upgrade st-wkl"),
        ({"format": "new"}, "has format 'new'"),
    ],
)
def test_mistakes_are_named_with_their_place(changes: dict[str, Any], message: str) -> None:
    """A key that nobody reads would leave a run with a default that its author believes to have changed."""
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_settings_override_the_file() -> None:
    """A sweep changes one key at a time, without a file for each; `1e-3` is a text for YAML and a number for people."""
    made = config().override(
        [
            "training.learning_rate=1e-3",
            "loss.parameters.gamma=2",
            "dev.split=validation",
            "candidates.sources=[bm25, x]",
        ]
    )
    assert made.training == {"learning_rate": 0.001}
    assert made.loss.parameters == {"gamma": 2}
    assert made.dev is not None
    assert made.dev.split == "validation"
    assert made.candidates.sources == ["bm25", "x"]
    for setting, message in (
        ("loss.name", "takes path.to.key=value"),
        ("los.name=kl", r"there is no 'los' \(did you mean 'loss'\?\)"),
        ("output.folder=x", "output is 'out' and has no keys"),
        ("collection.limit=some", "collection.limit is 'some'"),
    ):
        with pytest.raises(ValueError, match=message):
            config().override([setting])


def test_training_arguments_are_checked_by_name() -> None:
    """They are hundreds, and a typo in one of them would pass as a key of a plain dictionary."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    check_training_arguments({"learning_rate": 1.0}, SentenceTransformerTrainingArguments)
    with pytest.raises(ValueError, match=r"no such argument \(did you mean 'learning_rate'\?\)"):
        check_training_arguments({"lerning_rate": 1.0}, SentenceTransformerTrainingArguments)
    with pytest.raises(ValueError, match="set `output` of the run instead"):
        check_training_arguments({"output_dir": "x"}, SentenceTransformerTrainingArguments)
    assert nearest("zzz", ["learning_rate"]) == ""


def test_files_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    """A missing file, a broken one and an empty one have different remedies."""
    with pytest.raises(FileNotFoundError, match=r"`st-wkl init .*` writes one"):
        RunConfig.load(tmp_path / "none.yaml")
    for text, message in (("a: [", "is not valid YAML"), ("", "has to be keys and values"), ("a: 1", "no such key")):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            RunConfig.load(tmp_path / "bad.yaml")
