"""Candidates: the documents that a first stage finds for each query, best first."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from st_wkl.data.selection import own_result
from st_wkl.ranges import check_options
from st_wkl.text import unspaced, unspaced_characters, words

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection


class Candidate(NamedTuple):
    """One document that a first stage found for a query.

    Attributes:
        document_id: Id in the collection.
        score: The first stage's score; scores of different sources do not compare.
        rank: Place in the list, from 1.
        source: Which first stage found it, e.g. `"bm25"`.
        origins: What the lists said that a fused candidate comes from, see `reciprocal_rank_fusion`.
    """

    document_id: str
    score: float
    rank: int
    source: str
    origins: tuple[Candidate, ...] = ()


Candidates = dict[str, list[Candidate]]


# Numba's compilation takes some seconds of every process; numpy has searched as many documents for thousands of queries
# by then, with the same scores.
COMPILE_ABOVE = 10_000


@dataclass(frozen=True)
class BM25:
    """BM25 with its parameters, for `evaluate` as a model of its own or as the first stage of a reranker.

    | parameters | what they are | Cranfield | NFCorpus | SciFact | InsuranceQA |
    | --- | --- | --- | --- | --- | --- |
    | `BM25()` | bm25s and MTEB's `mteb/baseline-bm25s` | .428 | .326 | .688 | .299 |
    | `BM25(k1=0.9, b=0.4)` | `k1` and `b` of Anserini and of the BEIR paper | .403 | .320 | .680 | .291 |
    | `BM25(k1=0.9, b=0.4, language=None)` | the same on words as they stand | .376 | .305 | .662 | .293 |

    The numbers are nDCG@10 on the test queries. A student that beats one of them need not beat another: say which one
    you compare with, as the name in the results does.

    Words are those of `st_wkl.text.words`: marks stay inside, and where a script has no spaces each pair of characters
    is a word. Over a collection with such documents the name ends in `-bigrams`.

    Args:
        k1: Saturation of the term frequency.
        b: Weight of the document's length, between 0 and 1.
        language: Language of the Snowball stemmer and of the stop words; None for neither. Another one than the default
            says that the texts have words, so that no pairs of characters are made.

    Raises:
        ValueError: If a parameter is out of range; an unknown language is found out when it is used.

    Example:
        >>> from st_wkl.evaluation import evaluate
        >>> evaluate(BM25(k1=0.9, b=0.4, language=None), "data/scifact")  # doctest: +SKIP
    """

    k1: float = 1.5
    b: float = 0.75
    language: str | None = "english"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(k1=self.k1, b=self.b)

    @property
    def name(self) -> str:
        """`"bm25"`, and what differs from the defaults."""
        parts = [
            f"{key}-{'none' if value is None else value}"
            for key, value in vars(self).items()
            if value != getattr(BM25, key)
        ]
        return "-".join(["bm25", *parts])

    @property
    def bigrams(self) -> bool:
        """Whether pairs of characters are made where a script has no spaces."""
        return self.language in (None, BM25.language)

    def name_over(self, documents: Iterable[str]) -> str:
        """Return the name, and whether pairs of characters are made of any of the documents."""
        return f"{self.name}-bigrams" if self.bigrams and any(map(unspaced, documents)) else self.name

    @classmethod
    def of(cls, source: Any) -> BM25 | None:
        """Return the BM25 that `source` means, None if it means something else.

        Args:
            source: A `BM25`, `"bm25"`, or text with parameters such as `"bm25:k1=0.9,b=0.4,language=none"`.

        Raises:
            ValueError: If the text names another parameter, or a value that is none.

        Example:
            >>> BM25.of("bm25:k1=0.9,b=0.4,language=none")
            BM25(k1=0.9, b=0.4, language=None)
        """
        if isinstance(source, cls):
            return source
        if not isinstance(source, str) or source.partition(":")[0].lower() != "bm25":
            return None
        values: dict[str, Any] = {}
        try:
            for item in filter(None, source.partition(":")[2].split(",")):
                key, _, value = item.partition("=")
                values[key] = (None if value == "none" else value) if key == "language" else float(value)
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source!r}: write it as bm25:k1=0.9,b=0.4,language=none ({error})") from error


def bm25_candidates(
    collection: Collection,
    query_ids: Iterable[str] | None = None,
    *,
    top_k: int = 100,
    k1: float = 1.5,
    b: float = 0.75,
    language: str | None = "english",
    show_progress: bool = True,
) -> Candidates:
    """Find the best documents of each query with BM25 (bm25s, Lucene's formula, on all cores).

    Words are lower-cased, stemmed and freed of stop words; words of one character are kept ("vitamin d"). Documents
    that share no word with the query are no candidates, so a list may be shorter than `top_k`, or empty.

    Args:
        collection: Where to search.
        query_ids: Queries to search for, by default all of the collection.
        top_k: Number of candidates of a query at most.
        k1: Saturation of the term frequency; `BM25` says which parameters give which published baseline.
        b: Weight of the document's length, between 0 and 1.
        language: Language of the Snowball stemmer and of the stop words; `None` for neither; see `BM25`.
        show_progress: Show bars.

    Returns:
        `{query_id: candidates, best first}` with a key for each query asked for.

    Raises:
        ValueError: An unknown query id or language, or `top_k` below 1.

    References:
        Lù: BM25S: Orders of magnitude faster lexical search via eager sparse scoring. arXiv:2407.03618.

    Example:
        >>> from st_wkl.data.collection import Collection
        >>> collection = Collection("mine", {"d1": "Cats purr.", "d2": "Dogs bark."}, {"q1": "does a cat purr"})
        >>> [candidate.document_id for candidate in bm25_candidates(collection, show_progress=False)["q1"]]
        ['d1']
    """
    bm25 = BM25(k1, b, language)
    check_options(top_k=top_k)
    queries = list(collection.queries) if query_ids is None else list(query_ids)
    if unknown := [query_id for query_id in queries if query_id not in collection.queries]:
        raise ValueError(f"{len(unknown)} query ids are not in {collection.name!r}, the first is {unknown[0]!r}.")
    name, tokenizer = bm25.name_over(collection.documents.values()), _tokenizer(bm25)
    # A text without a word gets no token at all: bm25s' own way, an empty token, makes a query of unknown words match
    # every empty document.
    options: dict[str, Any] = {"return_as": "ids", "allow_empty": False, "show_progress": show_progress}
    documents = tokenizer.tokenize(collection.documents.values(), update_vocab=True, **options)
    vocabulary = tokenizer.get_vocab_dict()
    candidates: Candidates = {query_id: [] for query_id in queries}
    if not vocabulary:
        warnings.warn(f"BM25 finds no word in any document of {collection.name!r}.", stacklevel=2)
        return candidates
    texts = [collection.queries[query_id] for query_id in queries]
    if wordless := [query_id for query_id, text in zip(queries, texts, strict=True) if not words(text)]:
        warnings.warn(
            f"BM25 finds no word in {len(wordless):,} of {len(queries):,} queries of {collection.name!r}, and so no "
            f"candidate; the first is {wordless[0]!r}.",
            stacklevel=2,
        )
    if name != bm25.name:
        tokenizer.splitter = _with_single_characters(vocabulary)
    tokens = tokenizer.tokenize(texts, update_vocab=False, **options)
    searchable = [(query_id, known) for query_id, known in zip(queries, tokens, strict=True) if known]
    document_ids = list(collection.documents)
    found = _search(
        documents,
        vocabulary,
        [known for _, known in searchable],
        top_k + collection.leaves_out_own,
        k1,
        b,
        show_progress,
    )
    for (query_id, _), (places, scores) in zip(searchable, found, strict=True):
        # Asked for k documents, bm25s returns k, those without any word of the query with a score of 0.
        own = own_result(query_id, collection.leaves_out_own)
        hits = [place for place in np.lexsort((places, -scores)) if scores[place] > 0]
        order = [place for place in hits if document_ids[places[place]] not in own][:top_k]
        candidates[query_id] = [
            Candidate(document_ids[places[place]], float(scores[place]), rank, name)
            for rank, place in enumerate(order, 1)
        ]
    return candidates


def _with_single_characters(vocabulary: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the words of a query over pairs of characters: one without neighbours stands for all pairs with it."""
    pairs: dict[str, list[str]] = defaultdict(list)
    for word in vocabulary:
        characters = unspaced_characters(word)
        for character in set(characters) if len(characters) == 2 else ():
            pairs[character].append(word)
    return lambda text: [part for word in words(text) for part in (word, *pairs.get(word, ()))]


def _bm25s() -> Any:
    """Import bm25s, and take back that it turns its debugging on, which shows wherever logging is configured."""
    log = logging.getLogger("bm25s")
    level = log.level
    import bm25s.tokenization

    log.setLevel(level)
    return bm25s


def _tokenizer(bm25: BM25) -> Any:
    import Stemmer

    make = _bm25s().tokenization.Tokenizer
    language, pattern = bm25.language, partial(words, bigrams=bm25.bigrams)
    if language is None:
        return make(splitter=pattern, stopwords=None, stemmer=None)
    if language not in Stemmer.algorithms():
        raise ValueError(f"language must be None or one of {', '.join(Stemmer.algorithms())}; got {language!r}.")
    stemmer = Stemmer.Stemmer(language)
    try:
        return make(splitter=pattern, stopwords=language, stemmer=stemmer)
    except ValueError:  # a language with a stemmer but without a list of stop words
        return make(splitter=pattern, stopwords=None, stemmer=stemmer)


def _search(
    documents: list[list[int]],
    vocabulary: dict[str, int],
    queries: list[list[int]],
    top_k: int,
    k1: float,
    b: float,
    show_progress: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield document places and scores of each query, both of shape (min(top_k, documents),)."""
    if not queries:
        return
    bm25s = _bm25s()
    compiled = len(documents) > COMPILE_ABOVE
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numba" if compiled else "numpy")
    index.index((documents, vocabulary), create_empty_token=False, show_progress=show_progress)
    top_k = min(top_k, len(documents))  # bm25s refuses more

    def retrieve(chunk: list[list[int]]) -> Any:
        # With one thread numba takes its kernel that frees the interpreter lock: threads of our own then use all
        # cores, move the bar, and spare the much slower compilation of the parallel kernel.
        return index.retrieve(chunk, k=top_k, n_threads=int(compiled), show_progress=False)

    chunks = [queries[start : start + 64] for start in range(0, len(queries), 64)]
    with (
        tqdm(total=len(queries), desc="BM25", unit=" queries", disable=not show_progress) as bar,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        for results in pool.map(retrieve, chunks):
            yield from zip(results.documents, results.scores, strict=True)
            bar.update(len(results.documents))
