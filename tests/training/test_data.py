"""What cannot be trained on is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from st_wkl import distill

LISTS: dict[str, Any] = {"query": ["q"], "documents": [["a", "b"]], "scores": [[1.0, 0.0]], "labels": [[1, 0]]}


def renamed(old: str, new: str, **more: Any) -> Dataset:
    return Dataset.from_dict({new if name == old else name: column for name, column in LISTS.items()} | more)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetDict(test=Dataset.from_dict(LISTS)), r"is a DatasetDict; .* Pass one split, such as dataset\['test'\]"),
        ("some/folder", r"is a str; .* DistillationDataset\.load\('some/folder'\)"),
        (Path("some"), r"is a PosixPath; .*load\('some'\)"),
        ([{"query": "q"}], r"is a list; .*Dataset\.from_list\(rows\)"),
        (None, "is a NoneType; it has to be a DistillationDataset"),
        (
            renamed("documents", "passages"),
            r"'passages' holds lists of string.*rename_column\('passages', 'documents'\)",
        ),
        (renamed("scores", "teacher"), r"'teacher' holds lists of float64.*rename_column\('teacher', 'scores'\)"),
        (renamed("query", "question"), r"need a column 'query'; .*rename_column\('question', 'query'\)"),
        (renamed("documents", "document_ids"), "holds ids, no texts"),
    ],
)
def test_other_datasets_are_named(dataset: Any, message: str, tmp_path: Path) -> None:
    """A DatasetDict ended in a KeyError of the trainer, a path in one of str, after the student was loaded."""
    with pytest.raises(TypeError, match=message):
        distill("there/is-no-such-student", dataset, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
