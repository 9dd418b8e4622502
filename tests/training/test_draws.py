"""Negatives drawn anew for each epoch, and losses at several dimensions: exact, seeded, the same on resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

from st_wkl import ListwiseCollator, WeightedKLDistillationLoss, distill, make_loss
from st_wkl.data.dataset import DistillationDataset
from st_wkl.losses.lists import unpack
from st_wkl.training import DrawAnewCallback, TrainingRecord
from tests.helpers.students import gradients, listwise_batch, make_student, paired_rows, ragged_rows, weights
from tests.helpers.training import KillAt, Killed, arguments


def _long_rows(n: int = 12) -> list[dict[str, Any]]:
    return ragged_rows(n, shortest=9, longest=12)


def _seen(collator: ListwiseCollator, rows: list[dict[str, Any]]) -> list[list[float]]:
    """Return the teacher's scores of what a step sees of each row: they tell documents apart."""
    lists = unpack(collator(rows)["label"])
    return [sorted(scores[mask].tolist()) for scores, mask in zip(lists.scores, lists.mask, strict=True)]


@pytest.mark.parametrize("draw", ["random", "quantiles", "top"])
def test_a_step_sees_all_positives_and_some_negatives(draw: Any, tiny_bert_path: Path) -> None:
    """A positive that is drawn away would turn a list into one without an answer."""
    model, rows = make_student("dense", tiny_bert_path), _long_rows()
    collator = ListwiseCollator(model, negatives_per_step=3, draw=draw)
    collator.epoch = 0
    lists, whole = unpack(collator(rows)["label"]), unpack(ListwiseCollator(model)(rows)["label"])
    assert ((lists.gains > 0).sum(dim=1) == (whole.gains > 0).sum(dim=1)).all()
    assert ((lists.mask & (lists.gains <= 0)).sum(dim=1) == 3).all()
    first = _seen(collator, rows)
    assert _seen(collator, rows) == first, "a draw depends on seed, epoch and query alone"
    assert _seen(collator, rows[::-1]) == first[::-1]
    collator.epoch = 1
    assert (_seen(collator, rows) == first) == (draw == "top")
    if draw == "top":
        for row, scores in zip(rows, first, strict=True):
            negative = sorted(s for s, gain in zip(row["scores"], row["labels"], strict=True) if not gain)
            assert set(torch.tensor(negative[-3:]).tolist()) <= {*scores}


def test_every_negative_has_its_epoch(tiny_bert_path: Path) -> None:
    """Long lists are worth their scores only if all of them are seen in the end."""
    rows = _long_rows(4)
    collator = ListwiseCollator(make_student("dense", tiny_bert_path), negatives_per_step=3)
    seen: list[set[float]] = [set() for _ in rows]
    for collator.epoch in range(40):
        for found, scores in zip(seen, _seen(collator, rows), strict=True):
            found |= {*scores}
    assert [len(found) for found in seen] == [len(row["documents"]) for row in rows]


def test_pairs_and_ranks_follow_their_documents(tiny_bert_path: Path) -> None:
    """Places of a list that was cut are others; a preference of a document that is not there would be of another."""
    rows = [row | {"ranks": [10 * place + 1 for place in range(len(row["documents"]))]} for row in paired_rows(9)]
    collator = ListwiseCollator(make_student("dense", tiny_bert_path), negatives_per_step=2)
    collator.epoch = 5
    lists = unpack(collator(rows)["label"])
    assert lists.preferences is not None
    assert lists.ranks is not None
    kept = 0
    for number, row in enumerate(rows):
        scores = [torch.tensor(score).item() for score in row["scores"]]
        mask = lists.mask[number]
        places = [scores.index(score) for score in lists.scores[number][mask].tolist()]
        assert lists.ranks[number][mask].tolist() == [row["ranks"][place] for place in places]
        expected = {(i, j): p for i, j, p in row["pairs"] if {i, j} <= {*places}}
        table = lists.preferences[number]
        found = {(places[i], places[j]): table[i, j].item() for i, j in (~table.isnan()).nonzero().tolist()}
        assert found == pytest.approx(expected)
        kept += len(found)
    assert kept > 0


def test_without_an_epoch_nothing_is_drawn(tiny_bert_path: Path) -> None:
    """A stock trainer without the callback would show each epoch the same negatives, and nobody would notice."""
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="has not been told the epoch"):
        ListwiseCollator(model, negatives_per_step=2)(_long_rows())
    with pytest.raises(ValueError, match="draw must be one of"):
        ListwiseCollator(model, draw="hardest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negatives_per_step must be 1 or more, got 0"):
        ListwiseCollator(model, negatives_per_step=0)


def test_on_a_stock_trainer(tiny_bert_path: Path, tmp_path: Path) -> None:
    """The callback is all that a trainer of one's own needs: it counts epochs from 0, in their order."""
    model = make_student("dense", tiny_bert_path)
    collator, epochs = ListwiseCollator(model, negatives_per_step=2), []

    class Watched(DrawAnewCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_epoch_begin(*args, **kwargs)
            epochs.append(self.collator.epoch)

    options = {"save_strategy": "no", "num_train_epochs": 3}
    trainer = SentenceTransformerTrainer(
        model,
        arguments(model, tmp_path, **options),
        Dataset.from_list(_long_rows()),
        loss=WeightedKLDistillationLoss(model),
        data_collator=collator,
        callbacks=[Watched(collator)],
    )
    trainer.train()
    assert epochs == [0, 1, 2]
    trainer.args.dataloader_num_workers, trainer.args.dataloader_persistent_workers = 1, True
    with pytest.raises(ValueError, match="keep the first epoch's negatives"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_resumed_run_draws_what_it_would_have_drawn(step: int, static_student_path: Path, tmp_path: Path) -> None:
    """Other negatives after a crash are another experiment; killed within an epoch, at its end, and after it."""
    rows = Dataset.from_list(_long_rows(24))

    def start(folder: str, callbacks: Any = (), **options: Any) -> dict[str, torch.Tensor]:
        student = SentenceTransformer(str(static_student_path))
        args = arguments(student, tmp_path, num_train_epochs=4, save_steps=1)
        options = {"negatives_per_step": 3, **options}
        made = distill(
            student, rows, args=args, output_dir=tmp_path / folder, resume=True, callbacks=callbacks, **options
        )
        return weights(made.student)

    whole = start("whole")
    with pytest.raises(Killed):
        start("killed", [KillAt(step)])
    with pytest.raises(ValueError, match="those of another run"):
        start("killed", negatives_per_step=4)
    resumed = start("killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = start("quantiles", draw="quantiles")
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())
    told = TrainingRecord.load(tmp_path / "killed").arguments
    assert (told["negatives_per_step"], told["draw"]) == (3, "random")


def test_columns_and_words_without_meaning_are_refused(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path
) -> None:
    """An option that is taken and not followed is worse than an error."""
    student = SentenceTransformer(str(static_student_path))
    with pytest.raises(ValueError, match="negatives_per_step draws from lists"):
        distill(student, dataset, DistillKLDivLoss(student), output_dir=tmp_path / "a", negatives_per_step=2)
    with pytest.raises(ValueError, match="means nothing without negatives_per_step"):
        distill(student, dataset, output_dir=tmp_path / "b", draw="top")
    with pytest.raises(ValueError, match="put MatryoshkaLoss around your own"):
        distill(student, dataset, WeightedKLDistillationLoss(student), output_dir=tmp_path / "c", matryoshka=[8])


def test_losses_without_anything_to_compare_are_refused(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours of training with a loss of 0 ended with a card that named the loss it was taught with."""
    student = SentenceTransformer(str(static_student_path))
    lists = dataset.to_lists(copied=True)
    for bare in (lists.map(lambda row: {"labels": [0] * len(row["labels"])}), _without_gains(dataset)):
        for name in ("in-batch", "list-contrastive", "margin-kl", "margin-mse", "adaptive-margin"):
            with pytest.raises(ValueError, match="the student would learn nothing"):
                distill(student, bare, name, output_dir=tmp_path / name)
        args = arguments(student, tmp_path, max_steps=1)
        distill(student, bare, args=args, output_dir=tmp_path / bare.__class__.__name__)
        assert "InBatchContrastiveLoss adds nothing to the loss" in caplog.text
        caplog.clear()


def _without_gains(dataset: DistillationDataset) -> DistillationDataset:
    train = dataset.train.with_format(None).map(lambda row: {"labels": [0] * len(row["labels"])})
    return replace(dataset, train=train.cast(dataset.train.features))


def test_a_reranker_has_one_score(tiny_bert_path: Path) -> None:
    """A classifier's labels were taken for pairs, and trained."""
    with pytest.raises(ValueError, match="this CrossEncoder has 3 labels: load it with num_labels=1"):
        make_loss(CrossEncoder(str(tiny_bert_path), num_labels=3), "mse")


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("name", ["kl+in-batch", "weighted-kl", "pair-distill"])
def test_matryoshka_is_the_mean_over_dimensions(name: str, mini_batch_size: int | None, tiny_bert_path: Path) -> None:
    """Each dimension has to rank by itself, with the gradient cache of long lists, too."""
    model = make_student("dense", tiny_bert_path).double()
    batch = listwise_batch(model, "dense", paired_rows())
    made = make_loss(model, name, matryoshka=[16, 8], mini_batch_size=mini_batch_size or 100)
    value, found = gradients(made, model, *batch)
    expected: dict[str, Any] = {}
    total = 0.0
    for size in (32, 16, 8):
        model.truncate_dim = size
        part, grads = gradients(make_loss(model, name, mini_batch_size=100), model, *batch)
        total += part / 3
        expected = {key: expected.get(key, 0) + grad / 3 for key, grad in grads.items()}
    assert value == pytest.approx(total, rel=1e-9)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dimensions", [[], [0], [64], [8, 8], [True], [8.0], 8])
def test_dimensions_that_there_are_not(dimensions: Any, tiny_bert_path: Path) -> None:
    """A dimension above the student's own, or one that is none, is found before any work."""
    with pytest.raises(
        ValueError,
        match=r"matryoshka (must be different dimensions from 1 to the student's 32|is a list of dimensions)",
    ):
        make_loss(make_student("dense", tiny_bert_path), matryoshka=dimensions)


def test_matryoshka_needs_one_embedding(tiny_bert_path: Path) -> None:
    """Upstream's wrapper would cut what is no embedding."""
    for kind in ("sparse", "multi-vector", "cross-encoder"):
        with pytest.raises(ValueError, match="matryoshka cuts the one embedding of a text"):
            make_loss(make_student(kind, tiny_bert_path), matryoshka=[8])
    dot = make_student("dense", tiny_bert_path)
    dot.similarity_fn_name = "dot"
    with pytest.raises(ValueError, match="MatryoshkaLoss normalises what it cuts, and this student ranks by dot"):
        make_loss(dot, matryoshka=[8])
