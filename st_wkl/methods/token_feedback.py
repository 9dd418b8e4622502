"""The late-interaction retriever as its own teacher: its query expanded by what its best documents have in common."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from st_wkl.data.lists import Lists
from st_wkl.model_checks import check_complete
from st_wkl.models import identity as model_identity

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from st_wkl.data.score_store import ScoreStore

# Lists whose documents are embedded together: token embeddings of a whole collection would not fit into memory.
_LISTS_AT_ONCE = 256
_TEXTS_AT_ONCE = 1024


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
    from sklearn.cluster import KMeans

    if clusters < 1 or expansions < 1:
        raise ValueError(f"clusters and expansions must be positive, got {clusters} and {expansions}.")
    if not len(tokens):
        return np.empty((0, tokens.shape[1]), dtype=np.float32), np.empty(0, dtype=np.float32)
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
        from sentence_transformers import MultiVectorEncoder

        if not isinstance(model, MultiVectorEncoder):
            raise TypeError(f"A {type(model).__name__} has no token embeddings; FeedbackTeacher serves single ones.")
        numbers = {"feedback_documents": feedback_documents, "clusters": clusters, "expansions": expansions}
        for name, value in {**numbers, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number of at least 0, got {weight}.")
        check_complete(model, "teacher")
        self.model, self.weight, self.seed, self.batch_size = model, weight, seed, batch_size
        self.feedback_documents, self.clusters, self.expansions = feedback_documents, clusters, expansions
        self.idf = _document_frequencies(model, documents)

    @property
    def identity(self) -> dict[str, Any]:
        """The retriever's name and weights, prompts, similarity, the feedback's settings, and a hash of the idf."""
        digest = hashlib.blake2b(repr(sorted(self.idf.items())).encode(), digest_size=16).hexdigest()
        known = model_identity(self.model)
        return {
            "kind": "token feedback",
            "model": self.model.model_card_data.base_model or type(self.model).__name__,
            "revision": f"blake2b:{known['weights']}",
            "settings": f"blake2b:{known['settings']}",
            "prompts": dict(sorted((self.model.prompts or {}).items())),
            "similarity": str(self.model.similarity_fn_name),
            "feedback_documents": self.feedback_documents,
            "clusters": self.clusters,
            "expansions": self.expansions,
            "weight": self.weight,
            "seed": self.seed,
            "idf": f"blake2b:{digest}",
        }

    def score_lists(
        self, lists: Lists, *, store: ScoreStore | None = None, show_progress: bool = True, **options: Any
    ) -> list[np.ndarray]:
        """Return the scores of each list's documents; `store` and `options` are for other teachers.

        Raises:
            ValueError: A score is not finite; the message names the query.
        """
        from tqdm.auto import tqdm

        found = []
        with tqdm(total=len(lists), desc="Feedback", unit=" lists", disable=not show_progress) as bar:
            for start in range(0, len(lists), _LISTS_AT_ONCE):
                part = lists[start : start + _LISTS_AT_ONCE]
                queries = self._embedded(dict.fromkeys(query for query, _ in part), is_query=True)
                documents = self._embedded(dict.fromkeys(text for _, texts in part for text in texts), is_query=False)
                for query, texts in part:
                    scores = self._scored(queries[query][0], [documents[text] for text in texts])
                    if not np.isfinite(scores).all():
                        raise ValueError(
                            f"The retriever gives scores that are not finite for the query {query[:80]!r}."
                        )
                    found.append(scores)
                    bar.update()
        return found

    def _scored(self, query: np.ndarray, documents: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        if not documents:
            return np.empty(0, dtype=np.float32)
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
