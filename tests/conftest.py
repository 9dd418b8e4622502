"""Real models and collections for the tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from st_wkl.packaged import CROSS_ENCODER, MINILM, STATIC_STUDENT, fetch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _log_level_as_found() -> Iterator[None]:
    """A command with --quiet, run in this process, must not silence the log that another test reads."""
    logger = logging.getLogger("st_wkl")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of BEIR collections beside the checkout, or skip: their text is not ours to ship."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the BEIR folders scifact, nfcorpus, cranfield in ../shared/data")
    return SHARED_DATA


@pytest.fixture(scope="session")
def static_student_path() -> Path:
    """Return potion-base-8M: a real retriever that encodes a collection in a second."""
    return fetch(STATIC_STUDENT)


@pytest.fixture(scope="session")
def cross_encoder_onnx_path() -> Path:
    """Return the int8 ONNX form of ms-marco-MiniLM-L12-v2: a real reranker."""
    return fetch(CROSS_ENCODER)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return all-MiniLM-L6-v2: a real transformer student."""
    return fetch(MINILM)


@pytest.fixture(scope="session")
def tiny_bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a two-layer BERT with a masked-LM head, from which all four model classes can be made in milliseconds.

    Without dropout, so that two ways of computing the same gradient can be compared to the last digits.
    """
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
