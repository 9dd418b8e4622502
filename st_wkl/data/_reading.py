"""Collections as files: BEIR folders, and datasets of the Hub in MTEB's layout."""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from datasets import IterableDataset, IterableDatasetDict

Texts = dict[str, str]
Qrels = dict[str, dict[str, dict[str, int]]]

# trec_eval keeps an array of this length for each query, and gains as C integers.
_LARGEST_GAIN = 1_000_000
_QRELS_SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".qrels")


def document_text(title: str | None, text: str | None) -> str:
    """Return the text that represents a document everywhere: MTEB's `(title + " " + text).strip()`.

    Args:
        title: Title, `None` or empty where the collection has none.
        text: Body, `None` or empty where the collection has none.
    """
    return f"{title or ''} {text or ''}".strip()


def read_beir(folder: Path) -> tuple[Texts, Texts, Qrels]:
    """Return documents, queries and judgements of a BEIR folder; see `Collection.from_beir`."""
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
    return documents, queries, qrels


def read_mteb(folder: Path) -> tuple[Texts, Texts, Qrels]:
    """Return documents, queries and judgements of a folder in MTEB's layout; see `Collection.from_hub`."""
    documents = _hub_texts(_load_config(folder, "corpus"), "document")
    queries = _hub_texts(_load_config(folder, "query", "queries"), "query")
    qrels = {
        str(split): _collect_qrels(_hub_judgements(rows, split), f"judgements of split {split!r}, row")
        for split, rows in _load_config(folder, "default", "qrels").items()
    }
    return documents, queries, qrels


def whole_gain(value: Any, where: str) -> int:
    """Return a gain as `int`; `where` names the place in the error."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"In {where}: the gain must be a whole number, got {value!r}. Round or rescale the gains.")
    if abs(number) > _LARGEST_GAIN:
        raise ValueError(
            f"In {where}: the gain is {value!r}, and trec_eval can only hold gains up to {_LARGEST_GAIN:,}. Is that "
            "another column, such as a time stamp? Else rescale the gains."
        )
    return int(number)


def whole_gains(judged: Any, where: str) -> dict[str, int]:
    """Return the judgements of one query as `{document id: gain}`, or say what is wrong with which of them."""
    if not isinstance(judged, Mapping):
        raise TypeError(
            f"{where[:1].upper()}{where[1:]}: expected {{document_id: gain}}, got {type(judged).__name__}. "
            "For documents that are all alike relevant, give dict.fromkeys(documents, 1)."
        )
    for document_id in judged:
        if not isinstance(document_id, str):
            raise TypeError(f"In {where}, document {document_id!r}: ids are text (str). Use str(id).")
    return {key: whole_gain(gain, f"{where}, document {key!r}") for key, gain in judged.items()}


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


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
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
    for number, line in numbered_lines(path):
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
        key, gain = _identifier(document_id, where), whole_gain(score, where)
        if judged.setdefault(key, gain) != gain:
            raise ValueError(
                f"{where}: query {query_id!r} and document {key!r} were judged {judged[key]} before and {gain} here. "
                "Keep one of the two."
            )
    return qrels


def _qrels_rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    for number, line in numbered_lines(path):
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


def download(repo_id: str, revision: str | None) -> Path:
    """Return the folder of a dataset of the Hub, fetched or from the cache."""
    from huggingface_hub import snapshot_download

    # The files are fetched and then read as a local folder: `datasets` forgets the configs of a repository that it
    # only has in its cache (datasets#7947), so the same code would behave differently without a network.
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The dataset {repo_id!r} is not a folder here and could not be fetched from the Hub: {error}"
        ) from error


def config_names(folder: Path) -> list[str]:
    """Return the configs that the folder's README names, [] without one."""
    if not (folder / "README.md").is_file():
        return []
    from huggingface_hub import DatasetCard

    metadata = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    return [config["config_name"] for config in metadata.get("configs") or []]


def _load_config(folder: Path, *names: str) -> IterableDatasetDict:
    from datasets import load_dataset

    configs = config_names(folder)
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
