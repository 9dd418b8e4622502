"""Bi-encoders as teachers by their embeddings, and what else may teach so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from sentence_transformers import SentenceTransformer

from st_wkl.model_checks import check_complete
from st_wkl.models import check_unchanged, identity, load_model, model_state
from st_wkl.ranges import check_options

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")


class Embedder(Protocol):
    """What teaches by its embeddings: a model (`EmbeddingTeacher`), or a server or file of somebody's own.

    `identity` changes whenever the vectors do; `embed` returns n vectors for n texts, each as the side, `"query"` or
    `"document"`, demands.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides a vector, in JSON values."""

    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """Return one vector per text, `(n, D)`."""


class EmbeddingTeacher:
    """A bi-encoder that teaches by its embeddings, with its own prompts for queries and documents.

    Args:
        model: A `SentenceTransformer`, or a folder, Hub id or `packaged:` name of one.
        batch_size: Texts in one forward pass.
        trust_remote_code: Run code of the model's repository. Only for repositories that you have read.

    Raises:
        TypeError: The model has no single embedding of a text that a student could be compared with.
        ValueError: Some of its weights were made at random.

    Example:
        >>> teacher = EmbeddingTeacher("packaged:all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> teacher.embed(["which animal purrs"], "query").shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceTransformer,
        *,
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        check_options(batch_size=batch_size)
        source: Any = os.fspath(model) if isinstance(model, os.PathLike) else model
        loaded, self.name = load_model(source, trust_remote_code=trust_remote_code)
        if not isinstance(loaded, SentenceTransformer):
            raise TypeError(
                f"{self.name} is a {type(loaded).__name__}, whose embeddings no student can be compared with one by "
                "one: a SentenceTransformer has one vector per text. Its scores can teach: see SimilarityTeacher and "
                "CrossEncoderTeacher."
            )
        check_complete(loaded, "teacher")
        self.model, self.batch_size = loaded, batch_size
        known = identity(loaded)
        # Without the name: the same model teaches the same, wherever it was loaded from.
        self._identity = {
            "kind": "embedding",
            "weights": f"blake2b:{known['weights']}",
            "settings": f"blake2b:{known['settings']}",
            "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
            "similarity": str(loaded.similarity_fn_name),
        }
        self._state = model_state(loaded)

    def __repr__(self) -> str:
        return f"EmbeddingTeacher(model={self.name!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """Hashes of its weights and of its settings (prompts, lengths, modules), number type and similarity."""
        return dict(self._identity)

    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """Return the vectors of n texts, float32 `(n, D)`, as `encode_query` and `encode_document` make them.

        Raises:
            ValueError: The model is another one than at the beginning.
        """
        check_unchanged(self.model, self._state, "EmbeddingTeacher", "vectors")
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        found = encode(list(texts), batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True)
        vectors: np.ndarray = found.float().cpu().numpy()
        return vectors
