"""Collective labels: retrievers as their own teachers, their queries expanded by the best documents of a list."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sklearn.cluster import KMeans

from st_wkl.data.teacher import Lists
from st_wkl.model_checks import check_complete
from st_wkl.models import identity as model_identity
from st_wkl.progress import progress

# Lists whose documents are embedded together: token embeddings of a whole collection would not fit into memory.
_LISTS_AT_ONCE = 256
_TEXTS_AT_ONCE = 1024
_EMPTY = np.empty(0, dtype=np.float32)


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
        _check(weight, feedback_documents=feedback_documents, batch_size=batch_size)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        check_complete(model, "teacher")
        self.model, self.feedback_documents, self.weight = model, feedback_documents, weight
        self.temperature, self.batch_size = temperature, batch_size

    def __repr__(self) -> str:
        return f"FeedbackTeacher(feedback_documents={self.feedback_documents}, weight={self.weight})"

    @property
    def identity(self) -> dict[str, Any]:
        """The retriever's name and weights, length, prompts, similarity, and the feedback's settings."""
        length = self.model.max_seq_length
        return _identity(
            "feedback",
            self.model,
            max_length=int(length) if length is not None and np.isfinite(length) else None,
            feedback_documents=self.feedback_documents,
            weight=self.weight,
            temperature=self.temperature,
        )

    def score_lists(self, lists: Lists, *, show_progress: bool = True) -> list[np.ndarray]:
        """Return the scores of each list's documents.

        Raises:
            ValueError: A score is not finite; the message names the query.
        """
        queries = self._embedded((query for query, _ in lists), show_progress, is_query=True)
        documents = self._embedded((text for _, texts in lists for text in texts), show_progress, is_query=False)
        return [
            _finite(query, self._scored(queries[query], np.stack([documents[text] for text in texts])))
            if texts
            else _EMPTY
            for query, texts in lists
        ]

    def _scored(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        plain = self._similarity(query, documents)
        best, shares = np.argsort(-plain, kind="stable")[: self.feedback_documents], None
        if self.temperature is not None:
            shares = torch.softmax(torch.from_numpy(plain[best]) / self.temperature, dim=0).numpy()
        return self._similarity(rocchio(query, documents[best], weight=self.weight, shares=shares), documents)

    def _embedded(self, texts: Iterable[str], show_progress: bool, *, is_query: bool) -> dict[str, np.ndarray]:
        if not (texts := list(dict.fromkeys(texts))):
            return {}
        encode = self.model.encode_query if is_query else self.model.encode_document
        vectors = encode(texts, batch_size=self.batch_size, show_progress_bar=show_progress, convert_to_numpy=True)
        return dict(zip(texts, np.asarray(vectors, dtype=np.float32), strict=True))

    def _similarity(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        scores = self.model.similarity(torch.from_numpy(query)[None], torch.from_numpy(documents))
        return np.asarray(scores[0].float(), dtype=np.float32)


def centroid_expansion(
    tokens: np.ndarray,
    token_ids: np.ndarray,
    idf: Mapping[int, float],
    *,
    clusters: int = 24,
    expansions: int = 10,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Find what the feedback documents are about: the centroids of their tokens that stand for rare words.

    Args:
        tokens: Embeddings of all tokens of the feedback documents, shape (T, D).
        token_ids: Their ids in the vocabulary, shape (T,).
        idf: Inverse document frequency of token ids; ids that are missing count 0.
        clusters: Of k-means; fewer where there are fewer different tokens.
        expansions: How many centroids are kept, those with the highest idf.
        seed: Of k-means.

    Returns:
        Centroids, float32 of shape (E, D), and the idf of the token nearest to each, float32 of shape (E,), highest
        first.

    Example:
        >>> tokens = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> vectors, weights = centroid_expansion(tokens, np.array([7, 7, 9]), {7: 0.1, 9: 2.0}, expansions=1)
        >>> vectors.tolist(), weights.tolist()
        ([[0.0, 1.0]], [2.0])
    """
    _check(0.0, clusters=clusters, expansions=expansions)
    if not len(tokens):
        return np.empty((0, tokens.shape[1]), dtype=np.float32), _EMPTY
    tokens = np.asarray(tokens, dtype=np.float32)
    clusters = min(clusters, len(np.unique(tokens, axis=0)))
    centroids = KMeans(clusters, n_init=1, random_state=seed).fit(tokens).cluster_centers_.astype(np.float32)
    distances = (centroids**2).sum(1)[:, None] - 2 * centroids @ tokens.T + (tokens**2).sum(1)[None]
    nearest = np.asarray(token_ids)[distances.argmin(axis=1)]
    weights = np.array([idf.get(int(token_id), 0.0) for token_id in nearest], dtype=np.float32)
    best = np.argsort(-weights, kind="stable")[:expansions]
    return centroids[best], weights[best]


class TokenFeedbackTeacher:
    """A late-interaction retriever that teaches itself: it sees the query expanded by its best documents' tokens.

    Collective knowledge distillation with the model that it was published for. The tokens of a list's best documents
    are clustered, and the centroids that stand for the rarest tokens join the query with their idf as weight. The
    published recipe goes on with `Selection(label_correction="raise_positives")` in the builder and a listwise KL with
    `teacher_temperature=0.25`.

    A score depends on the other candidates, so this is a teacher of lists, and its scores are not kept in a store.

    Args:
        model: The retriever, as it is now. Its weights become part of the identity.
        documents: Texts whose tokens' document frequencies give the idf, best the whole collection.
        feedback_documents: How many of a list's documents, the best by the plain query, give feedback.
        clusters: Of k-means over their tokens.
        expansions: How many centroids join the query.
        weight: β, of the expansion beside the query; 0 gives back the plain scores.
        seed: Of k-means.
        batch_size: Texts in one forward pass.

    Raises:
        TypeError: The model has no token embeddings.
        ValueError: A number does not fit, or there is no document.

    Source:
        CollectiveKD, NAACL 2022, https://arxiv.org/abs/2205.03273, and its published code, on ColBERT-PRF's expansion
        (https://arxiv.org/abs/2106.11251). Differences: feedback comes from the candidate list, not from the whole
        collection, and a centroid's token is the nearest one of the feedback documents.

    Example:
        >>> student = MultiVectorEncoder("colbert-ir/colbertv2.0")  # doctest: +SKIP
        >>> teacher = TokenFeedbackTeacher(student, collection.documents.values())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        documents: Iterable[str],
        *,
        feedback_documents: int = 3,
        clusters: int = 24,
        expansions: int = 10,
        weight: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        if not isinstance(model, MultiVectorEncoder):
            raise TypeError(f"A {type(model).__name__} has no token embeddings; FeedbackTeacher serves single ones.")
        numbers = {"feedback_documents": feedback_documents, "clusters": clusters, "expansions": expansions}
        _check(weight, **numbers, batch_size=batch_size)
        check_complete(model, "teacher")
        self.model, self.weight, self.seed, self.batch_size = model, weight, seed, batch_size
        self.feedback_documents, self.clusters, self.expansions = feedback_documents, clusters, expansions
        self.idf = _document_frequencies(model, documents)

    def __repr__(self) -> str:
        return f"TokenFeedbackTeacher(feedback_documents={self.feedback_documents}, weight={self.weight})"

    @property
    def identity(self) -> dict[str, Any]:
        """The retriever's name and weights, prompts, similarity, the feedback's settings, and a hash of the idf."""
        digest = hashlib.blake2b(repr(sorted(self.idf.items())).encode(), digest_size=16).hexdigest()
        return _identity(
            "token feedback",
            self.model,
            feedback_documents=self.feedback_documents,
            clusters=self.clusters,
            expansions=self.expansions,
            weight=self.weight,
            seed=self.seed,
            idf=f"blake2b:{digest}",
        )

    def score_lists(self, lists: Lists, *, show_progress: bool = True) -> list[np.ndarray]:
        """Return the scores of each list's documents.

        Raises:
            ValueError: A score is not finite; the message names the query.
        """
        found = []
        with progress(total=len(lists), desc="Feedback", unit=" lists", disable=not show_progress) as bar:
            for start in range(0, len(lists), _LISTS_AT_ONCE):
                part = lists[start : start + _LISTS_AT_ONCE]
                queries = self._embedded(dict.fromkeys(query for query, _ in part), is_query=True)
                documents = self._embedded(dict.fromkeys(text for _, texts in part for text in texts), is_query=False)
                for query, texts in part:
                    scores = self._scored(queries[query][0], [documents[text] for text in texts]) if texts else _EMPTY
                    found.append(_finite(query, scores))
                    bar.update()
        return found

    def _scored(self, query: np.ndarray, documents: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        tokens = [vectors for vectors, _ in documents]
        plain = _maxsim(query, tokens).sum(axis=0)
        best = np.argsort(-plain, kind="stable")[: self.feedback_documents]
        extra, idf = centroid_expansion(
            np.concatenate([documents[place][0] for place in best]),
            np.concatenate([documents[place][1] for place in best]),
            self.idf,
            clusters=self.clusters,
            expansions=self.expansions,
            seed=self.seed,
        )
        scores = plain + self.weight * (idf @ _maxsim(extra, tokens))
        if self.model.similarity_fn_name == "meanmaxsim":
            scores = scores / max(len(query), 1)
        return scores.astype(np.float32)

    def _embedded(self, texts: Iterable[str], *, is_query: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return embeddings and ids of the tokens of each text that count."""
        texts = list(texts)
        encode: Any = self.model.encode_query if is_query else self.model.encode_document
        found = encode(texts, batch_size=self.batch_size, show_progress_bar=False, output_value=None) if texts else []
        result = {}
        for text, features in zip(texts, found, strict=True):
            counts = features["attention_mask"].bool()
            vectors = features["token_embeddings"][counts].float().cpu().numpy()
            result[text] = vectors, features["input_ids"][counts].cpu().numpy()
        return result


def _check(weight: float, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}.")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a finite number of at least 0, got {weight}.")


def _identity(kind: str, model: SentenceTransformer | MultiVectorEncoder, **settings: Any) -> dict[str, Any]:
    """Return what decides a retriever's similarities, and the settings of its feedback."""
    known = model_identity(model)
    return {
        "kind": kind,
        "model": model.model_card_data.base_model or type(model).__name__,
        "revision": f"blake2b:{known['weights']}",
        "settings": f"blake2b:{known['settings']}",
        "prompts": dict(sorted((model.prompts or {}).items())),
        "similarity": str(model.similarity_fn_name),
        **settings,
    }


def _finite(query: str, scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise ValueError(f"The retriever gives scores that are not finite for the query {query[:80]!r}.")
    return scores


def _maxsim(query: np.ndarray, documents: list[np.ndarray]) -> np.ndarray:
    """Return the best match of each query token in each document, (query tokens, documents)."""
    starts = np.cumsum([0, *(len(tokens) for tokens in documents)])[:-1]
    return np.maximum.reduceat(query @ np.concatenate(documents).T, starts, axis=1)


def _document_frequencies(model: MultiVectorEncoder, documents: Iterable[str]) -> dict[int, float]:
    """Return ln((N + 1) / (n + 1)) of each token id that stands in n of N documents."""
    texts = list(dict.fromkeys(documents))
    if not texts:
        raise ValueError("The idf needs documents: give the texts of the collection.")
    counts: Counter[int] = Counter()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        features = model.preprocess(texts[start : start + _TEXTS_AT_ONCE], task="document")
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
            counts.update(set(ids[mask.bool()].tolist()))
    return {token_id: math.log((len(texts) + 1) / (count + 1)) for token_id, count in counts.items()}
