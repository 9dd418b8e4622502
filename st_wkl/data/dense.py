"""Candidates of any sentence-transformers retriever, dense or sparse, by exact search in bounded memory."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from st_wkl._files import replacing, set_aside
from st_wkl.data import late_interaction
from st_wkl.data.candidates import Candidate, Candidates

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    from st_wkl.data.collection import Collection

# Documents in one file of the cache: what a killed run loses at most, and what is in memory at a time.
_SHARD = 16_384
_QUERIES_AT_ONCE = 1024
# Scores that are in memory at a time: 256 MiB. Larger matrix products are faster, up to about here.
_SCORES_AT_ONCE = 64 * 1024 * 1024
_FIRST = 16_384
# Scores are looked at in groups: one maximum tells for most groups that nothing in them reaches the list.
_GROUP = 32


def retriever_candidates(
    collection: Collection,
    model: SentenceTransformer | SparseEncoder | MultiVectorEncoder | str | os.PathLike[str],
    query_ids: Iterable[str] | None = None,
    *,
    top_k: int = 100,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    show_progress: bool = True,
) -> Candidates:
    """Find the best documents of each query with a dense, sparse or late-interaction retriever, exactly.

    Documents are embedded, searched and forgotten in pieces of 16,384, so that memory does not grow with their number
    (with `cache`, a piece is a file). Texts get the model's own prompts for queries and documents. Scores are the
    model's similarity: cosine, dot product, MaxSim or mean MaxSim.

    Args:
        collection: Where to search. Empty documents are no candidates.
        model: A `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`, or a folder or Hub id of one.
        query_ids: Queries to search for, by default all of the collection.
        top_k: Number of candidates of a query at most. A sparse retriever gives none without a common term.
        query_prompt: Text before each query in place of the model's own prompt.
        document_prompt: Text before each document in place of the model's own prompt.
        batch_size: Texts that are encoded at once.
        cache: Folder for document embeddings; `None` keeps none. Files are named by a hash of the weights, settings,
            length, prompt and texts, so a trained model never meets embeddings of its former self. Not for late
            interaction, whose token vectors would fill a disk.
        revision: Name of the weights where they cannot be hashed, as with the ONNX backend; for the cache.
        show_progress: Show bars.

    Returns:
        `{query_id: candidates, best first}` with the source `"dense:<name>"`, `"sparse:<name>"` or `"late:<name>"`.

    Raises:
        TypeError: The model is of another kind.
        ValueError: Unknown query ids, a similarity other than cosine and dot product, or an embedding that is not
            finite; the message names the document.

    Example:
        >>> candidates = retriever_candidates(collection, "intfloat/e5-small-v2", cache="embeddings")  # doctest: +SKIP
    """
    from sentence_transformers import MultiVectorEncoder

    from st_wkl.evaluation.identity import load_model

    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    queries = list(collection.queries) if query_ids is None else list(query_ids)
    if unknown := [query_id for query_id in queries if query_id not in collection.queries]:
        raise ValueError(f"{len(unknown)} query ids are not in {collection.name!r}, the first is {unknown[0]!r}.")
    retriever, name = load_model(model if not isinstance(model, os.PathLike) else Path(model))
    document_ids = [document_id for document_id, text in collection.documents.items() if text.strip()]
    if not queries or not document_ids:
        return {query_id: [] for query_id in queries}
    texts = [collection.queries[query_id] for query_id in queries]
    documents = [collection.documents[document_id] for document_id in document_ids]
    options: dict[str, Any] = {"document_prompt": document_prompt, "batch_size": batch_size}
    with tqdm(total=len(document_ids), desc=name, unit=" documents", disable=not show_progress) as bar:
        if isinstance(retriever, MultiVectorEncoder):
            if cache is not None:
                raise ValueError("The token vectors of a late-interaction model are not kept; leave cache out.")
            kind, best = "late", BestDocuments(len(queries), top_k, torch.device("cpu"))
            options |= {"best": best, "query_prompt": query_prompt, "advance": bar.update}
            lists = list(late_interaction.search(retriever, texts, documents, document_ids, **options))
        else:
            encoder = _Encoder(retriever, **options, cache=cache, revision=revision)
            kind = "sparse" if encoder.sparse else "dense"
            lists = list(_search(encoder, texts, query_prompt, documents, document_ids, top_k, bar.update))
    return {
        query_id: [
            Candidate(document_ids[place], score, rank, f"{kind}:{name}") for rank, (place, score) in enumerate(row, 1)
        ]
        for query_id, row in zip(queries, lists, strict=True)
    }


def _search(
    encoder: _Encoder,
    queries: Sequence[str],
    query_prompt: str | None,
    documents: Sequence[str],
    document_ids: Sequence[str],
    top_k: int,
    advance: Callable[[int], Any],
) -> Iterator[list[tuple[int, float]]]:
    blocks = [
        encoder.queries(queries[start : start + _QUERIES_AT_ONCE], query_prompt)
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    best = [BestDocuments(len(block), top_k, block.device) for block in blocks]
    for start in range(0, len(documents), _SHARD):
        shard = slice(start, start + _SHARD)
        embeddings = encoder.documents(documents[shard], document_ids[shard])
        for block, found in zip(blocks, best, strict=True):
            found.add_products(block, embeddings.to(block.device), start)
        advance(len(embeddings))
    for found in best:
        yield from found.lists(positive_only=encoder.sparse)


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
        best = BestDocuments(len(block), k, queries.device)
        best.add_products(block, documents, 0)
        results.append(best.sorted())
    if not results:
        empty = queries.new_zeros(0, min(k, len(documents)))
        return empty, empty.long()
    return torch.cat([scores for scores, _ in results]), torch.cat([places for _, places in results])


class BestDocuments:
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

    def lists(self, *, positive_only: bool) -> Iterator[list[tuple[int, float]]]:
        """Yield `(place, score)` of each query, best first."""
        scores, places = self.sorted()
        for row_scores, row_places in zip(scores.tolist(), places.tolist(), strict=True):
            pairs = zip(row_places, row_scores, strict=True)
            yield [(place, score) for place, score in pairs if score > 0 or not positive_only]


class _Encoder:
    """A retriever's embeddings, normalised if its similarity is cosine, documents from the cache if they are there."""

    def __init__(
        self,
        model: Any,
        document_prompt: str | None,
        batch_size: int,
        cache: str | os.PathLike[str] | None,
        revision: str | None,
    ) -> None:
        from sentence_transformers import SentenceTransformer, SparseEncoder

        if not isinstance(model, SentenceTransformer | SparseEncoder):
            raise TypeError(
                f"Expected a SentenceTransformer, SparseEncoder or MultiVectorEncoder, got {type(model).__name__}. "
                "Write what another retriever finds as a TREC run and read it with read_run."
            )
        self.sparse = isinstance(model, SparseEncoder)
        similarity = str(model.similarity_fn_name)
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"The model's similarity is {similarity!r}; exact search has 'cosine' and 'dot'.")
        self.model, self.batch_size, self.document_prompt = model, batch_size, document_prompt
        self.normalize = similarity == "cosine"
        self.folder: Path | None = None
        if cache is not None:
            from st_wkl.evaluation.identity import model_revision

            key = {
                "weights": revision or model_revision(model),
                "length": model.max_seq_length,
                "prompt": document_prompt,
                "normalized": self.normalize,
                "dtype": str(next((p.dtype for p in model.parameters()), None)),
            }
            digest = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
            self.folder = Path(cache) / digest

    def queries(self, texts: Sequence[str], prompt: str | None) -> Tensor:
        """Return dense float32 embeddings on the model's device."""
        embeddings = self._embed(self.model.encode_query, texts, prompt)
        return embeddings.to_dense() if self.sparse else embeddings

    def documents(self, texts: Sequence[str], document_ids: Sequence[str]) -> Tensor:
        """Return float32 embeddings, sparse ones in CSR layout."""
        path = self._path(texts)
        embeddings = _read(path) if path is not None and path.is_file() else None
        if embeddings is None:
            embeddings = self._embed(self.model.encode_document, texts, self.document_prompt)
            finite = (embeddings.to_dense() if self.sparse else embeddings).isfinite().all(dim=1)
            if not bool(finite.all()):
                wrong = document_ids[int((~finite).nonzero()[0])]
                raise ValueError(f"The embedding of document {wrong!r} holds NaN or infinity. Check model and dtype.")
            if path is not None:
                _write(path, embeddings)
        if not self.sparse:
            return embeddings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return embeddings.to_sparse_csr()

    def _embed(self, encode: Any, texts: Sequence[str], prompt: str | None) -> Tensor:
        embeddings = encode(
            list(texts), prompt=prompt, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        if self.sparse:
            embeddings = embeddings.coalesce().float()
            if not self.normalize:
                return embeddings
            norms = (embeddings * embeddings).sum(dim=1).to_dense().sqrt().clamp_min(1e-12)
            values = embeddings.values() / norms[embeddings.indices()[0]]
            return torch.sparse_coo_tensor(embeddings.indices(), values, embeddings.shape, is_coalesced=True)
        embeddings = embeddings.float()
        return torch.nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings

    def _path(self, texts: Sequence[str]) -> Path | None:
        if self.folder is None:
            return None
        digest = blake2b(digest_size=16)
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return self.folder / f"{digest.hexdigest()}.safetensors"


def _write(path: Path, embeddings: Tensor) -> None:
    from safetensors.torch import save_file

    embeddings = embeddings.cpu()
    if embeddings.is_sparse:
        tensors = {"indices": embeddings.indices().contiguous(), "values": embeddings.values().contiguous()}
        tensors["shape"] = torch.tensor(embeddings.shape)
    else:
        tensors = {"embeddings": embeddings.contiguous()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _read(path: Path) -> Tensor | None:
    """Return the embeddings of a file, `None` if it is damaged; it is set aside then."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        if "embeddings" in tensors:
            return tensors["embeddings"]
        shape = tensors["shape"].tolist()
        # Checked: an index out of range would be read from somebody else's memory.
        return torch.sparse_coo_tensor(
            tensors["indices"], tensors["values"], shape, is_coalesced=True, check_invariants=True
        )
    except (SafetensorError, KeyError, RuntimeError) as error:
        kept = set_aside(path)
        warnings.warn(
            f"The embeddings in {path} are damaged ({error}). The file is now {kept.name}; they are computed again.",
            stacklevel=2,
        )
        return None
