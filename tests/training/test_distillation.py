"""distill(): the trained student, the record beside it, runs that go on, and the errors before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MatryoshkaLoss
from transformers import EarlyStoppingCallback

from st_wkl import MarginKL, WeightedKLDistillationLoss, WeightedSumLoss, distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.models import load_model, model_revision
from st_wkl.record import Exposure
from st_wkl.training import LOSSES, RECORD_FILE, TrainingRecord, default_arguments, make_loss
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.students import takes_lists
from tests.helpers.animals import small_collection
from tests.helpers.students import CLASSES, make_student, ragged_rows
from tests.helpers.training import KillAt, Killed, LogOf, arguments
from tests.helpers.vectors import vectors_for


def test_distilled_student_is_saved_with_its_record(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """A student whose making is not written down cannot be reproduced, compared or published."""
    made = distill(static_student_path, dataset, output_dir=tmp_path / "student")
    loaded = SentenceTransformer(str(tmp_path / "student"))
    assert (loaded.encode(["do cats like water"]) == made.student.encode(["do cats like water"])).all()
    untrained = SentenceTransformer(str(static_student_path))
    assert not (untrained.encode(["do cats like water"]) == loaded.encode(["do cats like water"])).all()
    record = TrainingRecord.load(tmp_path / "student")
    assert record == made.record
    assert (record.student, record.loss) == (static_student_path.name, "WeightedSumLoss")
    assert record.loss_config["WeightedKLDistillationLoss"]["gamma"] == 0.0
    assert record.loss_config["InBatchContrastiveLoss"]["weight"] == 1.0
    assert "Distilling the Knowledge in a Neural Network" in record.loss_citation, "plain KL is not the paper's"
    assert record.teacher == {"model": "word-overlap"}
    assert record.dataset["rows_trained"] == len(dataset)
    assert record.arguments["learning_rate"] == 0.1
    assert set(made.results) == {"train_loss", "seconds"}
    assert Exposure.load(made.folder) == Exposure.of(dataset)
    assert not (tmp_path / "student" / "checkpoints").exists(), "they are worth nothing once the student is complete"
    for file in (RECORD_FILE, "README.md"):
        content = (tmp_path / "student" / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in content
        assert "word-overlap" in content


@pytest.mark.slow
def test_the_licence_of_the_base_model_reaches_the_card(
    dataset: DistillationDataset, static_student_path: Path, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """A student must not become free because nobody remembers what it was made from."""

    def licence(student: Any, name: str, **provenance: str) -> tuple[str, str | None]:
        data = replace(dataset, provenance=dataset.provenance | provenance)
        made = distill(student, data, output_dir=tmp_path / name)
        card = ModelCard.load(made.folder / "README.md")
        return made.record.student_license, card.data.to_dict().get("license")

    parts = {"license": "cc-by-nc-4.0", "teacher_license": "apache-2.0"}
    in_memory = SentenceTransformer(str(static_student_path))
    assert licence(static_student_path, "folder", **parts) == ("mit", "cc-by-nc-4.0")
    assert licence(in_memory, "memory", **(parts | {"license": "cc-by-4.0"})) == ("mit", "cc-by-4.0")
    assert licence(static_student_path, "unknown-data") == ("mit", None)
    assert licence(tiny_bert_path, "unknown-base", **parts) == ("", None)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_model_class_is_trained_and_reloads(
    kind: str, dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """One call for all four: each has its own trainer, arguments and, for sparse students, regularizers."""
    student = make_student(kind, tiny_bert_path)
    before = model_revision(student)
    made = distill(student, dataset, args=arguments(student, tmp_path), output_dir=tmp_path / "student")
    loaded, _ = load_model(tmp_path / "student")
    assert type(loaded) is CLASSES[kind]
    assert model_revision(loaded) == model_revision(made.student) != before
    expected = {"sparse": "CachedSpladeLoss", "dense": "WeightedSumLoss"}
    assert made.record.loss == expected.get(kind, "WeightedKLDistillationLoss")


def test_loss_and_arguments_can_be_the_users(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """One call must not mean one way: every part can be replaced by what the user already has."""
    student = SentenceTransformer(str(static_student_path))
    args = arguments(student, tmp_path / "run", max_steps=2)
    distill(student, dataset, lambda model: MarginKL(model, pairs="all"), args, output_dir=tmp_path / "student")
    record = TrainingRecord.load(tmp_path / "student")
    assert (record.loss, record.loss_config["pairs"]) == ("MarginKL", "all")
    assert args.output_dir == str(tmp_path / "run"), "the user's arguments are not ours to change"


def test_upstream_losses_get_columns(dataset: DistillationDataset, static_student_path: Path, tmp_path: Path) -> None:
    """Losses of sentence-transformers know no lists; the user should not have to."""
    student = SentenceTransformer(str(static_student_path))
    ours, theirs = WeightedKLDistillationLoss(student), DistillKLDivLoss(student)
    assert takes_lists(MatryoshkaLoss(student, ours, [32]))
    assert not takes_lists(MatryoshkaLoss(student, theirs, [32]))
    assert not takes_lists(WeightedSumLoss(student, [(1, ours), (1, _Upstream(student))]))
    made = distill(student, dataset, theirs, arguments(student, tmp_path, max_steps=1), output_dir=tmp_path / "student")
    assert made.record.loss == "DistillKLDivLoss"


class _Upstream(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> Any:
        return embeddings[0].sum()


def test_any_dataset_of_lists_or_columns(static_student_path: Path, tmp_path: Path) -> None:
    """What a user has already needs no builder: lists of any length get the collator that reads them."""
    student = SentenceTransformer(str(static_student_path))
    rows = datasets.Dataset.from_list(ragged_rows(16))
    made = distill(student, rows, args=arguments(student, tmp_path), output_dir=tmp_path / "student")
    assert made.record.dataset == {"rows_trained": 16}
    iterable = rows.to_iterable_dataset()
    args = arguments(student, tmp_path, max_steps=2, save_strategy="no")
    assert distill(student, iterable, args=args, output_dir=tmp_path / "second").record.dataset == {}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 7, 10])
def test_a_stopped_run_ends_with_the_same_weights(
    step: int, dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """A run that goes on with another order or other dropout is another experiment, and nobody would notice."""

    def start() -> tuple[Any, Any]:
        student = make_student("dense", tiny_bert_path)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        args = arguments(student, tmp_path, num_train_epochs=2, learning_rate=1e-3, save_steps=3, logging_steps=2)
        return student, args

    student, args = start()
    whole = distill(student, dataset, args=args, output_dir=tmp_path / "whole")
    student, args = start()
    with pytest.raises(Killed):
        distill(student, dataset, args=args, output_dir=tmp_path / "cut", callbacks=[KillAt(step)])
    student, args = start()
    with pytest.raises(FileExistsError, match="a run that was stopped"):
        distill(student, dataset, args=args, output_dir=tmp_path / "cut")
    for broken in (tmp_path / "cut").glob("checkpoints/checkpoint-9/trainer_state.json"):
        broken.write_text(broken.read_text()[:100])  # killed while it was written
    student, args = start()
    resumed = distill(student, dataset, args=args, output_dir=tmp_path / "cut", resume=True)
    weights = [load_file(made.folder / "model.safetensors") for made in (whole, resumed)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    student, args = start()
    again = distill(student, dataset, args=args, output_dir=tmp_path / "cut", resume=True, callbacks=[KillAt(1)])
    assert model_revision(again.student) == model_revision(resumed.student)


@pytest.mark.slow
def test_a_run_killed_while_saving_is_saved_again(
    dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last step and the last file lie seconds, in which a machine can fail, too."""
    student, again = (make_student("dense", tiny_bert_path) for _ in range(2))
    whole = distill(make_student("dense", tiny_bert_path), dataset, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("st_wkl.training.run.write_model_card", _killed)
        with pytest.raises(Killed):
            distill(student, dataset, output_dir=tmp_path / "cut")
    monkeypatch.setattr("transformers.Trainer.train", _killed)
    resumed = distill(again, dataset, output_dir=tmp_path / "cut", resume=True)
    assert model_revision(resumed.student) == model_revision(whole.student)


def _killed(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.slow
def test_the_best_checkpoint_by_the_dev_split_is_kept(
    dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """The last checkpoint is often not the best; a run that was stopped has to keep the same one."""
    collection = small_collection()
    evaluator = GradedEvaluator(collection.queries, collection.documents, collection.qrels["test"])

    def run(name: str, *callbacks: Any, **options: Any) -> Any:
        student = make_student("dense", tiny_bert_path)
        args = arguments(student, tmp_path, learning_rate=0.1, save_steps=1)  # a rate that spoils it step by step
        stop = EarlyStoppingCallback(3)
        folder = tmp_path / name
        return distill(
            student, dataset, args=args, output_dir=folder, evaluator=evaluator, callbacks=[stop, *callbacks], **options
        )

    whole = run("whole")
    log = LogOf()
    with pytest.raises(Killed):
        run("cut", KillAt(4), log)
    resumed = run("cut", log, resume=True)
    assert model_revision(resumed.student) == model_revision(whole.student)
    values = [entry["eval_dev_ndcg_at_10"] for entry in log.history if "eval_dev_ndcg_at_10" in entry]
    assert resumed.results["dev_after"] == pytest.approx(max(values), abs=1e-6)
    assert values[-1] < max(values), "a run whose last checkpoint is its best shows nothing"
    assert evaluator(SentenceTransformer(str(resumed.folder)))["dev_ndcg_at_10"] == pytest.approx(max(values), abs=1e-6)
    assert resumed.record.dev == whole.record.dev
    assert set(resumed.record.dev) == {"before", "after"}
    assert any("eval_dev_ndcg_at_10" in entry for entry in whole.history), "what a picture is drawn of"
    assert any("teacher_agreement" in entry for entry in log.history)


def test_checkpoints_of_another_run_are_refused(
    dataset: DistillationDataset, tiny_bert_path: Path, minilm_path: Path, tmp_path: Path
) -> None:
    """Weights of one run with the data of another would train without a word."""
    student = make_student("dense", tiny_bert_path)
    args = arguments(student, tmp_path)
    args.save_steps = 1
    with pytest.raises(Killed):
        distill(student, dataset, args=args, output_dir=tmp_path / "run", callbacks=[KillAt(3)])
    other = DistillationDataset(dataset.train.select(range(30)), dataset.queries, dataset.documents, dataset.provenance)
    changes: dict[str, dict[str, Any]] = {
        "student": {"student": make_student("dense", tiny_bert_path, seed=1).half().float()},
        "dataset": {"dataset": other},
        "loss": {"loss": "margin-kl"},
        "arguments": {"args": arguments(student, tmp_path, learning_rate=1e-3)},
    }
    for what, change in changes.items():
        options = {"student": make_student("dense", tiny_bert_path), "dataset": dataset, "args": args, **change}
        with pytest.raises(ValueError, match=f"those of another run \\({what}: "):
            distill(**options, output_dir=tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_nothing_is_overwritten(
    dataset: DistillationDataset, static_student_path: Path, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """A folder that holds something may be last week's best student."""
    (tmp_path / "keep.txt").write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="is not empty"):
            distill(static_student_path, dataset, output_dir=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]
    student = make_student("dense", tiny_bert_path)
    made = distill(
        student, dataset, "margin-kl", arguments(student, tmp_path, max_steps=1), output_dir=tmp_path / "student"
    )
    with pytest.raises(FileExistsError, match="was trained from another student, dataset, loss or arguments"):
        distill(static_student_path, dataset, output_dir=tmp_path / "student", resume=True)
    assert TrainingRecord.load(made.folder) == made.record


def test_bad_input_is_an_error_before_any_work(
    dataset: DistillationDataset, static_student_path: Path, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Each of these would otherwise show up after hours, or never."""
    student = SentenceTransformer(str(static_student_path))
    few = datasets.Dataset.from_list(ragged_rows(7))
    cross_encoder = make_student("cross-encoder", tiny_bert_path)
    without_scores = datasets.Dataset.from_list(ragged_rows(40)).remove_columns("scores")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (
            ValueError,
            r"7 rows, which do not fill one batch of 32.*per_device_train_batch_size to 7.*default_arguments",
            {"dataset": few, "args": default_arguments(cross_encoder, tmp_path / "x", dataloader_drop_last=True)},
        ),
        (TypeError, "DistillKLDivLoss is a loss for a sentence_transformer", {"loss": DistillKLDivLoss(student)}),
        (ValueError, "over another model than the student", {"loss": WeightedKLDistillationLoss(student)}),
        (ValueError, "'in-batch' on a CrossEncoder|needs embeddings", {"loss": "in-batch"}),
        (ValueError, "did you mean 'margin-kl'", {"loss": "margin-lk"}),
        (
            TypeError,
            "CrossEncoderTrainingArguments",
            {"args": SentenceTransformerTrainingArguments(str(tmp_path / "x"))},
        ),
        (ValueError, "score", {"dataset": without_scores}),
        (ValueError, "give it to your own loss", {"loss": WeightedKLDistillationLoss(student), "mini_batch_size": 4}),
    ]
    for error, message, change in cases:
        options = {"student": cross_encoder, "dataset": dataset, **change}
        with pytest.raises(error, match=message):
            distill(**options, output_dir=tmp_path / "student")
        assert not (tmp_path / "student").exists(), message


def test_every_loss_has_a_name(tiny_bert_path: Path) -> None:
    """The command line and the YAML name losses; one that has no name there does not exist for them."""
    import st_wkl.losses

    named = {getattr(loss, "func", loss).__name__ for loss in LOSSES.values()}
    # A sum has terms to name, and the last one learns from paraphrases, which a distillation dataset has not.
    unnamed = {"WeightedSumLoss", "PairwisePreferenceLoss", "CoherenceLoss"}
    unnamed.add("KLDistillLoss")  # `kl` goes on making it of weighted KL, by whose name runs and cards know it
    assert named == set(st_wkl.losses.__all__) - unnamed
    student = make_student("dense", tiny_bert_path)
    for name, loss in LOSSES.items():
        given: dict[str, Any] = {"vectors": vectors_for(ragged_rows())} if name == "embedding" else {}
        made = make_loss(make_student("cross-encoder", tiny_bert_path) if name == "mse" else student, name, **given)
        assert isinstance(made, getattr(loss, "func", loss))
    with pytest.raises(ValueError, match=r"'weighted-kl' on a SentenceTransformer: .*gama"):
        make_loss(student, "weighted-kl", gama=2)


def test_the_teacher_report_sets_the_temperature(tiny_bert_path: Path) -> None:
    """Probabilities as scores are flat to a softmax at temperature 1, and then every loss learns nothing from them."""
    student = make_student("dense", tiny_bert_path)
    flat = {"temperature": 1.0, "entropy": 0.99, "suggested_temperature": 0.07}
    assert make_loss(student, "kl", report=flat).teacher_temperature == 0.07
    assert make_loss(student, "kl", report=flat, teacher_temperature=2.0).teacher_temperature == 2.0
    assert make_loss(student, "kl", report={**flat, "entropy": 0.4}).teacher_temperature == 1.0
    assert make_loss(student, "pearson", report=flat)
    both = make_loss(student, in_batch=0.5, student_temperature=0.1)
    assert both.weights == [1.0, 0.5]
    assert [both.losses[0].student_temperature, both.losses[1].temperature] == [0.1, 0.1]


def test_students_get_their_own_learning_rates(minilm_path: Path, static_student_path: Path, tmp_path: Path) -> None:
    """The rate that a lookup table needs destroys a transformer within a few steps."""
    transformer, static = (SentenceTransformer(str(path)) for path in (minilm_path, static_student_path))
    assert default_arguments(transformer, tmp_path).learning_rate == 2e-5
    assert default_arguments(transformer, tmp_path, lora=True).learning_rate == 2e-4
    assert default_arguments(static, tmp_path).learning_rate == 0.1


def test_damaged_records_are_told_from_missing_ones(tmp_path: Path) -> None:
    """The remedies differ: a stock-trained student never had a record, a damaged one lost it."""
    with pytest.raises(FileNotFoundError, match="only students that `distill` saved"):
        TrainingRecord.load(tmp_path)
    for content in ('{"student": "x"', json.dumps({"student": "x"})):
        (tmp_path / RECORD_FILE).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged or from another version"):
            TrainingRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("push_to_hub", True), ("hub_model_id", "me/student"), ("hub_token", "secret"), ("hub_strategy", "end")],
)
def test_training_sends_nothing_to_the_hub(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path, name: str, value: Any
) -> None:
    """The trainer would make a public repository, and write the token into files that are shared."""
    student = SentenceTransformer(str(static_student_path))
    args = arguments(student, tmp_path / "student")
    setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"args\.{name}: a run sends nothing to the Hub.*push_student"):
        distill(student, dataset, args=args, output_dir=tmp_path / "student")
    assert not any(tmp_path.iterdir())


def test_weights_of_kl_are_said(static_student_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A strength of weights makes another loss of the default, which must not happen without a word."""
    student = SentenceTransformer(str(static_student_path))
    make_loss(student, "kl", gamma=0.0)
    make_loss(student, "weighted-kl", gamma=2)
    assert not caplog.messages
    make_loss(student, gamma=2)
    assert "gamma=2 weighs the terms of KL, so this is the loss weighted-kl" in caplog.text
    with pytest.raises(ValueError, match=r"'kl' on a .*: it has no parameter 'gama' \(did you mean 'gamma'\?\)"):
        make_loss(student, "kl", gama=2)


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "per_device_train_batch_size"])
def test_counts_of_training_are_checked_before_it(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path, name: str
) -> None:
    """No gradient is ever accumulated in 0 steps; the trainer divides by it when the teacher's work is done."""
    student = SentenceTransformer(str(static_student_path))
    args = arguments(student, tmp_path / "student")
    setattr(args, name, 0)
    with pytest.raises(ValueError, match=rf"args\.{name} must be 1 or more, got 0"):
        distill(student, dataset, args=args, output_dir=tmp_path / "student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluator": 3}, r"evaluator is 3; it has to be a GradedEvaluator"),
        ({"evaluator": [1]}, r"SequentialEvaluator joins several"),
        ({"resume": "yes"}, r"resume is 'yes'; it has to be True or False"),
        ({"trust_remote_code": 1}, r"trust_remote_code is 1; it has to be True or False"),
        ({"lora": "yes"}, r"lora is True or a LoraConfig"),
    ],
)
def test_values_of_another_kind_are_refused(
    change: dict[str, Any], message: str, dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """`resume="no"` resumed, and an evaluator that is none was found out by the trainer's first evaluation."""
    with pytest.raises(TypeError, match=message):
        distill(tiny_bert_path, dataset, output_dir=tmp_path / "student", **change)
    assert not (tmp_path / "student").exists()


def test_the_former_name_of_evaluator_says_so(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """Scripts of the last release go on for one more; what comes back is told in a few lines."""
    student = SentenceTransformer(str(static_student_path))
    texts = {"q": "do cats like water"}, {"a": "cats like water", "b": "dogs like meat"}
    evaluator = GradedEvaluator(*texts, {"q": {"a": 1}})
    args = arguments(student, tmp_path, max_steps=2)
    with pytest.warns(DeprecationWarning, match="is called evaluator= now"):
        made = distill(student, dataset, args=args, output_dir=tmp_path / "student", eval=evaluator)
    assert set(made.record.dev) == {"before", "after"}
    assert len(repr(made).splitlines()) < 6
    for part in ("WeightedSumLoss on 40 lists from word-overlap", "dev split: ", str(made.folder)):
        assert part in repr(made)
    assert "1 queries, 2 documents" in repr(evaluator)
    assert "hashes" in repr(Exposure.of(dataset))
