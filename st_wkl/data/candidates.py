"""Which documents are candidates: one question for every stage, whatever finds them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from st_wkl.data.bm25 import BM25
from st_wkl.data.runs import Candidate, Candidates, read_run, reciprocal_rank_fusion
from st_wkl.packaged import named
from st_wkl.ranges import check_options

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection

__all__ = ["BM25", "Candidate", "Candidates", "Source", "bm25_candidates", "find_candidates", "retriever_candidates"]

# What finds candidates, or found them: see `find_candidates`. A model is any retriever of sentence-transformers.
Source: TypeAlias = "str | os.PathLike[str] | BM25 | Mapping[str, Any] | Any"
_RUN_FILES = (".trec", ".run", ".txt", ".tsv", ".gz")


def find_candidates(
    collection: Collection,
    query_ids: Iterable[str] | None = None,
    sources: Source | Sequence[Source] = "bm25",
    *,
    top_k: int = 100,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    revision: str | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
) -> Candidates:
    """Find the best documents of each query with one or more first stages, fused by rank if there are several.

    A document that shares no word (BM25) or term (sparse) with the query is no candidate, nor is an empty one, nor the
    query's own where the collection leaves it out; so a list may be shorter than `top_k`, or empty. Retrievers search
    exactly and without an index, in pieces of 16,384 documents (1,024 where each token has an embedding), so that
    memory does not grow with their number.

    Args:
        collection: Where to search.
        query_ids: Queries to search for, by default all of the collection.
        sources: One or a list of `"bm25"`, `"bm25:k1=0.9,b=0.4"` or a `BM25`; a run file of TREC; a retriever: a
            `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`, its folder, Hub id or `packaged:` name;
            `Candidates` or a run, `{query_id: {document_id: score}}`.
        top_k: Candidates of a query at most, of each source and of the fused list.
        cache: Folder for a retriever's document embeddings, a file for a piece; `None` keeps none. Files are named by a
            hash of weights, settings, length, prompt and texts, so a trained model never meets embeddings of its former
            self. Late interaction takes 90 kB for a document of 180 tokens and 128 dimensions.
        batch_size: Texts that a retriever encodes at once.
        query_prompt: Text before each query in place of a retriever's own prompt.
        document_prompt: Text before each document in place of a retriever's own prompt.
        revision: Name of a retriever's weights where they cannot be hashed, as with the ONNX backend; for the cache.
        show_progress: Show bars.
        trust_remote_code: Run code of a retriever's repository. Only for repositories that you have read.

    Returns:
        Candidates with a key for each query asked for. The source is the name of the `BM25`, `"dense:<name>"`,
        `"sparse:<name>"`, `"multi-vector:<name>"`, a run file's tag, or `"rrf"`, whose `origins` are what each source
        said of the document.

    Raises:
        FileNotFoundError, TypeError: A run file does not exist, or a model is none of these.
        ValueError: Unknown query ids, a run of another collection, an embedding that is not finite, an option out of
            range. All that can be known is known before the first search.

    Example:
        >>> from st_wkl import Collection
        >>> collection = Collection("mine", {"d1": "Cats purr.", "d2": "Dogs bark."}, {"q1": "does a cat purr"})
        >>> found = find_candidates(collection, sources=["bm25", {"q1": {"d2": 0.9}}], show_progress=False)
        >>> [(hit.document_id, [origin.source for origin in hit.origins]) for hit in found["q1"]]
        [('d1', ['bm25']), ('d2', ['run'])]
    """
    check_options(top_k=top_k, batch_size=batch_size)
    given = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not given:
        raise ValueError("There is no source of candidates: give one or more, such as 'bm25'.")
    if revision is not None and len(given) > 1:
        raise ValueError(f"revision={revision!r} names the weights of one model: give one source, not {len(given)}.")
    queries = _asked(collection, query_ids)
    # What is wrong with the last source is said before the first one searches.
    known = [_resolved(source, collection, queries, top_k) for source in given]
    options = {"document_prompt": document_prompt, "batch_size": batch_size, "cache": cache, "revision": revision}
    options |= {"query_prompt": query_prompt, "trust_remote_code": trust_remote_code, "show_progress": show_progress}
    lists = [_search(source, collection, queries, top_k, options) for source in known]
    return lists[0] if len(lists) == 1 else reciprocal_rank_fusion(*lists, top_k=top_k)


def retriever_candidates(
    collection: Collection, model: Source, query_ids: Iterable[str] | None = None, **options: Any
) -> Candidates:
    """Find candidates with one retriever: `find_candidates(collection, query_ids, model, **options)`."""
    return find_candidates(collection, query_ids, model, **options)


def bm25_candidates(
    collection: Collection,
    query_ids: Iterable[str] | None = None,
    *,
    k1: float = 1.5,
    b: float = 0.75,
    language: str | None = "english",
    **options: Any,
) -> Candidates:
    """Find candidates with BM25: `find_candidates(collection, query_ids, BM25(k1, b, language), **options)`."""
    return find_candidates(collection, query_ids, BM25(k1, b, language), **options)


def _asked(collection: Collection, query_ids: Iterable[str] | None) -> dict[str, str]:
    asked = list(collection.queries if query_ids is None else query_ids)
    if unknown := [query_id for query_id in asked if query_id not in collection.queries]:
        raise ValueError(f"{len(unknown)} query ids are not in {collection.name!r}, the first is {unknown[0]!r}.")
    return {query_id: collection.queries[query_id] for query_id in asked}


def _resolved(source: Source, collection: Collection, queries: Mapping[str, str], top_k: int) -> Any:
    """Return a source as `Candidates` if it has found them already, as `BM25`, or as what `load_model` takes."""
    if isinstance(source, str | os.PathLike):
        if bm25 := BM25.of(source):
            return bm25
        where = named(os.fspath(source))[0]
        if not Path(where).is_file():
            if where.lower().endswith(_RUN_FILES) and not Path(where).exists():
                raise FileNotFoundError(f"The run file {where} does not exist.")
            return os.fspath(source)
        found = read_run(where, collection, top_k=top_k)
    elif isinstance(source, Mapping):
        found, where = _as_candidates(source), "The candidates given"
        check_candidates(found, queries, collection)
    else:
        return source
    missing = [query_id for query_id in queries if not found.get(query_id)]
    if queries and len(missing) == len(queries):
        raise ValueError(
            f"{where}: there is no candidate for any of the {len(queries):,} queries of {collection.name!r} that are "
            f"asked for, the first of which is {missing[0]!r}. Is it the run of another collection or split?"
        )
    if missing:
        warnings.warn(
            f"{where}: there is no candidate for {len(missing):,} of {len(queries):,} queries; the first is "
            f"{missing[0]!r}.",
            stacklevel=3,
        )
    return Candidates({query_id: list(found.get(query_id, ()))[:top_k] for query_id in queries})


def _as_candidates(run: Mapping[str, Any]) -> Candidates:
    """Return `{query_id: {document_id: score}}` as candidates, which equal scores leave in the order given."""
    found = Candidates()
    for query_id, hits in run.items():
        if isinstance(hits, Mapping):
            if wrong := [key for key, score in hits.items() if not math.isfinite(score)]:
                raise ValueError(f"Query {query_id!r}, document {wrong[0]!r}: the score is {hits[wrong[0]]!r}.")
            ranked = enumerate(sorted(hits, key=lambda key: -hits[key]), 1)
            hits = [Candidate(key, float(hits[key]), rank, "run") for rank, key in ranked]
        found[query_id] = list(hits)
    return found


def check_candidates(
    candidates: Mapping[str, Sequence[Candidate]], query_ids: Iterable[str], collection: Collection
) -> None:
    """Stop at candidates that a collection does not hold.

    Raises:
        ValueError: With their number and the first of them.
    """
    absent = [
        (query_id, hit.document_id)
        for query_id in query_ids
        for hit in candidates.get(query_id, ())
        if hit.document_id not in collection.documents
    ]
    if absent:
        raise ValueError(
            f"{len(absent):,} candidates are not in {collection.name!r}: the first is document {absent[0][1]!r} of "
            f"query {absent[0][0]!r}. Use candidates that were mined from this collection."
        )


def _search(
    source: Any, collection: Collection, queries: Mapping[str, str], top_k: int, options: dict[str, Any]
) -> Candidates:
    """Search with a `BM25` or a retriever, one document deeper where the query's own is left out afterwards."""
    if isinstance(source, Candidates):
        return source
    out = collection.leaves_out_own
    if isinstance(source, BM25):
        shown = {"where": collection.name, "show_progress": options["show_progress"]}
        name, lists = source.search(collection.documents, queries, top_k + out, **shown)
    else:
        from st_wkl.data.search import retrieve  # torch, which a BM25 does without

        name, lists = retrieve(source, collection.documents, queries, top_k + out, options)
    found = Candidates()
    for query_id, hits in zip(queries, lists, strict=True):
        ranked = enumerate([hit for hit in hits if not (out and hit[0] == query_id)][:top_k], 1)
        found[query_id] = [Candidate(key, score, rank, name) for rank, (key, score) in ranked]
    return found
