"""The class of a saved model has one answer, for loading, teachers and cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from st_wkl.models import is_retriever, saved_class

_SETTINGS = "config_sentence_transformers.json"
_RANKS = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({_SETTINGS: {"model_type": "SparseEncoder"}}, "SparseEncoder"),
        (
            {_SETTINGS: {"model_type": "Unheard"}, "config.json": _RANKS},
            "SentenceTransformer",
        ),
        ({_SETTINGS: {"prompts": {}}, "config.json": _RANKS}, "CrossEncoder"),
        ({"modules.json": [], "config.json": _RANKS}, "SentenceTransformer"),
        ({"config.json": _RANKS}, "CrossEncoder"),
        ({}, "SentenceTransformer"),
    ],
)
def test_class_of_a_saved_model(files: dict[str, object], expected: str, tmp_path: Path) -> None:
    # A card that calls a model otherwise than it is loaded gives readers code that fails.
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert saved_class(tmp_path) == expected
    assert is_retriever(tmp_path) == (expected != "CrossEncoder" and "modules.json" in files)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    # Half a file was "no settings" to a card, and the model another one than it says.
    (tmp_path / _SETTINGS).write_text('{"model_ty')
    with pytest.raises(ValueError, match=r"config_sentence_transformers\.json holds no JSON"):
        saved_class(tmp_path)
