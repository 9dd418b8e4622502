"""Options are written once: what a stage's dataclass has, the command line, the YAML file and `init` have, too."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from st_wkl.cli import app, stages
from st_wkl.cli._flags import Flags
from st_wkl.data.selection import Selection
from st_wkl.pipeline import (
    CandidatesConfig,
    CollectionConfig,
    DevConfig,
    EvaluationConfig,
    ImportConfig,
    LossConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    steps,
    template,
)
from st_wkl.pipeline.options import described
from st_wkl.pipeline.stages import ALL, Parts, changed
from tests.helpers.animals import small_collection, write_beir
from tests.helpers.command import st_wkl

PARTS = (
    *(CollectionConfig, CandidatesConfig, TeacherConfig, Selection, StudentConfig, LossConfig, DevConfig),
    *(EvaluationConfig, ImportConfig, RunConfig),
)
SMALLEST: dict[str, Any] = {
    "output": "out",
    "collection": {"source": "c"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_option_says_what_it_means(part: Any) -> None:
    """Its docstring is the help, the comment in the YAML file and the reference; one without is in none of them."""
    assert list(described(part)) == [entry.name for entry in dataclasses.fields(part)]
    assert all(described(part).values())


@pytest.mark.parametrize(
    ("command", "parts", "elsewhere"),
    [
        (stages.build, (CollectionConfig, TeacherConfig, CandidatesConfig, Selection), {"candidates.sources"}),
        (stages.train, (StudentConfig, LossConfig, DevConfig), {"student.prompts"}),
        (stages.evaluate, (EvaluationConfig,), {"evaluation.tasks"}),
        (stages.import_, (ImportConfig,), set()),
    ],
)
def test_what_a_stage_can_be_told_is_a_flag(command: Any, parts: tuple[Any, ...], elsewhere: set[str]) -> None:
    """A run could not say what `build` could, nor the command line what Python could."""
    flags = Flags(command.__wrapped__, {})
    there = {place for flag in flags.all.values() for place in flag.places}
    names = {kind: name for name, kind in flags.parts.items()}
    assert {f"{names[part]}.{entry.name}" for part in parts for entry in dataclasses.fields(part)} - there == elsewhere
    assert "settings" in there, "and so is what trainers and losses have of their own"


def test_the_template_has_every_option() -> None:
    """An option that `init` does not show is found by those who read code."""
    written = yaml.safe_load(template())
    made = RunConfig.from_dict(written).to_dict()
    assert {name: value.keys() if isinstance(value, dict) else None for name, value in written.items()} == {
        name: value.keys() if isinstance(value, dict) else None for name, value in made.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"model": "t", "workers": 3}}, "teacher.workers is 3, and one process scores"),
        ({"teacher": {"model": "t", "pairs_per_query": 3}}, "teacher.pairs_per_query means nothing without a pairwise"),
        ({"teacher": {"model": "t", "calibration": "rank"}}, "teacher.calibration means nothing for one teacher"),
        ({"evaluation": {"top_k": 3}}, "evaluation.top_k is 3, and nothing is reranked"),
        ({"merge": True}, "merge merges an adapter"),
        (
            {"loss": {"parameters": {"positive_threshold": float("nan")}}},
            "loss.parameters.positive_threshold must be a finite number, got nan",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], message: str) -> None:
    """Ten workers that nobody starts, and a depth that nobody searches, passed without a word."""
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(SMALLEST | changes)


def test_flags_that_would_be_ignored_are_refused_by_name() -> None:
    """Whoever types a command has no key of a configuration."""
    for line, message in (
        ("build c --teacher t --output o --workers 3", "--workers is 3"),
        ("evaluate bm25 c --top-k 3", "--top-k is 3"),
        ("train d --student s --output o --missing drop", "--missing needs a dev split to look at: add --dev"),
        ("train d --student s --output o --set training.seed=-1", "--seed must be from 0"),
    ):
        code, _, err = st_wkl(*line.split())
        assert (code, message in err) == (1, True), err


def test_what_a_model_is_loaded_with_is_said_everywhere() -> None:
    """Attention and quantisation of a teacher of 8 billion parameters were out of reach of all but Python."""
    told = {"attn_implementation": "eager", "quantization_config": {"load_in_4bit": True}}
    config = RunConfig.from_dict(SMALLEST | {"teacher": {"model": "t", "model_kwargs": told}})
    assert config.teacher.model_kwargs == told
    changed_one = config.override(["teacher.model_kwargs.attn_implementation=sdpa"])
    assert changed_one.teacher.model_kwargs == told | {"attn_implementation": "sdpa"}
    flags = Flags(stages.build.__wrapped__, {})  # type: ignore[attr-defined]
    line = ["attn_implementation=eager", "quantization_config={load_in_4bit: true}"]
    given = {"collection": "c", "--teacher": ["t"], "--output": "o", "--model-kwarg": line}
    named = {flag.name: name for name, flag in flags.all.items()}
    read = flags.read({named.get(name, name): value for name, value in given.items() if name != "--output"})
    assert read["teacher"].model_kwargs == told
    code, _, err = st_wkl("build", "c", "--teacher", "t", "--output", "o", "--model-kwarg", "eager")
    assert (code, "--model-kwarg takes name=value, got 'eager'" in err) == (1, True), err


def test_a_flag_that_there_is_not_ends_with_2() -> None:
    """Scripts tell a mistyped line from work that failed; the nearest name is told."""
    for line, message in (("bulid", "build"), ("build c --teacher t --output o --choice tops", "Did you mean")):
        code, out, err = st_wkl(*line.split())
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err


def test_help_fits_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 80 columns cut the names of options, which are what one looks for."""
    for columns, terminal in (("80", "dumb"), ("60", "xterm"), ("200", "xterm-256color")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERM", terminal)
        said = st_wkl("build", "--help")[1]
        for flag in Flags(stages.build.__wrapped__, {}).all.values():  # type: ignore[attr-defined]
            assert (flag.name if flag.name.startswith("-") else flag.name.upper()) in said
        assert "\x1b" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_help_to_a_full_disk_is_no_traceback() -> None:
    """It was forty lines of Python about a disk."""
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "st_wkl", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    assert "cannot be written" in said.stderr


def test_version_is_said() -> None:
    """It is what a report of a mistake begins with."""
    import st_wkl as package

    assert st_wkl("--version")[1].strip() == package.__version__
    with pytest.raises(SystemExit):
        app(["--version"])


def test_a_run_says_what_build_train_and_evaluate_can(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """Several teachers, leaks and preferences of a run are those of `build`; each makes a stage another one."""
    collection = small_collection()
    folder = write_beir(collection, tmp_path / "animals")
    teachers = [str(cross_encoder_onnx_path), str(Path(__file__).parent / "formats" / "teacher")]
    values = SMALLEST | {"collection": {"source": str(folder), "drop_leaks": True}, "output": str(tmp_path / "run")}
    told = {"model": teachers, "weights": [2, 1], "max_length": 16, "store": ":memory:", "pairwise": teachers[1]}
    config = RunConfig.from_dict(values | {"teacher": told})
    parts = Parts(config, show_progress=False)
    assert parts.teacher.identity["kind"] == "ensemble"
    builder = steps.make_builder(
        parts.collection,
        parts.query_ids,
        None,
        parts.teacher,
        *(config.collection, config.candidates, config.teacher, config.selection),
    )
    assert builder.drop_leaks
    assert builder.pairwise is not None
    parts.output.mkdir()
    parts.candidates.write_bytes(b"")
    plain = Parts(RunConfig.from_dict(values | {"teacher": told | {"pairwise": None}}), show_progress=False)
    inputs = ALL[1].inputs(parts)
    assert changed(ALL[1].inputs(plain), inputs) == ["pairwise"]
    assert changed({key: value for key, value in inputs.items() if key != "drop_leaks"}, inputs) == ["drop_leaks"]
