"""From embeddings to `(B, N)` student scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sentence_transformers.util import SimilarityFunction, similarity_fct_name
from torch import Tensor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PairwiseSimilarity = Callable[[Tensor, Tensor], Tensor]

# Where a score can only lie in [-1, 1], dividing by 1 leaves a softmax nearly flat: with 32 candidates its largest
# probability is at most 0.19. In practice 0.02 to 0.05 works; above 0.2 little of the teacher can be expressed.
BOUNDED = ("pairwise_cos_sim",)
BOUNDED_TEMPERATURE = 0.05
LARGEST_SENSIBLE_BOUNDED_TEMPERATURE = 0.2


def model_similarity(model: SentenceTransformer) -> PairwiseSimilarity:
    """Return the pairwise form of the similarity that the model itself ranks with."""
    return SimilarityFunction.to_similarity_pairwise_fn(model.similarity_fn_name)


def is_bounded(similarity_fct: PairwiseSimilarity) -> bool:
    """Tell whether scores of this similarity lie in [-1, 1]."""
    return similarity_fct_name(similarity_fct) in BOUNDED


def score_lists(query: Tensor, documents: Tensor, similarity_fct: PairwiseSimilarity) -> Tensor:
    """Score each query's own candidates.

    Args:
        query: `(B, D)` query embeddings.
        documents: `(B, N, D)` embeddings of the candidates.
        similarity_fct: Pairwise similarity, `(M, D), (M, D) -> (M,)`.

    Returns:
        `(B, N)` scores.
    """
    batch, candidates, _ = documents.shape
    queries = query.unsqueeze(1).expand(-1, candidates, -1)
    return similarity_fct(queries.reshape(batch * candidates, -1), documents.flatten(0, 1)).view(batch, candidates)
