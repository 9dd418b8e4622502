"""Collections as files: BEIR folders, and datasets of the Hub in MTEB's layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from st_wkl.data._rows import chained, delimited, file_kind, numbered_lines, rows

Texts = dict[str, str]
Qrels = dict[str, dict[str, dict[str, int]]]

# trec_eval keeps an array of this length for each query, and gains as C integers.
_LARGEST_GAIN = 1_000_000
_JUDGEMENTS = (".tsv", ".csv", ".txt", ".qrels", ".trec", ".jsonl", ".json", ".parquet")
_NO_JUDGEMENTS = ("readme", "license", "licence", "thumbs.db", "desktop.ini")
# How the columns of judgements are called, in small letters and without marks between the words.
_COLUMNS = {
    "query": {"queryid", "qid", "query", "topic", "topicid"},
    "document": {"corpusid", "documentid", "docid", "did", "doc", "document", "docno", "passageid", "pid", "corpus"},
    "gain": {"score", "gain", "relevance", "rel", "label", "grade", "judgement", "judgment", "relevancy"},
}


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
    qrels: Qrels = {}
    for split, file in _judgement_files(folder).items():
        qrels[split] = _collect_qrels(_qrels_rows(file, (queries, documents)), f"{file}, line")
    return documents, queries, qrels


def _judgement_files(folder: Path) -> dict[str, Path]:
    """Return `{split: file}`; a file that cannot be told to be something else is an error, as it may be judgements."""
    found: dict[str, Path] = {}
    for file in sorted((folder / "qrels").glob("*")):
        name = file.name.lower()
        if not file.is_file() or name.startswith((".", "~$", *_NO_JUDGEMENTS)):  # of other systems and editors
            continue
        if file_kind(file) not in _JUDGEMENTS:
            raise ValueError(
                f"{file} is in the folder of judgements, and no file that is read: {', '.join(_JUDGEMENTS)}, each of "
                "the text files also as .gz. Rename or unpack it, or take it away."
            )
        split = file.name[: name.removesuffix(".gz").rindex(".")]
        if split in found:
            raise ValueError(f"{folder / 'qrels'} holds two files for the split {split!r}. Remove one.")
        found[split] = file
    if not found:
        raise FileNotFoundError(f"{folder} has no judgements: expected qrels/<split>.tsv, e.g. qrels/train.tsv.")
    return found


def read_mteb(folder: Path) -> tuple[Texts, Texts, Qrels]:
    """Return documents, queries and judgements of a folder in MTEB's layout; see `Collection.from_hub`."""
    documents = _hub_texts(_config_files(folder, "corpus"), "document")
    queries = _hub_texts(_config_files(folder, "query", "queries"), "query")
    qrels = {
        split: _collect_qrels(_hub_judgements(files, split), f"judgements of split {split!r}, row")
        for split, files in _config_files(folder, "default", "qrels").items()
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
    if value.startswith("\ufeff"):
        raise ValueError(
            f"{where}: the id {value!r} begins with a byte order mark, so files were put together. Take the mark out."
        )
    return value


def _row_identifier(row: Mapping[str, Any], where: str) -> str:
    key = row.get("_id", row.get("id"))
    if key is None and "_id" not in row and "id" not in row:
        raise ValueError(
            f"{where}: the id is None, as there is no field '_id' or 'id', only {', '.join(map(repr, row))}. Rename "
            "the fields of id and text to '_id' and 'text'."
        )
    return _identifier(key, where)


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


def _jsonl_texts(folder: Path, stem: str, kind: str) -> dict[str, str]:
    path = next((file for file in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz. A BEIR folder holds corpus.jsonl, queries.jsonl, qrels/."
        )
    return _collect_texts([path], kind)


def _collect_texts(files: list[Path], kind: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, row in chained(files):
        key = _row_identifier(row, where)
        if key in texts:
            # Read again rather than remembered: a dict of places would weigh more than short texts.
            before = next(islice(chained(files), list(texts).index(key), None))[0]
            raise ValueError(
                f"{where}: the {kind} id {key!r} occurred before, at {before}. Ids must be unique: remove or rename "
                "one."
            )
        texts[key] = _row_text(row, kind, where)
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


def _qrels_rows(path: Path, texts: tuple[Texts, Texts]) -> Iterator[tuple[int, Any, Any, Any]]:
    """Yield `(number, query id, document id, gain)` of a file of judgements."""
    if file_kind(path) in (".jsonl", ".json", ".parquet"):
        for number, row in rows(path):
            places = _columns(list(row))
            if len(places) < len(_COLUMNS):
                raise ValueError(
                    f"{path}, line {number}: judgements have query-id, corpus-id and score, got "
                    f"{', '.join(map(repr, row))}."
                )
            values = list(row.values())
            yield number, values[places["query"]], values[places["document"]], values[places["gain"]]
        return
    places = {}
    for place, (number, fields) in enumerate(_fields(path)):
        if place == 0 and not _is_number(fields[-1]):
            places = _columns(fields)
            if len(places) == len(_COLUMNS) or (places and not any(key in known for key in fields for known in texts)):
                continue  # a header
            raise ValueError(
                f"{path}, line {number}: the gain must be a whole number, got {fields[-1]!r}. If this is a header, "
                f"name its columns query-id, corpus-id and score, got {', '.join(map(repr, fields))}."
            )
        if len(places) == len(_COLUMNS) and max(places.values()) < len(fields):
            yield number, fields[places["query"]], fields[places["document"]], fields[places["gain"]]
        elif len(fields) in (3, 4):
            yield number, fields[0], fields[-2], fields[-1]
        else:
            raise ValueError(
                f"{path}, line {number}: expected 3 columns (query-id, corpus-id, score) or the 4 of TREC (query, 0, "
                f"document, gain), got {len(fields)}: {' '.join(fields)[:80]!r}."
            )


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    if file_kind(path) == ".csv":
        yield from delimited(path, ",")
        return
    for number, line in numbered_lines(path):
        yield number, line.split("\t") if "\t" in line else line.split()


def _columns(names: list[str]) -> dict[str, int]:
    """Return where query id, document id and gain stand, as far as the names of the columns tell."""
    plain = ["".join(filter(str.isalnum, name.lower())) for name in names]
    return {
        role: next(place for place, name in enumerate(plain) if name in known)
        for role, known in _COLUMNS.items()
        if any(name in known for name in plain)
    }


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


def task_ignores_identical_ids(folder: Path) -> bool:
    """Return whether an MTEB task leaves the document of a query's id out, by its dataset's folder in a Hub cache."""
    parts = next((part.split("--") for part in folder.absolute().parts if part.startswith("datasets--")), [])
    if len(parts) != 3:
        return False
    import mteb

    tasks = mteb.get_tasks(exclude_superseded=False)
    return any(
        getattr(task, "ignore_identical_ids", False) and task.metadata.dataset["path"] == "/".join(parts[1:])
        for task in tasks
    )


def config_names(folder: Path) -> list[str]:
    """Return the configs that the folder's README names, [] without one."""
    if not (folder / "README.md").is_file():
        return []
    from huggingface_hub import DatasetCard

    metadata = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    return [config["config_name"] for config in metadata.get("configs") or []]


def _config_files(folder: Path, *names: str) -> dict[str, list[Path]]:
    """Return the files of each split of a config, as `datasets` finds them."""
    from datasets import load_dataset_builder

    configs = config_names(folder)
    found = next((name for name in names if name in configs), None)
    if found is None:
        raise ValueError(
            f"{folder} has no config {' or '.join(map(repr, names))} in its README.md, only "
            f"{', '.join(map(repr, configs)) or 'none'}. MTEB's layout has corpus, queries and default (or qrels)."
        )
    # Only the list of files: `datasets` guesses types, so that `001` becomes 1 and `2021-05-01` a date, and its cache
    # goes by names, not by contents.
    files = load_dataset_builder(str(folder), found).config.data_files or {}
    return {str(split): [Path(file) for file in paths] for split, paths in files.items()}


def _hub_judgements(files: list[Path], split: str) -> Iterator[tuple[int, Any, Any, Any]]:
    columns = ("query-id", "corpus-id", "score")
    bar = tqdm(chained(files), desc="judgements", delay=2, leave=False)
    for number, (_, row) in enumerate(bar, 1):
        if absent := [column for column in columns if column not in row]:
            raise ValueError(f"The judgements of split {split!r} lack {absent}; their columns are {list(row)}.")
        yield number, *(row[column] for column in columns)


def _hub_texts(splits: dict[str, list[Path]], kind: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for split, files in splits.items():
        for key, text in _collect_texts(files, kind).items():
            # Some repositories repeat the same entries in every split: fine, unless the texts differ.
            if texts.setdefault(key, text) != text:
                raise ValueError(f"The {kind} {key!r} has two texts, one in split {split!r}. Ids must be unique.")
    return texts
