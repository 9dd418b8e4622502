"""What a loaded model lacks is found before it is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.collection import Collection
from st_wkl.data.dense import retriever_candidates
from st_wkl.data.scoring import estimate_scoring, score_pairs
from st_wkl.data.teachers import CrossEncoderTeacher
from st_wkl.evaluation import evaluate
from st_wkl.methods.collective import FeedbackTeacher, TokenFeedbackTeacher
from st_wkl.model_checks import random_weights
from st_wkl.training import default_arguments, distill

COLLECTION = Collection("c", {"d": "a b", "e": "c"}, {"q": "a"}, {"test": {"q": {"d": 1}}})
ROWS = Dataset.from_list(
    [{"query": f"q{i}", "positive": f"q{i} a", "negative_1": "b c", "label": [3.0, 0.0]} for i in range(8)]
)


def save_without(folder: Path, source: Path, dropped: str) -> Path:
    """Copy a retriever without some of its weights."""
    SentenceTransformer(str(source), device="cpu").save_pretrained(str(folder))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if dropped not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("loaded", [False, True])
def test_a_retriever_is_no_teacher(tiny_bert_path: Path, loaded: bool) -> None:
    """Its classification head was made at random: other scores at each loading, under one identity."""
    model: Any = CrossEncoder(str(tiny_bert_path), device="cpu") if loaded else tiny_bert_path
    with pytest.raises(ValueError, match=r"cannot be a teacher: .*classifier\.bias, classifier\.weight.* in no file"):
        CrossEncoderTeacher(model)


def test_a_cross_encoder_that_was_trained_or_saved_is_one(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Once trained, its head is its own, in memory as in a folder."""
    model = CrossEncoder(str(tiny_bert_path), device="cpu")
    with torch.no_grad():
        model.transformers_model.bert.encoder.layer[0].output.dense.weight.add_(0.01)
    assert random_weights(model) == []
    CrossEncoderTeacher(model)
    model.save_pretrained(str(tmp_path / "trained"))
    CrossEncoderTeacher(tmp_path / "trained", device="cpu")


def test_a_missing_pooler_that_nobody_asks_is_fine(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Mean pooling reads the tokens; the pooler of the folder's class is made at random and changes nothing."""
    folder = (
        save_without(tmp_path / "model", tiny_bert_path, "pooler") if _has_pooler(tiny_bert_path) else tiny_bert_path
    )
    model = SentenceTransformer(str(folder), device="cpu")
    before = model.encode("a text")
    assert random_weights(model) == []
    assert (model.encode("a text") == before).all()
    assert len(retriever_candidates(COLLECTION, model, show_progress=False)["q"]) == 2
    FeedbackTeacher(model)


def _has_pooler(source: Path) -> bool:
    return any("pooler" in name for name in load_file(source / "model.safetensors"))


def test_random_encoders_are_refused_everywhere(tiny_bert_path: Path, tmp_path: Path) -> None:
    """Nothing of what the base model knows would be left, and no loss says so."""
    folder = save_without(tmp_path / "model", tiny_bert_path, "layer.1.")
    with pytest.raises(ValueError, match=r"cannot be a first stage: encoder\.layer\.1"):
        retriever_candidates(COLLECTION, folder, show_progress=False)
    with pytest.raises(ValueError, match=r"cannot be a first stage: encoder\.layer\.1"):
        evaluate(folder, COLLECTION, first_stage=folder, show_progress=False)
    student = SentenceTransformer(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"cannot be a student: encoder\.layer\.1.* of the encoder"):
        distill(student, ROWS, "kl", output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be a teacher"):
        FeedbackTeacher(student)


def test_a_random_projection_is_no_first_stage_and_no_teacher(tiny_bert_path: Path) -> None:
    """Late interaction puts a new projection on a plain encoder."""
    model = MultiVectorEncoder(str(tiny_bert_path), device="cpu")
    with pytest.raises(ValueError, match=r"cannot be a first stage: 1\.linear\.weight is in no file"):
        retriever_candidates(COLLECTION, model, show_progress=False)
    with pytest.raises(ValueError, match="cannot be a teacher"):
        TokenFeedbackTeacher(model, ["a text"])


@pytest.mark.parametrize("kind", [CrossEncoder, MultiVectorEncoder, SparseEncoder])
def test_a_new_head_is_a_students_and_is_said_once(
    minilm_path: Path, tiny_bert_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    """On purpose: a cross-encoder, a projection or a sparse head starts at random and is trained."""
    source = minilm_path if kind is SparseEncoder else tiny_bert_path
    student: Any = kind(str(source), device="cpu")
    args = default_arguments(student, tmp_path, max_steps=1, per_device_train_batch_size=4, use_cpu=True)
    with caplog.at_level(logging.WARNING):
        distill(student, ROWS, "kl", args, output_dir=tmp_path / "out")
    assert caplog.text.count("starts with a new head") == 1
    assert random_weights(kind(str(tmp_path / "out"), device="cpu")) == []


def robertas(folder: Path, **options: Any) -> Path:
    """Save a tiny cross-encoder with 66 rows of positions, which are 64, and a tokenizer that names no length."""
    from transformers import BertTokenizer, RobertaConfig, RobertaForSequenceClassification

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=10**30).save_pretrained(folder)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 65, "type_vocab_size": 2, "num_labels": 1}
    config = RobertaConfig(**{**sizes, "pad_token_id": 0, **options})
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_positions_of_roberta_lower_the_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """65 rows are 64 places, as they begin behind the padding; the 65th token was an IndexError in the work."""
    folder = robertas(tmp_path / "model")
    teacher = CrossEncoderTeacher(folder, device="cpu")
    assert caplog.text.count("reads 64 tokens at most") == 1
    assert teacher.identity["max_length"] == 64
    scores = score_pairs(teacher, [("a", "a " * 600), ("a", "b")], show_progress=False)
    assert scores.shape == (2,)
    assert estimate_scoring(teacher, [("a", "a " * 600)]).truncated == 1
    with pytest.raises(ValueError, match=r"max_length is 65, but .* has 64 positions"):
        CrossEncoderTeacher(folder, max_length=65, device="cpu")
    loaded = CrossEncoder(str(folder), device="cpu")
    assert CrossEncoderTeacher(loaded).identity["max_length"] == 64


def test_positions_hold_in_training_search_and_evaluation(tmp_path: Path) -> None:
    """Each of them read the model's own 65, and died at the first long text."""
    from transformers import RobertaModel

    folder = robertas(tmp_path / "model")
    transformer = RobertaModel.from_pretrained(folder, add_pooling_layer=False)
    transformer.save_pretrained(folder)
    long = Collection("c", {"d": "a " * 600, "e": "c"}, {"q": "a"}, {"test": {"q": {"d": 1}}})
    assert len(retriever_candidates(long, folder, show_progress=False)["q"]) == 2
    assert evaluate(folder, long, show_progress=False).tasks
    student = SentenceTransformer(str(folder), device="cpu")
    rows = ROWS.map(lambda row: {"positive": "a " * 600})
    args = default_arguments(student, tmp_path, max_steps=1, per_device_train_batch_size=4, use_cpu=True)
    distill(student, rows, "kl", args, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"max_length is 100, but .* has 64 positions"):
        ListwiseCollator(student, max_length={"document": 100})


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    """An added token without a row is an IndexError at the first text that holds it."""
    folder = robertas(tmp_path / "model")
    model = CrossEncoder(str(folder), device="cpu")
    model.tokenizer.add_tokens(["cats"])
    with pytest.raises(ValueError, match=r"has 1 tokens without an embedding, the first is 'cats' \(id 57"):
        CrossEncoderTeacher(model)


def test_lengths_without_sense_are_refused_at_once(cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """A million tokens cost gigabytes in a self-test, and more than a model has an error after hours."""
    for length in (1, 10**9):
        with pytest.raises(ValueError, match="max_length must be from 8 to 1,000,000"):
            CrossEncoderTeacher(cross_encoder_onnx_path, max_length=length)
    with pytest.raises(ValueError, match=r"max_length is 131,072\. Lower it"):
        CrossEncoderTeacher(cross_encoder_onnx_path, max_length=131_072)
