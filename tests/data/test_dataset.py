"""Rows that hold each text once: the same rows as copies would be, in every way that a trainer reads them."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from torch.utils.data import DataLoader

from st_wkl.data import arrow
from st_wkl.data.arrow import SharedTexts
from st_wkl.data.collator import ListwiseCollator
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.leaks import LeakReport
from st_wkl.losses import WeightedKLDistillationLoss, WeightedSumLoss

NUMBERS = ("first", "second", "probability")


def dataset(seed: int = 0, rows: int = 40, **provenance: Any) -> DistillationDataset:
    """Return random lists, ragged, with several positives, copies under other ids and texts of any length."""
    draw = random.Random(seed)
    words = "a bb river stone gärden 市場 winter".split()  # noqa: SIM905
    documents = {f"d{place}": " ".join(draw.choices(words, k=draw.randint(1, 9))) for place in range(50)}
    queries = {f"q{place}": f"Which {place} {draw.choice(words)}" for place in range(rows)}
    train: dict[str, list[Any]] = {"query_id": list(queries), "document_ids": [], "scores": [], "labels": []}
    train["preferences"] = []
    for _ in queries:
        ids = draw.sample(list(documents), draw.randint(3, 9))
        train["document_ids"].append(ids)
        train["scores"].append([draw.choice([-1.5, 0.25, draw.uniform(-5, 5)]) for _ in ids])
        train["labels"].append([draw.choice([0, 0, 0, 1, 2]) for _ in ids])
        pairs = [draw.sample(range(len(ids)), 2) for _ in range(draw.randint(0, 3))]
        train["preferences"].append([{"first": i, "second": j, "probability": draw.random()} for i, j in pairs])
    return DistillationDataset(
        Dataset.from_dict(train, features=features("train", preferences=True)),
        Dataset.from_dict({"query_id": list(queries), "text": list(queries.values())}),
        Dataset.from_dict({"document_id": list(documents), "text": list(documents.values())}),
        {"num_negatives": 2, **provenance},
    )


def plain_lists(made: DistillationDataset) -> list[dict[str, Any]]:
    """Return the lists as a loop that copies each text makes them."""
    queries, documents = _texts(made.queries), _texts(made.documents)
    return [
        {
            "query": queries[row["query_id"]],
            "documents": [documents[key] for key in row["document_ids"]],
            "scores": row["scores"],
            "labels": row["labels"],
            "pairs": [
                [float(pair[name]) for name in ("first", "second", "probability")] for pair in row["preferences"]
            ],
        }
        for row in made.train
    ]


def plain_columns(made: DistillationDataset, n: int) -> list[dict[str, Any]]:
    """Return the columns as a loop that copies each text makes them."""
    queries, documents = _texts(made.queries), _texts(made.documents)
    found = []
    for row in made.train:
        entries = list(zip(row["labels"], row["scores"], row["document_ids"], strict=True))
        positives = [entry for entry in entries if entry[0] > 0]
        negatives = [entry for entry in entries if entry[0] <= 0][: n - 1]
        if positives and len(negatives) == n - 1:
            chosen = [max(positives, key=lambda entry: entry[:2]), *negatives]
            names = ["positive", *(f"negative_{place}" for place in range(1, n))]
            texts = dict(zip(names, (documents[entry[2]] for entry in chosen), strict=True))
            found.append({"query": queries[row["query_id"]], **texts, "label": [entry[1] for entry in chosen]})
    return found


def _texts(table: Dataset) -> dict[str, str]:
    keys, texts = table.to_dict().values()
    return dict(zip(keys, texts, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_copies(seed: int) -> None:
    """A wrong place would train on another document's text, and nothing would say so."""
    made = dataset(seed)
    assert made.to_lists().to_list() == plain_lists(made)
    assert list(made.to_lists(copied=True)) == plain_lists(made)
    for n in (2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert list(made.to_columns(n)) == made.to_columns(n, copied=True).to_list() == plain_columns(made, n)
    made.train = made.train.shuffle(seed=seed).select(range(7))
    assert list(made.to_lists()) == plain_lists(made)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tell whether two batches are the same, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value.nan_to_num(-9), second[name].nan_to_num(-9))
        if isinstance(value, torch.Tensor)
        else value == second[name]
        for name, value in first.items()
    )


def test_batches_are_those_of_copies_however_rows_are_read(static_student_path: Path) -> None:
    """Workers, iterable datasets and shards get the rows in ways of their own."""
    model = SentenceTransformer(str(static_student_path), device="cpu")
    made = dataset()
    collator, rows = ListwiseCollator(model), made.to_lists()
    expected = [collator(plain_lists(made)[start : start + 8]) for start in range(0, 40, 8)]
    streamed = rows.to_iterable_dataset(4)
    for source, workers in ((rows, 0), (rows, 2), (streamed, 0), (pickle.loads(pickle.dumps(rows)), 0)):
        loader = DataLoader(source, batch_size=8, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
        assert all(map(same, loader, expected))
    shuffled = sorted(row["query"] for row in rows.shuffle(seed=1).to_iterable_dataset(4))
    assert shuffled == sorted(row["query"] for row in plain_lists(made))
    ends = [len(list(streamed.shard(2, place))) for place in range(2)]
    assert ends == [20, 20]


FINGERPRINTS = """
from tests.data.test_dataset import dataset
made = dataset()
print(made.to_lists()._fingerprint, made.to_columns(2)._fingerprint)
"""


@pytest.mark.slow
def test_fingerprints_are_the_same_in_every_process(tmp_path: Path) -> None:
    """`datasets` names its cache files by them, which all processes of a training share."""
    root = Path(__file__).parents[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = f"{dataset().to_lists()._fingerprint} {dataset().to_columns(2)._fingerprint}\n"
    command = [sys.executable, "-W", "ignore", "-c", FINGERPRINTS]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == here
    assert dataset(1).to_lists()._fingerprint not in here
    folder = dataset().save(tmp_path / "dataset")
    loaded = [DistillationDataset.load(folder).train._fingerprint for _ in range(2)]
    assert loaded[0] == loaded[1]


def test_texts_are_held_once() -> None:
    """Copies took 600 bytes a pair held and 2,900 while they were made: MS MARCO's pairs fitted no machine."""
    long = " ".join(f"word{place}" for place in range(200))
    count = 5_000
    ids = [[f"d{(7 * row + place) % 50}" for place in range(16)] for row in range(count)]
    train = {"query_id": [f"q{row}" for row in range(count)], "document_ids": ids}
    train |= {"scores": [[float(place) for place in range(16)]] * count, "labels": [[1] + [0] * 15] * count}  # type: ignore[dict-item]
    made = DistillationDataset(
        Dataset.from_dict(train, features=features("train")),
        Dataset.from_dict({"query_id": train["query_id"], "text": [f"query {row}" for row in range(count)]}),
        Dataset.from_dict(
            {"document_id": [f"d{place}" for place in range(50)], "text": [f"{place} {long}" for place in range(50)]}
        ),
    )
    for rows in (made.to_lists(), made.to_columns(16)):
        held = sum({buffer.address: buffer.size for column in rows.data.columns for buffer in buffers(column)}.values())
        assert held < 40 * 16 * count


def buffers(column: pa.ChunkedArray) -> list[pa.Buffer]:
    """Return what a column lies in."""
    return [buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None]


def test_texts_beyond_what_a_view_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view counts bytes in 31 bits: where the texts of a chunk are longer, it has to name another part of them."""
    monkeypatch.setattr(arrow, "_PART", 5)
    texts = [f"{'long ' * (place % 7)}text {place}" for place in range(60)]
    shared = SharedTexts(pa.chunked_array([texts[:30], texts[30:]]))
    places = [59, 0, -1, 31, 30, 29, 6, 59, *range(60)]
    found = shared.at(np.array(places))
    found.validate(full=True)
    assert len(shared.buffers) > 10
    assert found.to_pylist() == [texts[place] if place >= 0 else "" for place in places]


def test_values_say_what_they_are_in_a_few_lines() -> None:
    """Dictionaries of ids in place of a sentence."""
    made = dataset(collection={"name": "mine"}, split="train", teacher={"model": "teacher"})
    assert repr(made) == (
        "DistillationDataset('mine', split 'train', teacher 'teacher',\n"
        f"    40 rows, {sum(map(len, made.train['document_ids']))} pairs, 40 queries, 50 documents)"
    )
    report = LeakReport("mine, train", "mine, test", 2, 3, shared_documents={"q": ["d"]})
    assert repr(report).startswith("Of 2 queries of mine, test, 1 (50.0%) have a relevant document")


def test_one_verb_loads(tmp_path: Path) -> None:
    """There were three for a folder and a Hub id, and a typing error asked the Hub."""
    folder = dataset().save(tmp_path / "dataset")
    for old in (DistillationDataset.load_from_disk, DistillationDataset.from_hub):
        with pytest.warns(DeprecationWarning, match="is load now"):
            assert old(folder).to_lists().to_list() == dataset().to_lists().to_list()
    for absent in (tmp_path / "gone", "./gone", "gone"):
        with pytest.raises(FileNotFoundError, match=r"has no train\.parquet, so it is no complete"):
            DistillationDataset.load(absent)


def test_a_null_text_is_refused() -> None:
    """It was found when a batch was made, hours into a training."""
    made = dataset()
    texts = made.documents.to_dict()
    texts["text"][3] = None
    with pytest.raises(ValueError, match="The document 'd3' has no text"):
        DistillationDataset(made.train, made.queries, Dataset.from_dict(texts))


class Plain(torch.nn.Module):
    """A loss of one's own that knows lists."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return a number that has a gradient."""
        return sum(self.model(feature)["sentence_embedding"].sum() for feature in features)


RIGHT = {
    "own": WeightedKLDistillationLoss,
    "own-in-matryoshka": lambda model: losses.MatryoshkaLoss(model, WeightedKLDistillationLoss(model), [32]),
    "own-sum": lambda model: WeightedSumLoss(model, [(1.0, WeightedKLDistillationLoss(model))]),
    "foreign": Plain,
}
WRONG = {
    "alone": losses.MultipleNegativesRankingLoss,
    "in-matryoshka": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32]),
    "in-a-sum": lambda model: WeightedSumLoss(
        model, [(1.0, WeightedKLDistillationLoss(model)), (1.0, losses.MultipleNegativesRankingLoss(model))]
    ),
}


@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_losses_that_take_documents_for_positives_are_refused(
    name: str, static_student_path: Path, tmp_path: Path
) -> None:
    """Upstream's contrast took document i of the batch for the answer of query i, and lost .018 nDCG without a word."""
    model = SentenceTransformer(str(static_student_path), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset().to_lists(),
        loss=(RIGHT | WRONG)[name](model),
        data_collator=ListwiseCollator(model),
    )
    if name in RIGHT:
        trainer.train()
    else:
        with pytest.raises(ValueError, match=r"MultipleNegativesRankingLoss.*takes columns.*to_columns\(\)"):
            trainer.train()
