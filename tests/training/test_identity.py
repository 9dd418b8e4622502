"""Which run is this: what has to count does, however little a card shows of it, and what cannot matter does not."""

from __future__ import annotations

import enum
import functools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score
from transformers import EarlyStoppingCallback

from st_wkl import MarginKL, WeightedKLDistillationLoss, WeightedSumLoss, distill
from st_wkl.data.dataset import DistillationDataset
from st_wkl.losses import AdaptiveRelevanceMarginLoss, InBatchContrastiveLoss
from st_wkl.training import RECORD_FILE, TrainingRecord
from st_wkl.training.identity import Describer, differences, matters, run_identity, told
from tests.helpers.students import make_student
from tests.helpers.training import KillAt, Killed, arguments


class Curve(enum.Enum):
    """An option that is no word."""

    LINEAR = "linear"
    SQUARE = "square"


class Scaled:
    """A similarity with a setting, as an object."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.scale * pairwise_dot_score(a, b)


class Own(torch.nn.Module):
    """A user's loss, which says nothing of its options."""

    def __init__(self, model: Any, option: Any = None, inner: Any = None) -> None:
        super().__init__()
        self.model, self.hidden, self.inner = model, option, inner

    def forward(self, features: Any, labels: Any) -> torch.Tensor:
        return self.model(next(iter(features)))["sentence_embedding"].sum()


SCALE = 2.0


def own_class(power: int) -> type[Own]:
    class Powered(Own):
        def compute(self, value: torch.Tensor) -> torch.Tensor:
            return value**2 if power == 2 else value**3

    class OtherPowered(Own):
        def compute(self, value: torch.Tensor) -> torch.Tensor:
            return value**3

    OtherPowered.__qualname__ = Powered.__qualname__
    return Powered if power == 2 else OtherPowered


def scaled(factor: float) -> Callable[..., Any]:
    return lambda a, b: factor * pairwise_dot_score(a, b)


PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "an option that the card leaves out": (
        lambda m: InBatchContrastiveLoss(m, positive_threshold=1.0),
        lambda m: InBatchContrastiveLoss(m, positive_threshold=3.0),
    ),
    "a word": (
        lambda m: WeightedKLDistillationLoss(m),
        lambda m: WeightedKLDistillationLoss(m, several_positives="first"),
    ),
    "an option inside a sum": (
        lambda m: WeightedSumLoss(m, [(1.0, AdaptiveRelevanceMarginLoss(m))]),
        lambda m: WeightedSumLoss(m, [(1.0, AdaptiveRelevanceMarginLoss(m, positive_threshold=2.0))]),
    ),
    "an option inside upstream's wrapper": (
        lambda m: MatryoshkaLoss(m, WeightedKLDistillationLoss(m, 5.0), [32, 16]),
        lambda m: MatryoshkaLoss(m, WeightedKLDistillationLoss(m, 4.0), [32, 16]),
    ),
    "weights of upstream's wrapper": (
        lambda m: MatryoshkaLoss(m, MarginKL(m), [32, 16], [1, 1]),
        lambda m: MatryoshkaLoss(m, MarginKL(m), [32, 16], [1, 2]),
    ),
    "a regularizer of upstream's wrapper": (
        lambda m: SpladeLoss(m, MarginKL(m), 3e-5, 5e-5),
        lambda m: SpladeLoss(m, MarginKL(m), 3e-5, 5e-5, document_regularizer_threshold=1),
    ),
    "a cached loss of upstream": (
        lambda m: CachedMultipleNegativesRankingLoss(m, scale=20.0),
        lambda m: CachedMultipleNegativesRankingLoss(m, scale=21.0),
    ),
    "a similarity": (
        lambda m: MarginKL(m, similarity_fct=pairwise_cos_sim),
        lambda m: MarginKL(m, similarity_fct=pairwise_dot_score),
    ),
    "an object's setting": (
        lambda m: MarginKL(m, similarity_fct=Scaled(1.0)),
        lambda m: MarginKL(m, similarity_fct=Scaled(2.0)),
    ),
    "a partial": (
        lambda m: Own(m, functools.partial(torch.clamp, min=0)),
        lambda m: Own(m, functools.partial(torch.clamp, min=1)),
    ),
    "a lambda's body": (lambda m: Own(m, lambda x: x + 1), lambda m: Own(m, lambda x: x + 2)),
    "what a lambda is over": (lambda m: Own(m, scaled(1.0)), lambda m: Own(m, scaled(2.0))),
    "a float": (lambda m: Own(m, 0.1), lambda m: Own(m, 0.1 + 1e-12)),
    "an infinite float": (lambda m: Own(m, float("inf")), lambda m: Own(m, float("-inf"))),
    "a tensor": (lambda m: Own(m, torch.ones(3)), lambda m: Own(m, torch.tensor([1.0, 1.0, 2.0]))),
    "an array": (lambda m: Own(m, np.ones(3)), lambda m: Own(m, np.ones(4))),
    "a member of an enumeration": (lambda m: Own(m, Curve.LINEAR), lambda m: Own(m, Curve.SQUARE)),
    "a frozen model": (
        lambda m: Own(m, inner=torch.nn.Linear(2, 2, bias=False).requires_grad_(False)),
        lambda m: Own(m, inner=torch.nn.Linear(2, 2, bias=False).requires_grad_(False)),
    ),
    "a class": (lambda m: Own(m), lambda m: InBatchContrastiveLoss(m)),
    "the code of a class": (lambda m: own_class(2)(m), lambda m: own_class(3)(m)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_losses_that_would_train_otherwise_are_told_apart(case: str, tiny_bert_path: Path) -> None:
    """A resumed run handed back the student of another loss wherever a card did not show the difference."""
    student = make_student("dense", tiny_bert_path)

    def described(make: Callable[[Any], Any]) -> Any:
        torch.manual_seed(0)
        return json.loads(json.dumps(Describer(student)(make(student))))

    first, second = (described(make) for make in PAIRS[case])
    assert not differences(first, described(PAIRS[case][0])), "made twice, it is the same"
    if case != "a frozen model":
        assert differences(first, second)
    else:
        torch.manual_seed(1)
        assert differences(first, Describer(student)(PAIRS[case][1](student)))


def test_a_global_that_a_function_reads_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function with another number above it is another function."""

    def similarity(a: Any, b: Any) -> Any:
        return SCALE * pairwise_dot_score(a, b)

    first = Describer()(similarity)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert list(differences(first, Describer()(similarity))) == ["globals.SCALE"]


def test_use_leaves_a_loss_what_it_is(tiny_bert_path: Path) -> None:
    """Counters and checks of a first batch are no options."""
    student = make_student("dense", tiny_bert_path)
    loss = InBatchContrastiveLoss(student)
    before = Describer(student)(loss)
    loss([student.preprocess(["a b"]), student.preprocess(["c"])], torch.zeros(1, 1))
    assert not differences(before, Describer(student)(loss))


def identity(args: Any, student: Any, dataset: DistillationDataset, **changes: Any) -> dict[str, Any]:
    from st_wkl.training.data import training_data

    loss = changes.pop("loss", None) or MarginKL(student)
    parts: dict[str, Any] = {"lora": False, "evaluator": None, "callbacks": [], "rounded": None, "draws": {}, **changes}
    data = training_data(dataset, loss, student, args)
    run = SimpleNamespace(student=student, dataset=dataset, loss=loss, args=args, **parts)
    return run_identity(run, data, Describer(student))


def test_every_argument_counts_but_those_that_cannot_matter(
    dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Thirteen names counted, and a run with another seed of the data was handed back as this one."""
    student = make_student("dense", tiny_bert_path)
    plain = identity(arguments(student, tmp_path), student, dataset)
    count = {
        "prompts": {"query": "q: "},
        "adam_beta2": 0.98,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "batch_sampler": "no_duplicates",
        "data_seed": 7,
        "router_mapping": {"query": "query"},
        "learning_rate_mapping": {"bias": 1e-3},
        "neftune_noise_alpha": 5.0,
        "label_smoothing_factor": 0.1,
        "dataloader_drop_last": True,
    }
    for name, value in count.items():
        given = arguments(student, tmp_path, **{name: value})
        found = differences(plain, identity(given, make_student("dense", tiny_bert_path), dataset))
        # The student takes its prompts along.
        expected = {"student"} if name == "prompts" else set()
        assert {path for path in found if not path.startswith(f"arguments.{name}")} == expected
        assert any(path.startswith("arguments.") for path in found), name
    free = {"logging_steps": 3, "report_to": ["tensorboard"], "dataloader_num_workers": 2, "disable_tqdm": False}
    free |= {
        "output_dir": "elsewhere",
        "eval_steps": 7,
        "save_steps": 7,
        "run_name": "x",
        "gradient_checkpointing": True,
    }
    assert identity(arguments(student, tmp_path, **free), student, dataset) == plain
    assert not any(matters(name) for name in free)
    stop = identity(arguments(student, tmp_path), student, dataset, callbacks=[EarlyStoppingCallback(3)])
    other = identity(arguments(student, tmp_path), student, dataset, callbacks=[EarlyStoppingCallback(4)])
    assert differences(stop, other)
    assert identity(arguments(student, tmp_path), student, dataset, callbacks=[KillAt(3)]) == plain


def test_another_version_with_a_new_option_knows_its_runs(
    dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """An upgrade in the middle of a run must not orphan it for a field that nobody has set."""
    student = make_student("dense", tiny_bert_path)
    now = identity(arguments(student, tmp_path), student, dataset)
    there = json.loads(json.dumps(now))
    del there["arguments"]["defaults"]["adam_beta2"]
    there["arguments"]["defaults"]["gone"] = 1
    assert not differences(there, now)
    there["arguments"]["options"]["gone_and_set"] = 1
    assert told(differences(there, now)) == "arguments: gone_and_set 1 there, null now"


@pytest.mark.slow
def test_a_run_is_not_another_ones_student(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """The student of another loss or of other arguments was returned as if it had been asked for."""
    student = SentenceTransformer(str(static_student_path))

    def run(threshold: float = 1.0, name: str = "student", **changes: Any) -> Any:
        start = SentenceTransformer(str(static_student_path))
        callbacks = changes.pop("callbacks", [])
        args = arguments(start, tmp_path, max_steps=3, save_steps=1, **changes)
        loss = InBatchContrastiveLoss(start, positive_threshold=threshold)
        return distill(start, dataset, loss, args, output_dir=tmp_path / name, resume=True, callbacks=callbacks)

    made = run(adam_beta2=0.98)
    assert made.record.arguments["adam_beta2"] == 0.98
    assert "adam_beta1" not in made.record.arguments
    assert run(adam_beta2=0.98).record == made.record
    with pytest.raises(FileExistsError, match=r"loss or arguments \(loss: positive_threshold 1.0 there"):
        run(0.25, adam_beta2=0.98)
    with pytest.raises(FileExistsError, match=r"\(arguments: adam_beta2 0.98 there, 0.999 now\)"):
        run()
    assert run(0.5, name="third").record.loss_config["positive_threshold"] == 0.5
    with pytest.raises(Killed):
        run(name="cut", prompts={"query": "q: "}, callbacks=[KillAt(2)])
    with pytest.raises(ValueError, match=r"another run \(arguments: prompts"):
        run(name="cut")
    path = tmp_path / "cut" / "checkpoints" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="written by another version of st-wkl"):
        run(name="cut")
    # The record of an earlier version held a hash of less.
    replace(TrainingRecord.load(tmp_path / "student"), identity={}).save(tmp_path / "student")
    with pytest.raises(FileExistsError, match="of an earlier version of st-wkl"):
        run(adam_beta2=0.98)
    assert (tmp_path / "student" / RECORD_FILE).is_file()
    assert student is not made.student


def test_what_cannot_be_resumed_is_said_before_hours_of_work(
    dataset: DistillationDataset, tiny_bert_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run without an optimizer in its checkpoints began again at step 0, and looked like one that went on."""
    student = make_student("dense", tiny_bert_path)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("save_only_model=True keeps no optimizer", {"args": arguments(student, tmp_path, save_only_model=True)}),
        (r"loss\.hidden is an object that cannot be told", {"loss": Own(student, threading.Lock())}),
    ]
    for message, change in cases:
        options = {"args": arguments(student, tmp_path), **change}
        with pytest.raises(ValueError, match=f"cannot be resumed, since {message}"):
            distill(student, dataset, output_dir=tmp_path / "student", resume=True, **options)
        assert not (tmp_path / "student").exists()
    args = arguments(student, tmp_path, save_only_model=True, max_steps=1)
    distill(student, dataset, args=args, output_dir=tmp_path / "student")
    assert "If this run is stopped, it cannot be resumed, since save_only_model=True" in caplog.text
