"""BM25: its parameters, its name, and the search, by bm25s; words are those of `st_wkl.text`."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from st_wkl.progress import progress
from st_wkl.ranges import check_options
from st_wkl.text import unspaced, unspaced_characters, words

# Numba's compilation takes some seconds of every process; numpy has searched as many documents for thousands of queries
# by then, with the same scores.
COMPILE_ABOVE = 10_000


# Documents from which bm25s' own bars stand long enough to be read.
_MANY = 50_000


@dataclass(frozen=True)
class BM25:
    """BM25 with its parameters: a source of candidates, a first stage of a reranker, or a model for `evaluate`.

    | parameters | what they are | Cranfield | NFCorpus | SciFact | InsuranceQA |
    | --- | --- | --- | --- | --- | --- |
    | `BM25()` | bm25s and MTEB's `mteb/baseline-bm25s` | .428 | .326 | .688 | .299 |
    | `BM25(k1=0.9, b=0.4)` | `k1` and `b` of Anserini and of the BEIR paper | .403 | .320 | .680 | .291 |
    | `BM25(k1=0.9, b=0.4, language=None)` | the same on words as they stand | .376 | .305 | .662 | .293 |

    The numbers are nDCG@10 on the test queries. A student that beats one of them need not beat another: say which one
    you compare with, as the name in the results does.

    Words are lower-cased, stemmed and freed of stop words; marks stay inside, words of one character count ("vitamin
    d"), and where a script has no spaces each pair of characters is a word. Over a collection with such documents the
    name ends in `-bigrams`.

    Args:
        k1: Saturation of the term frequency.
        b: Weight of the document's length, between 0 and 1.
        language: Language of the Snowball stemmer and of the stop words; None for neither. Another one than the default
            says that the texts have words, so that no pairs of characters are made.

    Raises:
        ValueError: If a parameter is out of range; an unknown language is found out when it is used.

    References:
        Lù: BM25S: Orders of magnitude faster lexical search via eager sparse scoring. arXiv:2407.03618.

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
        told = {key: value for key, value in vars(self).items() if value != getattr(BM25, key)}
        return "-".join(["bm25", *(f"{key}-{'none' if value is None else value}" for key, value in told.items())])

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

    def search(
        self, documents: Mapping[str, str], queries: Mapping[str, str], top_k: int, *, where: str, show_progress: bool
    ) -> tuple[str, Iterator[list[tuple[str, float]]]]:
        """Return the name over the documents, and for each query the best that share a word with it, best first."""
        name, tokenizer = self.name_over(documents.values()), _tokenizer(self)
        # A text without a word gets no token at all: bm25s' own way, an empty token, makes a query of unknown words
        # match every empty document.
        bars = show_progress and len(documents) > _MANY
        options: dict[str, Any] = {"return_as": "ids", "allow_empty": False, "show_progress": bars}
        corpus = tokenizer.tokenize(documents.values(), update_vocab=True, **options)
        vocabulary = tokenizer.get_vocab_dict()
        if not vocabulary:
            warnings.warn(f"BM25 finds no word in any document of {where!r}.", stacklevel=4)
            return name, iter([[] for _ in queries])
        if wordless := [query_id for query_id, text in queries.items() if not words(text)]:
            warnings.warn(
                f"BM25 finds no word in {len(wordless):,} of {len(queries):,} queries of {where!r}, and so no "
                f"candidate; the first is {wordless[0]!r}.",
                stacklevel=4,
            )
        if name != self.name:
            tokenizer.splitter = _with_single_characters(vocabulary)
        tokens = tokenizer.tokenize(list(queries.values()), update_vocab=False, **options)
        bm25s = _bm25s()
        compiled = len(corpus) > COMPILE_ABOVE
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", backend="numba" if compiled else "numpy")
        index.index((corpus, vocabulary), create_empty_token=False, show_progress=bars)
        return name, _retrieve(index, tokens, list(documents), top_k, compiled, show_progress)


def _retrieve(
    index: Any, queries: list[list[int]], document_ids: list[str], top_k: int, compiled: bool, show_progress: bool
) -> Iterator[list[tuple[str, float]]]:
    top_k = min(top_k, len(document_ids))  # bm25s refuses more

    def retrieve(chunk: list[list[int]]) -> Iterator[list[tuple[str, float]]]:
        # With one thread numba takes its kernel that frees the interpreter lock: threads of our own then use all
        # cores, move the bar, and spare the much slower compilation of the parallel kernel.
        if not (known := [tokens for tokens in chunk if tokens]):
            return iter([[] for _ in chunk])
        found = index.retrieve(known, k=top_k, n_threads=int(compiled), show_progress=False)
        hits = zip(found.documents, found.scores, strict=True)
        return (_best(*next(hits), document_ids) if tokens else [] for tokens in chunk)

    chunks = [queries[start : start + 64] for start in range(0, len(queries), 64)]
    with (
        progress(total=len(queries), desc="BM25", unit=" queries", disable=not show_progress) as bar,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        for lists in pool.map(retrieve, chunks):
            for hits in lists:
                yield hits
                bar.update()


def _best(places: np.ndarray, scores: np.ndarray, document_ids: list[str]) -> list[tuple[str, float]]:
    """Return the hits of a query, equal scores by place; without those of score 0, with which bm25s fills a list up."""
    return [(document_ids[places[at]], float(scores[at])) for at in np.lexsort((places, -scores)) if scores[at] > 0]


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

    language, splitter = bm25.language, partial(words, bigrams=bm25.bigrams)
    if language is not None and language not in Stemmer.algorithms():
        raise ValueError(f"language must be None or one of {', '.join(Stemmer.algorithms())}; got {language!r}.")
    stemmer = None if language is None else Stemmer.Stemmer(language)
    make = partial(_bm25s().tokenization.Tokenizer, splitter=splitter, stemmer=stemmer)
    try:
        return make(stopwords=language)
    except ValueError:  # a language with a stemmer but without a list of stop words
        return make(stopwords=None)
