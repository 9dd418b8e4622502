"""Every wrapper of sentence-transformers around every loss: the sum by hand, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    GlobalOrthogonalRegularizationLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, CSRLoss, FlopsLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from sentence_transformers.util import pairwise_dot_score
from torch import Tensor

import st_wkl.losses as ours
from st_wkl.losses import CoherenceLoss, InBatchContrastiveLoss, MarginKL, WeightedKLDistillationLoss, WeightedSumLoss
from st_wkl.training import make_loss
from tests.helpers.students import (
    assert_same,
    features_and_labels,
    gradients,
    listwise_batch,
    make_student,
    paired_rows,
    ragged_rows,
    rows_with_paraphrases,
    trained,
)
from tests.helpers.vectors import vectors_for

DIMS, WEIGHTS = (32, 8), (1.0, 0.5)
SPLADE = {"document_regularizer_weight": 1e-2, "query_regularizer_weight": 1e-2}
NAMES = sorted(set(ours.__all__))
VECTORS = vectors_for(ragged_rows())


def make(name: str, model: Any, **options: Any) -> Any:
    if name == "WeightedSumLoss":
        terms = [(1.0, WeightedKLDistillationLoss(model)), (0.5, InBatchContrastiveLoss(model))]
        return WeightedSumLoss(model, terms, **options)
    if name == "MSEDistillLoss":  # takes over scores that no cosine can have
        options["similarity_fct"] = pairwise_dot_score
    if name == "EmbeddingDistillLoss":
        options["vectors"] = VECTORS
    return getattr(ours, name)(model, **options)


def batch_for(name: str, model: Any, kind: str = "dense") -> tuple[list[dict[str, Any]], Tensor]:
    if name == "CoherenceLoss":
        return features_and_labels(BaseDataCollator(model.preprocess), rows_with_paraphrases((1,)), kind, model)
    options = {"vectors": VECTORS} if name == "EmbeddingDistillLoss" else {}
    return listwise_batch(model, kind, paired_rows() if "Pair" in name else ragged_rows(), **options)


def total(value: Any) -> Tensor:
    return sum(value.values()) if isinstance(value, dict) else value


def layers(model: Any, features: dict[str, Any]) -> list[Tensor]:
    """Return the pooled embeddings of every layer, the last one last."""
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    hidden = model[0].auto_model(**inputs, output_hidden_states=True).hidden_states
    mask = features["attention_mask"]
    return [model[1]({"token_embeddings": layer, "attention_mask": mask})["sentence_embedding"] for layer in hidden]


def cut(loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    parts = [[F.normalize(column[:, :dim], dim=1) for column in embeddings] for dim in DIMS]
    values = [
        w * total(loss.compute_loss_from_embeddings(part, labels)) for w, part in zip(WEIGHTS, parts, strict=True)
    ]
    return torch.stack(values).sum()


def adaptive(of_layer: Callable[[list[Tensor]], Tensor], model: Any, features: Any) -> Tensor:
    """Weigh the last layer 2, the prior ones 3 on average, and draw these to the last with KL at temperature .3."""
    *prior, last = zip(*(layers(model, column) for column in features), strict=True)
    wanted = (torch.cat(last) / 0.3).softmax(dim=1).detach()
    value = 2 * of_layer(list(last))
    for layer in prior:
        apart = F.kl_div((torch.cat(layer) / 0.3).log_softmax(dim=1), wanted, reduction="batchmean")
        value = value + 3 * of_layer(list(layer)) / len(prior) + 0.3 * 1.5 * apart
    return value


LAYERS = {"n_layers_per_step": -1, "last_layer_weight": 2.0, "prior_layers_weight": 3.0, "kl_div_weight": 1.5}
DENSE = ["matryoshka", "matryoshka, cached", "layers", "both"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", DENSE)
def test_dense_wrappers_equal_the_sum_by_hand(wrapper: str, name: str, tiny_bert_path: Path) -> None:
    """Wrappers calculate with what they wrap: a loss of named terms broke some, and others could sum it wrongly."""
    model = make_student("dense", tiny_bert_path).double()
    features, labels = batch_for(name, model)
    plain = make(name, model)
    wrapped = {
        "matryoshka": lambda: MatryoshkaLoss(model, plain, DIMS, WEIGHTS),
        "matryoshka, cached": lambda: MatryoshkaLoss(model, make(name, model, mini_batch_size=2), DIMS, WEIGHTS),
        "layers": lambda: AdaptiveLayerLoss(model, plain, **LAYERS),
        "both": lambda: Matryoshka2dLoss(model, plain, list(DIMS), list(WEIGHTS), n_dims_per_step=-1, **LAYERS),
    }[wrapper]()
    value, found = gradients(wrapped, model, features, labels)
    model.zero_grad()
    if wrapper.startswith("matryoshka"):
        expected = cut(plain, [layers(model, column)[-1] for column in features], labels)
    else:
        of_layer = cut if wrapper == "both" else lambda *args: total(plain.compute_loss_from_embeddings(*args[1:]))
        expected = adaptive(lambda embeddings: of_layer(plain, embeddings, labels), model, features)
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=1e-9)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(wanted, found, 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", ["splade", "cached splade", "csr"])
def test_sparse_wrappers_equal_the_sum_by_hand(wrapper: str, name: str, tiny_bert_path: Path) -> None:
    """They call a loss by its embeddings alone, and pass its named terms on."""
    if wrapper == "csr":
        encoder = make_student("dense", tiny_bert_path)
        sparse = SparseAutoEncoder(input_dim=32, hidden_dim=48, k=8, k_aux=16)
        model: Any = SparseEncoder(modules=[encoder[0], Pooling(32), sparse]).double().train()
    else:
        model = make_student("sparse", tiny_bert_path).double()
    features, labels = batch_for(name, model, "sparse")
    loss = make(name, model)
    outputs = [model(dict(column)) for column in features]
    embeddings = [output["sentence_embedding"] for output in outputs]
    expected = total(loss.compute_loss_from_embeddings(embeddings, labels))
    if wrapper == "csr":
        wrapped = CSRLoss(model, loss, gamma=0.5)
        expected = 0.5 * expected + total(wrapped.reconstruction_loss.compute_loss_from_embeddings(outputs))
    else:
        cached = {"mini_batch_size": 2} if wrapper == "cached splade" else {}
        wrapped = (CachedSpladeLoss if cached else SpladeLoss)(model, loss, **SPLADE, **cached)
        flops = FlopsLoss(model).compute_loss_from_embeddings
        expected = expected + 1e-2 * (flops(torch.cat(embeddings[1:])) + flops(embeddings[0]))
    model.zero_grad()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    value, found = gradients(wrapped, model, features, labels)
    tolerance = 1e-6 if wrapper == "cached splade" else 1e-9  # upstream keeps its terms in float32
    assert value == pytest.approx(expected.item(), abs=tolerance)
    assert_same(wanted, {name: gradient for name, gradient in found.items() if name in wanted}, tolerance)


def test_a_cache_that_could_not_act_is_refused(tiny_bert_path: Path) -> None:
    """SpladeLoss embeds the whole batch, whatever its loss was told; layers are handed from one pass to the next."""
    sparse = make_student("sparse", tiny_bert_path)
    batch = listwise_batch(sparse, "sparse", ragged_rows())
    with pytest.raises(ValueError, match=r"MarginKL\(mini_batch_size=2\) does not embed.*CachedSpladeLoss"):
        SpladeLoss(sparse, MarginKL(sparse, mini_batch_size=2), **SPLADE)(*batch)
    dense = make_student("dense", tiny_bert_path)
    batch = listwise_batch(dense, "dense", ragged_rows())
    for wrapped in (
        lambda: AdaptiveLayerLoss(dense, make_loss(dense)),
        lambda: Matryoshka2dLoss(dense, make_loss(dense), [32, 8]),
    ):
        with pytest.warns(UserWarning, match="not compatible"):
            loss = wrapped()
        with pytest.raises(ValueError, match=r"WeightedSumLoss\(mini_batch_size=32\) cannot stand inside Adaptive"):
            loss(*batch)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_wrappers_of_single_embeddings_refuse_late_interaction(
    mini_batch_size: int | None, tiny_bert_path: Path
) -> None:
    """Matryoshka cut the channel off that says which tokens count, and trained with what was left."""
    model = make_student("multi-vector", tiny_bert_path)
    batch = listwise_batch(model, "multi-vector", ragged_rows())
    wrapped = MatryoshkaLoss(model, MarginKL(model, mini_batch_size=mini_batch_size), [32, 8])
    with pytest.raises(ValueError, match="MatryoshkaLoss works on one embedding per text"):
        wrapped(*batch)
    if mini_batch_size is None:
        with pytest.raises(ValueError, match="AdaptiveLayerLoss works on one embedding per text"):
            AdaptiveLayerLoss(model, MarginKL(model))(*batch)


def test_layers_of_a_vocabulary_are_refused(tiny_bert_path: Path) -> None:
    """Only the last layer of SPLADE speaks of words: the prior ones would be trained as if their channels did."""
    model = make_student("sparse", tiny_bert_path)
    batch = listwise_batch(model, "sparse", ragged_rows())
    with pytest.raises(ValueError, match=r"AdaptiveLayerLoss .* SPLADE"):
        AdaptiveLayerLoss(model, MarginKL(model), kl_temperature=0.0)(*batch)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_terms_of_terms_keep_their_names(mini_batch_size: int | None, tiny_bert_path: Path, tmp_path: Path) -> None:
    """A term that has terms of its own, ours or upstream's, was a TypeError; with a cache its terms had no names."""
    model = make_student("dense", tiny_bert_path)
    rows = rows_with_paraphrases((1,))
    loss = WeightedSumLoss(
        model,
        [(2.0, CoherenceLoss(model)), (0.5, GlobalOrthogonalRegularizationLoss(model))],
        mini_batch_size=mini_batch_size,
    )
    batch = features_and_labels(BaseDataCollator(model.preprocess), rows, "dense", model)
    embeddings = [model(dict(column))["sentence_embedding"] for column in batch[0]]
    parts = [term.compute_loss_from_embeddings(embeddings, batch[1]) for term in loss.losses]  # type: ignore[operator]
    found = loss(*batch)
    assert list(found) == [
        *(f"CoherenceLoss_{part}" for part in ("contrast", "embedding_coherence", "margin_coherence")),
        *(f"GlobalOrthogonalRegularizationLoss_{part}" for part in ("gor_mean", "gor_second_moment")),
    ]
    wanted = [weight * part for weight, terms in zip(loss.weights, parts, strict=True) for part in terms.values()]
    assert [value.item() for value in found.values()] == pytest.approx([value.item() for value in wanted], rel=1e-4)
    alone = CoherenceLoss(model, mini_batch_size=mini_batch_size)
    trainer = trained("dense", model, alone, tmp_path, Dataset.from_list(rows), data_collator=None)
    logged = trainer.state.log_history[0]
    terms = [logged[name] for name in ("contrast", "embedding_coherence", "margin_coherence")]
    assert sum(terms) == pytest.approx(logged["loss"], abs=2e-3)
    with pytest.raises(TypeError, match="FlopsLoss cannot be a term"):
        WeightedSumLoss(model, [(1.0, FlopsLoss(model))])


def test_terms_of_a_cache_are_told_for_the_dimensions_of_the_step(tiny_bert_path: Path) -> None:
    """With some of the dimensions a step, terms were told without the weights of these."""
    model = make_student("dense", tiny_bert_path).double()
    batch = batch_for("WeightedSumLoss", model)
    inner = make("WeightedSumLoss", model, mini_batch_size=2)
    loss = MatryoshkaLoss(model, inner, [32, 8], [3.0, 0.25], n_dims_per_step=1)
    for _ in range(4):
        value = loss(*([dict(column) for column in batch[0]], batch[1]))
        dim = inner._logged[0][0]
        weight = {32: 3.0, 8: 0.25}[dim]
        embeddings = [F.normalize(layers(model, column)[-1][:, :dim], dim=1) for column in batch[0]]
        terms = make("WeightedSumLoss", model).compute_loss_from_embeddings(embeddings, batch[1])
        expected = [weight * term.item() for term in terms.values()]
        assert [term.item() for term in value.values()] == pytest.approx(expected, abs=1e-9)
