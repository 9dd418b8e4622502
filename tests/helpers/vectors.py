"""A teacher of embeddings that costs nothing, and its vectors of the texts of lists."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from st_wkl.data.vectors import TeacherVectors, VectorStore
from st_wkl.text import text_hash


class Numbers:
    """Gives each text a direction of its own, another one as a query than as a document."""

    name = "numbers"

    def __init__(self, dimension: int = 32, similarity: str = "cosine", version: int = 1) -> None:
        self.dimension = dimension
        self.identity = {"dimension": dimension, "similarity": similarity, "version": version}
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
        """Draw from a generator that the text seeds."""
        self.asked += texts
        seeds = [(int(text_hash(text), 16), len(side)) for text in texts]
        return np.array([np.random.default_rng(seed).normal(size=self.dimension) for seed in seeds], np.float32)


def vectors_for(rows: list[dict[str, Any]], teacher: Any = None) -> TeacherVectors:
    """Return the vectors of all texts of lists; the folder goes with the process."""
    folder = tempfile.TemporaryDirectory()
    texts = {"query": [row["query"] for row in rows], "document": [text for row in rows for text in row["documents"]]}
    found = VectorStore(folder.name).embed(teacher or Numbers(), texts, show_progress=False)  # type: ignore[arg-type]
    found.folder = folder  # type: ignore[attr-defined]
    return found
