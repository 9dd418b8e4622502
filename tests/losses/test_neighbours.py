"""PairDistill, adaptive relevance margins and Pearson as modules: in every class, layout and memory setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.cross_encoder.losses import MSELoss

from st_wkl.data.collator import ListwiseCollator
from st_wkl.functional import (
    adaptive_relevance_margin,
    list_contrastive,
    margin_mse,
    pairwise_kl,
    pearson,
    rank_net,
    regularised_kl,
)
from st_wkl.losses import (
    AdaptiveRelevanceMarginLoss,
    InBatchContrastiveLoss,
    ListContrastiveLoss,
    MarginMSEDistillLoss,
    MSEDistillLoss,
    PairDistillLoss,
    PearsonDistillLoss,
    RankNetDistillLoss,
    RegularisedKLDistillLoss,
    WeightedKLDistillationLoss,
)
from st_wkl.losses.lists import unpack
from tests.helpers.students import (
    CLASSES,
    EXACT,
    assert_same,
    column_rows,
    features_and_labels,
    gradients,
    listwise_batch,
    make_student,
    moved,
    one_score,
    paired_rows,
    ragged_rows,
    trained,
    weights,
)

NEIGHBOURS: dict[str, Any] = {
    "pair": PairDistillLoss,
    "arm": AdaptiveRelevanceMarginLoss,
    "pearson": PearsonDistillLoss,
    "margin mse": MarginMSEDistillLoss,
    "rank net": RankNetDistillLoss,
    "mse": MSEDistillLoss,
    "regularised kl": RegularisedKLDistillLoss,
    "contrast": ListContrastiveLoss,
}


def make(name: str, model: Any, **options: Any) -> Any:
    return NEIGHBOURS[name](model, **options)


# Adaptive margins compare documents with each other; a cosine takes over no logit.
FOR = {"arm": ("dense", "sparse"), "mse": ("sparse", "multi-vector", "cross-encoder")}
COMBINATIONS = [(kind, name) for kind in CLASSES for name in NEIGHBOURS if kind in FOR.get(name, CLASSES)]


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_gradient_cache_changes_nothing(kind: str, name: str, tiny_bert_path: Path) -> None:
    """Preferences and triples index documents, which sorting and slicing must not move under them."""
    model = make_student(kind, tiny_bert_path).double()
    batch = listwise_batch(model, kind, paired_rows())
    value, plain = gradients(make(name, model), model, *batch)
    again, cached = gradients(make(name, model, mini_batch_size=2), model, *batch)
    assert again == pytest.approx(value, abs=EXACT[kind])
    assert_same(plain, cached, EXACT[kind])


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_every_class_trains(kind: str, name: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """The promise is one family for all classes; the trainers differ in what they hand over."""
    model = make_student(kind, tiny_bert_path)
    before = weights(model)
    dataset = Dataset.from_list(paired_rows(9))
    trainer = trained(kind, model, make(name, model), tmp_path, dataset, eval_dataset=dataset)
    assert moved(before, weights(model))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_pointwise_mse_is_upstreams(tiny_bert_path: Path) -> None:
    """A recipe that is repeated with this loss has to be the published one, score by score."""
    model = make_student("cross-encoder", tiny_bert_path).double()
    rows = ragged_rows(4, shortest=5, longest=5)
    value, found = gradients(MSEDistillLoss(model), model, *listwise_batch(model, "cross-encoder", rows))
    pairs = [(row["query"], document) for row in rows for document in row["documents"]]
    scores = torch.tensor([score for row in rows for score in row["scores"]]).double()
    expected, wanted = gradients(MSELoss(model), model, [[*side] for side in zip(*pairs, strict=True)], scores)
    assert value == pytest.approx(expected, abs=1e-9)
    assert_same(found, wanted, 1e-9)
    with pytest.raises(ValueError, match="Take MarginMSEDistillLoss"):
        MSEDistillLoss(make_student("dense", tiny_bert_path))


def test_pair_distill_is_the_sum_of_its_published_terms(tiny_bert_path: Path) -> None:
    """Listwise KL + λ · pairwise KL + in-batch cross entropy against the other queries' candidates only."""
    model = make_student("dense", tiny_bert_path).double()
    rows = paired_rows(4)
    for row in rows:
        row["labels"] = [1] + [0] * (len(row["documents"]) - 1)
    terms = PairDistillLoss(model, pair_weight=3.0)(*listwise_batch(model, "dense", rows))
    scores = [[one_score(model, "dense", row["query"], d).item() / 0.05 for d in row["documents"]] for row in rows]
    pairs = [(i, int(a), int(b), p) for i, row in enumerate(rows) for a, b, p in row["pairs"]]
    width = max(len(row["documents"]) for row in rows)
    student = torch.tensor([row + [0.0] * (width - len(row)) for row in scores], dtype=torch.float64)
    preferred = pairwise_kl(student, torch.tensor([p[:3] for p in pairs]), torch.tensor([p[3] for p in pairs]))
    assert terms["PairwisePreferenceLoss"].item() == pytest.approx(3 * preferred.item(), abs=1e-6)
    documents = dict.fromkeys(d for row in rows for d in row["documents"])
    contrast = []
    for row in rows:
        others = [d for d in documents if d not in row["documents"]]
        positive, *negatives = [
            one_score(model, "dense", row["query"], d).item() / 0.05 for d in (row["documents"][0], *others)
        ]
        contrast.append(math.log(math.exp(positive) + sum(math.exp(n) for n in negatives)) - positive)
    assert terms["InBatchContrastiveLoss"].item() == pytest.approx(sum(contrast) / len(contrast), abs=1e-9)
    listwise = WeightedKLDistillationLoss(model, gamma=0, alpha=0)(*listwise_batch(model, "dense", rows))
    assert terms["WeightedKLDistillationLoss"].item() == pytest.approx(listwise.item(), abs=1e-12)


def test_pair_distill_needs_preferences(tiny_bert_path: Path) -> None:
    """Without them two thirds of the loss would be missing, and nothing but the result would show it."""
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="needs a pairwise teacher's preferences"):
        PairDistillLoss(model)(*listwise_batch(model, "dense", ragged_rows()))


@pytest.mark.parametrize("bad", [[0, 99, 0.5], [-1, 0, 0.5], [0, 0, 0.5], [0, 1, 1.5], [0, 1, math.nan], [0, 1, None]])
def test_bad_preferences_are_named(bad: list[float], tiny_bert_path: Path) -> None:
    """A place outside the list would silently become another document's preference."""
    rows = paired_rows(3)
    rows[1]["pairs"] = [[0, 1, 0.5], bad]
    with pytest.raises(ValueError, match=r"the preference .* of the query .* does not fit"):
        ListwiseCollator(make_student("dense", tiny_bert_path))(rows)


def test_labels_never_look_like_embeddings(tiny_bert_path: Path) -> None:
    """MatryoshkaLoss cuts labels whose last size is the embedding dimension; no dimension is odd."""
    model = make_student("dense", tiny_bert_path)
    for longest in (3, 4, 5, 6):
        _, labels = listwise_batch(model, "dense", ragged_rows(4, longest=longest))
        assert labels.shape[2] % 2 == 1
    rows = paired_rows()
    _, labels = listwise_batch(model, "dense", rows)
    assert labels.shape[2] % 2 == 1
    preferences = unpack(labels).preferences
    assert preferences is not None
    found = [[i, j, round(preferences[0, i, j].item(), 4)] for i, j in (~preferences[0].isnan()).nonzero().tolist()]
    assert found == [[i, j, round(p, 4)] for i, j, p in rows[0]["pairs"]]


@pytest.mark.parametrize("loss_class", [RankNetDistillLoss, ListContrastiveLoss])
def test_without_a_teacher_temperature_none_is_told(loss_class: Any, tiny_bert_path: Path) -> None:
    """A parameter in the card that has no effect would be read as one that has."""
    config = loss_class(make_student("dense", tiny_bert_path)).get_config_dict()
    assert config == {"similarity_fct": "pairwise_cos_sim", "student_temperature": 0.05}


def test_pearson_knows_no_temperature(tiny_bert_path: Path) -> None:
    """A parameter in the card that has no effect would be read as one that has."""
    model = make_student("dense", tiny_bert_path).double()
    rows = ragged_rows()
    loss = PearsonDistillLoss(model)
    assert loss.get_config_dict() == {"similarity_fct": "pairwise_cos_sim"}
    values = []
    for row in rows:
        scores = torch.tensor([[one_score(model, "dense", row["query"], d).item() for d in row["documents"]]])
        values.append(pearson(scores.double(), torch.tensor([row["scores"]])).item())
    assert loss(*listwise_batch(model, "dense", rows)).item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize("name", ["arm", "contrast"])
def test_plain_data_trains_without_any_label(name: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Plain (query, positive, negative) data is all that these methods need, and all that many users have."""
    model = make_student("dense", tiny_bert_path)
    before = weights(model)
    rows = [{key: value for key, value in row.items() if key != "label"} for row in column_rows(6, candidates=3)]
    trained("dense", model, make(name, model), tmp_path, Dataset.from_list(rows), data_collator=None)
    assert moved(before, weights(model))


def test_modules_hand_scores_and_options_to_their_functions(tiny_bert_path: Path) -> None:
    """A temperature on the wrong side, or positives that get lost on the way, would still train."""
    model = make_student("dense", tiny_bert_path).double()
    rows = ragged_rows()
    width = max(len(row["documents"]) for row in rows)

    def padded(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [0.0] * (width - len(row)) for row in values], dtype=torch.float64)

    student = padded([[one_score(model, "dense", row["query"], d).item() for d in row["documents"]] for row in rows])
    teacher, positives = padded([row["scores"] for row in rows]), padded([row["labels"] for row in rows]) >= 1
    mask = padded([[1.0] * len(row["documents"]) for row in rows]) > 0
    temperatures = {"student_temperature": 0.05, "teacher_temperature": 0.5}
    expected = {
        "margin mse": margin_mse(student, teacher, positives, mask=mask, **temperatures),
        "rank net": rank_net(student, teacher, mask=mask, student_temperature=0.05),
        "regularised kl": regularised_kl(student, teacher, positives, beta=0.01, mask=mask, **temperatures),
        "contrast": list_contrastive(student, positives, mask=mask, student_temperature=0.05),
    }
    for name, value in expected.items():
        options = {
            "margin mse": {"teacher_temperature": 0.5},
            "regularised kl": {"teacher_temperature": 0.5, "beta": 0.01},
        }
        found = make(name, model, **options.get(name, {}))(*listwise_batch(model, "dense", rows)).item()
        assert found == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("target", [0.5, "adaptive", "distributed"])
def test_margins_over_columns_and_lists(target: Any, tiny_bert_path: Path) -> None:
    """Several negatives are compared in turn; lists take the k-th negatives together, as columns do."""
    model = make_student("dense", tiny_bert_path).double()
    rows = column_rows(4, candidates=3)
    loss = AdaptiveRelevanceMarginLoss(model, target=target)
    columns = features_and_labels(BaseDataCollator(model.preprocess), rows, "dense", model)
    embeddings = [model(dict(feature))["sentence_embedding"] for feature in columns[0]]
    expected = [adaptive_relevance_margin(*embeddings[:2], negative, target=target) for negative in embeddings[2:]]
    value = loss(*columns).item()
    assert value == pytest.approx(torch.stack(expected).mean().item(), abs=1e-9)
    lists = [
        {"query": r["query"], "documents": [r["positive"], r["negative_1"], r["negative_2"]], "labels": [1, 0, 0]}
        for r in rows
    ]
    assert loss(*listwise_batch(model, "dense", lists)).item() == pytest.approx(value, abs=1e-9)


def test_margins_of_lists_without_a_pair_count_zero(tiny_bert_path: Path) -> None:
    """A query whose positives are its only candidates has no margin; it must not stop or poison the batch."""
    model = make_student("dense", tiny_bert_path)
    rows = [
        {"query": "a", "documents": ["b", "c"], "labels": [1, 1]},
        {"query": "d", "documents": ["e"], "labels": [0]},
    ]
    value, found = gradients(AdaptiveRelevanceMarginLoss(model), model, *listwise_batch(model, "dense", rows))
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


def test_margins_need_single_embeddings_and_a_negative(tiny_bert_path: Path) -> None:
    """Token embeddings have no one cosine, and without a negative there is no margin."""
    with pytest.raises(ValueError, match="which a MultiVectorEncoder does not have"):
        AdaptiveRelevanceMarginLoss(make_student("multi-vector", tiny_bert_path))  # type: ignore[arg-type]
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="Add a column of negatives"):
        AdaptiveRelevanceMarginLoss(model).compute_loss_from_embeddings([torch.ones(2, 4)] * 2, None)


def test_a_batch_of_one_has_no_foreign_documents(tiny_bert_path: Path) -> None:
    """The last batch of an epoch may hold one row; a softmax over no negatives must be 0, not NaN."""
    model = make_student("dense", tiny_bert_path)
    loss = InBatchContrastiveLoss(model, own_negatives=False)
    value, found = gradients(loss, model, *listwise_batch(model, "dense", ragged_rows(1)))
    assert value == 0
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
