"""Collections as files: BEIR folders, and datasets of the Hub in MTEB's layout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from st_wkl.data._rows import chained, delimited, file_kind, numbered_lines
from st_wkl.files import file_name
from st_wkl.progress import progress

Texts = dict[str, str]
Judged = dict[str, dict[str, int]]
Qrels = dict[str, Judged]
By = Literal["query", "document"]

# What the layout has no place for; beside the files of a collection that was saved.
ABOUT_FILE = "collection.json"
# trec_eval keeps an array of this length for each query, and gains as C integers.
_LARGEST_GAIN = 1_000_000
_KINDS = (".tsv", ".csv", ".txt", ".qrels", ".trec", ".jsonl", ".json", ".parquet")
_NO_JUDGEMENTS = (".", "~$", "readme", "license", "licence", "thumbs.db", "desktop.ini")  # of other systems and editors
_HUB_COLUMNS = ("query-id", "corpus-id", "score")
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
    return {key: _whole_gain(gain, f"{where}, document {key!r}") for key, gain in judged.items()}


def _whole_gain(value: Any, where: str) -> int:
    number = _number(value)
    if number is None or not number.is_integer():
        raise ValueError(f"In {where}: the gain must be a whole number, got {value!r}. Round or rescale the gains.")
    if abs(number) > _LARGEST_GAIN:
        raise ValueError(
            f"In {where}: the gain is {value!r}, and trec_eval can only hold gains up to {_LARGEST_GAIN:,}. Is that "
            "another column, such as a time stamp? Else rescale the gains."
        )
    return int(number)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_beir(folder: Path) -> tuple[Texts, Texts, Qrels, dict[str, Any]]:
    """Return documents, queries, judgements, and what a saved collection says of itself; see `Collection.from_beir`."""
    about: dict[str, Any] = {}
    if (folder / ABOUT_FILE).is_file():
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    documents, queries = (
        _texts(_beir_file(folder, "corpus"), "document"),
        _texts(_beir_file(folder, "queries"), "query"),
    )
    files = _judgement_files(folder)
    if lost := [split for split in about.get("splits", [""] if not files else []) if split not in files]:
        which = f" of the split {lost[0]!r}" if lost[0] else ""
        raise FileNotFoundError(
            f"{folder} has no judgements{which}: expected qrels/<split>.tsv, e.g. qrels/train.tsv. Where there are "
            "none, give corpus.jsonl as the source and queries.jsonl as its queries."
        )
    qrels = {}
    for split, file in files.items():
        named = file_kind(file) in (".jsonl", ".json", ".parquet")
        qrels[split] = _collected(
            _judgement_rows([file], split) if named else _judgement_lines(file, (queries, documents))
        )
    return documents, queries, qrels, about


def read_mteb(folder: Path) -> tuple[Texts, Texts, Qrels]:
    """Return documents, queries and judgements of a folder in MTEB's layout; see `Collection.from_hub`."""
    documents = _texts(_config_files(folder, "corpus"), "document")
    queries = _texts(_config_files(folder, "query", "queries"), "query")
    files = _config_files(folder, "default", "qrels")
    return documents, queries, {split: _collected(_judgement_rows(paths, split)) for split, paths in files.items()}


def write_beir(folder: Path, documents: Texts, queries: Texts, qrels: Qrels, about: Mapping[str, Any]) -> None:
    """Write a collection as `read_beir` reads it, into an empty folder.

    Raises:
        ValueError: The name of a split cannot be that of a file, or an id cannot be read back.
    """
    (folder / "qrels").mkdir()
    for stem, texts in (("corpus", documents), ("queries", queries)):
        titled = {"title": ""} if stem == "corpus" else {}
        with (folder / f"{stem}.jsonl").open("w", encoding="utf-8") as file:
            for key, text in progress(texts.items(), desc=stem, delay=2, leave=False):
                entry = {"_id": _identifier(key, f"The {stem}"), **titled, "text": text}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    for split, judged in qrels.items():
        entries = [(query, key, gain) for query, gains in judged.items() for key, gain in gains.items()]
        # Text has no place for these characters between its tabs.
        kind = "jsonl" if any(set("\t\r\n\0") & {*query, *key} for query, key, _ in entries) else "tsv"
        if file_name(split) != split or split.lower().startswith(_NO_JUDGEMENTS):
            raise ValueError(f"The split {split!r} cannot be the name of a file of judgements. Rename it.")
        with (folder / "qrels" / f"{split}.{kind}").open("w", encoding="utf-8") as file:
            if kind == "tsv":
                file.writelines("\t".join(map(str, row)) + "\n" for row in (_HUB_COLUMNS, *entries))
            else:
                file.writelines(json.dumps(dict(zip(_HUB_COLUMNS, row, strict=True))) + "\n" for row in entries)
    (folder / ABOUT_FILE).write_text(json.dumps({**about, "splits": list(qrels)}, indent=2) + "\n", encoding="utf-8")


def _beir_file(folder: Path, stem: str) -> dict[str, list[Path]]:
    path = next((file for file in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz. A BEIR folder holds corpus.jsonl, queries.jsonl, qrels/."
        )
    return {stem: [path]}


def _judgement_files(folder: Path) -> dict[str, Path]:
    """Return `{split: file}`; a file that cannot be told to be something else is an error, as it may be judgements."""
    found: dict[str, Path] = {}
    for file in sorted((folder / "qrels").glob("*")):
        if not file.is_file() or file.name.lower().startswith(_NO_JUDGEMENTS):
            continue
        if file_kind(file) not in _KINDS:
            raise ValueError(
                f"{file} is in the folder of judgements, and no file that is read: {', '.join(_KINDS)}, each of "
                "the text files also as .gz. Rename or unpack it, or take it away."
            )
        split = file.name[: file.name.lower().removesuffix(".gz").rindex(".")]
        if split in found:
            raise ValueError(f"{folder / 'qrels'} holds two files for the split {split!r}. Remove one.")
        found[split] = file
    return found


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


def _entry(row: Mapping[str, Any], kind: str, where: str) -> tuple[str, str]:
    """Return id and text of a row."""
    there = ", ".join(map(repr, row))
    if "_id" not in row and "id" not in row:
        raise ValueError(
            f"{where}: the id is None, as there is no field '_id' or 'id', only {there}. Rename the fields of id and "
            "text to '_id' and 'text'."
        )
    key, title, text = _identifier(row.get("_id", row.get("id")), where), row.get("title"), row.get("text")
    if "text" not in row:
        raise ValueError(f"{where}: there is no field 'text', only {there}.")
    for value in (title, text):
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: expected text, got {value!r}. Put it in quotes.")
    if kind == "document":
        return key, document_text(title, text)
    if text is None or not text.strip():
        raise ValueError(f"{where}: the query has no text. Remove the line and its judgements.")
    return key, str(text)


def _texts(splits: Mapping[str, list[Path]], kind: str) -> Texts:
    """Return the texts of all splits; one that repeats an entry of another split is fine, unless the texts differ."""
    texts: Texts = {}
    for split, files in splits.items():
        here: Texts = {}
        for where, row in chained(files):
            key, text = _entry(row, kind, where)
            if key in here:
                # Read again rather than remembered: a dict of places would weigh more than short texts.
                before = next(islice(chained(files), list(here).index(key), None))[0]
                raise ValueError(
                    f"{where}: the {kind} id {key!r} occurred before, at {before}. Ids must be unique: remove or "
                    "rename one."
                )
            here[key] = text
            if texts.get(key, text) != text:
                raise ValueError(f"The {kind} {key!r} has two texts, one in split {split!r}. Ids must be unique.")
        texts = {**texts, **here} if texts else here
    return texts


def _collected(entries: Iterable[tuple[Any, ...]]) -> Judged:
    qrels: Judged = {}
    for where, query_id, document_id, score in entries:
        judged = qrels.setdefault(_identifier(query_id, where), {})
        key, gain = _identifier(document_id, where), _whole_gain(score, where)
        if judged.setdefault(key, gain) != gain:
            raise ValueError(
                f"{where}: query {query_id!r} and document {key!r} were judged {judged[key]} before and {gain} here. "
                "Keep one of the two."
            )
    return qrels


def _judgement_rows(files: list[Path], split: str) -> Iterator[tuple[Any, ...]]:
    """Yield `(place, query id, document id, gain)` of files whose rows have names."""
    for where, row in progress(chained(files), desc="judgements", delay=2, leave=False):
        at, values = _columns(list(row)), list(row.values())
        if absent := [name for role, name in zip(_COLUMNS, _HUB_COLUMNS, strict=True) if role not in at]:
            raise ValueError(
                f"{where}: the judgements of split {split!r} lack {absent}; their columns are {', '.join(row)}."
            )
        yield where, *(values[at[role]] for role in _COLUMNS)


def _judgement_lines(path: Path, texts: tuple[Texts, Texts]) -> Iterator[tuple[Any, ...]]:
    """Yield `(place, query id, document id, gain)` of a file of judgements."""
    at: dict[str, int] = {}
    for place, (number, fields) in enumerate(_fields(path)):
        where = f"{path}, line {number}"
        if place == 0 and _number(fields[-1]) is None:
            at = _columns(fields)
            if len(at) == len(_COLUMNS) or (at and not any(key in known for key in fields for known in texts)):
                continue  # a header
            raise ValueError(
                f"{where}: the gain must be a whole number, got {fields[-1]!r}. If this is a header, name its columns "
                f"query-id, corpus-id and score, got {', '.join(map(repr, fields))}."
            )
        if len(at) == len(_COLUMNS) and max(at.values()) < len(fields):
            yield where, *(fields[at[role]] for role in _COLUMNS)
        elif len(fields) in (3, 4):
            yield where, fields[0], fields[-2], fields[-1]
        else:
            raise ValueError(
                f"{where}: expected 3 columns (query-id, corpus-id, score) or the 4 of TREC (query, 0, document, "
                f"gain), got {len(fields)}: {' '.join(fields)[:80]!r}."
            )


def _fields(path: Path) -> Iterable[tuple[int, list[str]]]:
    if file_kind(path) == ".csv":
        return delimited(path, ",")
    return ((number, line.split("\t") if "\t" in line else line.split()) for number, line in numbered_lines(path))


def _columns(names: list[str]) -> dict[str, int]:
    """Return where query id, document id and gain stand, as far as the names of the columns tell."""
    plain = ["".join(filter(str.isalnum, name.lower())) for name in names]
    places = {role: [place for place, name in enumerate(plain) if name in known] for role, known in _COLUMNS.items()}
    return {role: found[0] for role, found in places.items() if found}


def fetched(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the path that a source is, or where a dataset of the Hub of that id was put."""
    path = Path(source).expanduser()
    if not path.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        return download(str(source), revision)
    return path


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

    return any(
        getattr(task, "ignore_identical_ids", False) and task.metadata.dataset["path"] == "/".join(parts[1:])
        for task in mteb.get_tasks(exclude_superseded=False)
    )


def is_collection(folder: Path) -> bool:
    """Return whether a folder holds documents, queries and judgements in BEIR's or MTEB's layout."""
    return (folder / "qrels").is_dir() or "corpus" in config_names(folder)


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
