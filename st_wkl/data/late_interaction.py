"""Exact search with late-interaction retrievers, whose documents are too large to keep: a vector for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import maxsim

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from st_wkl.data.dense import BestDocuments

# Documents whose token vectors are in memory at a time: about 100 MB at 200 tokens of 128 numbers.
_SHARD = 1_024


def search(
    model: MultiVectorEncoder,
    queries: Sequence[str],
    documents: Sequence[str],
    document_ids: Sequence[str],
    best: BestDocuments,
    *,
    query_prompt: str | None,
    document_prompt: str | None,
    batch_size: int,
    advance: Callable[[int], Any],
) -> Iterator[list[tuple[int, float]]]:
    """Yield `(place of the document, score)` of each query, best first, by the model's own MaxSim or mean MaxSim.

    Documents are embedded, scored and forgotten; every query meets every document.

    Raises:
        ValueError: An embedding is not finite; the message names the document.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
    asked = list(model.encode_query(list(queries), prompt=query_prompt, **options))
    mean = str(model.similarity_fn_name) == "meanmaxsim"
    for start in range(0, len(documents), _SHARD):
        texts = list(documents[start : start + _SHARD])
        vectors = list(model.encode_document(texts, prompt=document_prompt, **options))
        for place, tokens in enumerate(vectors):
            if not bool(tokens.isfinite().all()):
                wrong = document_ids[start + place]
                raise ValueError(f"The embedding of document {wrong!r} holds NaN or infinity. Check model and dtype.")
        with torch.inference_mode():
            best.add(maxsim(asked, vectors, length_normalize=mean), start)
        advance(len(texts))
    yield from best.lists(positive_only=False)
