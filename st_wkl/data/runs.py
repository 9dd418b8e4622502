"""Lists of candidates: the documents that first stages found for each query, as a value, as a file, fused, imported."""

from __future__ import annotations

import gzip
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from st_wkl.data._rows import numbered_lines
from st_wkl.files import replacing
from st_wkl.ranges import check_options
from st_wkl.text import plain_text

if TYPE_CHECKING:
    from datasets import Dataset

    from st_wkl.data.collection import Collection

# Begins the last column of a fused candidate: to other programs a tag like any, to `read_run` what it comes from.
_ORIGINS = "origins="


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


class Candidates(dict[str, list[Candidate]]):
    """`{query_id: candidates, best first}`, a dictionary like any that can be saved and loaded.

    Example:
        >>> Candidates(q1=[Candidate("d1", 3.2, 1, "bm25")])
        Candidates(1 queries, 1 documents, 1 to 1 a query, of bm25: 1)
    """

    def __repr__(self) -> str:
        """Return the sizes and the sources."""
        sizes = [len(hits) for hits in self.values()]
        sources = ", ".join(f"{source}: {count:,}" for source, count in self.sources().items())
        spread = f", {min(sizes)} to {max(sizes)} a query, of {sources or 'nothing'}" if sizes else ""
        return f"Candidates({len(self):,} queries, {sum(sizes):,} documents{spread})"

    def sources(self) -> dict[str, int]:
        """Return how many candidates each first stage found; one that several found counts for each."""
        hits = (hit for hits in self.values() for hit in hits)
        return dict(sorted(Counter(origin.source for hit in hits for origin in (hit.origins or (hit,))).items()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a run file of TREC, origins and all, see `write_run`."""
        return write_run(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], collection: Collection | None = None) -> Candidates:
        """Read what `save`, or another program, wrote, see `read_run`."""
        return read_run(path, collection)


def read_run(
    path: str | os.PathLike[str],
    collection: Collection | None = None,
    *,
    top_k: int | None = None,
    source: str | None = None,
) -> Candidates:
    """Read a run file of TREC: `query-id Q0 document-id rank score tag`, six columns, plain or gzipped.

    Lists are sorted by score, as trec_eval does; the file's ranks only decide between equal scores, and its order of
    lines means nothing. What `write_run` wrote of a fused candidate's origins is read back.

    Args:
        path: The file, which may end in `.gz`.
        collection: Where the ids come from. Entries whose query or document it does not hold are dropped, counted and
            warned about.
        top_k: Only the first candidates of each query.
        source: Name of the source, by default the tag in the file; origins are left out then.

    Raises:
        ValueError: A line has other columns, a score is no number, or a query has a document twice; the message names
            file and line.

    Example:
        >>> candidates = read_run("run.bm25.trec.gz", collection, top_k=50)  # doctest: +SKIP
    """
    check_options(top_k=top_k)
    path = Path(path).expanduser()
    found: dict[str, dict[str, tuple[float, float, str]]] = {}
    dropped, first = 0, ""
    for number, line in numbered_lines(path):
        fields, where = line.split(), f"{path}, line {number}"
        if len(fields) != 6:
            raise ValueError(
                f"{where}: expected 6 columns (query Q0 document rank score tag), got {len(fields)}: {line[:80]!r}."
            )
        query_id, _, document_id, rank, score, tag = fields
        if collection is not None and (query_id not in collection.queries or document_id not in collection.documents):
            dropped += 1
            first = first or f"query {query_id!r}, document {document_id!r} in line {number}"
            continue
        entries = found.setdefault(query_id, {})
        if document_id in entries:
            raise ValueError(f"{where}: query {query_id!r} has document {document_id!r} before. Remove one of the two.")
        entries[document_id] = (-_number(score, f"{where}: the score"), _number(rank, f"{where}: the rank"), tag)
    if dropped and collection is not None:
        warnings.warn(
            f"{dropped:,} entries of {path} are dropped, since {collection.name!r} does not hold their query or "
            f"document; the first is {first}.",
            stacklevel=2,
        )
    run = Candidates()
    for query_id, entries in found.items():
        best = sorted(entries.items(), key=lambda entry: entry[1][:2])[:top_k]
        run[query_id] = [
            Candidate(key, -cost, rank, source) if source else _tagged(key, -cost, rank, tag, path)
            for rank, (key, (cost, _, tag)) in enumerate(best, 1)
        ]
    return run


def write_run(
    candidates: Mapping[str, Sequence[Candidate]], path: str | os.PathLike[str], *, tag: str | None = None
) -> Path:
    """Write candidates as a run file of TREC, in one step.

    Args:
        candidates: `{query_id: candidates, best first}`; a query without any has no line.
        path: The file; gzipped if it ends in `.gz`.
        tag: Last column, with `_` for white space. By default each candidate's source, and where it was fused or its
            source has white space, `origins=` with what is known of it as JSON, percent-encoded where TREC must.

    Raises:
        ValueError: An id holds white space, which the format cannot express.

    Example:
        >>> write_run(bm25_candidates(collection), "run.bm25.trec.gz")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    with replacing(path) as temporary, temporary.open("wb") as raw:
        # Without a time stamp, so that equal runs are equal files.
        file: Any = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
        for query_id, hits in candidates.items():
            for hit in hits:
                check_id(query_id)
                check_id(hit.document_id)
                name = "_".join(tag.split()) or "run" if tag is not None else _tag(hit)
                # repr: the shortest text that reads back as the same number
                file.write(f"{query_id} Q0 {hit.document_id} {hit.rank} {float(hit.score)!r} {name}\n".encode())
        file.close()
    return path


def check_id(key: str) -> None:
    """Stop at an id that the columns of a run file cannot hold.

    Raises:
        ValueError: The id is empty or has white space.
    """
    if not key or len(key.split()) != 1 or key != key.strip():
        raise ValueError(f"The id {key!r} is empty or has white space; a run cannot hold it. Rename it in all files.")


def _tag(hit: Candidate) -> str:
    """Return the last column of a run for a candidate, from which `_tagged` makes it again."""
    if not hit.origins and len(hit.source.split()) == 1 and not hit.source.startswith(_ORIGINS):
        return hit.source
    known = json.dumps([hit.source, [*map(_origin, hit.origins)]], separators=(",", ":"), ensure_ascii=False)
    return _ORIGINS + quote(known, safe='"[]{},:;/\\=@+&*?!$()#~|')


def _origin(hit: Candidate) -> list[Any]:
    return [hit.source, hit.rank, float(hit.score), *([[*map(_origin, hit.origins)]] if hit.origins else [])]


def _tagged(document_id: str, score: float, rank: int, tag: str, path: Path) -> Candidate:
    """Return the candidate of a line of a run, with its origins where the tag holds any."""
    if not tag.startswith(_ORIGINS):
        return Candidate(document_id, score, rank, tag)

    def origin(source: str, rank: int, score: float, origins: Sequence[list[Any]] = ()) -> Candidate:
        return Candidate(document_id, float(score), int(rank), str(source), tuple(origin(*each) for each in origins))

    try:
        source, origins = json.loads(unquote(tag.removeprefix(_ORIGINS)))
        return origin(source, rank, score, origins)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}, document {document_id!r}: the tag {tag[:80]!r} does not say where the candidate comes from "
            f"({error}). Mine the candidates again, or give source=."
        ) from error


def _number(text: str, what: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise ValueError(f"{what} is {text!r}, which is no finite number. The file may be cut off: make it again.")


def reciprocal_rank_fusion(
    *lists: Mapping[str, Sequence[Candidate]],
    k: float = 60.0,
    weights: Sequence[float] | None = None,
    top_k: int | None = None,
) -> Candidates:
    """Fuse candidate lists by their ranks: a document's score is the sum of weight / (k + rank) over the lists.

    Ranks are all that is used, so the scores of BM25 and of a dense retriever need no calibration. Each fused candidate
    keeps what every list said of it in `origins`.

    Args:
        *lists: Candidates of two or more sources, or of one.
        k: How little the first ranks stand out; 60 is the authors' constant.
        weights: One weight above 0 for each list, by default 1.
        top_k: Candidates of a fused list at most.

    Returns:
        Candidates with the source `"rrf"`, for every query of any list; equal scores by best rank, then by the order
        of the lists.

    Raises:
        ValueError: There is no list, or a weight or `k` is out of range.

    References:
        Cormack, Clarke, Büttcher: Reciprocal rank fusion outperforms Condorcet and individual rank learning methods.
        SIGIR 2009.

    Example:
        >>> bm25 = {"q": [Candidate("a", 9.0, 1, "bm25"), Candidate("b", 7.0, 2, "bm25")]}
        >>> dense = {"q": [Candidate("b", 0.8, 1, "dense")]}
        >>> [(hit.document_id, [origin.source for origin in hit.origins])
        ...  for hit in reciprocal_rank_fusion(bm25, dense)["q"]]
        [('b', ['bm25', 'dense']), ('a', ['bm25'])]
    """
    if not lists:
        raise ValueError("There is nothing to fuse: give one or more candidate lists.")
    if not 0 <= k < math.inf:
        raise ValueError(f"k must be a finite number of 0 or more, got {k}.")
    check_options(top_k=top_k)
    weights = [1.0] * len(lists) if weights is None else list(weights)
    if len(weights) != len(lists) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be {len(lists)} numbers above 0, one for each list, got {weights}.")
    fused = Candidates()
    for query_id in dict.fromkeys(query_id for candidates in lists for query_id in candidates):
        scores: dict[str, float] = {}
        origins: dict[str, list[Candidate]] = {}
        for candidates, weight in zip(lists, weights, strict=True):
            # A document that a list names twice counts with its better rank.
            for hit in {hit.document_id: hit for hit in reversed(candidates.get(query_id, ()))}.values():
                scores[hit.document_id] = scores.get(hit.document_id, 0.0) + weight / (k + hit.rank)
                origins.setdefault(hit.document_id, []).append(hit)
        best = sorted(scores, key=lambda key: (-scores[key], min(hit.rank for hit in origins[key])))[:top_k]
        fused[query_id] = [
            Candidate(key, scores[key], rank, "rrf", tuple(origins[key])) for rank, key in enumerate(best, 1)
        ]
    return fused


def hard_negative_candidates(
    rows: Dataset | Iterable[Mapping[str, Any]],
    collection: Collection,
    *,
    query: str = "query",
    negatives: str | Sequence[str] | None = None,
    source: str = "hard-negatives",
) -> Candidates:
    """Turn the rows of a hard-negative dataset into candidates, in the order of the row.

    Both common layouts are read: one column with a list (`negatives`, `document_ids`), and columns `negative`,
    `negative_1`, `negative_2` and so on. Values are ids of the collection or, if they are no such id, texts, compared
    without regard to case and white space. Several rows of a query are joined. Positives are not needed: they come from
    the judgements.

    Args:
        rows: A `datasets.Dataset` or any mappings.
        collection: Whose ids the candidates get.
        query: Column with the id or the text of the query.
        negatives: Column or columns with the ids or texts, by default `negatives`, `negative` or all `negative_<n>`.
        source: Name of the source.

    Returns:
        `{query_id: candidates}`. Such datasets rarely have scores: the score is minus the rank.

    Raises:
        ValueError: A column is missing, or nothing at all is found in the collection. What is not found else is
            counted and warned about.

    Example:
        >>> rows = load_dataset("someone/hard-negatives", split="train")  # doctest: +SKIP
        >>> candidates = hard_negative_candidates(rows, collection)  # doctest: +SKIP
    """
    queries, documents = _Lookup(collection.queries), _Lookup(collection.documents)
    found: dict[str, dict[str, None]] = {}
    number = 0
    for number, row in enumerate(rows, 1):
        columns = _negative_columns(row, negatives)
        if query not in row:
            raise ValueError(f"Row {number} has no column {query!r}, only {list(row)}. Name it with query=.")
        if (query_id := queries.find(row[query])) is not None:
            cells = [row[column] for column in columns]
            values = [value for cell in cells for value in ([cell] if isinstance(cell, str | int) else cell or ())]
            hits = [documents.find(value) for value in values if value is not None]
            found.setdefault(query_id, {}).update({hit: None for hit in hits if hit is not None})
    missing = f"{len(queries.missing):,} queries and {len(documents.missing):,} documents"
    example = next(iter([*queries.missing, *documents.missing]), "")
    if not any(found.values()):
        raise ValueError(
            f"None of the {number:,} rows has a query and a document of {collection.name!r} ({missing} are not in it; "
            f"the first is {example[:80]!r})."
        )
    if queries.missing or documents.missing:
        warnings.warn(
            f"{missing} of the rows are not in {collection.name!r} and left out; the first is {example[:80]!r}.",
            stacklevel=2,
        )
    ranked = ((query_id, enumerate(hits, 1)) for query_id, hits in found.items())
    return Candidates(
        {query_id: [Candidate(key, -float(n), n, source) for n, key in hits] for query_id, hits in ranked}
    )


class _Lookup:
    """Ids of a collection by id or by text."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts, self.missing = texts, dict[str, None]()
        self.by_text = {plain_text(text): key for key, text in reversed(list(texts.items()))}  # the first of equal ones

    def find(self, value: Any) -> str | None:
        key = str(value)
        found = key if key in self.texts else self.by_text.get(plain_text(key)) if isinstance(value, str) else None
        if found is None:
            self.missing[key] = None
        return found


def _negative_columns(row: Mapping[str, Any], negatives: str | Sequence[str] | None) -> list[str]:
    numbered = [column for column in row if column.startswith("negative_") and column[9:].isdigit()]
    usual = [column for column in ("negatives", "negative") if column in row][:1]
    columns = usual or sorted(numbered, key=lambda column: int(column[9:]))
    if negatives is not None:
        columns = [negatives] if isinstance(negatives, str) else list(negatives)
    if not columns or any(column not in row for column in columns):
        raise ValueError(f"There is no column {columns or 'of negatives'} among {list(row)}. Name it with negatives=.")
    return columns
