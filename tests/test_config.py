"""One YAML for a whole run: typos are errors, numbers are numbers, and what `init` writes is what `run` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from st_wkl.pipeline import RunConfig, template
from st_wkl.pipeline.stages import Parts
from st_wkl.ranges import nearest
from st_wkl.reading import check_training_arguments
from tests.helpers.animals import small_collection, write_beir

SMALLEST: dict[str, Any] = {
    "output": "out",
    "collection": {"source": "data"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.from_dict({**SMALLEST, **changes})


def test_judgements_of_absent_texts_can_be_dropped_from_a_configuration(tmp_path: Path) -> None:
    """The remedy that the error names has to be there where there is no Python."""
    folder = write_beir(small_collection(), tmp_path / "animals")
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("\nq0-0\tgone\t1\n")
    parts = {"collection": {"source": str(folder)}, "teacher": {"model": "t"}, "student": {"model": "s"}}
    config = RunConfig.from_dict({"output": str(tmp_path / "run"), **parts})
    with pytest.raises(ValueError, match=r"--missing drop; collection\.missing in a configuration"):
        _ = Parts(config, show_progress=False).collection
    with pytest.warns(UserWarning, match="They are dropped"):
        assert Parts(config.override(["collection.missing=drop"]), show_progress=False).collection.documents


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
        ("learning_rate=1", r"there is no 'learning_rate'\. Say the part, too, as in training\.learning_rate="),
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("collection.limit", -90, "must be 1 or more, got -90"),
        ("collection.limit", 0, "must be 1 or more, got 0"),
        ("candidates.top_k", -1, "must be 1 or more, got -1"),
        ("candidates.num_negatives", 0, "must be 1 or more, got 0"),
        ("evaluation.batch_size", -1, "must be 1 or more, got -1"),
        ("teacher.max_length", 10**9, "must be from 8 to 1,000,000, got 1000000000"),
        ("teacher.max_length", 1, "must be from 8.*got 1"),
        ("selection.relative_margin", ".nan", "relative_margin"),
        ("selection.seed", -1, "must be from 0.*got -1"),
        ("loss.in_batch", -1, "must be 0 or more, got -1"),
        ("training.seed", -1, "must be from 0.*got -1"),
        ("training.gradient_accumulation_steps", 0, "must be 1 or more, got 0"),
        ("training.learning_rate", ".inf", "must be from 0 to 1,000,000, got inf"),
        ("training.max_grad_norm", ".nan", "must be 0 or more, got nan"),
        ("training.eval_strategy", "steps", "there is no `dev`"),
        ("training.push_to_hub", True, "sends nothing to the Hub.*`st-wkl push"),
        ("training.hub_model_id", "a/b", "sends nothing to the Hub"),
        ("training.hub_token", "secret", "sends nothing to the Hub"),
    ],
)
def test_values_that_no_run_can_have_are_refused_at_the_start(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """They were found after the teacher's hours, or were slices that trained on 10 of 100 queries."""
    parts: dict[str, Any] = {"collection": {"source": "c"}, "teacher": {"model": "t"}, "student": {"model": "s"}}
    values = {"output": "out", **parts}
    group, name = key.split(".")
    values[group] = {**values.get(group, {}), name: yaml.safe_load(str(value))}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    for refused in (
        lambda: RunConfig.from_dict(values),
        lambda: RunConfig.load(path),
        lambda: RunConfig.from_dict({"output": "out", **parts}).override([f"{key}={value}"]),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            refused()
        assert name in str(caught.value)
        assert "secret" not in str(caught.value)


def test_keys_that_stand_twice_and_other_encodings_are_named(tmp_path: Path) -> None:
    """Of two equal keys YAML takes the last without a word; a latin-1 file ended in a UnicodeDecodeError."""
    path = tmp_path / "run.yaml"
    path.write_text("output: a\ncollection:\n  source: x\n  limit: 3\n  limit: 30\n")
    with pytest.raises(ValueError, match=r"run\.yaml: line 5: the key 'limit' stands in line 4 already"):
        RunConfig.load(path)
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes("output: a\n# für\n".encode(encoding))
        with pytest.raises(ValueError, match=r"run\.yaml: line \d is not UTF-8"):
            RunConfig.load(path)
