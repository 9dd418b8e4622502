"""Search with any retriever: dense, sparse, late interaction; exact, in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from st_wkl.data.embeddings import Encoder
from st_wkl.model_checks import check_complete
from st_wkl.models import load_model

# Documents in one file of the cache: what a killed run loses at most, and what is in memory at a time.
_SHARD = 16_384
# The same where each token has an embedding: 100 MB at 180 tokens of 128 dimensions.
_TOKEN_SHARD = 1_024
_QUERIES_AT_ONCE = 1024
# Scores that are in memory at a time: 256 MiB. Larger matrix products are faster, up to about here.
_SCORES_AT_ONCE = 64 * 1024 * 1024
_FIRST = 16_384
# Scores are looked at in groups: one maximum tells for most groups that nothing in them reaches the list.
_GROUP = 32


def retrieve(
    source: Any,
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    top_k: int,
    *,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
) -> tuple[str, Iterator[list[tuple[str, float]]]]:
    """Return the name of a retriever and for each query its best documents; see `retriever_candidates`.

    Raises:
        TypeError: The model is of another kind.
        ValueError: A similarity other than cosine and dot product, or an embedding that is not finite.
    """
    retriever, name = load_model(source, trust_remote_code=trust_remote_code)
    encoder = Encoder(retriever, document_prompt, batch_size, cache, revision)
    check_complete(retriever, "first stage")
    name, document_ids = f"{encoder.kind}:{name}", [key for key, text in documents.items() if text.strip()]
    texts = list(queries.values())
    if not texts or not document_ids:
        return name, iter([[] for _ in texts])
    blocks = [
        encoder.queries(texts[start : start + _QUERIES_AT_ONCE], query_prompt)
        for start in range(0, len(texts), _QUERIES_AT_ONCE)
    ]
    device = blocks[0][0].device
    best = [_Best(len(block), top_k, device) for block in blocks]
    size = _TOKEN_SHARD if encoder.kind == "multi-vector" else _SHARD
    with tqdm(total=len(document_ids), desc=name, unit=" documents", disable=not show_progress) as bar:
        for start in range(0, len(document_ids), size):
            shard = document_ids[start : start + size]
            vectors = encoder.documents([documents[document_id] for document_id in shard], shard)
            for block, found in zip(blocks, best, strict=True):
                if isinstance(vectors, list):  # a tensor of token vectors for each document
                    found.add(_late_interaction(retriever, block, [tokens.to(device) for tokens in vectors]), start)
                else:
                    found.add_products(block, vectors.to(device), start)  # type: ignore[arg-type]
            bar.update(len(shard))
    # A sparse retriever that shares no term gives 0; a document without any token that counts gets −∞.
    floor = 0.0 if encoder.kind == "sparse" else -math.inf
    rows = (row for found in best for row in found.lists(floor))
    return name, ([(document_ids[place], score) for place, score in row] for row in rows)


def exact_top_k(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k documents with the highest dot product for each query, in bounded memory.

    The product is made in blocks. A block's scores are compared with the k-th best score so far in groups, by their
    maximum; only what reaches the list is looked at. Beside the vectors this takes about 0.4 GB.

    Args:
        queries: `(Q, D)` float tensor.
        documents: `(N, D)` float tensor on the same device.
        k: Documents for a query; all if there are no more.

    Returns:
        Scores and places, both `(Q, min(k, N))`, best first, equal scores by place. Which of several documents with
        the k-th score is in the list is left open.

    Raises:
        ValueError: `k` is below 1 or the shapes do not fit.

    Example:
        >>> documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> scores, places = exact_top_k(torch.tensor([[2.0, 1.0]]), documents, 2)
        >>> scores.tolist(), places.tolist()
        ([[3.0, 2.0]], [[2, 0]])
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}.")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"Expected (Q, D) and (N, D), got {tuple(queries.shape)} and {tuple(documents.shape)}.")
    results = []
    for block in queries.split(_QUERIES_AT_ONCE):
        best = _Best(len(block), k, queries.device)
        best.add_products(block, documents, 0)
        results.append(best.sorted())
    if not results:
        empty = queries.new_zeros(0, min(k, len(documents)))
        return empty, empty.long()
    return torch.cat([scores for scores, _ in results]), torch.cat([places for _, places in results])


@torch.inference_mode()
def _late_interaction(model: Any, queries: Any, documents: list[Tensor]) -> Tensor:
    """Return the model's late-interaction scores `(Q, N)`, −∞ for documents without a token that counts."""
    # Neighbours of like length: the blocks that sentence-transformers pads are then nearly full.
    order = sorted((place for place in range(len(documents)) if len(documents[place])), key=lambda p: len(documents[p]))
    scores = torch.full((len(queries), len(documents)), -math.inf, device=queries[0].device)
    if order:
        found = model.similarity(queries, [documents[place] for place in order], chunk_elements=_SCORES_AT_ONCE)
        scores[:, torch.tensor(order, device=scores.device)] = found
    return scores


class _Best:
    """The k best documents so far of each of a block of queries."""

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.empty(queries, 0, device=device)
        self.places = torch.empty(queries, 0, dtype=torch.long, device=device)
        self.buffer: Tensor | None = None

    @torch.inference_mode()
    def add_products(self, queries: Tensor, documents: Tensor, offset: int) -> None:
        """Take the dot products of the queries `(Q, D)` with further documents `(N, D)`, dense or sparse CSR."""
        if documents.layout == torch.sparse_csr:
            # Sparse times dense is the product that every build of torch has.
            self.add((documents @ queries.T).T.contiguous(), offset)
            return
        size = max(_GROUP, _SCORES_AT_ONCE // max(len(queries), 1) // _GROUP * _GROUP)
        start = 0
        while start < len(documents):
            # A small first block: its k best give the bar that later blocks are measured with.
            length = min(size, _FIRST) if not self.scores.shape[1] else size
            block = documents[start : start + length]
            scores = self._buffer(len(queries), min(size, len(documents)), queries)[: len(queries) * len(block)]
            scores = scores.view(len(queries), len(block))
            torch.mm(queries, block.T, out=scores)
            self.add(scores, offset + start)
            start += len(block)

    def _buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        if self.buffer is None or self.buffer.numel() < rows * columns or self.buffer.dtype != like.dtype:
            self.buffer = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return self.buffer

    def add(self, scores: Tensor, offset: int) -> None:
        """Take the scores `(Q, N)` of the documents from place `offset` on."""
        rows, columns = scores.shape
        grouped = columns // _GROUP * _GROUP
        if self.scores.shape[1] < self.k or grouped < _GROUP:
            found, places = scores.topk(min(self.k, columns), dim=1, sorted=False)
            self._merge(found, places + offset)
            return
        if grouped < columns:  # the few that fill no group
            found, places = scores[:, grouped:].topk(min(self.k, columns - grouped), dim=1, sorted=False)
            self._merge(found, places + (offset + grouped))
        groups = scores[:, :grouped].reshape(rows, -1, _GROUP)
        bar = self.scores.amin(dim=1, keepdim=True)
        row, group = (groups.amax(dim=2) > bar).nonzero(as_tuple=True)
        values = groups.reshape(-1, _GROUP).index_select(0, row * groups.shape[1] + group)
        hit, inside = (values > bar[row]).nonzero(as_tuple=True)
        if not len(hit):
            return
        # Hits of a row stand beside each other: lay them out as a rectangle, padded with −∞.
        row, place = row[hit], group[hit] * _GROUP + inside + offset
        counts = torch.bincount(row, minlength=rows)
        column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        shape = rows, int(counts.max())
        found = scores.new_full(shape, -math.inf)
        places = torch.zeros(shape, dtype=torch.long, device=row.device)
        found[row, column] = values[hit, inside]
        places[row, column] = place
        self._merge(found, places)

    def _merge(self, scores: Tensor, places: Tensor) -> None:
        scores, places = torch.cat([self.scores, scores], dim=1), torch.cat([self.places, places], dim=1)
        self.scores, kept = scores.topk(min(self.k, scores.shape[1]), dim=1, sorted=False)
        self.places = places.gather(1, kept)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Return scores and places, best first, equal scores by place."""
        places, order = self.places.sort(dim=1)
        scores, order = self.scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        return scores, places.gather(1, order)

    def lists(self, floor: float) -> Iterator[list[tuple[int, float]]]:
        """Yield `(place, score)` of each query, best first, where the score is above `floor`."""
        scores, places = self.sorted()
        for row_scores, row_places in zip(scores.tolist(), places.tolist(), strict=True):
            pairs = zip(row_places, row_scores, strict=True)
            yield [(place, score) for place, score in pairs if score > floor]
