"""Teachers that people use, each by its own manners: raw logits of plain transformers code, or a refusal that helps."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense
from sentence_transformers.cross_encoder.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from st_wkl.data import vllm
from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.collection import Collection
from st_wkl.data.teachers import CrossEncoderTeacher, SimilarityTeacher
from st_wkl.pipeline import TeacherConfig, steps
from tests.helpers import rerankers
from tests.helpers.tiny import collection

PAIRS = [
    ("what is red", "a red cat runs"),
    ("who sings", "the bird sings " * 4),
    ("which dog", "blue"),
    ("what is red", "slow"),
    ("who", "who runs fast"),
]
TABLE = {
    cells[0].strip(" `"): [cell.strip() for cell in cells[1:]]
    for line in (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `") and (cells := line.strip("| ").split(" | "))
}


def alone(folder: Path, pairs: list[tuple[str, str]], max_length: int = 32) -> list[float]:
    """Return the logits of a sequence classifier by transformers alone, one pair at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [
            model.eval()(**tokenizer(*pair, truncation=True, max_length=max_length, return_tensors="pt")).logits.item()
            for pair in pairs
        ]


@pytest.mark.parametrize("kind", rerankers.ENCODERS)
def test_encoders_give_their_logits(kind: str, tmp_path: Path) -> None:
    """Each lays out a pair in its own way: segments, none, or two separators; and cuts the longer text."""
    teacher = CrossEncoderTeacher(rerankers.save_encoder(kind, tmp_path / kind), device="cpu")
    pairs = [*PAIRS, ("what", "red dog " * 40), ("red dog " * 40, "what")]
    expected = np.array(alone(tmp_path / kind, pairs))
    assert np.abs(teacher.score(pairs) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert np.ptp(expected) > 0.1, "equal scores prove nothing"
    assert teacher.truncated_pairs == 2
    own = teacher._engine.encoder is not None
    assert TABLE[kind][1] == ("own batches" if own else "`predict`")
    assert teacher.identity["max_length"] == 32, "the tokenizer's own"


@pytest.mark.parametrize("kind", rerankers.CAUSAL)
def test_language_models_give_their_answers_logits(kind: str, tmp_path: Path) -> None:
    """The words around a pair, and which tokens are yes and no, are the model's, from modules.json and template."""
    teacher = CrossEncoderTeacher(rerankers.save_causal(kind, tmp_path / kind), device="cpu")
    tokenizer, model = (part.from_pretrained(tmp_path / kind) for part in (AutoTokenizer, AutoModelForCausalLM))
    yes, no = rerankers.CAUSAL[kind]
    expected = []
    for query, document in PAIRS:
        asked = tokenizer(f"judge {query} | {document} answer", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**asked).logits[0, -1]
        expected.append(float(logits[tokenizer.convert_tokens_to_ids(yes)]))
        expected[-1] -= float(logits[tokenizer.convert_tokens_to_ids(no)]) if no else 0.0
    assert np.abs(teacher.score(PAIRS) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert np.ptp(expected) > 0.5
    assert TABLE[kind][1] == ("own batches" if teacher._engine.encoder is not None else "`predict`")
    assert TABLE[kind][2] == (f"`{yes}` − `{no}`" if no else "`Yes`")


def test_a_reranker_of_several_modules_gives_its_last_ones_numbers(tmp_path: Path) -> None:
    """Ettin's published rerankers are an encoder, a pooling and a head; the sigmoid of their settings is left out."""
    encoder = rerankers.save_encoder("modernbert", tmp_path / "encoder")
    transformer = Transformer(str(encoder), transformer_task="feature-extraction")
    torch.manual_seed(0)
    head = Dense(
        16,
        1,
        activation_function=torch.nn.Identity(),
        module_output_name="scores",
        module_input_name="sentence_embedding",
    )
    CrossEncoder(modules=[transformer, Pooling(16, "cls"), head], device="cpu").save_pretrained(str(tmp_path / "ettin"))
    teacher = CrossEncoderTeacher(tmp_path / "ettin", device="cpu")
    inner = teacher._engine.model  # type: ignore[union-attr]
    expected = []
    for pair in PAIRS:
        features = inner[0].tokenizer(*pair, return_tensors="pt")
        with torch.no_grad():
            expected.append(inner[2].linear(inner[0].model(**features).last_hidden_state[:, 0]).item())
    assert np.abs(teacher.score(PAIRS) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert TABLE["ettin-reranker-v1"][1] == "`predict`"


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        ("qwen3-reranker", None, r"language model \(Qwen3ForCausalLM\) without modules.json.*docs/teachers.md"),
        ("mxbai-rerank-v2", None, r"language model \(Qwen2ForCausalLM\) without modules.json"),
        ("jina-reranker-v3", "JinaForRanking", "ranks a whole list at once.*ListTeacher"),
        ("bge-reranker-v2-minicpm-layerwise", "LayerWiseMiniCPMForCausalLM", "scores at a layer.*CallableTeacher"),
        ("bge-reranker-v2.5-gemma2-lightweight", "CostWiseGemmaForCausalLM", "scores at a layer.*CallableTeacher"),
    ],
)
def test_what_would_be_asked_wrongly_is_refused(
    kind: str, architecture: str | None, message: str, tmp_path: Path
) -> None:
    """Loaded all the same, a bare language model answers the bare pair with 'yes' and 'no', and others with noise."""
    folder = rerankers.save_language_model(kind, tmp_path / kind)
    if architecture is None:
        assert np.isfinite(CrossEncoder(str(folder), device="cpu").predict(PAIRS[:1])).all(), "upstream scores it"
    else:
        rerankers.rename_architecture(folder, architecture)
        assert "refused" in TABLE[kind][1]
    for trust in (False, True):
        with pytest.raises(ValueError, match=message):
            CrossEncoderTeacher(folder, device="cpu", trust_remote_code=trust)


@pytest.fixture(scope="module")
def retrievers(tiny_bert_path: Path) -> dict[str, Any]:
    """Return a retriever of each class."""
    torch.manual_seed(0)
    kinds = (SentenceTransformer, SparseEncoder, MultiVectorEncoder)
    return {kind.__name__: kind(str(tiny_bert_path), device="cpu") for kind in kinds}


@pytest.mark.parametrize("kind", ["SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"])
def test_retrievers_teach_by_their_similarity(kind: str, retrievers: dict[str, Any], tmp_path: Path) -> None:
    """A chunk of pairs that share texts gives what one pair after the other gives; prompts and all."""
    retrievers[kind].save_pretrained(str(tmp_path))
    model = type(retrievers[kind])(str(tmp_path), device="cpu")
    model.prompts |= {"query": "what "}
    teacher = SimilarityTeacher(model)
    expected = []
    for query, document in PAIRS:
        first, second = model.encode_query(query), model.encode_document(document)
        if kind == "SentenceTransformer":
            expected.append(float(first @ second / np.linalg.norm(first) / np.linalg.norm(second)))
        elif kind == "SparseEncoder":
            expected.append(float(first.to_dense() @ second.to_dense()))
        else:
            expected.append(float(sum(row.max() for row in np.asarray(first) @ np.asarray(second).T)))
    assert np.abs(teacher.score(PAIRS) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert teacher.score(PAIRS).tobytes() == teacher.score(PAIRS).tobytes()
    assert TABLE[kind][1] == "`SimilarityTeacher`"
    plain = SimilarityTeacher(str(tmp_path))
    assert plain.identity["settings"] != teacher.identity["settings"], "the prompt"
    assert pickle.loads(pickle.dumps(plain)).score(PAIRS).tobytes() == plain.score(PAIRS).tobytes()
    model.prompts |= {"query": "who "}
    with pytest.raises(ValueError, match="was changed after it became a teacher"):
        teacher.score(PAIRS)


def test_a_wrong_kind_is_refused_with_the_right_one(static_student_path: Path, tmp_path: Path) -> None:
    """A bi-encoder that is asked as a cross-encoder, or the other way round, answers something."""
    dense = SentenceTransformer(str(static_student_path), device="cpu")
    for wrong in (dense, static_student_path, str(static_student_path)):
        with pytest.raises((TypeError, ValueError), match="SimilarityTeacher"):
            DistillationDatasetBuilder(collection(), wrong, split="test", against=None)
    encoder = rerankers.save_encoder("bert", tmp_path / "bert")
    for one in (encoder, CrossEncoder(str(encoder), device="cpu")):
        with pytest.raises(TypeError, match="is a cross-encoder, which has no similarity"):
            SimilarityTeacher(one)  # type: ignore[arg-type]


def test_a_configuration_names_a_retriever(static_student_path: Path) -> None:
    """`kind: retriever` builds with a bi-encoder, and what it would ignore is an error."""
    made = collection(train={"q1": {"d1": 1}, "q4": {"d7": 1}})
    teacher = steps.load_teacher(TeacherConfig(str(static_student_path), kind="retriever"))
    dataset = DistillationDatasetBuilder(made, teacher, num_negatives=3, store=":memory:", against=None).build(False)
    assert dataset.provenance["teacher"]["kind"] == "similarity"
    assert isinstance(made, Collection)
    with pytest.raises(ValueError, match="max_length means nothing for a retriever"):
        TeacherConfig("t", kind="retriever", max_length=128)


def test_vllm_is_asked_for_before_anything_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing that is said at once; where it is there, what decides a score has to be said."""
    folder = rerankers.save_encoder("bert", tmp_path / "bert")
    options: dict[str, Any] = {"backend": "vllm", "max_length": 32, "dtype": "float32"}
    with pytest.raises(ImportError, match="needs vLLM, which is not installed here"):
        CrossEncoderTeacher(folder, **options)
    monkeypatch.setattr(vllm, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="needs max_length and dtype, got None and 'auto'"):
        CrossEncoderTeacher(folder, backend="vllm", dtype="auto")
    with pytest.raises(ValueError, match="vLLM makes its own batches"):
        CrossEncoderTeacher(folder, device="cuda", **options)
    there = CrossEncoderTeacher(folder, model_kwargs={"enforce_eager": True}, **options).identity
    torchs = CrossEncoderTeacher(folder, max_length=32, dtype="float32", device="cpu").identity
    assert there == torchs | {"backend": "vllm", "model_kwargs": {"enforce_eager": True}}


def test_the_table_of_teachers_is_complete() -> None:
    """Every kind that is tested has its row: how it is asked, what its score is, and a temperature to start with."""
    kinds = {*rerankers.ENCODERS, *rerankers.CAUSAL, "ettin-reranker-v1", "jina-reranker-v3"}
    assert kinds <= TABLE.keys()
    assert all(len(row) == 5 and all(row) for row in TABLE.values()), TABLE
    assert all(re.search(r"\d|—", row[-1]) for row in TABLE.values())
