"""What a model costs, beside what it scores: the reason for distilling.

Importing this module imports torch, which takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from st_wkl.models import AnyModel

# A sparse or multi-vector index depends on the texts; this many documents, evenly spaced, stand for the collection.
_SAMPLE = 512
# An inverted index keeps a 32-bit document number and a 32-bit weight for each entry.
_BYTES_PER_ENTRY = 8


def measure_efficiency(
    model: AnyModel,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    batch_size: int = 32,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure speed and size of a model on the texts of a collection.

    Speeds are the median of `repeats` timed batches after one that is not counted. They hold for this machine, as busy
    as it is; compare models that were measured side by side.

    Args:
        model: One of the four model classes.
        queries: Texts of queries.
        documents: Texts of all documents; their number decides the size of the index.
        batch_size: Texts per forward pass.
        repeats: Timed batches.

    Returns:
        `parameters`, `active_parameters` (without embedding tables, which are looked up and not computed), `device` and
        `threads`, and for a retriever `queries_per_second`, `documents_per_second`, `dimension`, and `index_bytes`: the
        bytes of all vectors without compression, for a sparse model 8 for each non-zero weight. The last is exact for a
        dense model and else scaled up from 512 documents. For a cross-encoder `pairs_per_second`.

    Raises:
        ValueError: If there are no texts, or `repeats` or `batch_size` is below 1.

    Example:
        >>> measure_efficiency(model, ["a query"], ["a document"])["index_bytes"]  # doctest: +SKIP
    """
    if not queries or not documents:
        raise ValueError("speed and size are measured on texts; give at least one query and one document")
    if batch_size < 1 or repeats < 1:
        raise ValueError(f"batch_size is {batch_size} and repeats is {repeats}; both must be at least 1")
    found: dict[str, Any] = {
        **parameter_counts(model),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }
    plain: Any = model
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}

    def speed(encode: Callable[[list[Any]], Any], texts: Sequence[Any]) -> float:
        batches = [[texts[(i * batch_size + j) % len(texts)] for j in range(batch_size)] for i in range(repeats)]
        return round(batch_size / median(_seconds(encode, batches)), 2)

    if type(model).__name__ == "CrossEncoder":
        pairs = [(queries[i % len(queries)], document) for i, document in enumerate(_spread(documents))]
        found["pairs_per_second"] = speed(lambda batch: plain.predict(batch, **options), pairs)
        return found
    sample = _spread(documents)
    found["queries_per_second"] = speed(lambda batch: plain.encode_query(batch, **options), queries)
    found["documents_per_second"] = speed(lambda batch: plain.encode_document(batch, **options), sample)
    is_dense = type(model).__name__ == "SentenceTransformer"
    if type(model).__name__ != "MultiVectorEncoder":  # its vectors differ in number, and so are a list in any case
        options["convert_to_tensor"] = True
    vectors = plain.encode_document(sample[:1] if is_dense else sample, **options)
    size, dimension = _size(vectors)
    measured = 1 if is_dense else len(sample)
    return {**found, "dimension": dimension, "index_bytes": round(size * len(documents) / measured)}


def parameter_counts(model: Any) -> dict[str, int]:
    """Return the number of all parameters, and of those that are computed with: all but the embedding tables.

    Args:
        model: Any torch module.
    """
    total = sum(weight.numel() for weight in model.parameters())
    tables = {
        id(weight): weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for weight in module.parameters()
    }
    return {"parameters": total, "active_parameters": total - sum(tables.values())}


def _spread(texts: Sequence[str]) -> list[str]:
    """Return up to 512 texts, evenly spaced."""
    step = max(1, len(texts) // _SAMPLE)
    return list(texts[::step][:_SAMPLE])


def _seconds(encode: Callable[[list[Any]], Any], batches: Sequence[list[Any]]) -> list[float]:
    """Return the seconds of each batch, after one round of the first that warms up."""
    encode(batches[0])
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        encode(batch)
        seconds.append(max(time.perf_counter() - start, 1e-9))
    return seconds


def _size(vectors: Any) -> tuple[int, int]:
    """Return bytes and dimension of embeddings: a dense or sparse matrix, or a list of one matrix per document."""
    if isinstance(vectors, torch.Tensor) and vectors.layout != torch.strided:
        entries = vectors.to_sparse_coo().coalesce().values().numel()
        return entries * _BYTES_PER_ENTRY, vectors.shape[-1]
    matrices = [vectors] if isinstance(vectors, torch.Tensor) else list(vectors)
    size = sum(matrix.numel() * matrix.element_size() for matrix in map(torch.as_tensor, matrices))
    return size, matrices[0].shape[-1]
