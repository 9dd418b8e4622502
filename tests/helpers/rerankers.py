"""A tiny model with random weights of each architecture that people use as a teacher, saved as its makers save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

WORDS = "red green blue cat dog bird runs sleeps sings fast slow what which who is a the yes no 1 0".split()  # noqa: SIM905
ENCODERS = ("bert", "modernbert", "xlm-roberta")
CAUSAL = {"qwen3-reranker": ("yes", "no"), "mxbai-rerank-v2": ("1", "0"), "zerank": ("yes", None)}
_SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
TEMPLATE = (
    "judge {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }} | "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }} answer"
)


def _tokenizer(special: list[str], pair: str | None, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate([*special, "judge", "answer", "|", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=options["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if pair is not None:
        marks = [(token, vocabulary[token]) for token in special if token in pair]
        tokenizer.post_processor = TemplateProcessing(single=pair.split(" $B")[0], pair=pair, special_tokens=marks)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def save_encoder(kind: str, folder: Path, max_length: int = 32) -> Path:
    """Save a sequence classifier with one logit: MiniLM's, Ettin's or bge-reranker-v2-m3's architecture."""
    torch.manual_seed(0)
    if kind == "xlm-roberta":
        tokenizer = _tokenizer(
            ["<s>", "<pad>", "</s>", "<unk>"],
            "<s> $A </s> </s> $B </s>",
            **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
            **{"pad_token": "<pad>", "unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]},
            model_max_length=max_length,
        )
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": max_length + 2, "type_vocab_size": 1}
        model: Any = XLMRobertaForSequenceClassification(XLMRobertaConfig(**_SIZE, **size, num_labels=1))
    else:
        types = [] if kind == "modernbert" else ["token_type_ids"]
        tokenizer = _tokenizer(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1" if types else "[CLS] $A [SEP] $B [SEP]",
            **{"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
            **{"model_input_names": ["input_ids", *types, "attention_mask"], "model_max_length": max_length},
        )
        config: Any = ModernBertConfig if kind == "modernbert" else BertConfig
        marks = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3} if kind == "modernbert" else {}
        made = config(**_SIZE, vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **marks)
        model = (ModernBertForSequenceClassification if kind == "modernbert" else BertForSequenceClassification)(made)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(("classifier", "head")):
                value.normal_(0, 2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_language_model(kind: str, folder: Path, max_length: int = 32, template: str | None = None) -> Path:
    """Save a bare causal language model, Qwen2's or Qwen3's architecture, as most of them lie on the Hub."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(
        ["<|endoftext|>", "<|unk|>"],
        None,
        **{"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|unk|>", "padding_side": "left"},
        **{"model_input_names": ["input_ids", "attention_mask"], "model_max_length": max_length},
    )
    size = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**_SIZE, **size))
    if kind != "mxbai-rerank-v2":
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZE, **size))
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_causal(kind: str, folder: Path) -> Path:
    """Save a reranker that is a language model, with modules.json: its words, and the tokens of its answers."""
    bare = save_language_model(kind, folder.with_name(f"{folder.name}-bare"), template=TEMPLATE)
    transformer = Transformer(str(bare), transformer_task="text-generation")
    yes, no = (word and transformer.tokenizer.convert_tokens_to_ids(word) for word in CAUSAL[kind])
    CrossEncoder(modules=[transformer, LogitScore(yes, no)], device="cpu").save_pretrained(str(folder))
    return folder


def rename_architecture(folder: Path, architecture: str) -> Path:
    """Say in the configuration that a model is of another class, whose code is nowhere here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}), encoding="utf-8")
    return folder
