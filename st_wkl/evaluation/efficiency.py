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
    model: AnyModel, queries: Sequence[str], documents: Sequence[str], *, batch_size: int = 32, repeats: int = 5
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
    plain: Any = model
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}

    def speed(encode: Callable[..., Any], texts: Sequence[Any]) -> float:
        batches = [[texts[(i * batch_size + j) % len(texts)] for j in range(batch_size)] for i in range(repeats)]
        encode(batches[0], **options)  # warms up
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            encode(batch, **options)
            seconds.append(max(time.perf_counter() - start, 1e-9))
        return round(batch_size / median(seconds), 2)

    found = {**parameter_counts(model), "device": str(model.device), "threads": torch.get_num_threads()}
    found["batch_size"] = batch_size
    sample = list(documents[:: max(1, len(documents) // _SAMPLE)][:_SAMPLE])
    kind = type(model).__name__
    if kind == "CrossEncoder":
        pairs = [(queries[i % len(queries)], document) for i, document in enumerate(sample)]
        return {**found, "pairs_per_second": speed(plain.predict, pairs)}
    found["queries_per_second"] = speed(plain.encode_query, queries)
    found["documents_per_second"] = speed(plain.encode_document, sample)
    measured = sample[:1] if kind == "SentenceTransformer" else sample
    if kind != "MultiVectorEncoder":  # its vectors differ in number, and so are a list in any case
        options["convert_to_tensor"] = True
    vectors = plain.encode_document(measured, **options)
    if isinstance(vectors, torch.Tensor) and vectors.layout != torch.strided:
        size, dimension = vectors.to_sparse_coo().coalesce().values().numel() * _BYTES_PER_ENTRY, vectors.shape[-1]
    else:  # a matrix, or one for each document
        matrices = list(map(torch.as_tensor, [vectors] if isinstance(vectors, torch.Tensor) else vectors))
        size, dimension = sum(m.numel() * m.element_size() for m in matrices), matrices[0].shape[-1]
    return {**found, "dimension": dimension, "index_bytes": round(size * len(documents) / len(measured))}


def parameter_counts(model: Any) -> dict[str, int]:
    """Return the number of all parameters of a torch module, and of those that are computed with, not looked up."""
    total = sum(weight.numel() for weight in model.parameters())
    tables = {
        id(weight): weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for weight in module.parameters()
    }
    return {"parameters": total, "active_parameters": total - sum(tables.values())}
