"""Prompts: what stands before a text in use stands there in training, in every layout and for every model class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from st_wkl import DistillationDatasetBuilder, MarginKL, WeightedKLDistillationLoss, distill, evaluate
from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.dense import retriever_candidates
from st_wkl.models import own_prompt, prompts_of, set_prompts
from st_wkl.training.dev import GradedEvaluator
from st_wkl.training.refresh import RefreshCandidatesCallback
from st_wkl.training.students import kind_of
from tests.helpers.animals import WordOverlap, small_collection
from tests.helpers.students import CLASSES, column_rows, make_student, ragged_rows
from tests.helpers.training import arguments

PROMPTS: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"query": "query: ", "document": "passage: "}, None),
    ({"query": "query: ", "passage": "passage: "}, None),
    ({"all": "text: "}, "all"),
    ({"query": "find: ", "all": "text: "}, "all"),
]


class Spy:
    """Notes with which prompt and task a model is asked to read texts."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str | None, str | None]] = []
        read = type(model).preprocess

        def preprocess(model: Any, texts: Any, prompt: Any = None, **kwargs: Any) -> Any:
            self.seen.append((prompt or None, kwargs.get("task")))
            return read(model, texts, prompt=prompt, **kwargs)

        monkeypatch.setattr(type(model), "preprocess", preprocess)
        # Upstream measures and shows samples on its card, without prompts.
        for name in ("compute_dataset_metrics", "set_widget_examples", "run_usage_snippet"):
            monkeypatch.setattr(type(model.model_card_data), name, lambda *_, **__: {})

    def take(self) -> set[tuple[str | None, str | None]]:
        found, self.seen = set(self.seen), []
        return found


def prompted(kind: str, path: Path, prompts: dict[str, str], default: str | None, *, bare: bool = False) -> Any:
    student = make_student(kind, path)
    # A folder that was saved by another package knows these names only.
    student.prompts = dict(prompts) if bare else {**student.prompts, **prompts}
    student.default_prompt_name = default
    return student


@pytest.mark.parametrize("kind", CLASSES)
def test_training_reads_texts_as_the_model_does_in_use(
    kind: str, tiny_bert_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instruction-tuned student was trained without its instructions, and evaluated with them."""
    rows = ragged_rows(4)
    spy = Spy(make_student(kind, tiny_bert_path), monkeypatch)
    for prompts, default in PROMPTS:
        for bare in (False, True):
            student = prompted(kind, tiny_bert_path, prompts, default, bare=bare)
            if kind == "cross-encoder":
                student.predict([("a", "b")])
                (asked, _), *_ = spy.take()
                assert asked == own_prompt(student)
                assert ListwiseCollator(student)(rows).get("prompt") == asked
                continue
            student.encode_query(["a b"])
            student.encode_document(["a b"])
            used = spy.take()
            assert used == {(own_prompt(student, side), side) for side in ("query", "document")}
            ListwiseCollator(student)(rows)
            assert spy.take() == used


def test_without_prompts_batches_are_what_they_were(tiny_bert_path: Path) -> None:
    """Students without prompts are most of all, and nothing may change for them."""
    student = make_student("dense", tiny_bert_path)
    rows = ragged_rows(4)
    batches = [ListwiseCollator(student, prompts=prompts)(rows) for prompts in (None, {}, "")]
    expected = student.preprocess([row["query"] for row in rows], prompt=None, task="query")
    for batch in batches:
        assert batch.keys() == batches[0].keys()
        assert "query_prompt_length" not in batch
        assert all(torch.equal(batch[f"query_{key}"], expected[key]) for key in ("input_ids", "attention_mask"))


def test_prompts_that_pooling_leaves_out(tiny_bert_path: Path) -> None:
    """INSTRUCTOR's pooling skips the prompt: training has to skip it as well, also where a batch is cut in pieces."""
    student = prompted("dense", tiny_bert_path, {"query": "a b ", "document": "c "}, None)
    student.set_pooling_include_prompt(False)
    rows = ragged_rows(4)
    batch = ListwiseCollator(student)(rows)
    features = {key.removeprefix("query_"): value for key, value in batch.items() if key.startswith("query_")}
    with torch.no_grad():
        trained = student.eval()(features)["sentence_embedding"]
    used = student.encode_query([row["query"] for row in rows], convert_to_tensor=True)
    assert torch.allclose(trained, used.clone(), atol=1e-6)
    values = []
    for size in (None, 3):
        loss = MarginKL(student, mini_batch_size=size)
        labels = batch["label"]
        columns = [
            {key.removeprefix(f"{side}_"): value for key, value in batch.items() if key.startswith(f"{side}_")}
            for side in ("query", "document")
        ]
        values.append(loss(columns, labels).item())
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_every_step_of_distill_uses_the_same_prompts(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists and columns, dev split and evaluation: one prompt for queries, one for documents, in the record, too."""
    collection = small_collection()
    dev = GradedEvaluator(collection.queries, collection.documents, collection.qrels["test"])
    wanted = {"query": "query: ", "document": "passage: "}

    def start() -> Any:
        return SentenceTransformer(str(static_student_path), prompts=wanted)

    spy = Spy(start(), monkeypatch)
    for name, loss in (("lists", WeightedKLDistillationLoss), ("columns", DistillKLDivLoss)):
        student = start()
        args = arguments(student, tmp_path, max_steps=1)
        made = distill(student, dataset, loss, args, output_dir=tmp_path / name, evaluator=dev)
        assert {prompt for prompt, _ in spy.take()} == {"query: ", "passage: "}
        assert made.record.prompts == wanted
        assert "| Prompts | query `query: `, document `passage: ` |" in (made.folder / "README.md").read_text()
        evaluate(str(made.folder), collection, split="test", show_progress=False)
        assert {prompt for prompt, _ in spy.take()} == {"query: ", "passage: "}


def test_prompts_of_the_arguments_become_the_students(
    dataset: DistillationDataset, static_student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a student is trained with it has to be used with; upstream's collator left `document` out of negatives."""
    given: list[tuple[Any, dict[str, str]]] = [
        ({"query": "q: ", "document": "d: "}, {"query": "q: ", "document": "d: "}),
        ({"query": "q: ", "positive": "d: "}, {"query": "q: ", "document": "d: "}),
        ("t: ", {"query": "t: ", "document": "t: "}),
        ("", {}),
    ]
    spy = Spy(SentenceTransformer(str(static_student_path)), monkeypatch)
    for number, (prompts, wanted) in enumerate(given):
        student = SentenceTransformer(str(static_student_path), prompts={"query": "old: "})
        args = arguments(student, tmp_path, max_steps=1, prompts=prompts)
        made = distill(student, dataset, DistillKLDivLoss, args, output_dir=tmp_path / f"student-{number}")
        assert {prompt for prompt, _ in spy.take()} == ({*wanted.values()} or {None})
        assert made.record.prompts == wanted == prompts_of(SentenceTransformer(str(made.folder)))
        assert args.prompts == prompts, "the user's arguments are not ours to change"
    for prompts in ({"qurey": "q: "}, {"positive": "a: ", "negative_1": "b: "}):
        student = SentenceTransformer(str(static_student_path))
        args = arguments(student, tmp_path, prompts=prompts)
        with pytest.raises(ValueError, match="neither the query nor the documents, or these have several"):
            distill(student, dataset, DistillKLDivLoss, args, output_dir=tmp_path / "refused")
    with pytest.raises(ValueError, match="was given one for 'documents'"):
        ListwiseCollator(student, prompts={"documents": "d: "})(ragged_rows(2))


def test_columns_take_the_routes_of_a_router(static_student_path: Path, tmp_path: Path) -> None:
    """A student with two encoders was trained with the second one on everything, or not at all."""
    encoders = [SentenceTransformer(str(static_student_path))[0] for _ in range(2)]
    assert all(isinstance(encoder, StaticEmbedding) for encoder in encoders)
    router = Router.for_query_document(query_modules=[encoders[0]], document_modules=[encoders[1]])
    student = SentenceTransformer(modules=[router])
    before = [encoder.embedding.weight.detach().clone() for encoder in encoders]
    rows = datasets.Dataset.from_list(column_rows(16))
    distill(student, rows, DistillKLDivLoss, arguments(student, tmp_path, max_steps=1), output_dir=tmp_path / "student")
    assert all((old != encoder.embedding.weight).any() for old, encoder in zip(before, encoders, strict=True))


def test_the_stock_trainer_can_give_its_arguments(tiny_bert_path: Path, tmp_path: Path) -> None:
    """A trainer does not tell its prompts and lengths to a collator that it is given."""
    student = make_student("multi-vector", tiny_bert_path)
    args = arguments(student, tmp_path, prompts={"query": "a b c "}, max_length=4)
    batch = ListwiseCollator(student, args=args)(ragged_rows(4))
    assert batch["document_input_ids"].shape[1] <= 4
    assert "query_prompt_length" in batch


@pytest.mark.parametrize("kind", ["dense", "multi-vector", "cross-encoder"])
def test_a_stock_trainers_arguments_are_obeyed(kind: str, tiny_bert_path: Path, tmp_path: Path) -> None:
    """They were used nowhere, without a word, unless the collator had been given them, too."""
    student = make_student(kind, tiny_bert_path)
    prompts: Any = "judge: " if kind == "cross-encoder" else {"query": "a b c "}
    lengths = {"max_length": {"document": 5}} if kind == "multi-vector" else {}
    collator, batches = ListwiseCollator(student), []
    loss = WeightedKLDistillationLoss(student)
    trainer = kind_of(student).trainer(
        student,
        arguments(student, tmp_path, max_steps=1, prompts=prompts, **lengths),
        datasets.Dataset.from_list(ragged_rows(4)),
        loss=loss,
        data_collator=collator,
    )
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **options: (
        batches.append({**inputs}),
        compute(model, inputs, **options),
    )[1]  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="'(judge: |a b c )' stands before each (pair|query) in training, and '' in"):
        trainer.train()
    (batch,) = batches
    if kind == "cross-encoder":
        assert batch["prompt"] == "judge: "
        return
    texts = [row["query"] for row in ragged_rows(4)]
    found = sorted(batch["query_attention_mask"].sum(dim=1).tolist())
    expected = student.preprocess(texts, prompt="a b c ", task="query")["attention_mask"].sum(dim=1)
    assert found == sorted(expected.tolist())
    if kind == "multi-vector":
        assert batch["document_input_ids"].shape[1] <= 5
        assert "document" in str(collator.max_length)
    again = ListwiseCollator(student)  # what a training before was told is not this one's
    assert "query_prompt_length" not in again(ragged_rows(4))


def test_prompts_are_named_by_side(tiny_bert_path: Path) -> None:
    """A prompt under a name that nothing reads would be saved and never used."""
    dense, pairs = (make_student(kind, tiny_bert_path) for kind in ("dense", "cross-encoder"))
    for student, prompts in ((dense, {"passage": "p: "}), (dense, {"query": 1}), (pairs, {"query": "q: "})):
        with pytest.raises(ValueError, match="are texts by the names"):
            set_prompts(student, prompts)
    set_prompts(pairs, {"pair": "judge: "})
    assert (own_prompt(pairs), prompts_of(pairs)) == ("judge: ", {"pair": "judge: "})
    assert json.loads(json.dumps(prompts_of(dense))) == {}


def test_mining_and_refresh_use_the_students_prompts(static_student_path: Path, tmp_path: Path) -> None:
    """Candidates that the student finds without its prompts are not those that it will mistake in use."""
    student = SentenceTransformer(str(static_student_path))
    collection = small_collection()
    bare = retriever_candidates(collection, student, top_k=5, show_progress=False)
    set_prompts(student, {"query": "whales sing in the sea: ", "document": "an animal: "})
    found = retriever_candidates(collection, student, top_k=5, show_progress=False)
    assert found != bare
    documents = student.encode([f"an animal: {text}" for text in collection.documents.values()])
    queries = student.encode([f"whales sing in the sea: {collection.queries[query]}" for query in found])
    scores = student.similarity(queries, documents)
    best = [[hit.score for hit in hits] for hits in found.values()]
    assert torch.allclose(torch.tensor(best), scores.topk(5).values, atol=1e-5)
    builder = DistillationDatasetBuilder(collection, WordOverlap(), num_negatives=3, store=":memory:")
    refresh = RefreshCandidatesCallback(builder, builder.build(show_progress=False), every=1)
    refresh.refresh(student, 1)
    builder.candidates = retriever_candidates(collection, student, top_k=10, show_progress=False)
    expected = builder.build(show_progress=False).to_lists().to_list()
    assert refresh.train_dataset[:]["documents"] == [row["documents"] for row in expected]
