"""The dataset card: whoever finds the dataset must learn what it is, who made it, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import DatasetCard

from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.report import report_on_lists

PROVENANCE: dict[str, Any] = {
    "collection": {"name": "mteb/scifact", "fingerprint": "f00"},
    "split": "train",
    "num_negatives": 15,
    "candidates": {"sources": {"bm25": 30}, "top_k": 18},
    "selection": {"choice": "top", "absolute_margin": 3.0, "seed": 0},
    "teacher": {"model": "cross-encoder/ms-marco|L12", "revision": "abc", "max_length": 512},
    "teacher_license": "apache-2.0",
    "license": "cc-by-nc-4.0",
    "counts": {"queries": 1, "pairs": 2},
    "dropped": {"false_negatives": 4, "empty_documents": 0},
    "report": report_on_lists([[3.0, 1.0]], [[1, 0]]).to_dict(),
    "leaks": {
        "test": "scifact, test",
        "test_queries": 300,
        "queries_with_shared_documents": 196,
        "share_of_judgements": 0.637,
        "equal_queries": 2,
        "near_queries": 12,
    },
    "command": "st-wkl build mteb/scifact --store /home/someone/scores.sqlite3",
    "versions": {"st-wkl": "0.1.0"},
}


def dataset(provenance: dict[str, Any]) -> DistillationDataset:
    """Return a dataset of one list."""
    return DistillationDataset(
        Dataset.from_list(
            [{"query_id": "q", "document_ids": ["1", "2"], "scores": [3.0, 1.0], "labels": [1, 0]}],
            features=features("train"),
        ),
        Dataset.from_list([{"query_id": "q", "text": "query"}]),
        Dataset.from_list([{"document_id": "1", "text": "one"}, {"document_id": "2", "text": "two"}]),
        provenance,
    )


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
    assert "## How to use it" in text


def test_folders_load_without_the_collection(tmp_path: Path) -> None:
    """What is shared is enough to train on; a name that is neither folder nor repository says so."""
    folder = dataset(PROVENANCE).save_to_disk(tmp_path / "dataset")
    loaded = DistillationDataset.from_hub(folder)
    assert loaded.to_lists().to_list() == dataset(PROVENANCE).to_lists().to_list()
    assert loaded.provenance == PROVENANCE
