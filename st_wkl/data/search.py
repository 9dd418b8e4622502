"""Search with any retriever: dense, sparse, late interaction; exact, in bounded memory, embeddings kept on disk."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from torch import Tensor

from st_wkl.files import content_hash, replacing, set_aside
from st_wkl.model_checks import check_complete
from st_wkl.models import load_model, model_revision
from st_wkl.progress import progress

# Documents in one file of the cache: what a killed run loses at most, and what is in memory at a time.
_SHARD = 16_384
# The same where each token has an embedding: 100 MB at 180 tokens of 128 dimensions.
_TOKEN_SHARD = 1_024
_QUERIES_AT_ONCE = 1024
# Scores that are in memory at a time: 256 MiB. Larger matrix products are faster, up to about here.
_SCORES_AT_ONCE = 64 * 1024 * 1024
_KINDS: dict[Any, str] = {MultiVectorEncoder: "multi-vector", SparseEncoder: "sparse", SentenceTransformer: "dense"}
# Of a list of texts: one matrix, or for late interaction one (tokens, D) matrix for each text.
Embeddings = Tensor | list[Tensor]


def retrieve(
    source: Any, documents: Mapping[str, str], queries: Mapping[str, str], top_k: int, options: Mapping[str, Any]
) -> tuple[str, Iterator[list[tuple[str, float]]]]:
    """Return the name of a retriever and for each query its best documents; see `find_candidates` for the options."""
    retriever, name = load_model(source, trust_remote_code=options["trust_remote_code"])
    encoder = _Encoder(
        retriever, **{key: options[key] for key in ("document_prompt", "batch_size", "cache", "revision")}
    )
    check_complete(retriever, "first stage")
    name, document_ids = f"{encoder.kind}:{name}", [key for key, text in documents.items() if text.strip()]
    texts = list(queries.values())
    if not texts or not document_ids:
        return name, iter([[] for _ in texts])
    starts, prompt = range(0, len(texts), _QUERIES_AT_ONCE), options["query_prompt"]
    blocks = [encoder.queries(texts[start : start + _QUERIES_AT_ONCE], prompt) for start in starts]
    best = [_Best(len(block), top_k, block[0].device) for block in blocks]
    size = _TOKEN_SHARD if encoder.kind == "multi-vector" else _SHARD
    with progress(total=len(document_ids), desc=name, unit=" documents", disable=not options["show_progress"]) as bar:
        for start in range(0, len(document_ids), size):
            shard = document_ids[start : start + size]
            vectors = encoder.documents([documents[document_id] for document_id in shard], shard)
            for block, found in zip(blocks, best, strict=True):
                if isinstance(vectors, list):  # a tensor of token vectors for each document
                    found.add(_late_interaction(retriever, block, vectors), start)
                else:
                    found.add_products(block, vectors.to(block[0].device), start)  # type: ignore[arg-type]
            bar.update(len(shard))
    # A sparse retriever that shares no term gives 0; a document without any token that counts gets −∞.
    floor = 0.0 if encoder.kind == "sparse" else -math.inf
    rows = (zip(*row, strict=True) for found in best for row in zip(*map(Tensor.tolist, found.sorted()), strict=True))
    return name, ([(document_ids[place], score) for score, place in row if score > floor] for row in rows)


def exact_top_k(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k documents with the highest dot product for each query; beside the vectors this takes about 0.5 GB.

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
    return torch.cat([scores for scores, _ in results]), torch.cat([places for _, places in results])


class _Best:
    """The k best documents so far of each of a block of queries."""

    # Not `sentence_transformers.util.semantic_search`: it takes all vectors at once, 65 GB for a million documents, and
    # 1.7 times as long (500 queries over 100,000 × 384 on two cores; examples/benchmark_mining.py).

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self.k, self.scores = k, torch.empty(queries, 0, device=device)
        self.places = torch.empty(queries, 0, dtype=torch.long, device=device)

    @torch.inference_mode()
    def add_products(self, queries: Tensor, documents: Tensor, offset: int) -> None:
        """Take the dot products of the queries `(Q, D)` with further documents `(N, D)`, dense or sparse CSR."""
        if documents.layout == torch.sparse_csr:
            # Sparse times dense is the product that every build of torch has.
            self.add((documents @ queries.T).T.contiguous(), offset)
            return
        size = max(1, _SCORES_AT_ONCE // max(len(queries), 1))
        for start in range(0, len(documents), size):
            self.add(queries @ documents[start : start + size].T, offset + start)

    def add(self, scores: Tensor, offset: int) -> None:
        """Take the scores `(Q, N)` of the documents from place `offset` on."""
        found, places = scores.topk(min(self.k, scores.shape[1]), dim=1, sorted=False)
        found, places = torch.cat([self.scores, found], dim=1), torch.cat([self.places, places + offset], dim=1)
        self.scores, kept = found.topk(min(self.k, found.shape[1]), dim=1, sorted=False)
        self.places = places.gather(1, kept)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Return scores and places, best first, equal scores by place."""
        places, order = self.places.sort(dim=1)
        scores, order = self.scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        return scores, places.gather(1, order)


@torch.inference_mode()
def _late_interaction(model: Any, queries: Any, documents: list[Tensor]) -> Tensor:
    """Return the model's late-interaction scores `(Q, N)`, −∞ for documents without a token that counts."""
    # Neighbours of like length: the blocks that sentence-transformers pads are then nearly full.
    order = sorted((place for place in range(len(documents)) if len(documents[place])), key=lambda p: len(documents[p]))
    scores = torch.full((len(queries), len(documents)), -math.inf, device=queries[0].device)
    if order:
        vectors = [documents[place].to(scores.device) for place in order]
        found = model.similarity(queries, vectors, chunk_elements=_SCORES_AT_ONCE)
        scores[:, torch.tensor(order, device=scores.device)] = found
    return scores


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
        kinds = [kind for cls, kind in _KINDS.items() if isinstance(model, cls)]
        if not kinds:
            raise TypeError(
                f"Expected a SentenceTransformer, a SparseEncoder or a MultiVectorEncoder, got {type(model).__name__}. "
                "Write what another retriever finds as a TREC run and read it with read_run."
            )
        self.model, self.kind = model, kinds[0]
        similarity = str(model.similarity_fn_name)
        if self.kind != "multi-vector" and similarity not in ("cosine", "dot"):
            raise ValueError(f"The model's similarity is {similarity!r}; exact search has 'cosine' and 'dot'.")
        self.batch_size, self.document_prompt, self.normalize = batch_size, document_prompt, similarity == "cosine"
        self.folder: Path | None = None
        if cache is not None:
            key = {
                "weights": revision or model_revision(model),
                "length": model.max_seq_length,
                "prompt": document_prompt,
                "normalized": self.normalize,
                "dtype": str(next((p.dtype for p in self.model.parameters()), None)),
            }
            self.folder = Path(cache).expanduser() / content_hash(key, size=16)

    def queries(self, texts: Sequence[str], prompt: str | None) -> Any:
        """Return float32 embeddings on the model's device, sparse ones as dense tensors."""
        embeddings = self._embed(self.model.encode_query, texts, prompt)
        return embeddings.to_dense() if self.kind == "sparse" else embeddings

    def documents(self, texts: Sequence[str], document_ids: Sequence[str]) -> Embeddings:
        """Return float32 embeddings, sparse ones in CSR layout, or stop at the document of one that is not finite."""
        path = None
        if self.folder is not None:
            digest = blake2b(digest_size=16)
            for data in map(str.encode, texts):
                digest.update(len(data).to_bytes(8, "little") + data)
            path = self.folder / f"{digest.hexdigest()}.safetensors"
        embeddings = _read(path) if path is not None and path.is_file() else None
        if embeddings is None:
            embeddings = self._embed(self.model.encode_document, texts, self.document_prompt)
            if (wrong := _first_not_finite(embeddings)) is not None:
                raise ValueError(
                    f"The embedding of document {document_ids[wrong]!r} holds NaN or infinity. Check model and dtype."
                )
            if path is not None:
                _write(path, embeddings)
        if self.kind != "sparse":
            return embeddings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return embeddings.to_sparse_csr()

    def _embed(self, encode: Any, texts: Sequence[str], prompt: str | None) -> Any:
        options = {"prompt": prompt, "batch_size": self.batch_size, "show_progress_bar": False}
        if self.kind == "multi-vector":
            return [tokens.float() for tokens in encode(list(texts), **options)]
        embeddings = encode(list(texts), convert_to_tensor=True, **options)
        if self.kind == "dense":
            embeddings = embeddings.float()
            return torch.nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings
        embeddings = embeddings.coalesce().float()
        if not self.normalize:
            return embeddings
        norms = (embeddings * embeddings).sum(dim=1).to_dense().sqrt().clamp_min(1e-12)
        values = embeddings.values() / norms[embeddings.indices()[0]]
        return torch.sparse_coo_tensor(embeddings.indices(), values, embeddings.shape, is_coalesced=True)


def _first_not_finite(embeddings: Any) -> int | None:
    if isinstance(embeddings, list):
        return next((place for place, tokens in enumerate(embeddings) if not tokens.isfinite().all()), None)
    if embeddings.is_sparse:
        wrong = embeddings.indices()[0][~embeddings.values().isfinite()]
    else:
        wrong = (~embeddings.isfinite().all(dim=1)).nonzero()[:, 0]
    return int(wrong[0]) if len(wrong) else None


def _write(path: Path, embeddings: Any) -> None:
    if isinstance(embeddings, list):
        lengths = torch.tensor([len(tokens) for tokens in embeddings])
        tensors = {"tokens": torch.cat(embeddings), "lengths": lengths}
    elif embeddings.is_sparse:
        shape = torch.tensor(embeddings.shape)
        tensors = {"indices": embeddings.indices(), "values": embeddings.values(), "shape": shape}
    else:
        tensors = {"embeddings": embeddings}
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def _read(path: Path) -> Any:
    """Return the embeddings of a file, `None` if it is damaged; it is set aside then."""
    try:
        tensors = load_file(path)
        if "embeddings" in tensors:
            return tensors["embeddings"]
        if "tokens" in tensors:
            return list(tensors["tokens"].split(tensors["lengths"].tolist()))
        options: Any = {"is_coalesced": True, "check_invariants": True}  # no index is read from others' memory
        return torch.sparse_coo_tensor(tensors["indices"], tensors["values"], tensors["shape"].tolist(), **options)
    except (SafetensorError, KeyError, RuntimeError) as error:
        kept = set_aside(path)
        warnings.warn(
            f"The embeddings in {path} are damaged ({error}). The file is now {kept.name}; they are computed again.",
            stacklevel=2,
        )
        return None
