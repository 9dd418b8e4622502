"""Retrievers as teachers by their similarity: bi-encoders, sparse encoders, late interaction (ColBERT)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from st_wkl.data.teacher import Pair, TextPairs
from st_wkl.model_checks import check_complete
from st_wkl.models import check_unchanged, identity, load_model, model_state
from st_wkl.ranges import check_options

_REMEMBERED = 1_000_000_000  # bytes of embeddings: a text stands in many chunks, which are sorted by length


class SimilarityTeacher:
    """A retriever as a teacher of pairs: how similar it finds query and document, each embedded with its own prompt.

    A strong bi-encoder or ColBERT teaches a small one without a cross-encoder. Scores are raw similarities, on the
    scale of the model: cosines lie within -1 and 1, and a ColBERT's sum grows with the query's tokens. The dataset's
    report suggests a teacher temperature, which is far below 1 for cosines.

    Args:
        model: A `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`, or a folder, Hub id or `packaged:` name
            of one.
        batch_size: Texts in one forward pass.
        trust_remote_code: Run code of the model's repository. Only for repositories that you have read.

    Raises:
        TypeError: The model is a cross-encoder, which `CrossEncoderTeacher` asks.
        ValueError: Some of its weights were made at random.

    Example:
        >>> teacher = SimilarityTeacher("packaged:all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> teacher.score([("a cat", "cats purr"), ("a cat", "stock prices")])  # doctest: +SKIP
        array([0.72, 0.03], dtype=float32)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceTransformer | SparseEncoder | MultiVectorEncoder,
        *,
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        check_options(batch_size=batch_size)
        self._made_from = model, {"batch_size": batch_size, "trust_remote_code": trust_remote_code}
        source: Any = os.fspath(model) if isinstance(model, os.PathLike) else model
        loaded, name = load_model(source, trust_remote_code=trust_remote_code)
        if isinstance(loaded, CrossEncoder):
            raise TypeError(f"{name} is a cross-encoder, which has no similarity: give it to CrossEncoderTeacher.")
        check_complete(loaded, "teacher")
        self.model: Any = loaded
        self.batch_size = batch_size
        known = identity(loaded)
        self._identity = {
            "kind": "similarity",
            "model": name,
            "revision": f"blake2b:{known['weights']}",
            "settings": f"blake2b:{known['settings']}",
            "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
            "similarity": str(loaded.similarity_fn_name),
        }
        self._state = model_state(loaded)
        self._known: dict[tuple[str, str], torch.Tensor] = {}
        self._bytes = 0

    def __repr__(self) -> str:
        return f"SimilarityTeacher(model={self._identity['model']!r}, similarity={self._identity['similarity']!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """Model, hashes of its weights and of its settings (prompts, lengths, modules), number type and similarity."""
        return dict(self._identity)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker as what it was made from."""
        return {"made_from": self._made_from, "identity": self._identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, options = state["made_from"]
        self.__init__(model, **options)  # type: ignore[misc]
        if self._identity != state["identity"]:
            raise ValueError(f"The worker loaded {self._identity}, but the teacher is {state['identity']}.")

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the similarities of n pairs, float32 of shape (n,).

        Raises:
            ValueError: The model is another one than at the beginning.
        """
        check_unchanged(self.model, self._state, "SimilarityTeacher", "scores")
        if self._bytes > _REMEMBERED:
            self._known, self._bytes = {}, 0
        asked = TextPairs.of(pairs)
        rows, columns = asked.places()
        queries = self._embedded("query", asked.queries, rows)
        documents = self._embedded("document", asked.documents, columns)
        found: np.ndarray = self.model.similarity_pairwise(queries, documents).float().numpy()
        return found

    def _embedded(self, side: str, texts: Sequence[str], places: np.ndarray) -> Any:
        used = [texts[place] for place in places.tolist()]
        new = [text for text in dict.fromkeys(used) if (side, text) not in self._known]
        many = isinstance(self.model, MultiVectorEncoder)
        options: dict[str, Any] = {} if many else {"convert_to_tensor": True}
        options |= {"convert_to_sparse_tensor": False} if isinstance(self.model, SparseEncoder) else {}
        if new:
            encode = self.model.encode_query if side == "query" else self.model.encode_document
            for text, vector in zip(
                new, encode(new, batch_size=self.batch_size, show_progress_bar=False, **options), strict=True
            ):
                self._known[side, text] = torch.as_tensor(vector).cpu()
                self._bytes += self._known[side, text].nbytes
        found = [self._known[side, text] for text in used]
        return found if many or not found else torch.stack(found)
