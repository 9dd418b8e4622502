"""Several data sets in one training: what is drawn, what is written down of each, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.sampler import MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

from st_wkl import KLDistillLoss, MarginKL, distill, evaluate
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.dataset import DistillationDataset
from st_wkl.evaluation.results import SHARED
from st_wkl.losses.lists import unpack
from st_wkl.publish.leaderboard_model import known_training_datasets
from st_wkl.publish.licences import licence_of
from st_wkl.publish.model_card import _licences
from st_wkl.record import Exposure
from st_wkl.training import RECORD_FILE, TrainingRecord
from tests.helpers.animals import WordOverlap, small_collection
from tests.helpers.command import st_wkl
from tests.helpers.students import make_student, ragged_rows, weights
from tests.helpers.training import KillAt, Killed, arguments

ROUND_ROBIN = MultiDatasetBatchSamplers.ROUND_ROBIN


def _part(name: str, query_ids: list[str], teacher: str = "word-overlap") -> DistillationDataset:
    collection = replace(small_collection(), name=name)
    builder = DistillationDatasetBuilder(
        collection, WordOverlap(teacher), num_negatives=4, store=":memory:", query_ids=query_ids
    )
    return builder.build(show_progress=False)


@pytest.fixture(scope="module")
def datasets() -> dict[str, DistillationDataset]:
    """Return 24 and 16 lists, of two collections by name and of two teachers."""
    queries = list(small_collection().queries)
    return {"land": _part("land", queries[:24]), "sea": _part("sea", queries[24:], "another")}


def _student(static_student_path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(static_student_path))


def test_all_of_a_mixture_is_written_down(datasets: Any, static_student_path: Path, tmp_path: Path) -> None:
    """A card, or the seen part of a test split, that knows one of two datasets praises what was learnt by heart."""
    student = _student(static_student_path)
    made = distill(student, datasets, args=arguments(student, tmp_path), output_dir=tmp_path / "student")
    record = TrainingRecord.load(made.folder)
    assert record == made.record
    assert list(record.datasets) == ["land", "sea"]
    assert [part["rows_trained"] for part in record.datasets.values()] == [24, 16]
    assert record.dataset["rows_trained"] == 40
    for name, part in datasets.items():
        kept = {key: value for key, value in record.datasets[name].items() if key != "rows_trained"}
        assert kept == part.provenance, "leaks, report, licence and counts of each"
    assert record.teacher == {
        "name": "word-overlap, another",
        "teachers": {"land": {"model": "word-overlap"}, "sea": {"model": "another"}},
    }
    assert record.arguments["multi_dataset_batch_sampler"] == "proportional"
    exposure, parts = Exposure.load(made.folder), [Exposure.of(part) for part in datasets.values()]
    assert exposure is not None
    assert exposure.queries == parts[0].queries | parts[1].queries
    assert exposure.positives == parts[0].positives | parts[1].positives
    card = ModelCard.load(made.folder / "README.md").text
    for told in ("`land`", "`sea`", "word-overlap, another", "24 queries", "16 queries"):
        assert told in card


@pytest.mark.parametrize("sampler", MultiDatasetBatchSamplers)
def test_a_batch_is_of_one_dataset(sampler: Any, datasets: Any, static_student_path: Path, tmp_path: Path) -> None:
    """What answers a query in one dataset may be its negative in another: contrast must not reach across."""
    student = _student(static_student_path)
    losses: dict[str, Any] = {"land": KLDistillLoss(student, teacher_temperature=2.0), "sea": MarginKL(student)}
    seen: dict[str, list[int]] = {name: [] for name in losses}
    for name, loss in losses.items():
        loss.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(len(unpack(given[1]).scores)))
    changes = {"multi_dataset_batch_sampler": sampler, "logging_steps": 1}
    made = distill(student, datasets, losses, arguments(student, tmp_path, **changes), output_dir=tmp_path / "student")
    del seen["land"][0], seen["sea"][0]  # the trial of two rows
    assert seen["sea"] == [8, 8]
    assert seen["land"] == ([8, 8] if sampler is ROUND_ROBIN else [8, 8, 8])
    assert made.record.loss == "KLDistillLoss, MarginKL"
    assert (
        made.record.loss_config["land"] | {"name": "KLDistillLoss", "teacher_temperature": 2.0}
        == (made.record.loss_config["land"])
    )
    assert made.record.dataset["rows_trained"] == (32 if sampler is ROUND_ROBIN else 40)
    assert {"teacher_agreement_land", "teacher_agreement_sea"} <= {key for entry in made.history for key in entry}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", MultiDatasetBatchSamplers)
@pytest.mark.parametrize("step", [2, 7])
def test_a_killed_mixture_ends_with_equal_weights(
    step: int, sampler: Any, datasets: Any, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Two samplers, draws of negatives and dropout have to go on where they were, within an epoch and after it."""

    def start(folder: str, *callbacks: Any, **changes: Any) -> Any:
        student = make_student("dense", tiny_bert_path)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        options = {"num_train_epochs": 2, "save_steps": 1, "multi_dataset_batch_sampler": sampler, **changes}
        losses = {"land": "kl", "sea": "margin-mse"}
        args = arguments(student, tmp_path, learning_rate=1e-3, **options)
        told: dict[str, Any] = {"negatives_per_step": 2, "resume": True, "callbacks": callbacks}
        return distill(student, datasets, losses, args, output_dir=tmp_path / folder, **told)

    whole = start("whole")
    with pytest.raises(Killed):
        start("cut", KillAt(step))
    other = next(one for one in MultiDatasetBatchSamplers if one is not sampler)
    with pytest.raises(ValueError, match=r"those of another run .*multi_dataset_batch_sampler"):
        start("cut", multi_dataset_batch_sampler=other)
    resumed = start("cut")
    found = weights(resumed.student)
    assert all(torch.equal(value, found[name]) for name, value in weights(whole.student).items())


def test_another_order_is_another_run(datasets: Any, static_student_path: Path, tmp_path: Path) -> None:
    """The draws go through the datasets in their order, so a resumed run with another one would end elsewhere."""

    def start(given: Any, *callbacks: Any) -> Any:
        student = _student(static_student_path)
        args = arguments(student, tmp_path, save_steps=1)
        return distill(student, given, args=args, output_dir=tmp_path / "run", resume=True, callbacks=callbacks)

    with pytest.raises(Killed):
        start(datasets, KillAt(2))
    for other in (dict(reversed(datasets.items())), {"land": datasets["land"], "ocean": datasets["sea"]}):
        with pytest.raises(ValueError, match=r"those of another run .*datasets"):
            start(other)
    with pytest.raises(ValueError, match=r"those of another run .*dataset"):
        start(datasets["land"])


def test_one_dataset_by_a_name_is_that_one(datasets: Any, static_student_path: Path, tmp_path: Path) -> None:
    """What is stored of one dataset must not hang on how it was handed over."""

    def record(name: str, dataset: Any, loss: Any) -> TrainingRecord:
        student = _student(static_student_path)
        args = arguments(student, tmp_path, max_steps=1, save_strategy="no")
        return replace(distill(student, dataset, loss, args, output_dir=tmp_path / name).record, seconds=0)

    plain = record("plain", datasets["land"], "kl")
    assert record("named", {"nq": datasets["land"]}, {"nq": "kl"}) == plain
    assert record("list", [datasets["land"]], "kl") == plain
    assert list(plain.datasets) == ["land"]
    assert "datasets" not in plain.dataset
    assert "datasets" not in plain.identity


def test_a_list_goes_by_the_collections(datasets: Any, static_student_path: Path, tmp_path: Path) -> None:
    """Names that nobody has to type, and a teacher's temperature for the dataset whose report asks for one."""
    student = _student(static_student_path)
    sharp = {"report": {"entropy": 0.01, "suggested_temperature": 3.0, "temperature": 1.0}}
    sea = replace(datasets["sea"], provenance=datasets["sea"].provenance | sharp)
    args = arguments(student, tmp_path, max_steps=1, save_strategy="no")
    made = distill(student, [datasets["land"], sea], "kl", args, output_dir=tmp_path / "student")
    told = {name: config["teacher_temperature"] for name, config in made.record.loss_config.items()}
    assert told == {"land": 1.0, "sea": 3.0}


LISTS = Dataset.from_list(ragged_rows(12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": lambda d: [d["land"], d["land"]]}, "datasets 0 and 1 of the list are both of 'land'"),
        ({"dataset": lambda d: [d["land"], LISTS]}, "dataset 1 of the list does not say which collection"),
        ({"dataset": lambda d: {}}, "There is no dataset"),
        ({"dataset": lambda d: {**d, 3: LISTS}}, "names have to be texts, got 3"),
        ({"dataset": lambda d: {**d, "x": "folder"}}, r"dataset 'x': dataset is a str; .*load\('folder'\)"),
        ({"loss": {"land": "kl"}}, "'sea': there is no loss for that dataset"),
        ({"loss": {"land": "kl", "sea": "kl", "see": "kl"}}, "'see': there is no dataset of that name"),
        ({"dataset": lambda d: d["land"], "loss": {"land": "kl"}}, "there is one dataset: name it"),
        ({"loss": {"land": "kl", "sea": lambda s: DistillKLDivLoss(s)}}, "'land' is trained as lists and 'sea' as col"),
        (
            {"dataset": lambda d: {"a.b": d["land"], "c": LISTS}, "loss": {"a.b": "kl", "c": "margin-kl"}},
            "with a loss of its own cannot be called 'a.b'",
        ),
        (
            {"dataset": lambda d: {**d, "bare": LISTS.remove_columns("scores")}},
            "dataset 'bare': WeightedSumLoss cannot be trained on .*scores",
        ),
        (
            {"dataset": lambda d: {**d, "short": LISTS}, "negatives_per_step": 5},
            r"dataset 'land': negatives_per_step is 5, and the longest list of the dataset 'land' has 4 negatives",
        ),
        (
            {
                "dataset": lambda d: {**d, "none": LISTS.map(lambda row: {"labels": [0] * len(row["labels"])})},
                "loss": "margin-kl",
            },
            "dataset 'none': No document of the dataset 'none' is judged relevant",
        ),
        (
            {"dataset": lambda d: {**d, "all": LISTS.to_iterable_dataset()}},
            "'all' is an IterableDataset, and 'land'",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    change: dict[str, Any], message: str, datasets: Any, static_student_path: Path, tmp_path: Path
) -> None:
    """Found by the trainer it would be a KeyError, a wrong student, or half a night later."""
    student = _student(static_student_path)
    given = {"dataset": lambda d: d, **change}
    given["dataset"] = given["dataset"](datasets)
    args = arguments(student, tmp_path / "run", max_steps=2, save_strategy="no")
    with pytest.raises((ValueError, TypeError), match=message):
        distill(student, args=args, output_dir=tmp_path / "student", **given)
    assert not (tmp_path / "student").exists()


def test_contradictions_between_datasets_are_said(
    datasets: Any, static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A query that two datasets share teaches one thing and its contrary, and the loss looks as if all were well."""
    row = datasets["land"].to_lists(copied=True)[0]
    wrong = Dataset.from_list([{**row, "query": row["query"].upper(), "labels": [0] * (len(row["labels"]) - 1) + [1]}])
    student = _student(static_student_path)
    args = arguments(student, tmp_path, max_steps=1, save_strategy="no")
    losses = {"land": "kl", "sea": "kl", "wrong": "margin-kl"}
    distill(student, {**datasets, "wrong": wrong}, losses, args, output_dir=tmp_path / "student")
    assert "2 lists hold a document as a negative that answers the same query in another dataset" in caplog.text
    caplog.clear()
    same = {"a": datasets["land"], "b": datasets["land"]}
    distill(student, same, "kl", args, output_dir=tmp_path / "same")
    assert "hold a document as a negative" not in caplog.text, "nothing contradicts itself"


def test_rows_of_other_datasets_are_said(
    datasets: Any, static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was seen of such rows is not known, and half an exposure would be taken for the whole."""
    row = datasets["land"].to_lists(copied=True)[0]
    wrong = Dataset.from_list([row])
    student = _student(static_student_path)
    args = arguments(student, tmp_path, max_steps=1, save_strategy="no")
    losses = {"land": "kl", "sea": "kl", "wrong": "margin-kl"}
    distill(student, {**datasets, "wrong": wrong}, losses, args, output_dir=tmp_path / "student")
    assert "'wrong' is no DistillationDataset, so what training has seen is not known as a whole" in caplog.text
    assert Exposure.load(tmp_path / "student") is None
    assert "dataset_name" not in wrong[0], "the user's rows stay as they are"


def test_iterable_datasets_take_turns(static_student_path: Path, tmp_path: Path) -> None:
    """Rows that pass once have no size to be drawn in proportion to, and the stock trainer no losses for them."""
    student = _student(static_student_path)
    given = {name: Dataset.from_list(ragged_rows(16)).to_iterable_dataset() for name in ("a", "b")}

    def start(name: str, loss: Any = "kl", **changes: Any) -> TrainingRecord:
        args = arguments(student, tmp_path, max_steps=2, save_strategy="no", **changes)
        return distill(student, given, loss, args, output_dir=tmp_path / name).record

    with pytest.raises(ValueError, match="cannot be drawn from in proportion: set multi_dataset_batch_sampler"):
        start("proportional")
    with pytest.raises(ValueError, match="Iterable datasets are trained with one loss"):
        start("losses", {"a": "kl", "b": "margin-kl"}, multi_dataset_batch_sampler=ROUND_ROBIN)
    assert start("turns", multi_dataset_batch_sampler=ROUND_ROBIN).datasets == {"a": {}, "b": {}}
    given["b"] = given["b"].remove_columns("scores")
    with pytest.raises(ValueError, match="Columns of 'a' are documents, labels, query, scores, those of 'b' documents"):
        start("columns", "in-batch", multi_dataset_batch_sampler=ROUND_ROBIN)


@pytest.mark.parametrize("kind", ["cross-encoder", "columns"])
def test_rerankers_and_columns_are_mixed_too(
    kind: str, datasets: Any, tiny_bert_path: Path, static_student_path: Path, tmp_path: Path
) -> None:
    """Their batches are made elsewhere, and columns of one name may be of other places in another dataset."""
    student: Any = CrossEncoder(str(tiny_bert_path), num_labels=1)
    losses: Any = {"land": "kl", "sea": "margin-mse"}
    if kind == "columns":
        student = _student(static_student_path)
        student.prompts["query"] = "question: "
        losses = {name: DistillKLDivLoss(student, temperature=t) for name, t in (("land", 1.0), ("sea", 2.0))}
    before = weights(student)
    made = distill(student, datasets, losses, arguments(student, tmp_path), output_dir=tmp_path / "student")
    assert any(not torch.equal(value, before[name]) for name, value in weights(made.student).items())
    assert (made.folder / RECORD_FILE).is_file()


def test_one_command_mixes_and_the_test_split_knows_all(datasets: Any, tmp_path: Path) -> None:
    """What Python can, the command line can; and a document of either dataset is one that training has seen."""
    for name, part in datasets.items():
        part.save(tmp_path / name)
    same = f"{tmp_path / 'land'} {tmp_path / 'land'}"
    line = "--student packaged:potion-base-8M --epochs 1 --batch-size 8 --sampling round_robin --quiet --json"
    for given, message in (
        (same, "Two datasets are called 'land': name one as in land-2="),
        (f"{tmp_path / 'land'} {tmp_path / 'sea'} --loss-of see=mse", "--loss-of has 'see' (did you mean 'sea'?)"),
        (f"{tmp_path / 'land'} --loss-of land.draw", "--loss-of takes name=value"),
        (f"{tmp_path / 'land'} --loss-of land={{draw:top}}", "each.land"),
    ):
        code, _, err = st_wkl("train", *given.split(), "--output", str(tmp_path / "out"), *line.split())
        assert (code, message in err) == (1, True), err
    options = [
        "--loss",
        "kl",
        "--loss-of",
        "earth={parameters: {teacher_temperature: 2}}",
        "--loss-of",
        "sea=margin-mse",
    ]
    sources = [f"earth={tmp_path / 'land'}", str(tmp_path / "sea")]
    code, out, err = st_wkl("train", *sources, "--output", str(tmp_path / "student"), *options, *line.split())
    assert code == 0, err
    record = TrainingRecord.load(tmp_path / "student")
    assert json.loads(out)["dataset"] == json.loads(json.dumps(record.dataset))
    assert list(record.datasets) == ["earth", "sea"]
    assert record.arguments["multi_dataset_batch_sampler"] == "round_robin"
    assert {name: config["name"] for name, config in record.loss_config.items()} == {
        "earth": "WeightedKLDistillationLoss",
        "sea": "MarginMSEDistillLoss",
    }
    assert record.loss_config["earth"]["teacher_temperature"] == 2.0
    again = st_wkl("train", *sources, "--output", str(tmp_path / "student"), *options, *line.split())
    assert again[0] == 0, "the same command finds it complete"
    results = evaluate(str(tmp_path / "student"), small_collection(), show_progress=False)
    assert len(results.tasks[0].groups[SHARED]) == 40, "24 of one and 16 of the other"


def test_the_leaderboard_and_the_licence_know_all(datasets: Any) -> None:
    """A model is zero-shot only on what none of its datasets has; the strictest licence of any holds."""
    names = {"land": "mteb/scifact", "sea": "NFCorpus"}
    licences = {"land": "mit", "sea": "cc-by-nc-4.0"}
    parts = {
        name: part.provenance
        | {"collection": {"name": names[name]}, "license": licences[name], "teacher_license": "mit"}
        for name, part in datasets.items()
    }
    record = TrainingRecord("s", "KLDistillLoss, MarginKL", {}, "", {}, {"datasets": parts}, {}, 1.0, {})
    seen, notes = known_training_datasets(record, [])
    assert seen is not None
    assert {"SciFact", "NFCorpus"} <= {*seen}
    assert len([note for note in notes if note.startswith("Collection")]) == 2
    known = _licences(record, {"student": "mit"})
    assert known == {
        "student": "mit",
        "teacher": "mit",
        "training data of `land`": "mit",
        "training data of `sea`": "cc-by-nc-4.0",
    }
    assert licence_of(known).id == "cc-by-nc-4.0"
    assert licence_of(_licences(record, {"student": "mit", "training data": "mit"})).id == "mit"
