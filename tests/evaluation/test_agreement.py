"""Every class of student on whole collections: our numbers are MTEB's own, on an empty cache and before its rounding.

MTEB rounds each mean to five decimals as soon as it has it, so the test takes `round` away from it: what is left is
compared with the mean of our scores per query, to 1e-6, and after rounding with the metrics that we report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from mteb._evaluators import retrieval_metrics
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from st_wkl.data.collection import Collection
from st_wkl.evaluation import evaluate
from st_wkl.evaluation.tasks import CollectionTask
from st_wkl.evaluation.two_stage import BM25Search
from st_wkl.training.lora import merge

pytestmark = pytest.mark.slow

TOP_K = 10
KINDS: dict[str, Any] = {
    "static": SentenceTransformer,
    "adapter": SentenceTransformer,
    "merged": SentenceTransformer,
    "sparse": SparseEncoder,
    "late-interaction": MultiVectorEncoder,
    "cross-encoder": CrossEncoder,
}
Build = Callable[[type], Path]


@pytest.fixture(scope="module")
def base(static_student_path: Path, tiny_bert: Any) -> Build:
    """Return a function that saves a tiny BERT which knows what words mean, from the start of its static embeddings."""

    def build(head: type) -> Path:
        folder: Path = tiny_bert(head)
        model: Any = head.from_pretrained(folder)
        static = load_file(static_student_path / "model.safetensors")["embeddings"]
        model.base_model.embeddings.word_embeddings.weight.data = static[:, : model.config.hidden_size].float()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder, model_max_length=24).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="module")
def saved(base: Build, static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the smallest student of a kind: as fast as can be, and better than chance."""

    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("students") / kind
        model: Any
        if kind == "static":
            return static_student_path
        if kind == "sparse":  # bag of words, each as heavy as its static embedding is long
            weight = load_file(static_student_path / "model.safetensors")["embeddings"].float().norm(dim=1)
            tokenizer = AutoTokenizer.from_pretrained(base(BertModel))
            model = SparseEncoder(modules=[SparseStaticEmbedding(tokenizer, weight=weight)], device="cpu")
        elif kind == "late-interaction":
            model = MultiVectorEncoder(str(base(BertModel)), device="cpu")
        elif kind == "cross-encoder":
            model = CrossEncoder(str(base(BertForSequenceClassification)), device="cpu")
        else:
            model = SentenceTransformer(str(base(BertModel)), device="cpu")
            torch.manual_seed(0)
            model.add_adapter(
                LoraConfig(TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"], init_lora_weights=False)
            )
            if kind == "merged":
                return merge(model, folder)
        model.save_pretrained(str(folder))
        return folder

    return build


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "cranfield") for kind in KINDS),
        # The others agree here, too, but take minutes.
        *((kind, "scifact") for kind in ("sparse", "cross-encoder")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*documents of 'cranfield' have no text")
def test_our_numbers_are_mtebs(
    kind: str,
    name: str,
    saved: Callable[[str], Path],
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student is trained to be used on whole collections: its number there must be the one that MTEB gives."""
    cls, folder, collection = KINDS[kind], saved(kind), Collection.load(shared_data / name)
    stages: Any = {"first_stage": "bm25", "top_k": TOP_K} if cls is CrossEncoder else {}
    ours = evaluate(folder, collection, show_progress=False, **stages).task()
    task: Any = CollectionTask(collection, "test")
    if stages:
        mteb.evaluate(
            BM25Search(show_progress=False), task, cache=None, prediction_folder=tmp_path, show_progress_bar=False
        )
        task = CollectionTask(collection, "test").convert_to_reranking(tmp_path, top_k=TOP_K)
    monkeypatch.setattr(retrieval_metrics, "round", lambda x, n=None: round(x) if n is None else x, raising=False)
    outcome = mteb.evaluate(cls(str(folder), device="cpu"), task, cache=None, show_progress_bar=False)
    exact = outcome.task_results[0].scores["test"][0]
    decimals = {metric: 6 if metric.startswith("mrr") else 5 for metric in ours.metrics}  # MTEB rounds MRR in its files
    assert ours.metrics == {metric: round(float(exact[metric]), decimals[metric]) for metric in decimals}
    for metric in ("ndcg_at_10", "recall_at_10", "recall_at_100"):
        values = ours.scores(metric).values()
        assert math.fsum(values) / len(values) == pytest.approx(exact[metric], abs=1e-6)
    assert ours.ndcg_at_10 > 0.01, "chance would agree with chance"
