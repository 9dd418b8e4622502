"""Scores that others have made: every layout to the same lists, bad rows by their place, and back again."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from st_wkl.data import grouping
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.tables import tables

pytestmark = pytest.mark.filterwarnings("ignore")

QUERIES = {"q1": "who purrs", "q2": "who barks"}
DOCUMENTS = {"d1": "Cats purr.", "d2": "Dogs bark.", "d3": "Fish swim."}
# query, document, score, gain
PAIRS = [
    ("q1", "d1", 4.5, 1),
    ("q1", "d2", -2.0, 0),
    ("q1", "d3", -3.5, 0),
    ("q2", "d2", 5.25, 1),
    ("q2", "d1", 0.5, 0),
]
LISTS = [("who purrs", [("Cats purr.", 4.5, 1), ("Dogs bark.", -2.0, 0), ("Fish swim.", -3.5, 0)])]
LISTS += [("who barks", [("Dogs bark.", 5.25, 1), ("Cats purr.", 0.5, 0)])]
COLLECTION = Collection("three", DOCUMENTS, QUERIES, {"train": {"q1": {"d1": 1}, "q2": {"d2": 1}}})


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(made: DistillationDataset, labels: bool = True) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Return queries and their documents with score and gain, all as text and numbers."""
    lists = made.to_lists(copied=True)
    parts = ("documents", "scores", "labels") if labels else ("documents", "scores")
    return [(row["query"], list(zip(*(row[name] for name in parts), strict=True))) for row in lists]


def of(side: str, query: str) -> dict[str, list[Any]]:
    found = [(d, s) for q, d, s, gain in PAIRS if q == query and bool(gain) == (side == "pos")]
    return {"ids": [d for d, _ in found], "texts": [DOCUMENTS[d] for d, _ in found], "scores": [s for _, s in found]}


def flagembedding(folder: Path) -> Any:
    rows = []
    for query, text in QUERIES.items():
        row: dict[str, Any] = {"query": text, "prompt": "Represent"}
        for side in ("pos", "neg"):
            row |= {side: of(side, query)["texts"], f"{side}_scores": of(side, query)["scores"]}
        rows.append(row)
    return jsonl(folder / "train.jsonl", rows)


def tevatron(folder: Path) -> Any:
    rows = []
    for query, text in QUERIES.items():
        row: dict[str, Any] = {"query_id": query, "query": text}
        for side, name in (("pos", "positive"), ("neg", "negative")):
            found = of(side, query)
            passages = zip(found["ids"], found["texts"], strict=True)
            row[f"{name}_passages"] = [
                dict(zip(("title", "text"), t.split(" ", 1), strict=True), docid=d) for d, t in passages
            ]
            row[f"{name}_scores"] = found["scores"]
        rows.append(row)
    return jsonl(folder / "train.jsonl.gz", rows)


def pylate(folder: Path) -> Any:
    """As some have it on the Hub: lists written as text, whole numbers for ids of queries, several files a table."""
    train = [
        {
            "query_id": int(query[1:]),
            "document_ids": str([d for q, d, *_ in PAIRS if q == query]),
            "scores": str([s for q, _, s, _ in PAIRS if q == query]),
        }
        for query in QUERIES
    ]
    for number, row in enumerate(train):
        pl.DataFrame([row]).write_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    pl.DataFrame([{"query_id": int(key[1:]), "text": text} for key, text in QUERIES.items()]).write_parquet(
        folder / "q.parquet"
    )
    jsonl(folder / "documents.jsonl", [{"document_id": key, "text": text} for key, text in DOCUMENTS.items()])
    return folder


def n_tuples(folder: Path) -> Any:
    """As `mine_hard_negatives(output_format="n-tuple", output_scores=True)` writes, with lists of different lengths."""
    rows = []
    for query, text in QUERIES.items():
        negatives = [*of("neg", query)["texts"], None][:2]
        row = {
            "anchor": text,
            "answer": of("pos", query)["texts"][0],
            "negative_1": negatives[0],
            "negative_2": negatives[1],
        }
        rows.append(row | {"scores": of("pos", query)["scores"] + of("neg", query)["scores"]})
    return Dataset.from_list(rows)


def labelled_lists(folder: Path) -> Any:
    rows = []
    for query, text in QUERIES.items():
        found = [(DOCUMENTS[d], s, gain) for q, d, s, gain in PAIRS if q == query]
        columns = zip(("positive", "scores", "labels"), map(list, zip(*found, strict=True)), strict=True)
        rows.append({"query": text, **dict(columns)})
    return Dataset.from_list(rows).to_iterable_dataset()


def triples(folder: Path) -> Any:
    rows = [(QUERIES[q], DOCUMENTS[d], s, g) for q, d, s, g in PAIRS]
    pd.DataFrame(rows, columns=["question", "passage", "score", "relevance"]).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def frame(folder: Path) -> Any:
    names = ["query", "document", "score", "label"]
    return pl.DataFrame([(QUERIES[q], DOCUMENTS[d], s, g) for q, d, s, g in PAIRS], schema=names, orient="row")


@pytest.mark.parametrize("write", [flagembedding, tevatron, pylate, n_tuples, labelled_lists, triples, frame])
def test_every_layout_makes_the_same_lists(write: Callable[[Path], Any], tmp_path: Path) -> None:
    """A column taken for another one trains on something else, and nothing would say so."""
    made = DistillationDataset.load(write(tmp_path), teacher="t")
    judged = write is not pylate  # which has no gains
    assert read(made, labels=judged) == [(q, d if judged else [one[:2] for one in d]) for q, d in LISTS]
    assert made.provenance["teacher"] == {"kind": "imported", "model": "t"}
    assert made.provenance["counts"]["pairs"] == 5
    card = (made.save(tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    assert "| Read as | " in card
    assert "raw scores" not in card, "which only their maker knows"


def hard_negatives(folder: Path) -> Any:
    """As sentence-transformers' MS MARCO files: numbers for ids, negatives by the system that found them."""
    rows = [{"qid": 1, "pos": [1], "neg": {"bm25": [2], "tas-b": [3, 2]}}, {"qid": 2, "pos": [2], "neg": {"bm25": [1]}}]
    return jsonl(folder / "hard-negatives.jsonl.gz", rows)


def numbered() -> Collection:
    documents, queries = ({key[1:]: text for key, text in texts.items()} for texts in (DOCUMENTS, QUERIES))
    return Collection("numbered", documents, queries, {"train": {"1": {"1": 2}, "2": {"2": 1, "3": 1}}})


def test_ids_get_texts_judgements_and_scores(tmp_path: Path) -> None:
    """Lists by id say nothing alone; the gain is the collection's, a positive without a score is not made up."""
    scores = pd.DataFrame([(q[1:], d[1:], s) for q, d, s, _ in PAIRS], columns=["query_id", "corpus_id", "score"])
    made = DistillationDataset.load(hard_negatives(tmp_path), collection=numbered(), scores=scores)
    (first, documents), second = LISTS
    assert read(made) == [(first, [("Cats purr.", 4.5, 2), *documents[1:]]), second]
    assert made.provenance["dropped"] == {"pairs that came again": 1}
    assert made.train["document_ids"][0] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"has no scores.*Give those of a reranker"):
        DistillationDataset.load(hard_negatives(tmp_path), collection=numbered())
    with pytest.raises(ValueError, match=r"Query '2' .* and document '1' .* have no score among the others"):
        DistillationDataset.load(hard_negatives(tmp_path), collection=numbered(), scores=scores[:4])
    made = DistillationDataset.load(hard_negatives(tmp_path), collection=numbered(), scores=scores[:4], missing="drop")
    assert made.provenance["dropped"]["pairs without a score"] == 1


def test_a_run_is_scores_of_a_collection(tmp_path: Path) -> None:
    """What a reranker wrote for trec_eval is a teacher's work."""
    lines = "".join(f"{q} Q0 {d} {rank} {s} reranker\n" for rank, (q, d, s, _) in enumerate(PAIRS, 1))
    (tmp_path / "run.trec").write_text(lines)
    assert read(DistillationDataset.load(tmp_path / "run.trec", collection=COLLECTION)) == LISTS
    with pytest.raises(ValueError, match=r"names queries by id.*--collection"):
        DistillationDataset.load(tmp_path / "run.trec")
    (tmp_path / "run.trec").write_text(lines + "q1 Q0 d9 4 -5.0 reranker\n")
    with pytest.raises(ValueError, match=r"run\.trec, line 6: query 'q1', document 'd9'.*no text"):
        DistillationDataset.load(tmp_path / "run.trec", collection=COLLECTION)


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Return the pairs as rows with ids, the third with other values."""
    made = [
        {"query_id": q, "query": QUERIES[q], "docid": d, "document": DOCUMENTS[d], "score": s} for q, d, s, _ in PAIRS
    ]
    made[2] |= changes
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, r"line 3: query 'q1', document 'd3', score nan: pairs without a finite score"),
        ({"score": 1e300}, r"line 3: .*score 1e\+300: pairs without a finite score"),
        ({"score": None}, r"line 3: .*pairs without a finite score"),
        ({"score": "high"}, r"line 3: 'high' in 'score' is no number"),
        ({"document": None}, "line 3: .*pairs without document text"),
        ({"document": " "}, "line 3: .*pairs without document text"),
        ({"query": ""}, "line 3: .*pairs without query text"),
        ({"query_id": None}, "line 3: .*pairs without query id"),
        (
            {"document": "Birds sing.", "docid": "d1"},
            r"line 3: the document id 'd1' has another text before than 'Birds",
        ),
        ({"query": "who sings"}, "line 3: the query id 'q1' has another text before"),
        (
            {"docid": "d2", "document": "Dogs bark."},
            r"Query 'q1' \('who purrs'\) and document 'd2' .*two scores, -2.0 and -3",
        ),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """NaN and empty texts train on nothing or destroy weights; of two values one would be lost."""
    with pytest.raises(ValueError, match=message):
        DistillationDataset.load(jsonl(tmp_path / "rows.jsonl", rows(**changes)))


@pytest.mark.parametrize(
    "changes", [{"score": None}, {"document": ""}, {"query": None}, {"docid": None, "document": None}]
)
def test_what_is_missing_is_left_out_if_told(changes: dict[str, Any], tmp_path: Path) -> None:
    """One bad row in a hundred million must not be the end, and must be counted."""
    with pytest.warns(UserWarning, match="Left out: 1 pairs without"):
        made = DistillationDataset.load(jsonl(tmp_path / "rows.jsonl", rows(**changes)), missing="drop")
    assert [len(ids) for ids in made.train["document_ids"]] == [2, 2]
    assert sum(made.provenance["dropped"].values()) == 1


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    """Copies under other ids become negatives of themselves; pairs that come again would count twice."""
    twice = [*rows(), *rows()[:1], {**rows()[0], "query_id": "q3"}, {**rows()[1], "score": -2.0001}]
    path = jsonl(tmp_path / "rows.jsonl", twice)
    with pytest.warns(UserWarning, match="1 queries with the text of another id") as said:
        made = DistillationDataset.load(path)
    told = " ".join(str(one.message) for one in said)
    assert "2 pairs that came again" in told
    assert "Who made the scores is not said" in told
    assert "No list says what is relevant" in told
    assert "1 lists of one document" in told
    assert made.train["scores"][0] == [4.5, -2.0, -3.5], "the first of two that differ by rounding"


def test_activated_scores_are_said(tmp_path: Path) -> None:
    """After a sigmoid all good documents are 1.0, and a student learns no order from them."""
    frame = pd.DataFrame({"query": ["a"] * 3, "text": ["b", "c", "d"], "score": [0.99, 0.5, 0.0]})
    with pytest.warns(UserWarning, match="All teacher scores lie between 0 and 1, as after a sigmoid.*raw logits"):
        DistillationDataset.load(frame)


@pytest.mark.parametrize(
    "ids", [[1, 2], [1.0, 2.0], ["007", "08"], pd.to_datetime(["2021-05-01", "2021-05-02"]).date, [True, False]]
)
def test_ids_of_any_type_become_text(ids: Any, tmp_path: Path) -> None:
    """Pandas makes 1.0 of 1 as soon as a cell is empty, and other readers a number of 007."""
    frame = pd.DataFrame({"query_id": ids, "query": ["a", "b"], "docid": ids, "text": ["c", "d"], "score": [1.5, 2]})
    expected = [str(key).lower().removesuffix(".0") for key in ids]
    made = DistillationDataset.load(frame)
    assert (made.train["query_id"][:], made.documents["document_id"][:]) == (expected, expected)
    path = tmp_path / "frame.parquet"
    frame.to_parquet(path)
    assert DistillationDataset.load(path).train["query_id"][:] == expected


def test_a_margin_is_no_score() -> None:
    """(query, positive, negative, score) of MarginMSE's files: one number for two documents."""
    frame = pd.DataFrame({"query": ["a"], "positive": ["b"], "negative": ["c"], "score": [4.0]})
    with pytest.raises(ValueError, match=r"row 1: 'score' holds one number, 4\.0, for 2 documents\. A difference"):
        DistillationDataset.load(frame)


def test_columns_of_any_name_and_what_was_found(tmp_path: Path) -> None:
    """A message that names no column leaves the user guessing."""
    frame = pl.DataFrame({"ask": ["a", "a"], "reply": ["b", "c"], "rerank": [1.5, -1.0]})
    with pytest.raises(ValueError, match=r"the rows \(ask, reply, rerank\)\. Lists have a query.*--query"):
        DistillationDataset.load(frame)
    made = DistillationDataset.load(frame, query="ask", text="reply", score="rerank")
    assert read(made, labels=False) == [("a", [("b", 1.5), ("c", -1.0)])]
    with pytest.raises(ValueError, match="There is no column 'reranker'"):
        DistillationDataset.load(frame, score="reranker")
    with pytest.raises(FileNotFoundError, match=r"holds no file that is read\. Give \.jsonl"):
        DistillationDataset.load(tmp_path)
    with pytest.raises(TypeError, match="int is nothing whose rows can be read"):
        DistillationDataset.load(3)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    """The scores beside MS MARCO's hard negatives are a pickle, which is no file to load; overlooked is worse."""
    jsonl(tmp_path / "rows.jsonl", rows())
    (tmp_path / "scores.pkl.gz").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"scores\.pkl\.gz cannot be read: unpack it, or write its rows"):
        assert len(DistillationDataset.load(tmp_path)) == 2
    with pytest.raises(ValueError, match=r"scores\.pkl\.gz cannot be read"):
        DistillationDataset.load(tmp_path / "scores.pkl.gz")


def test_the_row_of_another_type_is_named(tmp_path: Path) -> None:
    """One text where a list belongs, in the middle of many rows: the first row is not to blame."""
    row = {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [1.5], "neg_scores": [0.5, -2.0]}
    found = [row | {"query": f"q{number}"} for number in range(9)]
    found[4]["pos"] = "a text"
    with pytest.raises(ValueError, match=r"line 5: the field 'pos' holds 'a text', and other rows hold another type"):
        DistillationDataset.load(jsonl(tmp_path / "rows.jsonl", found))


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    """What the Hub's cache holds lies below `.cache`, and none of it would have been found."""
    folder = tmp_path / ".cache" / "set"
    (folder / ".git").mkdir(parents=True)
    for file in (folder / "rows.csv", folder / ".git" / "old.csv"):
        file.write_text("query,document,score\na,b,1.5\na,c,-2\n")
    assert [Path(table.name).name for table in tables(folder)] == ["rows.csv"]


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    """Half a download must not become half a dataset."""
    whole = jsonl(tmp_path / "rows.jsonl.gz", rows() * 200).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read beyond line"):
        DistillationDataset.load(tmp_path)


def test_pairs_in_any_order_are_grouped_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pairs come from many files in any order; what does not fit memory at once must end as what does."""
    draw = np.random.default_rng(0)
    pairs = [(f"query {q}", f"document {d}", float(q + d)) for q in range(50) for d in range(7)]
    shuffled = [pairs[place] for place in draw.permutation(len(pairs))]
    frame = pd.DataFrame(shuffled, columns=["query", "document", "score"])
    whole = DistillationDataset.load(frame)
    monkeypatch.setattr(grouping, "_RUN", 20)
    monkeypatch.setattr("st_wkl.data.tables._BYTES", 600)
    parts = DistillationDataset.load({"one": frame[:100], "two": frame[100:]})
    assert read(parts) == read(whole)
    expected: dict[str, list[Any]] = {}
    for query, document, score in shuffled:
        expected.setdefault(query, []).append((document, score))
    assert read(whole, labels=False) == list(expected.items())


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(str.strip)


@st.composite
def datasets(draw: Any) -> DistillationDataset:
    """Return lists as the builder makes them: positives first, each document and query named by some list."""
    texts = draw(st.lists(TEXTS, min_size=2, max_size=8))
    keys = draw(st.lists(TEXTS, min_size=len(texts), max_size=len(texts), unique=True))
    score = st.floats(-1e6, 1e6, width=32)
    asked = draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    train: dict[str, list[Any]] = {name: [] for name in features("train")}
    used: dict[str, None] = {}
    for query, _ in asked:
        chosen = draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
        gains = sorted((draw(st.integers(0, 3)) for _ in chosen), key=lambda gain: gain <= 0)
        row = (query, chosen, [draw(score) for _ in chosen], gains)
        for name, value in zip(train, row, strict=True):
            train[name].append(value)
        used |= dict.fromkeys(chosen)
    text_of = dict(zip(keys, texts, strict=True))
    tables = {"train": train, "queries": dict(zip(("query_id", "text"), zip(*asked, strict=True), strict=True))}
    tables["documents"] = {"document_id": list(used), "text": [text_of[key] for key in used]}
    return DistillationDataset(
        **{name: Dataset.from_dict(columns, features=features(name)) for name, columns in tables.items()}
    )


@settings(max_examples=30, deadline=None)
@given(made=datasets(), layout=st.sampled_from(["flagembedding", "pylate"]))
def test_there_and_back_again(made: DistillationDataset, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whoever trains elsewhere for a while comes back to the same lists, ids, texts, scores and gains."""
    folder = tmp_path_factory.mktemp("there") / "lists"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = DistillationDataset.load(made.save(folder, layout=layout))
    for name in ("train", "queries", "documents"):
        assert getattr(back, name).to_dict() == getattr(made, name).to_dict()


def test_the_layouts_are_what_others_read(tmp_path: Path) -> None:
    """FlagEmbedding takes these five fields; PyLate would tokenise a column of gains."""
    made = DistillationDataset.load(frame(tmp_path))
    (line, *_) = (made.save(tmp_path / "fe", layout="flagembedding") / "train.jsonl").read_text().splitlines()
    fields = {"query": "who purrs", "pos": ["Cats purr."], "neg": ["Dogs bark.", "Fish swim."]}
    fields |= {"pos_scores": [4.5], "neg_scores": [-2.0, -3.5]}
    assert {name: json.loads(line)[name] for name in fields} == fields
    tables = made.save(tmp_path / "pylate", layout="pylate")
    assert pl.read_parquet(tables / "train.parquet").columns == ["query_id", "document_ids", "scores"]
    with pytest.raises(ValueError, match="layout is 'colbert'; it has to be one of flagembedding, pylate"):
        made.save(tmp_path / "other", layout="colbert")
