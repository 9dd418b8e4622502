"""The losses and the collator inside the stock trainers of all four model classes, and what users combine them with."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
)
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Router
from torch import nn

from st_wkl.data.collator import ListwiseCollator
from st_wkl.losses import InBatchContrastiveLoss, MarginKL, WeightedKLDistillationLoss, WeightedSumLoss
from tests.helpers.students import (
    CLASSES,
    assert_same,
    column_rows,
    gradients,
    listwise_batch,
    make_student,
    moved,
    ragged_rows,
    trained,
    weights,
)


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_every_class_trains_on_ragged_lists(
    kind: str, mini_batch_size: int | None, tiny_bert_path: Path, tmp_path: Path
) -> None:
    """Each trainer hands over features and labels in its own way; a loss that misreads one fails only there."""
    model = make_student(kind, tiny_bert_path)
    before = weights(model)
    dataset = Dataset.from_list(ragged_rows(9))
    loss = WeightedKLDistillationLoss(model, mini_batch_size=mini_batch_size)
    trainer = trained(kind, model, loss, tmp_path, dataset, eval_dataset=dataset)
    assert moved(before, weights(model))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_cross_encoder_trains_on_columns_with_its_own_collator(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Columns with a label list are what other classes train on, and the trainer's own collator serves them."""
    model = make_student("cross-encoder", tiny_bert_path)
    before = weights(model)
    dataset = Dataset.from_list(column_rows(6))
    trained("cross-encoder", model, MarginKL(model), tmp_path, dataset, data_collator=None)
    assert moved(before, weights(model))


def test_cross_encoder_lists_without_the_collator_are_explained(tiny_bert_path: Path, tmp_path: Path) -> None:
    """The default collator loses which documents are relevant; training on would take the first for the positive."""
    model = make_student("cross-encoder", tiny_bert_path)
    rows = [{"query": r["query"], "documents": r["documents"], "label": r["scores"]} for r in ragged_rows(6)]
    with pytest.raises(ValueError, match="Lists of documents need data_collator=ListwiseCollator"):
        trained("cross-encoder", model, MarginKL(model), tmp_path, Dataset.from_list(rows), data_collator=None)


@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates", "no_duplicates_hashed"])
def test_batch_samplers(sampler: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Samplers look at the columns of the dataset, which are lists here."""
    model = make_student("dense", tiny_bert_path)
    dataset = Dataset.from_list(ragged_rows(12))
    before = weights(model)
    arguments = {"batch_sampler": sampler}
    trained("dense", model, WeightedKLDistillationLoss(model), tmp_path, dataset, arguments=arguments)
    assert moved(before, weights(model))


def test_iterable_dataset(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Data that outgrows the disk is streamed; list columns must survive that."""
    model = make_student("dense", tiny_bert_path)
    before = weights(model)
    stream = Dataset.from_list(ragged_rows(12)).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    loss = WeightedKLDistillationLoss(model)
    with pytest.raises(ValueError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
        trained("dense", model, loss, tmp_path, stream)
    arguments = {"accelerator_config": {"dispatch_batches": False}}
    trained("dense", model, loss, tmp_path, stream, arguments=arguments)
    assert moved(before, weights(model))


def test_several_datasets_with_a_loss_each(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Mixing distilled and merely labelled data is common; each dataset must meet its own loss and prompts."""
    model = make_student("dense", tiny_bert_path)
    before = weights(model)
    labelled = [{key: row[key] for key in ("query", "documents", "labels")} for row in ragged_rows(9, seed=1)]
    datasets = DatasetDict({"distilled": Dataset.from_list(ragged_rows(9)), "labelled": Dataset.from_list(labelled)})
    losses = {"distilled": WeightedKLDistillationLoss(model), "labelled": InBatchContrastiveLoss(model)}
    prompts = {"distilled": {"query": "q: "}, "labelled": {"query": "find: "}}
    collator = ListwiseCollator(model, prompts=prompts)
    trained("dense", model, losses, tmp_path, datasets, data_collator=collator, arguments={"max_steps": 6})
    assert moved(before, weights(model))


def test_prompts_go_by_the_names_query_and_document(tiny_bert_path: Path) -> None:
    """Upstream matches prompts to exact column names, so a prompt for 'document' silently never reached document_1."""
    model = make_student("dense", tiny_bert_path)
    rows = ragged_rows(2)
    plain = ListwiseCollator(model)(rows)
    prompted = ListwiseCollator(model, prompts={"query": "ask: ", "document": "text: "})(rows)
    for side, prompt in (("query", "ask: "), ("document", "text: ")):
        documents = dict.fromkeys(text for row in rows for text in row["documents"])
        texts = [row["query"] for row in rows] if side == "query" else list(documents)
        expected = model.preprocess(texts, prompt=prompt)["input_ids"]
        assert torch.equal(prompted[f"{side}_input_ids"], expected)
        assert plain[f"{side}_input_ids"].shape[1] < expected.shape[1]


def test_routers_and_late_interaction_get_their_tasks(tiny_bert_path: Path, tmp_path: Path) -> None:
    """An asymmetric student encodes queries and documents by different modules; the default route is the document's."""
    query, document = (make_student("dense", tiny_bert_path, seed=seed) for seed in (1, 2))
    router = Router.for_query_document(list(query), list(document))
    model = SentenceTransformer(modules=[router])
    before = {name: weights(part) for name, part in router.sub_modules.items()}
    dataset = Dataset.from_list(ragged_rows(9))
    arguments = {"router_mapping": {"query": "query", "documents": "document"}}
    trained("dense", model, WeightedKLDistillationLoss(model), tmp_path, dataset, arguments=arguments)
    for name, part in router.sub_modules.items():
        assert moved(before[name], weights(part)), name
    features, _ = listwise_batch(make_student("multi-vector", tiny_bert_path), "multi-vector", ragged_rows(2))
    assert [feature["task"] for feature in features] == ["query", "document"]


def test_equal_documents_are_embedded_once(tiny_bert_path: Path) -> None:
    """Lists mined from one corpus share documents; embedding each copy costs time and memory for nothing."""
    rows = ragged_rows(6)
    features, labels = listwise_batch(make_student("dense", tiny_bert_path), "dense", rows)
    unique = {text for row in rows for text in row["documents"]}
    assert len(features[1]["input_ids"]) == len(unique) < sum(len(row["documents"]) for row in rows)
    assert labels.shape == (6, max(len(row["documents"]) for row in rows), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "lists of length"),
        ({"labels": [1] * 99}, "lists of length"),
        ({"query": None}, "Drop that row"),
        ({"query": "  "}, "Drop that row"),
        ({"scores": math.nan}, r"the score of document 0 of the query .* is nan"),
        ({"scores": math.inf}, r"the score of document 0 of the query .* is inf"),
        ({"scores": None}, r"the score of document 0 of the query .* is None"),
        ({"documents": None}, r"document 0 of the query .* is None"),
        ({"labels": "missing"}, "a row lacks"),
        ({"documents": "empty"}, "there has to be at least one"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str, tiny_bert_path: Path) -> None:
    """Upstream's messages for such rows speak of tensors; a user has to learn which row to mend."""
    rows = copy.deepcopy(ragged_rows(3))
    for key, value in change.items():
        if value == "missing":
            del rows[1][key]
        elif value == "empty":
            rows[1] |= {"documents": [], "scores": [], "labels": []}
        elif key in ("query",) or isinstance(value, list):
            rows[1][key] = value
        else:
            rows[1][key] = [value, *rows[1][key][1:]]
    with pytest.raises(ValueError, match=message):
        ListwiseCollator(make_student("dense", tiny_bert_path))(rows)


def test_lists_are_no_embeddings_to_matryoshka(tiny_bert_path: Path, tmp_path: Path) -> None:
    """MatryoshkaLoss cuts labels as wide as the embedding; 32 candidates of a 32-dimensional model are that."""
    model = make_student("dense", tiny_bert_path).double()
    rng_rows = ragged_rows(4)
    for row in rng_rows:
        extra = [f"{row['query']} {place}" for place in range(32 - len(row["documents"]))]
        row["documents"] = [*row["documents"], *extra]
        row["scores"] = [*row["scores"], *[-9.0] * len(extra)]
        row["labels"] = [*row["labels"], *[0] * len(extra)]
    batch = listwise_batch(model, "dense", rng_rows)
    inner = WeightedKLDistillationLoss(model)
    value, _ = gradients(MatryoshkaLoss(model, inner, [32]), model, *batch)
    assert value == pytest.approx(inner(*batch).item(), abs=1e-9)
    columns = Dataset.from_list(column_rows(4, candidates=32))
    with pytest.raises(ValueError, match="Inside MatryoshkaLoss, labels as wide as the embedding dimension"):
        trained(
            "dense", model.float(), MatryoshkaLoss(model, inner, [32, 16]), Path("unused"), columns, data_collator=None
        )


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_sum_under_matryoshka(mini_batch_size: int | None, tiny_bert_path: Path) -> None:
    """Terms, gradient cache and Matryoshka each wrap the others' outputs; together they must still be plain sums."""
    model = make_student("dense", tiny_bert_path).double()
    batch = listwise_batch(model, "dense", ragged_rows())
    parts = [(1.0, WeightedKLDistillationLoss(model)), (0.1, InBatchContrastiveLoss(model))]
    total, wanted = 0.0, None
    for weight, part in parts:
        value, found = gradients(MatryoshkaLoss(model, part, [32, 8], [1.0, 0.5]), model, *batch)
        total += weight * value
        found = {name: weight * gradient for name, gradient in found.items()}
        wanted = found if wanted is None else {name: wanted[name] + found[name] for name in wanted}
    summed = MatryoshkaLoss(model, WeightedSumLoss(model, parts, mini_batch_size=mini_batch_size), [32, 8], [1.0, 0.5])
    value, found = gradients(summed, model, *batch)
    assert value == pytest.approx(total, abs=1e-9)
    assert wanted is not None
    assert_same(wanted, found, 1e-9)
    terms = summed([dict(feature) for feature in batch[0]], batch[1])
    expected = [
        weight * gradients(MatryoshkaLoss(model, part, [32, 8], [1.0, 0.5]), model, *batch)[0] for weight, part in parts
    ]
    assert [value.item() for value in terms.values()] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_terms_are_logged_by_name(mini_batch_size: int | None, tiny_bert_path: Path, tmp_path: Path) -> None:
    """A sum whose terms cannot be seen cannot be tuned."""
    model = make_student("dense", tiny_bert_path)
    terms = [(1.0, WeightedKLDistillationLoss(model)), (0.5, WeightedKLDistillationLoss(model, gamma=0, alpha=0))]
    loss = WeightedSumLoss(model, [*terms, (0.1, InBatchContrastiveLoss(model))], mini_batch_size=mini_batch_size)
    trainer = trained("dense", model, loss, tmp_path, Dataset.from_list(ragged_rows(9)))
    logged = trainer.state.log_history[0]
    names = ["WeightedKLDistillationLoss", "WeightedKLDistillationLoss_2", "InBatchContrastiveLoss"]
    assert sum(logged[name] for name in names) == pytest.approx(logged["loss"], abs=2e-3)
    model.save_pretrained(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert "WeightedSumLoss" in card
    assert "Weighted KL-Divergence for Document Ranking" in card
    assert "Contrastive Predictive Coding" in card


def test_sum_takes_upstream_losses_on_columns(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Users have losses already; a sum that only took ours would make them choose."""
    model = make_student("dense", tiny_bert_path)
    before = weights(model)
    terms = [
        (1.0, WeightedKLDistillationLoss(model)),
        (0.1, MultipleNegativesRankingLoss(model)),
        (1, DistillKLDivLoss(model)),
    ]
    dataset = Dataset.from_list(column_rows(6))
    trainer = trained("dense", model, WeightedSumLoss(model, terms), tmp_path, dataset, data_collator=None)
    assert moved(before, weights(model))
    assert "MultipleNegativesRankingLoss" in trainer.state.log_history[0]


def test_sum_refuses_what_it_cannot_share(tiny_bert_path: Path) -> None:
    """A term with its own forward pass or its own cache would be computed twice or not at all."""
    model = make_student("dense", tiny_bert_path)
    with pytest.raises(ValueError, match="at least one"):
        WeightedSumLoss(model, [])
    with pytest.raises(TypeError, match="would need a forward pass of its own"):
        WeightedSumLoss(model, [(1.0, nn.MSELoss())])
    with pytest.raises(ValueError, match="has a gradient cache of its own"):
        WeightedSumLoss(model, [(1.0, MarginKL(model, mini_batch_size=2))])
    with pytest.raises(ValueError, match="must be a finite number"):
        WeightedSumLoss(model, [(math.nan, MarginKL(model))])


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["lora", "gradient_checkpointing", "accumulation", "bf16", "compile"])
def test_gradient_cache_with_what_users_turn_on(feature: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """Each of these changes how the second forward pass runs; the trained weights must be those of plain training."""
    arguments: dict[str, Any] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "accumulation": {"gradient_accumulation_steps": 2},
        "bf16": {"bf16": True, "use_cpu": True},
        "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    }.get(feature, {})
    results = []
    for mini_batch_size in (None, 2):
        model = make_student("dense", tiny_bert_path)
        if feature == "lora":
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
        loss = WeightedKLDistillationLoss(model, mini_batch_size=mini_batch_size)
        options = {"optim": "sgd", "learning_rate": 1e-2, **arguments}
        before = weights(model)
        trained("dense", model, loss, tmp_path, Dataset.from_list(ragged_rows(12)), arguments=options)
        results.append(weights(model))
        assert moved(before, results[-1])
    tolerance = 5e-3 if feature == "bf16" else 1e-5
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=tolerance, msg=name)
