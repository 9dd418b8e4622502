"""The dataset card: what the tables hold, who scored what, what was left out, and how to make it again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from st_wkl.data.report import TeacherReport
from st_wkl.markdown import is_hub_id, listed, markdown_block, markdown_cell, markdown_text, without_local_paths

_TABLES = ("train", "queries", "documents")
_TAGS = ("sentence-transformers", "st-wkl", "knowledge-distillation", "distillation")


def dataset_card(
    provenance: Mapping[str, Any], *, rows: int, documents: int, preferences: bool, contents: str, scores: str = ""
) -> str:
    """Return the README.md of a distillation dataset, from its provenance and its sizes.

    Beside what the builder writes, three entries of the provenance are read, which only a person knows: `license` (of
    the dataset, an id of the Hub such as `"cc-by-nc-4.0"`), `teacher_license`, and `command` (that makes it again).
    Paths of this machine are cut to their last part.

    Args:
        provenance: Where the dataset comes from.
        rows: Its candidate lists.
        documents: Its different documents.
        preferences: Whether a pairwise teacher took part.
        contents: Hash of the dataset's files. `load_dataset` caches a folder by its name and by what this card says of
            it, not by the files: without the hash in the configs' `description` it would serve the old data after a
            folder was built again.
        scores: How the scores lie, see `scores_by_label`.

    Example:
        >>> card = dataset_card({"license": "mit"}, rows=809, documents=5_183, preferences=False, contents="f00")
        >>> "809 candidate lists over 5,183 documents" in card
        True
    """
    collection, teacher = _name(provenance.get("collection"), "a collection"), _teacher_name(provenance)
    data: dict[str, Any] = {"tags": list(_TAGS), "task_categories": ["text-retrieval"]}
    if provenance.get("license"):
        data["license"] = provenance["license"]
    if is_hub_id(collection):
        data["source_datasets"] = [collection]
    data["configs"] = [
        {
            "config_name": name,
            **({"default": True} if name == "train" else {}),
            "description": f"contents {contents}",
            "data_files": [{"split": "train", "path": f"{name}.parquet"}],
        }
        for name in _TABLES
    ]
    made = "\n".join(f"| {name} | {markdown_cell(value)} |" for name, value in _made(provenance) if value)
    parts = [
        f"# {markdown_text(collection)}, scored by {markdown_text(teacher)}",
        f"{rows:,} candidate lists over {documents:,} documents for ranking distillation, "
        f"with the {'' if provenance.get('imported') else 'raw '}scores of the teacher. Made with st_wkl.",
        "## Usage",
        _USE,
        _COLUMNS + (_PREFERENCES if preferences else "") + _unjudged(provenance),
    ]
    teacher_told = [_report(provenance), markdown_block("text", scores) if scores else ""]
    if any(teacher_told):
        parts += ["## The teacher", *filter(None, teacher_told)]
    if leaks := _leaks(provenance):
        parts.append(leaks)
    if provenance.get("command"):
        command = str(provenance["command"]).strip()
        language = "python" if command.startswith("Distillation") else "bash"
        parts += ["## How it was made", markdown_block(language, command)]
    if made:
        told = f"| | |\n| :-- | :-- |\n{made}"
        parts.append(
            f"<details>\n<summary>Collection, teacher, selection, counts, versions</summary>\n\n{told}\n\n</details>"
        )
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    text = "\n\n".join(parts)
    return f"---\n{front}---\n\n{without_local_paths(text, Path.cwd())}\n"


_COLUMNS = inspect.cleandoc("""
    | config | columns |
    | :-- | :-- |
    | `train` | `query_id`, `document_ids`, `scores` (of the teacher), `labels` (judged gain, 0 where unjudged) |
    | `queries` | `query_id`, `text` |
    | `documents` | `document_id`, `text` |
    """)

_PREFERENCES = (
    "\n\nThe `train` config also has `preferences`: a pairwise teacher's `probability` that document `first` of the "
    "row is better than document `second`; places count from 0."
)


def _unjudged(provenance: Mapping[str, Any]) -> str:
    counts = provenance.get("counts") or {}
    if not (number := counts.get("unjudged_queries")):
        return ""
    margin = (provenance.get("selection") or {}).get("positive_margin")
    told = f"\n\n{number:,} queries have no judged positive"
    if taught := counts.get("teacher_positives"):
        told += (
            f"; in the lists of {taught:,} the label 1 is the teacher's best document, ahead of the next by {margin:g}"
        )
    return f"{told}. Labels are 0 for all else that nobody has judged."


_USE = inspect.cleandoc("""
    ```python
    from st_wkl.data import DistillationDataset

    dataset = DistillationDataset.load("path/to/this/folder").to_columns()
    ```

    or with sentence-transformers alone (`scores` only: a collator takes the first label column that it finds):

    ```python
    from datasets import load_dataset
    from sentence_transformers.util import resolve_ids

    train, queries, documents = (
        load_dataset("path/to/this/folder", name, split="train") for name in ("train", "queries", "documents")
    )
    train.set_transform(
        resolve_ids({"query_id": queries, "document_ids": documents}, keep_columns=("scores",), output_format="lists")
    )
    ```
    """)


def _made(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table on the origin."""
    collection, teacher = provenance.get("collection"), provenance.get("teacher")
    if isinstance(collection, Mapping):
        yield "Collection", listed(_name(collection, "unknown"), {**collection, "split": provenance.get("split")})
    if isinstance(teacher, Mapping):
        licence = {"licence": provenance.get("teacher_license") or "not stated here, see the model"}
        yield "Teacher", listed(_teacher_name(provenance), {**teacher, **licence})
    elif teacher:  # several teachers: whatever describes them
        yield "Teachers", listed(None, {"teacher": str(teacher)})
    yield "Read as", markdown_text(provenance.get("imported") or "")  # scores that others have made
    yield "Candidates", listed(None, provenance.get("candidates") or {})
    selection = {"num_negatives": provenance.get("num_negatives"), **(provenance.get("selection") or {})}
    yield "Selection", listed(None, selection)
    yield "Preferences", listed(None, provenance.get("preferences") or {})
    yield "Counts", listed(None, provenance.get("counts") or {})
    lost = {what.replace("_", " "): count for what, count in (provenance.get("dropped") or {}).items() if count}
    yield "Left out", listed(None, lost)
    yield "Versions", listed(None, provenance.get("versions") or {})


def _report(provenance: Mapping[str, Any]) -> str:
    """Return the teacher report in words, if the provenance holds a whole one."""
    try:
        report = TeacherReport(**(provenance.get("report") or {}))
    except TypeError:  # made by hand, or by another version
        return ""
    return str(report)


def _leaks(provenance: Mapping[str, Any]) -> str:
    leaks = provenance.get("leaks") or {}
    if not leaks:
        return ""
    return (
        f"## Compared with {markdown_text(str(leaks['test']))}\n\n"
        f"{leaks['queries_with_shared_documents']:,} of {leaks['test_queries']:,} "
        f"test queries have a relevant document that is a positive here ({leaks['share_of_judgements']:.1%} of the "
        f"relevant judgements); {leaks['equal_queries']:,} are queries of this dataset too, {leaks['near_queries']:,} "
        "nearly one. Results on that split say little about other documents, as far as these numbers are not 0."
    )


def _name(value: Any, otherwise: str) -> str:
    return str(value.get("name") or otherwise) if isinstance(value, Mapping) else str(value or otherwise)


def _teacher_name(provenance: Mapping[str, Any]) -> str:
    teacher = provenance.get("teacher")
    return str(teacher.get("model") or "a teacher") if isinstance(teacher, Mapping) else "several teachers"
