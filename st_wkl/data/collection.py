"""A test collection in the sense of information retrieval: documents, queries and judgements, validated once."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from datasets import IterableDataset, IterableDatasetDict

Qrels = dict[str, dict[str, dict[str, int]]]
Missing = Literal["raise", "drop"]

_QRELS_SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".qrels")


def document_text(title: str | None, text: str | None) -> str:
    """Return the text that represents a document everywhere: MTEB's `(title + " " + text).strip()`.

    Args:
        title: Title, `None` or empty where the collection has none.
        text: Body, `None` or empty where the collection has none.
    """
    return f"{title or ''} {text or ''}".strip()


@dataclass(frozen=True, repr=False)
class Collection:
    """Documents, queries and graded judgements, checked when they are put together.

    Everything after this class may rely on it: ids are non-empty text, every query has text, every judgement is a
    whole number and points at a document and a query that exist.

    Args:
        name: Name for people and for provenance, e.g. `"nfcorpus"`.
        documents: `{document_id: text}`, the text in MTEB's form, see `document_text`. Empty documents exist in real
            collections; they are counted and warned about.
        queries: `{query_id: text}`.
        qrels: `{split: {query_id: {document_id: gain}}}`; a gain of 0 means judged and not relevant.
        missing: What to do about judgements of documents or queries that the collection does not hold: `"raise"`
            an error (default, since it usually means that files do not belong together), or `"drop"` them, counted.

    Raises:
        TypeError: An id or a text is not a `str`.
        ValueError: Anything else that is wrong; the message names the place and what to do.

    Example:
        >>> collection = Collection(
        ...     "mine",
        ...     documents={"d1": "Cats purr.", "d2": "Dogs bark."},
        ...     queries={"q1": "which animal purrs"},
        ...     qrels={"train": {"q1": {"d1": 1}}},
        ... )
        >>> collection.positives("train")
        {'q1': {'d1': 1}}
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels = field(default_factory=dict)
    missing: InitVar[Missing] = "raise"

    def __post_init__(self, missing: Missing) -> None:
        """Validate, and normalise the gains to `int`."""
        if missing not in ("raise", "drop"):
            raise ValueError(f'missing must be "raise" or "drop", got {missing!r}.')
        for kind, texts in (("documents", self.documents), ("queries", self.queries)):
            if not texts:
                raise ValueError(f"Collection {self.name!r} has no {kind}.")
            for key, text in texts.items():
                _check_entry(f"{kind} of {self.name!r}", key, text)
        blank_query = next((key for key, text in self.queries.items() if not text.strip()), None)
        if blank_query is not None:
            raise ValueError(
                f"Query {blank_query!r} of {self.name!r} has no text. Remove it from the queries and the judgements."
            )
        blank = [key for key, text in self.documents.items() if not text.strip()]
        if blank:
            warnings.warn(
                f"{len(blank):,} of {len(self.documents):,} documents of {self.name!r} have no text "
                f"(the first is {blank[0]!r}). They can be neither found nor used for training.",
                stacklevel=3,
            )
        object.__setattr__(self, "qrels", _check_qrels(self, missing))

    def __repr__(self) -> str:
        """Return the sizes, not the texts."""
        splits = ", ".join(f"{split}: {len(judged):,} judged queries" for split, judged in self.qrels.items())
        return (
            f"Collection({self.name!r}, {len(self.documents):,} documents, {len(self.queries):,} queries"
            f"{', ' + splits if splits else ''})"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex hash of documents, queries and judgements. The name and the order of entries do not matter."""
        digest = hashlib.blake2b(digest_size=16)

        def add(*parts: str) -> None:
            for part in parts:
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)

        for kind, texts in (("documents", self.documents), ("queries", self.queries)):
            add(kind)
            for key in sorted(texts):
                add(key, texts[key])
        for split in sorted(self.qrels):
            add("qrels", split)
            for query_id in sorted(self.qrels[split]):
                for document_id, gain in sorted(self.qrels[split][query_id].items()):
                    add(query_id, document_id, str(gain))
        return digest.hexdigest()

    def judgements(self, split: str) -> dict[str, dict[str, int]]:
        """Return `{query_id: {document_id: gain}}` of one split.

        Raises:
            ValueError: The collection has no such split; the message lists those it has.
        """
        if split not in self.qrels:
            raise ValueError(
                f"Collection {self.name!r} has no split {split!r}; it has {', '.join(map(repr, self.qrels)) or 'none'}."
            )
        return self.qrels[split]

    def positives(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of one split with a gain above 0, without the queries that have none."""
        relevant = {
            query_id: {document_id: gain for document_id, gain in judged.items() if gain > 0}
            for query_id, judged in self.judgements(split).items()
        }
        return {query_id: judged for query_id, judged in relevant.items() if judged}

    @classmethod
    def from_beir(cls, path: str | os.PathLike[str], *, name: str | None = None, missing: Missing = "raise") -> Self:
        """Read a folder in the layout of the BEIR benchmark.

        Args:
            path: Folder with `corpus.jsonl`, `queries.jsonl` (either may end in `.gz`) and `qrels/<split>.tsv`.
                Numeric ids become text, as they are in the judgements. A judgements file holds `query-id corpus-id
                score` with or without a header, or the four columns of TREC.
            name: Name of the collection, by default the folder's.
            missing: See `Collection`.

        Raises:
            FileNotFoundError: A file of the layout is missing.
            ValueError: A line cannot be read or an id occurs twice; the message names file and line.

        Example:
            >>> collection = Collection.from_beir("datasets/nfcorpus")  # doctest: +SKIP
        """
        folder = Path(path)
        documents = _jsonl_texts(folder, "corpus", "document")
        queries = _jsonl_texts(folder, "queries", "query")
        files = sorted(file for file in folder.glob("qrels/*") if file.name.endswith(_QRELS_SUFFIXES))
        if not files:
            raise FileNotFoundError(f"{folder} has no judgements: expected qrels/<split>.tsv, e.g. qrels/train.tsv.")
        qrels: Qrels = {}
        for file in files:
            split = next(file.name.removesuffix(suffix) for suffix in _QRELS_SUFFIXES if file.name.endswith(suffix))
            if split in qrels:
                raise ValueError(f"{folder / 'qrels'} holds two files for the split {split!r}. Remove one.")
            qrels[split] = _collect_qrels(_qrels_rows(file), f"{file}, line")
        return cls(name or folder.resolve().name, documents, queries, qrels, missing=missing)

    @classmethod
    def from_hub(
        cls,
        repo_id_or_folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        revision: str | None = None,
        missing: Missing = "raise",
    ) -> Self:
        """Read a dataset in MTEB's retrieval layout from the Hub or from a folder.

        The configs are `corpus` and `queries` (or `query`) with `_id`, `title`, `text`, and `default` (or `qrels`) with
        `query-id`, `corpus-id`, `score`; the splits of the latter become the splits of the collection.

        Args:
            repo_id_or_folder: Dataset id such as `"mteb/nfcorpus"`, or a folder whose README.md names the configs.
            name: Name of the collection, by default the id or the folder's name.
            revision: Branch, tag or commit on the Hub.
            missing: See `Collection`.

        Raises:
            FileNotFoundError: There is no such dataset, or the Hub cannot be reached.
            ValueError: A config or a column is missing, or the contents are invalid.

        Example:
            >>> collection = Collection.from_hub("mteb/nfcorpus")  # doctest: +SKIP
        """
        folder = Path(repo_id_or_folder)
        name = name or (folder.resolve().name if folder.is_dir() else str(repo_id_or_folder))
        if not folder.is_dir():
            folder = _download(str(repo_id_or_folder), revision)
        documents = _hub_texts(_load_config(folder, "corpus"), "document")
        queries = _hub_texts(_load_config(folder, "query", "queries"), "query")
        qrels = {
            str(split): _collect_qrels(_hub_judgements(rows, split), f"judgements of split {split!r}, row")
            for split, rows in _load_config(folder, "default", "qrels").items()
        }
        return cls(name, documents, queries, qrels, missing=missing)

    @classmethod
    def load(
        cls,
        source: Collection | str | os.PathLike[str],
        *,
        revision: str | None = None,
        missing: Missing = "raise",
    ) -> Collection:
        """Return the collection that `source` means: itself, a BEIR folder, a folder or a Hub dataset as MTEB lays out.

        Args:
            source: A collection, a folder, or a Hub id with its organisation, such as `"mteb/nfcorpus"`.
            revision: Branch, tag or commit, for a Hub id.
            missing: See `Collection`; of no meaning for a collection.

        Raises:
            FileNotFoundError: Neither a folder of either layout nor a dataset that can be fetched.
        """
        if isinstance(source, Collection):
            return source
        folder = Path(source)
        if folder.is_dir():
            if "corpus" in _config_names(folder):
                return cls.from_hub(folder, missing=missing)
            return cls.from_beir(folder, missing=missing)
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"{str(source)!r} is neither a folder nor a Hub id. Give a BEIR folder (corpus.jsonl, queries.jsonl, "
                'qrels/) or a dataset id with its organisation, e.g. "mteb/nfcorpus".'
            )
        return cls.from_hub(str(source), revision=revision, missing=missing)


def _check_entry(where: str, key: object, text: object) -> None:
    if not isinstance(key, str) or not isinstance(text, str):
        what = "id" if not isinstance(key, str) else "text"
        wrong = key if what == "id" else text
        remedy = f"Use str({wrong!r})" if isinstance(wrong, (int, float)) else "Remove the entry, or give it a text"
        raise TypeError(f"In the {where}, entry {key!r}: the {what} is {wrong!r}, not text (str). {remedy}.")
    if not key:
        raise ValueError(f"In the {where}, an id is empty (its text begins {text[:60]!r}). Every id needs a character.")
    if not (key.isascii() and text.isascii()):
        try:
            (key + text).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"In the {where}, entry {key!r} holds half a character (a lone surrogate), which no tokenizer reads. "
                'Repair it with text.encode("utf-8", "replace").decode().'
            ) from error


def _check_qrels(collection: Collection, missing: Missing) -> Qrels:
    kept: Qrels = {}
    dropped = {"documents": 0, "queries": 0}
    first = ""
    for split, queries in collection.qrels.items():
        kept[split] = {}
        for query_id, judged in queries.items():
            if not isinstance(judged, Mapping):
                raise TypeError(
                    f"Split {split!r} of {collection.name!r}, query {query_id!r}: expected {{document_id: gain}}, "
                    f"got {type(judged).__name__}."
                )
            for document_id, gain in judged.items():
                where = f"split {split!r} of {collection.name!r}, query {query_id!r}, document {document_id!r}"
                if not isinstance(query_id, str) or not isinstance(document_id, str):
                    raise TypeError(f"In {where}: ids are text (str). Use str(id).")
                if query_id not in collection.queries or document_id not in collection.documents:
                    dropped["documents" if query_id in collection.queries else "queries"] += 1
                    first = first or where
                    continue
                kept[split].setdefault(query_id, {})[document_id] = _gain(gain, where)
    if any(dropped.values()):
        message = (
            f"Collection {collection.name!r} has judgements of what it does not hold: {dropped['documents']:,} of "
            f"absent documents, {dropped['queries']:,} of absent queries. The first is {first}."
        )
        if missing == "raise":
            raise ValueError(f'{message} Check that the files belong together, or pass missing="drop".')
        warnings.warn(f"{message} They are dropped.", stacklevel=4)
    for split, queries in kept.items():
        if not queries:
            raise ValueError(f"Split {split!r} of {collection.name!r} has no judgements. Remove the split.")
    return kept


def _gain(value: Any, where: str) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"In {where}: the gain must be a whole number, got {value!r}. Round or rescale the gains.")
    return int(number)


def _identifier(value: Any, where: str) -> str:
    """Return an id as text; whole numbers are converted since judgement files hold text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: the id is {value!r}. Ids are non-empty text or whole numbers.")
    return value


def _row_text(row: Mapping[str, Any], kind: str, where: str) -> str:
    title, text = row.get("title"), row.get("text")
    if "text" not in row:
        raise ValueError(f"{where}: there is no field 'text', only {', '.join(map(repr, row))}.")
    for value in (title, text):
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"{where}: expected text, got {value!r}. Put it in quotes.")
    if kind == "document":
        return document_text(title, text)
    if text is None or not text.strip():
        raise ValueError(f"{where}: the query has no text. Remove the line and its judgements.")
    return str(text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, line)` of a plain or gzipped text file without its blank lines."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(tqdm(lines, desc=path.name, unit=" lines", delay=2, leave=False), 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read beyond line {number} ({error}). Fetch or unpack it again.") from error


def _jsonl_texts(folder: Path, stem: str, kind: str) -> dict[str, str]:
    path = next((file for file in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz. A BEIR folder holds corpus.jsonl, queries.jsonl, qrels/."
        )
    return _collect_texts(_jsonl_rows(path), kind, f"{path}, line")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}). The file may be cut off: fetch it again."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object with _id and text, got {line[:60]!r}.")
        yield number, row


def _collect_texts(rows: Iterable[tuple[int, dict[str, Any]]], kind: str, place: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    numbers = array("Q")  # of the rows in `texts`, in its order: a dict of places would weigh more than short texts
    for number, row in rows:
        where = f"{place} {number}"
        key = _identifier(row.get("_id", row.get("id")), where)
        if key in texts:
            raise ValueError(
                f"{where}: the {kind} id {key!r} occurred before, at {place} {numbers[list(texts).index(key)]}. "
                "Ids must be unique: remove or rename one."
            )
        texts[key] = _row_text(row, kind, where)
        numbers.append(number)
    return texts


def _collect_qrels(rows: Iterable[tuple[int, Any, Any, Any]], place: str) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, query_id, document_id, score in rows:
        where = f"{place} {number}"
        judged = qrels.setdefault(_identifier(query_id, where), {})
        key, gain = _identifier(document_id, where), _gain(score, where)
        if judged.setdefault(key, gain) != gain:
            raise ValueError(
                f"{where}: query {query_id!r} and document {key!r} were judged {judged[key]} before and {gain} here. "
                "Keep one of the two."
            )
    return qrels


def _qrels_rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) not in (3, 4):
            raise ValueError(
                f"{path}, line {number}: expected 3 columns (query-id, corpus-id, score) or the 4 of TREC (query, 0, "
                f"document, gain), got {len(fields)}: {line[:80]!r}."
            )
        if number > 1 or _is_number(fields[-1]):  # a first line without a score is a header, any other an error
            yield number, fields[0], fields[-2], fields[-1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # The files are fetched and then read as a local folder: `datasets` forgets the configs of a repository that it
    # only has in its cache (datasets#7947), so the same code would behave differently without a network.
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The dataset {repo_id!r} is not a folder here and could not be fetched from the Hub: {error}"
        ) from error


def _config_names(folder: Path) -> list[str]:
    """Return the configs that the folder's README names, [] without one."""
    if not (folder / "README.md").is_file():
        return []
    from huggingface_hub import DatasetCard

    metadata = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    return [config["config_name"] for config in metadata.get("configs") or []]


def _load_config(folder: Path, *names: str) -> IterableDatasetDict:
    from datasets import load_dataset

    configs = _config_names(folder)
    found = next((name for name in names if name in configs), None)
    if found is None:
        raise ValueError(
            f"{folder} has no config {' or '.join(map(repr, names))} in its README.md, only "
            f"{', '.join(map(repr, configs)) or 'none'}. MTEB's layout has corpus, queries and default (or qrels)."
        )
    # The cache of `datasets` must stay out of this: for a folder its key is made of names, not of contents, so another
    # folder of the same name, or an older state of this one, would be served. Streaming reads the files themselves;
    # the empty cache folder hides the column types of earlier reads.
    with tempfile.TemporaryDirectory() as empty:
        return load_dataset(str(folder), found, streaming=True, cache_dir=empty)


def _hub_judgements(rows: IterableDataset, split: str) -> Iterator[tuple[int, Any, Any, Any]]:
    columns = ("query-id", "corpus-id", "score")
    for number, row in enumerate(tqdm(rows, desc="judgements", delay=2, leave=False)):
        if absent := [column for column in columns if column not in row]:
            raise ValueError(f"The judgements of split {split!r} lack {absent}; their columns are {list(row)}.")
        yield number, *(row[column] for column in columns)


def _hub_texts(splits: IterableDatasetDict, kind: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for split, rows in splits.items():
        bar = tqdm(rows, desc=f"{kind} texts", delay=2, leave=False)
        for key, text in _collect_texts(enumerate(bar), kind, f"split {split!r}, row").items():
            # Some repositories repeat the same entries in every split: fine, unless the texts differ.
            if texts.setdefault(key, text) != text:
                raise ValueError(f"The {kind} {key!r} has two texts, one in split {split!r}. Ids must be unique.")
    return texts
