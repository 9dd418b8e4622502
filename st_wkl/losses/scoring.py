"""From features to the `(B, N)` scores of a student, for each of the four model classes of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.util import (
    SimilarityFunction,
    maxsim,
    maxsim_pairwise,
    mean_maxsim,
    mean_maxsim_pairwise,
    similarity_fct_name,
)
from torch import Tensor, nn

from st_wkl.losses.lists import CandidateLists

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

    Student = SentenceTransformer | SparseEncoder | MultiVectorEncoder | CrossEncoder

Similarity = Callable[..., Tensor]
# What one row of a student's output is: an embedding, a matrix of token embeddings, or the score of a pair of texts.
Output = Literal["embedding", "tokens", "score"]

# Where a score can only lie in [-1, 1], dividing by 1 leaves a softmax nearly flat: with 32 candidates its largest
# probability is at most 0.19. In practice 0.02 to 0.05 works; above 0.2 little of the teacher can be expressed.
BOUNDED = ("pairwise_cos_sim", "mean_maxsim_pairwise", "cos_sim", "mean_maxsim")
BOUNDED_TEMPERATURE = 0.05
LARGEST_SENSIBLE_BOUNDED_TEMPERATURE = 0.2


def student_output(model: Student) -> Output:
    """Tell what the model computes for one row of a batch."""
    if isinstance(model, CrossEncoder):
        return "score"
    return "tokens" if isinstance(model, MultiVectorEncoder) else "embedding"


def model_similarity(model: Student, pairwise: bool = True) -> Similarity | None:
    """Return the similarity that the model itself ranks with; None where its output is a score.

    Args:
        model: The student.
        pairwise: Row by row, or all rows with all.
    """
    if isinstance(model, CrossEncoder):
        return None
    name = str(model.similarity_fn_name)
    if isinstance(model, MultiVectorEncoder):
        kinds = (mean_maxsim, mean_maxsim_pairwise) if name == "meanmaxsim" else (maxsim, maxsim_pairwise)
        return kinds[pairwise]
    return (SimilarityFunction.to_similarity_pairwise_fn if pairwise else SimilarityFunction.to_similarity_fn)(name)


def is_bounded(similarity_fct: Similarity | None) -> bool:
    """Tell whether scores of this similarity lie in [-1, 1]."""
    return similarity_fct is not None and similarity_fct_name(similarity_fct) in BOUNDED


def embed(model: nn.Module, features: dict[str, Any], output: Output) -> Tensor:
    """Run a batch of features through the student, which may be wrapped for distributed training.

    Returns:
        `(rows, D)` embeddings; `(rows, T, D + 1)` token embeddings whose last channel is 1 for tokens that count, so
        that embeddings and mask stay together through caching and sorting; or `(rows, 1)` scores.
    """
    if output == "score":
        return model(features)["scores"].view(-1, 1)
    if output == "embedding":
        return model(features)["sentence_embedding"]
    out = model(features, task=features.get("task"))
    tokens = out["token_embeddings"]
    return torch.cat([tokens, out["attention_mask"].unsqueeze(-1).to(tokens.dtype)], dim=-1)


def concatenate(chunks: list[Tensor]) -> Tensor:
    """Concatenate outputs along the rows, padding token axes of different length with tokens that do not count."""
    if chunks[0].ndim == 3:
        longest = max(chunk.shape[1] for chunk in chunks)
        chunks = [F.pad(chunk, (0, 0, 0, longest - chunk.shape[1])) for chunk in chunks]
    return torch.cat(chunks)


def compare(query: Tensor, documents: Tensor, similarity_fct: Similarity) -> Tensor:
    """Apply a similarity to what `embed` gave."""
    if query.ndim == 2:
        return similarity_fct(query, documents)
    masks = {"a_mask": query[..., -1].bool(), "b_mask": documents[..., -1].bool()}
    return similarity_fct(query[..., :-1], documents[..., :-1], **masks)


def score_lists(embeddings: list[Tensor], lists: CandidateLists, similarity_fct: Similarity | None) -> Tensor:
    """Score the candidates of each row.

    Args:
        embeddings: What `embed` gave for the queries, then for the documents, in one tensor or one per column; for a
            cross-encoder the scores of all pairs alone.
        lists: Which document stands where.
        similarity_fct: Pairwise similarity; None where the embeddings are scores already.

    Returns:
        `(B, N)` scores, 0 at masked places.
    """
    mask, wanted = lists.mask, lists.index
    if similarity_fct is None:
        return torch.where(mask, embeddings[0].view(-1)[wanted], 0.0)
    query, documents = embeddings[0], concatenate(embeddings[1:])
    if query.ndim == 3 and lists.identity is not None:
        # Late interaction pays for every pair: of ragged lists it computes those that there are, at the price of
        # waiting for the device to count them.
        rows, _ = places = mask.nonzero(as_tuple=True)
        values = compare(query[rows], documents[wanted[places]], similarity_fct)
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).index_put(places, values)
    # Another document of the list stands in where there is none, so that nothing hangs on what is left out.
    wanted = torch.where(mask, wanted, wanted.gather(1, mask.int().argmax(dim=1, keepdim=True)))
    values = compare(query.repeat_interleave(mask.shape[1], dim=0), documents[wanted.flatten()], similarity_fct)
    return torch.where(mask, values.view(mask.shape), 0.0)


def pair_features(
    model: CrossEncoder, columns: list[list[Any]], prompt: str | None, task: str | None
) -> dict[str, Any]:
    """Tokenize the pairs of a cross-encoder's batch, list by list or column by column.

    Args:
        model: The cross-encoder, or its distributed wrapper, to which the trainer lends `preprocess`.
        columns: Queries and one list of documents per query, or queries and one column of documents per candidate.
        prompt: Prompt of the dataset, from the collator.
        task: Task of the dataset, from the collator.
    """
    queries, *candidates = columns
    if isinstance(candidates[0][0], str):
        pairs = [(query, text) for column in candidates for query, text in zip(queries, column, strict=True)]
    else:
        pairs = [(query, text) for query, texts in zip(queries, candidates[0], strict=True) for text in texts]
    return model.preprocess(pairs, prompt=prompt, task=task)
