"""A user's own tables, with columns of any name: what becomes of them, what is held out, what is said of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from tests.helpers.command import st_wkl

ARTICLES = pd.DataFrame(
    {"nr": [7, 8, 9], "headline": ["Cats", None, "Fish"], "body": ["purr.", "Dogs bark.", "swim."], "price": [1, 2, 3]}
)
DOCUMENTS = {"7": "Cats purr.", "8": "Dogs bark.", "9": "Fish swim."}
ASKED = pd.DataFrame({"uid": ["007", "08"], "words": ["who purrs", "who barks"]})
CLICKS = pd.DataFrame({"uid": ["007", "08", "08"], "nr": [7, 8, 9], "clicks": [3, 12, 0]})
NAMED = {"id": "nr", "text": "body", "title": "headline", "query_id": "uid", "query": "words"}
QRELS = {"train": {"007": {"7": 3}, "08": {"8": 12, "9": 0}}}


def folder_of(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for name, frame in (("articles", ARTICLES), ("asked", ASKED), ("clicks", CLICKS)):
        if kind == "parquet":
            frame.to_parquet(folder / f"{name}.parquet")
        elif kind == "jsonl":
            frame.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
        else:
            frame.to_csv(folder / f"{name}.{kind}", index=False, sep="\t" if kind == "tsv" else ",")
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_folder_of_tables_is_a_collection(kind: str, tmp_path: Path) -> None:
    """The conversion was forty lines that everybody wrote; ids keep their zeros, and numbers meet numbers."""
    made = Collection.load(folder_of(tmp_path / "shop", kind), **NAMED)
    assert (made.name, made.documents, made.qrels) == ("shop", DOCUMENTS, QRELS)
    assert made.queries == {"007": "who purrs", "08": "who barks"}
    assert Collection.load(made.save(tmp_path / "beir")) == made


def test_frames_and_datasets_are_read_alike() -> None:
    """Whoever has a frame has no file, and pandas makes floats of ids as soon as one is missing."""
    floats = CLICKS.astype({"nr": "float64"})
    made = Collection.load(ARTICLES, queries=ASKED, judgements=Dataset.from_pandas(floats), name="shop", **NAMED)
    assert (made.documents, made.qrels) == (DOCUMENTS, QRELS)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_the_separator_of_a_country(separator: str, tmp_path: Path) -> None:
    """Half of Europe's spreadsheets write semicolons into .csv, and one column of all names is none."""
    ASKED.assign(id=[1, 2], text=["a, b", "c"]).to_csv(tmp_path / "all.csv", index=False, sep=separator)
    made = Collection.load(tmp_path / "all.csv", query="words", query_id="uid")
    assert (made.documents, set(made.queries)) == ({"1": "a, b", "2": "c"}, {"007", "08"})


def test_what_was_taken_for_what_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column that is guessed wrongly makes another corpus, and one that is left out may be the text."""
    caplog.set_level("INFO")
    squad = pd.DataFrame({"context": ["Cats purr."], "question": ["who purrs"], "answer": ["cats"]})
    squad.to_csv(tmp_path / "squad.csv", index=False)
    Collection.load(tmp_path / "squad.csv", text="answer")
    assert "is read as documents: text from 'answer', query from 'question'; not used: 'context'" in caplog.text
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.warns(UserWarning, match=r"other\.csv is not read; its columns are a, b"):
        Collection.load(tmp_path, text="answer")


def test_a_query_beside_each_document(tmp_path: Path) -> None:
    """A FAQ is one table; the same question may have several answers, and no ids are needed."""
    faq = pd.DataFrame({"question": ["who purrs", "who barks", "who purrs"], "answer": ["Cats.", "Dogs.", "Lions."]})
    faq.to_csv(tmp_path / "faq.csv", index=False)
    made = Collection.load(tmp_path / "faq.csv")
    assert sorted(made.documents.values()) == ["Cats.", "Dogs.", "Lions."]
    texts = {made.queries[q]: [made.documents[d] for d in found] for q, found in made.qrels["train"].items()}
    assert texts == {"who purrs": ["Cats.", "Lions."], "who barks": ["Dogs."]}


def test_judgements_may_name_queries_by_their_text() -> None:
    """Logs of a search engine have what was typed, not an id."""
    log = pd.DataFrame({"typed": ["who purrs", "who barks", "who swims"], "nr": [7, 8, 9]})
    made = Collection.load(ARTICLES, judgements=log, id="nr", text="body", title="headline", query="typed")
    assert {made.queries[q]: list(found) for q, found in made.qrels["train"].items()} == {
        "who purrs": ["7"],
        "who barks": ["8"],
        "who swims": ["9"],
    }


def shop(queries: int, documents: int) -> dict[str, Any]:
    rows = [{"nr": n, "body": f"text {n}"} for n in range(documents)]
    asked = [{"uid": f"q{n}", "words": f"words {n}"} for n in range(queries)]
    clicks = [{"uid": f"q{n}", "nr": (n + step) % documents} for n in range(queries) for step in (0, documents // 2)]
    named = {"id": "nr", "text": "body", "query_id": "uid", "query": "words"}
    return {"source": pd.DataFrame(rows), "queries": pd.DataFrame(asked), "judgements": pd.DataFrame(clicks), **named}


@pytest.mark.parametrize("by", ["query", "document"])
def test_a_share_is_held_out(by: Any) -> None:
    """Numbers of queries whose answer was trained on say nothing about new documents."""
    first, again, other = (
        Collection.load(**shop(200, 40), test_share=0.2, by=by, seed=seed).qrels for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first["train"].keys() | first["test"].keys() == {f"q{n}" for n in range(200)}
    assert not first["train"].keys() & first["test"].keys()
    assert abs(len(first["test"]) - 40) <= (0 if by == "query" else 10)
    shared = {d for found in first["train"].values() for d in found} & {d for f in first["test"].values() for d in f}
    assert bool(shared) == (by == "query")


def test_what_cannot_be_held_out_is_said() -> None:
    """All queries of one document are one group, of which no part can be for test."""
    with pytest.raises(ValueError, match=r"of 9 queries 0 would be for test\. 9 share documents .*by=\"query\""):
        Collection.load(**shop(9, 1), test_share=0.2, by="document")
    with pytest.raises(ValueError, match="test_share must be from 0 to 1, got 2"):
        Collection.load(**shop(9, 1), test_share=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "number"}, r"There is no column 'number' in the rows \(nr, headline, body, price\)"),
        ({"source": ARTICLES.rename(columns={"body": "prose"}), "text": None}, "No documents are in the rows .*text="),
        ({"queries": None, "judgements": None}, "No queries are in the rows .*queries=, judgements="),
        (
            {"source": pd.concat([ARTICLES, ARTICLES.assign(body="x")])},
            "row 4: the document '7' had another",
        ),
        ({"source": ARTICLES.assign(nr=[None, 8, 9])}, "the document that begins 'Cats purr.' has no id"),
        ({"queries": ASKED.assign(words=["who purrs", " "])}, "row 2: the query has no text"),
        ({"queries": ASKED.assign(uid="08")}, "row 2: the query '08' had another text before"),
        ({"judgements": CLICKS.assign(clicks=[1, 2, 0.5])}, r"row 3, query '08', document '9': the gain .* got 0\.5"),
        (
            {"judgements": pd.concat([CLICKS, CLICKS.assign(clicks=1)])},
            "row 4: query '007' and document '7' were",
        ),
        ({"judgements": CLICKS.assign(nr=[7, 8, 10])}, "1 of absent documents.*'10'"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    """The row, the value and what to do, before anything is scored."""
    named = {**NAMED, **{name: value for name, value in changes.items() if name in NAMED}}
    named = {name: value for name, value in named.items() if value is not None}
    parts = {"queries": ASKED, "judgements": CLICKS, **{k: v for k, v in changes.items() if k not in NAMED}}
    if parts["queries"] is None:
        named = {name: value for name, value in named.items() if not name.startswith("query")}
    with pytest.raises(ValueError, match=message):
        Collection.load(parts.pop("source", ARTICLES), **parts, **named)


def test_an_option_that_there_is_not_is_named() -> None:
    """A misspelt name would leave its column unread."""
    with pytest.raises(TypeError, match=r"no option 'txt', did you mean 'text'|no option 'txt'.*text"):
        Collection.load(ARTICLES, txt="body")


def test_the_command_makes_a_collection_or_a_dataset(tmp_path: Path) -> None:
    """A folder of tables was told that it is no BEIR folder, and nothing else."""
    folder = folder_of(tmp_path / "shop", "csv")
    for line in (["build", folder, "--teacher", "t", "--output", tmp_path / "o"], ["evaluate", "bm25", folder]):
        code, _, err = st_wkl(*line)
        assert code == 1
        assert "articles.csv (nr, headline, body, price)" in err
        assert f"st-wkl import {folder} --output my-collection --id ID_COLUMN --text body" in err
    flags = [word for name, column in NAMED.items() for word in (f"--{name.replace('_', '-')}", column)]
    code, out, err = st_wkl("import", folder, *flags, "--output", tmp_path / "beir", "--test-share", "0.5", "--json")
    assert code == 0, err
    counts = {"documents": 3, "queries": 2, "judged queries of train": 1, "judged queries of test": 1}
    assert json.loads(out) == {"path": str(tmp_path / "beir"), **counts}
    assert Collection.load(tmp_path / "beir").documents == DOCUMENTS
    scored = pd.DataFrame({"ask": ["a", "a"], "reply": ["b", "c"], "rerank": [1.5, -1.0]})
    scored.to_csv(tmp_path / "scored.csv", index=False)
    flags = ["--query", "ask", "--text", "reply", "--score", "rerank"]
    code, out, err = st_wkl("import", tmp_path / "scored.csv", *flags, "--output", tmp_path / "lists")
    assert code == 0, err
    assert out == f"1 queries, 2 pairs, 2 documents are in {tmp_path / 'lists'}.\n"
    made = DistillationDataset.load(tmp_path / "lists")
    assert made.provenance["command"].startswith("st-wkl import scored.csv --output lists --query ask")
    code, _, err = st_wkl("import", tmp_path / "scored.csv", *flags, "--output", tmp_path / "x", "--test-share", "0.1")
    assert (code, "--test-share is for a corpus, and score for" in err) == (1, True)
