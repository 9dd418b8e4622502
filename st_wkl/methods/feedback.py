"""The retriever as its own teacher: its query moved towards the documents that it found (pseudo-relevance feedback)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from st_wkl.data.lists import Lists, split
from st_wkl.model_checks import check_complete
from st_wkl.models import identity as model_identity

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from st_wkl.data.score_store import ScoreStore


def rocchio(
    query: np.ndarray, feedback: np.ndarray, *, weight: float = 1.0, shares: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """Move a query's embedding towards the mean of its feedback documents' embeddings.

    Args:
        query: Embedding, shape (D,).
        feedback: Embeddings of the feedback documents, shape (K, D).
        weight: Of the mean beside the query, whose own weight is 1.
        shares: Share of each feedback document in the mean, not negative; `None` weighs all alike.

    Returns:
        float32 of shape (D,). For cosine similarity its length does not matter.

    Raises:
        ValueError: Shapes do not fit, or the shares sum to 0.

    Example:
        >>> rocchio(np.array([1.0, 0.0]), np.array([[0.0, 1.0], [0.0, 3.0]]), weight=0.5)
        array([1., 1.], dtype=float32)
    """
    if feedback.ndim != 2 or query.shape != feedback.shape[1:]:
        raise ValueError(f"A query of shape {query.shape} and feedback of shape {feedback.shape} do not fit.")
    if not len(feedback):
        return query.astype(np.float32)
    if shares is not None and (len(shares) != len(feedback) or min(shares) < 0 or not sum(shares) > 0):
        raise ValueError(f"{len(feedback)} feedback documents need as many shares that are not all 0, got {shares}.")
    return (query + weight * np.average(feedback, axis=0, weights=shares)).astype(np.float32)


class FeedbackTeacher:
    """A dense retriever that teaches itself: it sees the query expanded by the best documents of its list.

    Collective knowledge distillation (CollectiveKD, arXiv 2205.03273, there with the token vectors of ColBERT) in the
    form that single vectors allow, Rocchio feedback: the query's embedding plus a weighted mean of its feedback
    documents' embeddings. The student must find from the query alone what the teacher finds with that help.

    A score depends on the other candidates, so this is a teacher of lists, and its scores are not kept in a store:
    embedding the texts again takes seconds. Scores are the model's own similarities. With cosine they lie between -1
    and 1: take a low teacher temperature.

    Args:
        model: The retriever, as it is now. Its weights become part of the identity.
        feedback_documents: How many of a list's documents, the most similar to the plain query, give feedback.
        weight: Of their mean beside the query; 0 gives back the plain similarities.
        temperature: Feedback documents share the mean by the softmax of their similarity over `temperature`; `None`
            weighs them alike.
        batch_size: Texts in one forward pass.

    Raises:
        ValueError: A number does not fit.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> FeedbackTeacher(student).score_lists([("cat", ["A cat.", "A kitten.", "A dog."])])  # doctest: +SKIP
        [array([0.93, 0.87, 0.68], dtype=float32)]
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        feedback_documents: int = 3,
        weight: float = 1.0,
        temperature: float | None = None,
        batch_size: int = 32,
    ) -> None:
        if feedback_documents < 1 or batch_size < 1:
            raise ValueError(
                f"feedback_documents and batch_size must be positive, got {feedback_documents}, {batch_size}."
            )
        if not 0 <= weight < float("inf") or (temperature is not None and not temperature > 0):
            raise ValueError(f"weight must be 0 or more and temperature positive, got {weight}, {temperature}.")
        check_complete(model, "teacher")
        self.model, self.feedback_documents, self.weight = model, feedback_documents, weight
        self.temperature, self.batch_size = temperature, batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """The retriever's name and weights, length, prompts, similarity, and the feedback's settings."""
        length, known = self.model.max_seq_length, model_identity(self.model)
        return {
            "kind": "feedback",
            "model": self.model.model_card_data.base_model or type(self.model).__name__,
            "revision": f"blake2b:{known['weights']}",
            "settings": f"blake2b:{known['settings']}",
            "max_length": int(length) if length is not None and np.isfinite(length) else None,
            "prompts": dict(sorted((self.model.prompts or {}).items())),
            "similarity": str(self.model.similarity_fn_name),
            "feedback_documents": self.feedback_documents,
            "weight": self.weight,
            "temperature": self.temperature,
        }

    def score_lists(
        self, lists: Lists, *, store: ScoreStore | None = None, show_progress: bool = True, **options: Any
    ) -> list[np.ndarray]:
        """Return the scores of each list's documents; `store` and `options` are for other teachers.

        Raises:
            ValueError: A score is not finite; the message names the query.
        """
        import torch

        if not any(documents for _, documents in lists):
            return split(np.empty(0, dtype=np.float32), lists)
        queries = self._embedded(list(dict.fromkeys(query for query, _ in lists)), show_progress, is_query=True)
        documents = self._embedded(
            list(dict.fromkeys(text for _, texts in lists for text in texts)), show_progress, is_query=False
        )
        found = []
        for query, texts in lists:
            if not texts:
                found.append(np.empty(0, dtype=np.float32))
                continue
            vectors = np.stack([documents[text] for text in texts])
            plain = self._similarity(queries[query], vectors)
            best = np.argsort(-plain, kind="stable")[: self.feedback_documents]
            shares = None
            if self.temperature is not None:
                shares = torch.softmax(torch.from_numpy(plain[best]) / self.temperature, dim=0).numpy()
            expanded = rocchio(queries[query], vectors[best], weight=self.weight, shares=shares)
            scores = self._similarity(expanded, vectors)
            if not np.isfinite(scores).all():
                raise ValueError(f"The retriever gives scores that are not finite for the query {query[:80]!r}.")
            found.append(scores)
        return found

    def _embedded(self, texts: list[str], show_progress: bool, *, is_query: bool) -> dict[str, np.ndarray]:
        encode = self.model.encode_query if is_query else self.model.encode_document
        vectors = encode(texts, batch_size=self.batch_size, show_progress_bar=show_progress, convert_to_numpy=True)
        return dict(zip(texts, np.asarray(vectors, dtype=np.float32), strict=True))

    def _similarity(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        import torch

        scores = self.model.similarity(torch.from_numpy(query)[None], torch.from_numpy(documents))
        return np.asarray(scores[0].float(), dtype=np.float32)
