"""Forty questions about eight animals, as values and as files, and a teacher that counts words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from st_wkl.data.collection import Collection


def small_collection() -> Collection:
    subjects = ["cats", "dogs", "birds", "whales", "snakes", "horses", "wolves", "frogs"]
    facts = ["like water", *(f"like {what} and water" for what in ("grass", "meat", "fish", "fruit"))]
    documents = {f"d{i}-{j}": f"{s} {f}" for i, s in enumerate(subjects) for j, f in enumerate(facts)}
    queries = {f"q{i}-{j}": f"do {s} {f}" for i, s in enumerate(subjects) for j, f in enumerate(facts)}
    qrels = {query: {query.replace("q", "d"): 1} for query in queries}
    return Collection("animals", documents, queries, {"train": qrels, "test": qrels})


def write_beir(collection: Collection, folder: Path) -> Path:
    """Write a collection as the files that a user has, and return their folder."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", collection.documents), ("queries", collection.queries)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for split, judged in collection.qrels.items():
        rows = ["query-id\tcorpus-id\tscore"]
        rows += [f"{query}\t{document}\t{gain}" for query, found in judged.items() for document, gain in found.items()]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows), encoding="utf-8")
    return folder


class WordOverlap:
    """A teacher that counts shared words, and which pairs it was asked about."""

    def __init__(self, name: str = "word-overlap") -> None:
        self.name = name
        self.asked: list[tuple[str, str]] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": self.name}

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        self.asked += pairs
        return np.array([3.0 * len({*q.split()} & {*d.split()}) for q, d in pairs], dtype=np.float32)
