"""The dataset card: whoever finds the dataset must learn what it is, who made it, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard

from st_wkl.data.dataset import DistillationDataset
from tests.helpers.cards import PROVENANCE, dataset


def test_the_card_says_it_all(tmp_path: Path) -> None:
    """Teacher and licence, collection, miners, filters, counts, leaks, versions, command: all of it, for the Hub."""
    folder = dataset(PROVENANCE).save_to_disk(tmp_path / "dataset")
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.source_datasets == ["mteb/scifact"]
    assert [config["config_name"] for config in card.data.configs] == ["train", "queries", "documents"]
    for words in (
        "# mteb/scifact, scored by cross-encoder/ms-marco|L12",
        "1 candidate lists over 2 documents",
        r"`cross-encoder/ms-marco\|L12`: revision `abc`, max_length `512`, licence `apache-2.0`",
        "sources.bm25 `30`",
        "absolute_margin `3`",
        "| Left out | false negatives `4` |",
        "judged relevant in 100.0% of the lists",
        "196 of 300 test queries have a relevant document that is a positive here (63.7% of",
        "--store scores.sqlite3",
        "st-wkl `0.1.0`",
        "relevant (1)",
        'DistillationDataset.load("path',
    ):
        assert words in card.text
    assert "empty documents" not in card.text
    assert "someone" not in card.text


@pytest.mark.parametrize(
    "provenance",
    [{}, {"teacher": [{"model": "a"}, {"model": "b"}], "report": {"precision_at_1": 1.0}}, {"collection": "x"}],
)
def test_cards_without_provenance(tmp_path: Path, provenance: dict[str, Any]) -> None:
    """Datasets made by hand have a card too, and one that the Hub reads."""
    text = (dataset(provenance).save_to_disk(tmp_path / "dataset") / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["configs"]
    assert "## Usage" in text


def test_folders_load_without_the_collection(tmp_path: Path) -> None:
    """What is shared is enough to train on; a name that is neither folder nor repository says so."""
    folder = dataset(PROVENANCE).save_to_disk(tmp_path / "dataset")
    loaded = DistillationDataset.from_hub(folder)
    assert loaded.to_lists().to_list() == dataset(PROVENANCE).to_lists().to_list()
    assert loaded.provenance == PROVENANCE
