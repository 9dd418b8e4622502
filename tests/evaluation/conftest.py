"""A real retriever and tiny models of every class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, PreTrainedTokenizerFast


@pytest.fixture
def student(static_student_path: Path) -> Any:
    """Return a real retriever that a test may change."""
    return SentenceTransformer(str(static_student_path), device="cpu")


@pytest.fixture(scope="module")
def tiny_bert(static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that saves a tiny random BERT with a real vocabulary into a folder."""

    def build(head: type, seed: int = 0, folder: Path | None = None) -> Path:
        torch.manual_seed(seed)
        folder = folder or tmp_path_factory.mktemp("tiny-bert")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(static_student_path / "tokenizer.json"), pad_token="[PAD]", model_max_length=64
        )
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": len(tokenizer), "intermediate_size": 16, "max_position_embeddings": 64, "num_labels": 1}
        config = BertConfig(**sizes)
        # With the usual tiny initial weights every pair would get almost the same score.
        config.initializer_range = 0.5
        head(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build
