"""Values that no run can have: refused before anything is loaded, from Python, the command line and a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments

from st_wkl.cli import app
from st_wkl.config import RunConfig
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import BM25, bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.cross_encoder import CrossEncoderTeacher
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.runs import read_run, reciprocal_rank_fusion
from st_wkl.data.scoring import estimate_scoring, score_pairs
from st_wkl.data.selection import Selection, choose
from st_wkl.evaluation import evaluate
from st_wkl.methods.rounds import distill_rounds
from st_wkl.pipeline import run
from st_wkl.ranges import RANGES, Range
from st_wkl.reading import check_training_arguments
from st_wkl.training import distill, make_loss
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.refresh import RefreshCandidatesCallback
from tests.helpers.animals import write_beir
from tests.helpers.command import CliRunner

NOWHERE: Any = "no/such/thing"
MINE = Collection("mine", {"d": "cats"}, {"q": "cats"}, {"train": {"q": {"d": 1}}})
BUILD = ("build", NOWHERE, "--teacher", NOWHERE, "--output", "out")
TRAIN = ("train", NOWHERE, "--student", NOWHERE, "--output", "out")
EVALUATE = ("evaluate", NOWHERE, NOWHERE)


def trained(**given: Any) -> Any:
    return distill(NOWHERE, NOWHERE, args=SentenceTransformerTrainingArguments("out", **given), output_dir="out")


# Option, value, calls of Python, commands, keys of a configuration. Nothing that they name exists.
CASES: list[tuple[str, Any, list[Callable[..., Any]], list[tuple[str, ...]], list[str]]] = [
    ("limit", -90, [], [BUILD], ["collection.limit"]),
    ("limit", 0, [], [BUILD], ["collection.limit"]),
    (
        "top_k",
        -1,
        [
            lambda **o: bm25_candidates(MINE, **o),
            lambda **o: retriever_candidates(MINE, NOWHERE, **o),
            lambda **o: retriever_candidates(MINE, "bm25", **o),
            lambda **o: evaluate(NOWHERE, NOWHERE, **o),
            lambda **o: read_run(NOWHERE, **o),
            lambda **o: reciprocal_rank_fusion({}, **o),
        ],
        [EVALUATE],
        ["candidates.top_k"],
    ),
    ("num_negatives", 0, [lambda **o: DistillationDatasetBuilder(NOWHERE, NOWHERE, **o)], [BUILD], ["candidates"]),
    ("num_negatives", 1.5, [lambda **o: DistillationDatasetBuilder(NOWHERE, NOWHERE, **o)], [], []),
    ("num_negatives", True, [lambda **o: DistillationDatasetBuilder(NOWHERE, NOWHERE, **o)], [], []),
    ("pairs_per_query", 0, [lambda **o: DistillationDatasetBuilder(NOWHERE, NOWHERE, **o)], [], []),
    ("workers", 0, [lambda **o: DistillationDatasetBuilder(NOWHERE, NOWHERE, **o)], [BUILD], []),
    ("chunk_size", -1, [lambda **o: score_pairs(NOWHERE, NOWHERE, **o)], [], []),
    ("sample_size", -1, [lambda **o: estimate_scoring(NOWHERE, NOWHERE, **o)], [], []),
    ("k1", math.inf, [BM25, lambda **o: bm25_candidates(MINE, **o)], [], []),
    ("b", math.nan, [BM25], [], []),
    ("n", -1, [lambda **o: choose(5, **o)], [], []),
    ("max_positives", 0, [Selection], [BUILD], ["selection"]),
    ("pool_size", -1, [Selection], [], ["selection"]),
    ("relative_margin", math.nan, [Selection], [BUILD], ["selection"]),
    ("absolute_margin", -1.0, [Selection], [BUILD], ["selection"]),
    ("near_duplicates", 0.0, [Selection], [BUILD], ["selection"]),
    ("seed", -1, [Selection, trained], [BUILD, TRAIN], ["selection", "training"]),
    ("data_seed", 2**32, [trained], [], ["training"]),
    ("max_length", 1, [lambda **o: CrossEncoderTeacher(NOWHERE, **o)], [BUILD], ["teacher"]),
    ("max_length", 10**9, [lambda **o: CrossEncoderTeacher(NOWHERE, **o)], [BUILD], ["teacher"]),
    ("batch_tokens", 0, [lambda **o: CrossEncoderTeacher(NOWHERE, **o)], [BUILD], []),
    (
        "batch_size",
        -1,
        [
            lambda **o: evaluate(NOWHERE, NOWHERE, **o),
            lambda **o: retriever_candidates(MINE, NOWHERE, **o),
            lambda **o: GradedEvaluator.of(MINE, "no such split", **o),
        ],
        [EVALUATE, TRAIN],
        ["evaluation"],
    ),
    ("max_queries", 0, [lambda **o: GradedEvaluator.of(MINE, "no such split", **o)], [], ["dev"]),
    ("max_documents", -5, [lambda **o: GradedEvaluator.of(MINE, "no such split", **o)], [], ["dev"]),
    ("patience", 0, [], [(*TRAIN, "--dev", NOWHERE)], ["dev"]),
    ("in_batch", -1.0, [lambda **o: make_loss(NOWHERE, **o)], [TRAIN], ["loss"]),
    (
        "mini_batch_size",
        0,
        [lambda **o: make_loss(NOWHERE, **o), lambda **o: distill(NOWHERE, NOWHERE, output_dir="out", **o)],
        [TRAIN],
        ["loss"],
    ),
    ("gamma", -1.0, [], [TRAIN], ["loss.parameters"]),
    ("student_temperature", 0.0, [], [TRAIN], ["loss.parameters"]),
    ("teacher_temperature", math.nan, [], [TRAIN], ["loss.parameters"]),
    ("epochs", -1.0, [], [TRAIN], []),
    ("num_train_epochs", -1, [], [], ["training"]),
    ("learning_rate", math.inf, [], [TRAIN], ["training"]),
    ("gradient_accumulation_steps", 0, [trained], [], ["training"]),
    ("per_device_train_batch_size", -1, [trained], [], ["training"]),
    ("max_grad_norm", math.nan, [], [], ["training"]),
    ("warmup_ratio", 2, [], [], ["training"]),
    ("weight_decay", -0.1, [], [], ["training"]),
    ("every", 0, [lambda **o: RefreshCandidatesCallback(NOWHERE, NOWHERE, **o)], [], []),
    ("rounds", 0, [lambda **o: distill_rounds(NOWHERE, NOWHERE, NOWHERE, output_dir="out", **o)], [], []),
]


@pytest.mark.parametrize(("name", "value", "calls", "commands", "keys"), CASES, ids=[f"{c[0]}={c[1]}" for c in CASES])
def test_values_out_of_range(
    name: str,
    value: Any,
    calls: list[Callable[..., Any]],
    commands: list[tuple[str, ...]],
    keys: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were slices from the end, NaN scores, or errors after the teacher's hours; one table holds all ranges."""
    monkeypatch.chdir(tmp_path)
    expected = "0 or more" if name in ("sample_size", "n") else str(RANGES[name])
    if name in ("relative_margin", "near_duplicates"):
        expected = r"(0, 1]"
    said = []
    for call in calls:
        with pytest.raises(ValueError, match=name) as caught:
            call(**{name: value})
        said.append(str(caught.value))
    for command in commands:
        flag = f"--{name.replace('_', '-')}"
        result = CliRunner().invoke(app, [*command, f"{flag}={value}"])
        assert result.exit_code == 1, result.output
        assert f"error: {flag} must be " in result.stderr
        said.append(result.stderr.replace(str(RANGES[name]), expected))
    for key in keys:
        path = key if key.endswith(name) else f"{key}.{name}"
        with pytest.raises(ValueError, match=path) as caught:
            RunConfig.from_dict(configured({path: value}))
        said.append(str(caught.value).replace(str(RANGES[name]), expected))
    assert said
    for message in said:
        assert str(value) in message
        assert expected in message or "finite distance of 0 or more" in message
    assert not any(tmp_path.iterdir())


def configured(changes: dict[str, Any], source: Any = NOWHERE, output: Any = "out") -> dict[str, Any]:
    values: dict[str, Any] = {"output": str(output), "collection": {"source": str(source)}}
    values |= {"teacher": {"model": NOWHERE}, "student": {"model": NOWHERE}}
    for path, value in changes.items():
        *parents, key = path.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return values


def test_what_a_range_holds() -> None:
    """NaN, infinity, truth values and text are no numbers; whole ones are counts."""
    assert [Range(0).holds(value) for value in (0, 1.5, math.nan, math.inf, True, "1", None)] == [True, True] + [
        False
    ] * 5
    assert [Range(0, 1, above=True).holds(value) for value in (0, 0.1, 1, 1.1)] == [False, True, True, False]
    assert [Range(1, whole=True).holds(value) for value in (0, 1, 1.0)] == [False, True, False]
    assert [str(one) for one in (Range(1), Range(8, 10**6), Range(0, above=True), Range(0, 1, above=True))] == [
        "1 or more",
        "from 8 to 1,000,000",
        "above 0",
        "above 0, up to 1",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": "fast"}, "training.learning_rate is 'fast'; it has to be of type float"),
        (
            {"per_device_train_batch_size": "32"},
            "training.per_device_train_batch_size is '32'; it has to be of type int",
        ),
        ({"num_train_epochs": [3]}, r"training.num_train_epochs is \[3\]; it has to be of type float"),
        ({"bf16": "yes"}, "training.bf16 is 'yes'; it has to be of type bool"),
    ],
)
def test_training_arguments_have_types(values: dict[str, Any], message: str) -> None:
    """They were found by the optimizer, after the student of the run before had been moved away."""
    with pytest.raises(ValueError, match=message):
        check_training_arguments(values, SentenceTransformerTrainingArguments)
    fine = {"learning_rate": 1, "lr_scheduler_type": "cosine", "report_to": ["none"], "max_steps": 3, "run_name": None}
    check_training_arguments({**fine, "save_strategy": "no"}, SentenceTransformerTrainingArguments)


def test_lists_of_thousands_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query with 5,000 positives became a list of 5,003 documents, which every batch would have embedded."""
    monkeypatch.chdir(tmp_path)
    documents = {f"d{i}": f"word{i}" for i in range(5_010)}
    qrels = {"train": {"q": dict.fromkeys(list(documents)[:5_000], 1), "r": {"d1": 1}}}
    many = Collection("many", documents, {"q": "word1", "r": "word2"}, qrels)
    message = "max_positives must be given, since query 'q' has 5,000 positives, and so a list of 5,015 documents"
    with pytest.raises(ValueError, match=message):
        DistillationDatasetBuilder(many, NOWHERE)
    folder = write_beir(many, tmp_path / "many")
    result = CliRunner().invoke(app, ["build", str(folder), "--teacher", NOWHERE, "--output", "out"])
    assert f"error: {message.replace('max_positives', '--max-positives')}" in result.stderr
    with pytest.raises(ValueError, match=message):
        run(RunConfig.from_dict(configured({}, folder, tmp_path / "out")), show_progress=False)
    for options in ({"query_ids": ["r"]}, {"selection": Selection(max_positives=10)}):
        with pytest.raises(OSError, match="no/such/thing"):
            DistillationDatasetBuilder(many, NOWHERE, **options)


def test_a_run_checks_its_collection_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ids that a run file cannot hold stopped a run when its candidates had been found; equal splits never did."""
    spaced = Collection("spaced", {"d 1": "cats", "d2": "dogs"}, {"q": "cats"}, {"train": {"q": {"d 1": 1}}})
    folder = write_beir(spaced, tmp_path / "spaced")
    with pytest.raises(ValueError, match="The id 'd 1' is empty or has white space"):
        run(RunConfig.from_dict(configured({}, folder, tmp_path / "out")), show_progress=False)
    folder = write_beir(MINE, tmp_path / "mine")
    same = configured({"dev.split": "train", "evaluation.split": "train"}, folder, tmp_path / "same")
    with pytest.raises(OSError, match="no/such/thing"):
        run(RunConfig.from_dict(same), show_progress=False)
    for pair in ("collection.split and dev", "collection.split and evaluation", "dev.split and evaluation"):
        assert f"{pair}.split are both 'train'" in caplog.text


def test_nothing_to_evaluate_is_known_before_the_student_is_loaded() -> None:
    """The trainer said so when the student had been loaded and its adapter rehearsed."""
    with pytest.raises(
        ValueError, match="eval_strategy is 'steps', and there is nothing to evaluate on: give evaluator="
    ):
        trained(eval_strategy="steps")
