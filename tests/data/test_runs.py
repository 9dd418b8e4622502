"""Run files, fused lists and the datasets of others: ids, order and origin survive, and nothing vanishes silently."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import Candidate, Candidates
from st_wkl.data.collection import Collection
from st_wkl.data.runs import hard_negative_candidates, read_run, reciprocal_rank_fusion, write_run

COLLECTION = Collection(
    "mine",
    {"1": "Cats purr.", "2": "Dogs bark.", "3": "Birds sing.", "4": "Fish swim."},
    {"q1": "who purrs", "q2": "who sings"},
    {"train": {"q1": {"1": 1}, "q2": {"3": 1}}},
)


def ranked(source: str, **lists: str) -> Candidates:
    """Make candidates from space-separated document ids, best first."""
    return {
        query_id: [Candidate(key, 1 / rank, rank, source) for rank, key in enumerate(ids.split(), 1)]
        for query_id, ids in lists.items()
    }


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_runs_read_back(tmp_path: Path, name: str) -> None:
    """A run that was written and read is the same to the last digit, and equal runs are equal files."""
    candidates = ranked("bm25", q1="1 2 3", q2="3 1")
    path = write_run(candidates, tmp_path / name)
    assert read_run(path, COLLECTION) == candidates
    assert read_run(path, top_k=1, source="mine")["q1"] == [Candidate("1", 1.0, 1, "mine")]
    assert write_run(candidates, tmp_path / f"again.{name}").read_bytes() == path.read_bytes()


def test_origins_read_back(tmp_path: Path) -> None:
    """What a list was fused from is part of a dataset's provenance, whether or not a file lay between."""
    dense = ranked("dense:my model%20", q1="2 3", q2="1")
    fused = reciprocal_rank_fusion(ranked("bm25", q1="1 2 3", q2="3 1"), dense)
    twice = reciprocal_rank_fusion(fused, ranked("日本 语\u00a0x", q1="3"))
    for candidates in (dense, fused, twice, ranked("", q1="1"), ranked("origins=x", q1="1")):
        path = write_run(candidates, tmp_path / "run.gz")
        assert read_run(path, COLLECTION) == candidates
    assert read_run(path, source="mine")["q1"] == [Candidate("1", 1.0, 1, "mine")]
    (tmp_path / "cut").write_text('q1 Q0 1 1 1.0 origins=["rrf",[["bm25",1\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cut, document '1': the tag .* does not say where"):
        read_run(tmp_path / "cut")


def test_runs_of_other_programs(tmp_path: Path) -> None:
    """Scores decide, as in trec_eval; lines come in any order, with tabs, and with ranks from 0."""
    path = tmp_path / "run"
    path.write_text("q1 Q0 2 1 1.5 x\nq1\tQ0\t1\t0\t1.5\tx\n\nq1 Q0 3 7 2e3 x\n", encoding="utf-8")
    assert [(hit.document_id, hit.rank) for hit in read_run(path)["q1"]] == [("3", 1), ("1", 2), ("2", 3)]


def test_foreign_entries_are_counted(tmp_path: Path) -> None:
    """A run of another version of the collection must not shrink the lists silently."""
    path = write_run(ranked("x", q1="1 gone", q9="1"), tmp_path / "run")
    with pytest.warns(UserWarning, match="2 entries of .* 'mine' does not hold.*document 'gone' in line 2"):
        assert list(read_run(path, COLLECTION)) == ["q1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 2 2 1.0", "line 2: expected 6 columns.*got 5"),
        ("q1 Q0 2 2 high x", "line 2: the score is 'high'"),
        ("q1 Q0 2 2 nan x", "line 2: the score is 'nan'"),
        ("q1 Q0 1 2 1.0 x", "line 2: query 'q1' has document '1' before"),
    ],
)
def test_broken_runs(tmp_path: Path, line: str, message: str) -> None:
    """The line is named."""
    path = tmp_path / "run"
    path.write_text(f"q1 Q0 1 1 2.0 x\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_run(path)


def test_truncated_and_unwritable_runs(tmp_path: Path) -> None:
    """A gzip file without its end is an error, and an id with a space is refused before the file is there."""
    path = write_run(ranked("x", q1="1 2 3"), tmp_path / "run.gz")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read beyond line"):
        read_run(path)
    with pytest.raises(ValueError, match="'a b' is empty or has white space"):
        write_run({"a b": ranked("x", q="1")["q"]}, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["run.gz"]
    assert gzip.decompress(write_run({}, tmp_path / "empty.gz").read_bytes()) == b""


def test_fusion_by_hand() -> None:
    """Sums of 1 / (60 + rank), with every list's word kept."""
    bm25, dense = ranked("bm25", q1="1 2 3"), ranked("dense", q1="3 1", q2="4")
    fused = reciprocal_rank_fusion(bm25, dense, top_k=2)
    assert [hit.document_id for hit in fused["q1"]] == ["1", "3"]
    assert fused["q1"][0].score == pytest.approx(1 / 61 + 1 / 62)
    assert fused["q1"][1].origins == (Candidate("3", 1 / 3, 3, "bm25"), Candidate("3", 1.0, 1, "dense"))
    assert [(hit.document_id, hit.rank, hit.source) for hit in fused["q2"]] == [("4", 1, "rrf")]
    weighted = reciprocal_rank_fusion(bm25, dense, weights=[1, 100])
    assert weighted["q1"][0].document_id == "3"
    twice = {"q1": [*bm25["q1"], *bm25["q1"]]}
    assert [hit.score for hit in reciprocal_rank_fusion(twice)["q1"]] == [1 / 61, 1 / 62, 1 / 63]
    for options, message in (({"k": -1}, "k must be"), ({"weights": [1]}, "weights must be 2 numbers")):
        with pytest.raises(ValueError, match=message):
            reciprocal_rank_fusion(bm25, dense, **options)
    with pytest.raises(ValueError, match="nothing to fuse"):
        reciprocal_rank_fusion()


class Constant:
    """A teacher that tells documents apart by their length."""

    identity = {"model": "length"}  # noqa: RUF012

    def score(self, pairs: Any) -> Any:
        """Score by length."""
        return [float(len(document)) for _, document in pairs]


@pytest.mark.filterwarnings("ignore")
def test_fused_sources_reach_the_provenance() -> None:
    """Readers of the dataset must learn of bm25 and dense, not of "rrf" alone."""
    fused = reciprocal_rank_fusion(ranked("bm25", q1="2 3", q2="1"), ranked("dense", q1="3"))
    import numpy as np

    class Teacher(Constant):
        def score(self, pairs: Any) -> Any:
            return np.array(super().score(pairs), dtype=np.float32)

    dataset = DistillationDatasetBuilder(COLLECTION, Teacher(), candidates=fused, store=":memory:").build(False)
    assert dataset.provenance["candidates"] == {"sources": {"bm25": 3, "dense": 1}}


def test_hard_negative_datasets() -> None:
    """Lists or columns, ids or texts, several rows of one query: the layouts that the Hub has."""
    expected = [Candidate("2", -1.0, 1, "hard-negatives"), Candidate("4", -2.0, 2, "hard-negatives")]
    texts = {"query": "Who  purrs", "positive": "Cats purr.", "negative_1": "Dogs bark.", "negative_2": "fish swim."}
    for rows in (
        [{"query": "q1", "negatives": ["2", "4"]}],
        Dataset.from_list([{"query": "q1", "negatives": [2, 4]}]),
        [texts],
        [{"query": "q1", "negative": "2"}, {"query": "q1", "negative": "4"}, {"query": "q1", "negative": None}],
    ):
        assert hard_negative_candidates(rows, COLLECTION) == {"q1": expected}
    named = hard_negative_candidates([{"q": "q1", "docs": ["4"]}], COLLECTION, query="q", negatives="docs", source="x")
    assert named == {"q1": [Candidate("4", -1.0, 1, "x")]}


def test_hard_negatives_that_are_not_ours() -> None:
    """Counted if some, an error if all: a wrong collection must not end in an empty dataset."""
    rows = [{"query": "q1", "negatives": ["2", "gone"]}, {"query": "who asks", "negatives": ["2"]}]
    with pytest.warns(UserWarning, match="1 queries and 1 documents of the rows are not in 'mine'"):
        assert list(hard_negative_candidates(rows, COLLECTION)) == ["q1"]
    with pytest.raises(ValueError, match="None of the 1 rows has a query and a document of 'mine'"):
        hard_negative_candidates([{"query": "q1", "negatives": ["gone"]}], COLLECTION)
    with pytest.raises(ValueError, match="no column of negatives"):
        hard_negative_candidates([{"query": "q1"}], COLLECTION)
    with pytest.raises(ValueError, match="has no column 'query'"):
        hard_negative_candidates([{"q": "q1", "negatives": ["2"]}], COLLECTION)
