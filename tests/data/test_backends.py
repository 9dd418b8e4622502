"""Own batches give the logits of `CrossEncoder.predict`, and models that they cannot serve go through it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from st_wkl.data.backends import PairEncoder, _padded, token_batches, why_predict
from st_wkl.data.teachers import CrossEncoderTeacher
from tests.data.test_teachers import tiny_cross_encoder

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer

WORDS = ["red", "green", "Blue", "cat's", "dog,", "bird.", "runs", "12", "über", "sings", "ﬁsh", "東京", "slow"]


def mixed_pairs(count: int, longest: int = 60) -> list[tuple[str, str]]:
    """Make pairs of mixed lengths, some of which share a text, are empty, or are cut at either side."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(0, longest))) for _ in range(count)]
    return [(chance.choice(texts), chance.choice(texts)) for _ in range(count)]


@pytest.fixture
def tokenizer(cross_encoder_onnx_path: Path) -> Tokenizer:
    """Return the tokenizer of a BERT, as saved: with the padding to 512 of its export."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(cross_encoder_onnx_path / "tokenizer.json"))


@pytest.fixture
def tiny(cross_encoder_onnx_path: Path, tmp_path: Path) -> CrossEncoder:
    """Return a random BERT cross-encoder."""
    return tiny_cross_encoder(cross_encoder_onnx_path, tmp_path / "tiny")


@pytest.mark.parametrize("max_length", [8, 9, 31, 32, 512])
@pytest.mark.parametrize("style", ["bert", "roberta", "bare"])
def test_pairs_from_single_texts_equal_pairs_from_the_tokenizer(
    tokenizer: Tokenizer, max_length: int, style: str
) -> None:
    """Tokenising each text once is worth nothing if a pair is then cut or framed in another way."""
    from tokenizers.processors import RobertaProcessing

    if style == "roberta":
        tokenizer.post_processor = RobertaProcessing(("[SEP]", 102), ("[CLS]", 101))
    elif style == "bare":
        tokenizer.post_processor = None  # type: ignore[assignment]
    pairs = mixed_pairs(60)
    encoder = PairEncoder(tokenizer, max_length)
    assert encoder._template is not None
    lengths = encoder.lengths(pairs)
    rows, cut = encoder.encode(pairs)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    whole = [len(encoding) for encoding in tokenizer.encode_batch(pairs)]
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    expected = [(encoding.ids, encoding.type_ids) for encoding in tokenizer.encode_batch(pairs)]
    assert rows == expected
    assert lengths.tolist() == whole
    assert cut == sum(length > max_length for length in whole)
    assert len({len(row[0]) for row in rows}) > 1 or max_length < 10


def test_each_text_is_tokenised_once(tokenizer: Tokenizer) -> None:
    """A query stands in a hundred pairs, a document in many lists."""
    encoder = PairEncoder(tokenizer, 64)
    seen: list[str] = []

    class Counting:
        def encode_batch(self, texts: list[str], **options: Any) -> list[Any]:
            seen.extend(texts)
            return honest.encode_batch(texts, **options)

    honest, encoder._texts = encoder._texts, Counting()  # type: ignore[assignment]
    pairs = [(query, document) for query in ("a", "b") for document in ("c", "d", "a")]
    encoder.lengths(pairs)
    for pair in pairs:
        encoder.encode([pair])
    assert sorted(seen) == ["a", "b", "c", "d"]


def test_unusual_tokenizers_encode_pairs_themselves(tokenizer: Tokenizer) -> None:
    """A post-processor that puts the second text first cannot be built from single texts."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $B:1 [SEP] $A:0", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    pairs = mixed_pairs(20)
    encoder = PairEncoder(tokenizer, 24)
    assert encoder._template is None
    lengths, (rows, cut) = encoder.lengths(pairs), encoder.encode(pairs)
    tokenizer.no_padding()
    tokenizer.enable_truncation(24, strategy="longest_first")
    assert [row[0] for row in rows] == [encoding.ids for encoding in tokenizer.encode_batch(pairs)]
    assert cut == (lengths > 24).sum() > 0


def test_batches_keep_the_budget() -> None:
    """After padding, no batch costs more than the budget, unless one pair alone does."""
    chance = random.Random(0)
    lengths = sorted((chance.randint(3, 700) for _ in range(300)), reverse=True)
    batches = [lengths[batch] for batch in token_batches(lengths, 512)]
    assert [length for batch in batches for length in batch] == lengths
    assert all(len(batch) * batch[0] <= 512 or len(batch) == 1 for batch in batches)
    assert all((len(batch) + 1) * batch[0] > 512 for batch in batches[:-1]), (
        "batches that are smaller than they may be waste time"
    )
    assert max(map(len, (lengths[batch] for batch in token_batches(lengths, 512, 3)))) == 3


def test_torch_logits_equal_predict(tiny: CrossEncoder) -> None:
    """The whole point: faster, and the same numbers, for cut, empty and repeated texts too."""
    import torch

    tiny.max_seq_length = 48
    pairs = mixed_pairs(120)
    teacher = CrossEncoderTeacher(tiny, batch_tokens=300)
    assert teacher._engine.encoder is not None
    expected = tiny.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert np.ptp(expected) > 0.1
    assert np.abs(teacher.score(pairs) - expected).max() < 1e-5
    lengths = teacher.token_lengths(pairs)
    assert lengths is not None
    assert teacher.truncated_pairs == (lengths > 48).sum() > 0
    assert np.abs(teacher.score(pairs) - expected).max() < 1e-5, "the remembered token ids are other ones"


def test_real_reranker_equals_predict(shared_data: Path) -> None:
    """The same with the weights that people use: 1e-4 on logits of up to 10."""
    import torch
    from sentence_transformers import CrossEncoder

    folder = shared_data.parent / "models" / "ms-marco-MiniLM-L12-v2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models/ms-marco-MiniLM-L12-v2")
    model = CrossEncoder(str(folder), device="cpu", max_length=64)
    pairs = mixed_pairs(24)
    expected = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert np.abs(CrossEncoderTeacher(folder, device="cpu", max_length=64).score(pairs) - expected).max() < 1e-4


def test_dtype_is_used_and_part_of_the_identity(tiny: CrossEncoder, tmp_path: Path) -> None:
    """A bfloat16 score is another score: it must never be taken for a float32 one."""
    import torch

    half = CrossEncoderTeacher(tmp_path / "tiny", dtype="bfloat16", device="cpu")
    full = CrossEncoderTeacher(tmp_path / "tiny", dtype="float32", device="cpu")
    assert next(half._engine.model.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert half.identity == {**full.identity, "dtype": "bfloat16"}
    pairs = mixed_pairs(40)
    scores = half.score(pairs)
    assert scores.dtype == np.float32
    assert 0 < np.abs(scores - full.score(pairs)).max() < 0.1 * np.ptp(scores)
    automatic = CrossEncoderTeacher(tmp_path / "tiny", dtype="auto", device="cpu").identity["dtype"]
    assert automatic in ("float32", "bfloat16")
    with pytest.raises(ValueError, match="dtype must be"):
        CrossEncoderTeacher(tmp_path / "tiny", dtype="int8")  # type: ignore[arg-type]


def tiny_llm_reranker(tokenizer_folder: Path, folder: Path) -> CrossEncoder:
    """Make a causal language model that scores a pair by its logits of "yes" and "no"."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", max_length=64)


def test_llm_rerankers_and_prompts_go_through_predict(
    tiny: CrossEncoder, cross_encoder_onnx_path: Path, tmp_path: Path
) -> None:
    """Templates, prompts and left padding are upstream's knowledge; a second version of them would drift."""
    import torch

    llm = tiny_llm_reranker(cross_encoder_onnx_path, tmp_path / "llm")
    pairs = mixed_pairs(10, longest=8)
    for model, prompt, reason in ((llm, None, "several modules"), (tiny, "Judge: ", "a prompt")):
        teacher = CrossEncoderTeacher(model, prompt=prompt)
        assert reason in (why_predict(model, teacher._engine.prompt) or "")
        assert teacher.token_lengths(pairs) is None
        expected = model.predict(pairs, prompt=prompt, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        assert np.ptp(expected) > 0
        assert np.abs(teacher.score(pairs) - expected).max() < 1e-5


def test_other_models_go_through_predict(tiny: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trait that own batches would get wrong is seen."""
    from sentence_transformers import CrossEncoder

    assert why_predict(tiny, None) is None
    with monkeypatch.context() as patch:
        patch.setattr(tiny.tokenizer, "padding_side", "left")
        assert "tokenizer" in (why_predict(tiny, None) or "")
    with monkeypatch.context() as patch:
        patch.setattr(tiny[0], "can_flatten_inputs", True)
        assert "flash attention" in (why_predict(tiny, None) or "")
    with monkeypatch.context() as patch:
        patch.setattr(tiny[0].model, "hf_device_map", {"": 0}, raising=False)
        assert "devices" in (why_predict(tiny, None) or "")
    with monkeypatch.context() as patch:
        patch.setattr(tiny[0], "modality_config", {**tiny[0].modality_config, "image": {}})
        assert "other media" in (why_predict(tiny, None) or "")
    with monkeypatch.context() as patch:
        patch.setattr(tiny.tokenizer, "model_max_length", int(1e30))
        assert "maximum length" in (why_predict(tiny, None) or "")

    class Custom(CrossEncoder):
        pass

    tiny.__class__ = Custom
    assert "no plain CrossEncoder" in (why_predict(tiny, None) or "")


def test_a_batch_ahead_is_the_same_batch(tiny: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next batch is begun before the last one is fetched: each score stays with its pair."""
    tiny.max_seq_length = 48
    pairs = mixed_pairs(90)
    teacher = CrossEncoderTeacher(tiny, batch_tokens=300)
    one_by_one = [(places.tolist(), scores.tolist()) for places, scores in teacher.score_parts(pairs)]
    cut, teacher.truncated_pairs = teacher.truncated_pairs, 0
    forward, begun = teacher._engine._forward, []
    monkeypatch.setattr(teacher._engine, "_forward", lambda rows: begun.append(len(rows)) or forward(rows))
    monkeypatch.setattr(teacher._engine, "ahead", 1)
    parts = teacher.score_parts(pairs)
    first = next(parts)
    assert len(begun) == 2
    assert [(places.tolist(), scores.tolist()) for places, scores in (first, *parts)] == one_by_one
    assert teacher.truncated_pairs == cut > 0


def test_padding_is_masked() -> None:
    """Padded places carry the padding id and a mask of 0."""
    features = _padded([([1, 2, 3], [0, 0, 1]), ([4], [0])], pad_id=9)
    assert features["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert features["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert features["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
