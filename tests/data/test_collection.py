"""Collections: what is read, what is converted, and what stops with a name and a remedy."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from st_wkl.data.collection import Collection, document_text
from st_wkl.training.dev import GradedEvaluator

DOCUMENTS = [{"_id": "d1", "title": "Cats", "text": "purr"}, {"_id": "d2", "title": "", "text": "Dogs bark"}]
QUERIES = [{"_id": "q1", "text": "which animal purrs"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"


def beir(
    folder: Path,
    documents: list[Any] = DOCUMENTS,
    queries: list[Any] = QUERIES,
    qrels: str = QRELS,
    split: str = "train",
) -> Path:
    """Write a BEIR folder."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "qrels" / f"{split}.tsv").write_text(qrels, encoding="utf-8")
    return folder


def mteb_folder(folder: Path, qrels_name: str = "default", queries_name: str = "queries", split: str = "test") -> Path:
    """Write a folder in MTEB's layout, as the Hub holds it."""
    folder.mkdir(parents=True)
    rows: dict[str, list[Any]] = {"corpus": DOCUMENTS, queries_name: QUERIES}
    rows[qrels_name] = [{"query-id": "q1", "corpus-id": "d1", "score": 2.0}]
    configs = []
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
        part = split if name == qrels_name else name
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: {part}\n    path: {name}.jsonl\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n# A collection\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "documents", "splits"),
    [
        ("scifact", 5183, {"train": (809, 919), "test": (300, 339)}),
        ("nfcorpus", 3633, {"train": (2590, 110575), "dev": (324, 11385), "test": (323, 12334)}),
    ],
)
def test_real_collections_are_read_completely(
    shared_data: Path, name: str, documents: int, splits: dict[str, tuple[int, int]]
) -> None:
    """Every document, judged query and judgement of a published collection arrives, under its own split."""
    collection = Collection.load(shared_data / name)
    found = {split: (len(judged), sum(map(len, judged.values()))) for split, judged in collection.qrels.items()}
    assert (collection.name, len(collection.documents), found) == (name, documents, splits)


def test_document_text_is_mtebs(tmp_path: Path) -> None:
    """Training, scoring and evaluation must see one and the same text, or the student learns another format."""
    rows = [*DOCUMENTS, {"_id": "d3", "title": None, "text": " body "}, {"_id": "d4", "text": "no title"}]
    documents = Collection.from_beir(beir(tmp_path, rows)).documents
    assert documents == {"d1": "Cats purr", "d2": "Dogs bark", "d3": "body", "d4": "no title"}
    assert document_text("Only title", None) == "Only title"


def test_numeric_ids_in_json_match_judgements(tmp_path: Path) -> None:
    """Judgement files are text, so a numeric id in JSON would never match and every query would lose its positives."""
    folder = beir(tmp_path, [{"_id": 7, "text": "seven"}], [{"_id": 12, "text": "which number"}], "12\t7\t1\n")
    collection = Collection.from_beir(folder)
    assert collection.positives("train") == {"12": {"7": 1}}


@pytest.mark.parametrize(
    ("documents", "queries"),
    [({7: "seven"}, {"q": "which"}), ({"d": "seven"}, {12: "which"}), ({"d": 3.5}, {"q": "w"})],
)
def test_constructor_refuses_what_is_not_text(documents: dict[Any, Any], queries: dict[Any, Any]) -> None:
    """A number as id or text must not travel on to fail hours later; the entry and the remedy are named."""
    with pytest.raises(TypeError, match=r"entry (7|12|'d').*Use str\((7|12|3\.5)\)"):
        Collection("mine", documents, queries)


@pytest.mark.parametrize("text", [float("nan"), pd.NA], ids=["nan", "na"])
def test_empty_cells_are_no_text(text: Any) -> None:
    """To make the text "nan" of it, as the remedy was, would put that word into the corpus."""
    with pytest.raises(TypeError, match=r"Remove the entry, or give it a text\. pandas .*keep_default_na=False"):
        Collection("mine", {"d": text}, {"q": "which"})


@pytest.mark.parametrize("kind", ["corpus", "queries"])
def test_duplicate_ids_name_both_lines(tmp_path: Path, kind: str) -> None:
    """The second text of an id would silently replace the first; a blank line must not shift the numbers."""
    folder = beir(tmp_path)
    (folder / f"{kind}.jsonl").write_text('\n{"_id": "1", "text": "a"}\n\n{"_id": 1, "text": "b"}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"{kind}\.jsonl, line 4: .*id '1' occurred before, at .*{kind}\.jsonl, line 2\."
    ):
        Collection.from_beir(folder)


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_query_without_text_is_an_error(tmp_path: Path, text: str | None) -> None:
    """An empty query retrieves and teaches noise."""
    folder = beir(tmp_path, queries=[*QUERIES, {"_id": "q2", "text": text}])
    with pytest.raises(ValueError, match=r"queries\.jsonl, line 2: the query has no text\. Remove"):
        Collection.from_beir(folder)
    if text is not None:
        with pytest.raises(ValueError, match="Query 'q2' of 'mine' has no text"):
            Collection("mine", {"d": "text"}, {"q2": text})


def test_documents_without_text_are_counted_once(tmp_path: Path) -> None:
    """Real collections hold some (two in Cranfield); they are allowed, but never silently."""
    rows = [*DOCUMENTS, {"_id": "d3", "text": ""}, {"_id": "d4", "title": None, "text": None}]
    with pytest.warns(UserWarning, match="2 of 4 documents of .* have no text .*'d3'") as caught:
        Collection.from_beir(beir(tmp_path, rows))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": "d3", "body": "text"}, "no field 'text', only '_id', 'body'"),
        ({"_id": "d3", "text": 5}, "expected text, got 5"),
        ({"_id": "d3", "text": ["a"]}, r"expected text, got \['a'\]"),
        ({"text": "a"}, "the id is None"),
        ({"_id": "", "text": "a"}, "the id is ''"),
        ({"_id": True, "text": "a"}, "the id is True"),
        ([1, 2], "expected an object"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    """Somebody has to find the row among a million."""
    with pytest.raises(ValueError, match=rf"corpus\.jsonl, line 3: .*{message}"):
        Collection.from_beir(beir(tmp_path, [*DOCUMENTS, row]))


def test_lone_surrogates_are_an_error() -> None:
    """Half an emoji, common in crawled text, would only fail in the tokenizer or in Arrow, after hours of scoring."""
    with pytest.raises(ValueError, match=r"entry 'd1' holds half a character.*replace"):
        Collection("mine", {"d1": json.loads(r'"cut \ud83d"')}, {"q": "text"})
    assert Collection("mine", {"é": "naïve 😀"}, {"q": "text"}).documents


@pytest.mark.parametrize(
    ("gain", "expected"), [("1.0", 1), ("2", 2), ("0", 0), ("-1", -1), ("0.5", None), ("nan", None), ("inf", None)]
)
def test_gains_are_whole_numbers(tmp_path: Path, gain: str, expected: int | None) -> None:
    """Metrics and labels are integers; a fraction that is cut off would turn relevant into not relevant."""
    folder = beir(tmp_path, qrels=f"q1\td1\t{gain}\n")
    if expected is None:
        with pytest.raises(ValueError, match=rf"train\.tsv, line 1: the gain must be a whole number, got '{gain}'"):
            Collection.from_beir(folder)
    else:
        assert Collection.from_beir(folder).judgements("train") == {"q1": {"d1": expected}}


@pytest.mark.parametrize(
    ("judged", "error", "message"),
    [
        ({"d1": 1_700_000_000}, ValueError, r"query 'q1', document 'd1': the gain is 1700000000, .* time stamp"),
        ({"d1": -(10**400)}, ValueError, "query 'q1', document 'd1': the gain must be a whole number"),
        ({"d1": 0.5}, ValueError, "query 'q1', document 'd1': the gain must be a whole number, got 0.5"),
        ({1: 1}, TypeError, r"query 'q1', document 1: ids are text \(str\). Use str\(id\)"),
        ({"d1"}, TypeError, r"query 'q1': expected {document_id: gain}, got set.*dict.fromkeys\(documents, 1\)"),
        ({"d1": np.float32(2), "d2": True}, None, ""),
    ],
)
def test_gains_are_the_same_for_everyone(judged: Any, error: type[Exception] | None, message: str) -> None:
    """What a collection refuses must not be learnt from or measured by the dev evaluation, and the other way round."""
    documents, queries = {"d1": "a cat", "d2": "a dog"}, {"q1": "cats"}
    if error is None:
        qrels = Collection("mine", documents, queries, {"dev": {"q1": judged}}).qrels["dev"]
        assert GradedEvaluator(queries, documents, {"q1": judged}).qrels == qrels == {"q1": {"d1": 2, "d2": 1}}
        return
    with pytest.raises(error, match=f"(?i)split 'dev' of 'mine', {message}"):
        Collection("mine", documents, queries, {"dev": {"q1": judged}})
    with pytest.raises(error, match=f"(?i)split 'dev', {message}"):
        GradedEvaluator(queries, documents, {"q1": judged})


@pytest.mark.parametrize(
    "qrels",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        "q1\td1\t1\n",
        "q1 0 d1 1\n",
        "q1\t0\td1\t1\r\n\r\n",
        "\ufeffq1\td1\t1.0",
        "corpus_id\tQuery ID\trelevance\textra\nd1\tq1\t1\t9\n",
        "Anfrage\tdoc\tGrad\nq1\td1\t1\n",
    ],
    ids=[
        "beir",
        "no header",
        "trec",
        "trec with tabs and crlf",
        "byte order mark",
        "order of the header",
        "half known",
    ],
)
def test_forms_of_judgement_files(tmp_path: Path, qrels: str) -> None:
    """All forms that circulate are read alike; none loses its first line to a header that is not there."""
    assert Collection.from_beir(beir(tmp_path, qrels=qrels)).qrels == {"train": {"q1": {"d1": 1}}}


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1\td1\t1\nq1\td2\n", "line 2: expected 3 columns .* got 2"),
        ("q1\td1\t1\nq1\td2\tyes\n", "line 2: the gain must be a whole number, got 'yes'"),
        ("q1\td1\t1\nq1\td1\t0\n", "line 2: .* were judged 1 before and 0 here"),
        ("query-id\tcorpus-id\tscore\n", "Split 'train' .* has no judgements"),
        ("q1\td1\trelevant\nq1\td2\t1\n", "line 1: the gain must be a whole number, got 'relevant'"),
        ("query\td1\trelevant\n", r"line 1: .*got 'relevant'"),
        ("\ufeff\ufeffq1\td1\t1\n", "the id '\\\\ufeffq1' begins with a byte order mark"),
    ],
)
def test_bad_judgement_lines(tmp_path: Path, qrels: str, message: str) -> None:
    """A line that is skipped is a positive that becomes a negative."""
    with pytest.raises(ValueError, match=message):
        Collection.from_beir(beir(tmp_path, qrels=qrels))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", b"query-id,corpus-id,score\nq1,d1,1\n"),
        ("train.CSV", b'"q1","d1","1"\r\n'),
        ("train.TSV", b"q1\td1\t1\n"),
        ("train.tsv.gz", gzip.compress(b"q1\td1\t1\n", mtime=0)),
        ("train.trec.GZ", gzip.compress(b"q1 0 d1 1\n", mtime=0)),
        ("train.jsonl", b'{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'),
        ("train.jsonl.gz", gzip.compress(b'{"score": "1", "qid": "q1", "docid": "d1"}\n', mtime=0)),
        ("train.json", b'[\n{"query_id": "q1", "document_id": "d1", "label": 1}\n]'),
        ("train.tsv", "q1\td1\t1\n".encode("utf-16")),
        ("train.csv", "q1,d1,1\n".encode("utf-32")),
    ],
)
def test_kinds_of_judgement_files(tmp_path: Path, name: str, content: bytes) -> None:
    """A split that is not seen is a training set, or a test, that silently is not there."""
    folder = beir(tmp_path)
    (folder / "qrels" / "train.tsv").unlink()
    (folder / "qrels" / name).write_bytes(content)
    for other in ("._train.tsv", ".DS_Store", "Thumbs.db", "README.md"):
        (folder / "qrels" / other).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xb0")
    assert Collection.load(folder).qrels == {"train": {"q1": {"d1": 1}}}
    (folder / "qrels" / "dev.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"dev\.xlsx is in the folder of judgements.*Rename or unpack it"):
        Collection.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1\td1\t1\nq1\tdé\t1\n".encode("latin-1"), r"beyond line 1 .*another encoding.*iconv"),
        ("q1\td1\t1\n".encode("utf-16-le"), r"line 1: there is a NUL character.*UTF-16"),
        ("q1\td1\t1\nq1\tdé".encode()[:-1], r"beyond line 1 .*cut off: fetch it again"),
    ],
)
def test_encodings_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    """«Fetch it again» does not help whoever saved a table from a spreadsheet."""
    folder = beir(tmp_path)
    (folder / "qrels" / "train.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Collection.load(folder)


def test_other_names_of_columns_are_shown(tmp_path: Path) -> None:
    """Somebody else's table has an id and a text under other names; the message says what was found."""
    folder = beir(tmp_path, [{"pid": "d1", "passage": "purr"}])
    with pytest.raises(ValueError, match=r"line 1: .*no field '_id' or 'id', only 'pid', 'passage'\. Rename"):
        Collection.load(folder)


def test_judgements_of_absent_texts(tmp_path: Path) -> None:
    """Files that do not belong together show in judgements that point nowhere; they lower every score if kept."""
    folder = beir(tmp_path, qrels="q1\td1\t1\nq1\tgone\t1\nq9\td1\t1\nq9\tgone\t1\n")
    message = "1 of absent documents, 2 of absent queries. The first is split 'train' .* query 'q1', document 'gone'"
    with pytest.raises(ValueError, match=rf'{message}.*missing="drop"'):
        Collection.from_beir(folder)
    with pytest.warns(UserWarning, match=rf"{message}.* They are dropped"):
        collection = Collection.load(folder, missing="drop")
    assert collection.qrels == {"train": {"q1": {"d1": 1}}}
    with pytest.raises(ValueError, match="missing must be"):
        Collection.from_beir(folder, missing="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(("documents", "queries"), [({}, {"q": "text"}), ({"d": "text"}, {})])
def test_empty_collection(documents: dict[str, str], queries: dict[str, str]) -> None:
    """Nothing can be mined from nothing; the error comes here, not as an empty array in BM25."""
    with pytest.raises(ValueError, match=r"Collection 'mine' has no (documents|queries)"):
        Collection("mine", documents, queries)


def test_qrels_must_be_nested() -> None:
    """A set of ids, the form of other libraries, would be read as ids without gains."""
    with pytest.raises(TypeError, match=r"query 'q': expected \{document_id: gain\}, got set"):
        Collection("mine", {"d": "text"}, {"q": "text"}, {"train": {"q": {"d"}}})  # type: ignore[dict-item]


def test_truncated_files_name_file_and_line(tmp_path: Path) -> None:
    """A download that broke off must not become a smaller collection."""
    folder = beir(tmp_path)
    path = folder / "corpus.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-10], encoding="utf-8")
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2: not a JSON object .*cut off"):
        Collection.from_beir(folder)
    chance = random.Random(0)
    lines = "".join(json.dumps({"_id": str(i), "text": chance.randbytes(20).hex()}) + "\n" for i in range(500)).encode()
    path.write_bytes('{"_id": "d1", "text": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"corpus\.jsonl cannot be read beyond line 0 .*utf-8"):
        Collection.from_beir(folder)
    path.unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz.*(cannot be read beyond line \d+|cut off)"):
        Collection.from_beir(folder)
    damaged = bytearray(gzip.compress(lines))
    damaged[20:60] = bytes(40)
    (folder / "corpus.jsonl.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz cannot be read beyond line 0 .*invalid"):
        Collection.from_beir(folder)
    (folder / "corpus.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="cannot be read beyond line 0"):
        Collection.from_beir(folder)


def test_gzipped_collection(tmp_path: Path) -> None:
    """BEIR's larger collections are kept compressed."""
    folder = beir(tmp_path)
    plain = Collection.from_beir(folder)
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "train.tsv"):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert Collection.from_beir(folder) == plain


def test_missing_files_and_ambiguous_splits(tmp_path: Path) -> None:
    """What is missing is named, and two files for one split are not merged by chance."""
    folder = beir(tmp_path)
    (folder / "qrels" / "train.txt").write_text(QRELS, encoding="utf-8")
    with pytest.raises(ValueError, match="two files for the split 'train'"):
        Collection.from_beir(folder)
    for file in folder.glob("qrels/*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no judgements: expected qrels"):
        Collection.from_beir(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no queries\.jsonl or queries\.jsonl\.gz"):
        Collection.from_beir(folder)


def test_fingerprint_is_of_the_contents() -> None:
    """A dataset records what it was made of: any change of a text or a gain shows, order and name do not matter."""
    documents, queries, qrels = {"a": "one", "b": "two"}, {"q": "text"}, {"train": {"q": {"a": 1}}}
    first = Collection("first", documents, queries, qrels).fingerprint
    assert Collection("second", dict(reversed(documents.items())), queries, qrels).fingerprint == first
    others = [
        Collection("c", {"a": "onet", "b": "wo"}, queries, qrels),
        Collection("c", {"a": "one", "bt": "wo"}, queries, qrels),
        Collection("c", documents, {"q": "text "}, qrels),
        Collection("c", documents, queries, {"train": {"q": {"a": 2}}}),
        Collection("c", documents, queries, {"test": {"q": {"a": 1}}}),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 6


def test_splits_and_positives() -> None:
    """Positives are gains above 0, and a wrong split names the right ones."""
    qrels = {"train": {"q": {"a": 2, "b": 0, "c": -1}, "r": {"a": 0}}}
    collection = Collection("mine", dict.fromkeys("abc", "text"), {"q": "text", "r": "text"}, qrels)
    assert collection.positives("train") == {"q": {"a": 2}}
    assert "2 queries" in repr(collection)
    assert "text" not in repr(collection)
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'train'"):
        collection.judgements("dev")


@pytest.mark.parametrize(("qrels_name", "queries_name"), [("default", "queries"), ("qrels", "query")])
def test_folder_in_mtebs_layout(tmp_path: Path, qrels_name: str, queries_name: str) -> None:
    """A dataset of the Hub reads like the BEIR folder that it was made of, under each of MTEB's config names."""
    folder = mteb_folder(tmp_path / "mine", qrels_name, queries_name)
    collection = Collection.load(folder)
    beir_twin = Collection.from_beir(beir(tmp_path / "beir", qrels="q1\td1\t2\n", split="test"))
    assert collection.name == "mine"
    assert collection.fingerprint == beir_twin.fingerprint


STRANGE_IDS = ["2021-05-01", "001", "1", "1.10", "NA", "null", "None", "true", "1e5", "2021-05-01T10:00:00Z", "٣", "-"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"])
def test_ids_and_texts_stay_text(tmp_path: Path, kind: str) -> None:
    """What looks like a number, a date or a missing value is an id or a text like any other, in every kind of file."""
    import pandas as pd

    texts = [f"{key}, 007" if number % 2 else key for number, key in enumerate(STRANGE_IDS)]
    titles = [None] * (len(texts) - 1) + ["NA"]
    tables = {
        "corpus": pd.DataFrame({"_id": STRANGE_IDS, "title": titles, "text": texts}, dtype=object),
        "queries": pd.DataFrame({"_id": STRANGE_IDS, "text": texts}),
        "default": pd.DataFrame({"query-id": STRANGE_IDS, "corpus-id": STRANGE_IDS, "score": 1}),
    }
    folder = mteb_folder(tmp_path / "mine")
    readme = (folder / "README.md").read_text(encoding="utf-8").replace(".jsonl", f".{kind}")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    for name, table in tables.items():
        (folder / f"{name}.jsonl").unlink()
        path = folder / f"{name}.{kind}"
        if kind == "parquet":
            table.to_parquet(path)
        elif kind in ("csv", "tsv"):
            table.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
        else:
            table.to_json(path, orient="records", lines=kind != "json", date_format=None)
    collection = Collection.load(folder)
    assert list(collection.documents) == list(collection.queries) == STRANGE_IDS
    assert list(collection.queries.values()) == texts
    assert [*collection.documents.values()][:-1] == texts[:-1]
    assert collection.documents["-"] == "NA -, 007"
    assert collection.qrels == {"test": {key: {key: 1} for key in STRANGE_IDS}}


def test_titles_that_begin_late(tmp_path: Path) -> None:
    """A column that is null for longer than any guess looks is still a column of text."""
    folder = mteb_folder(tmp_path / "mine")
    documents = [{"_id": f"x{i}", "title": None, "text": "long " * 500} for i in range(12_000)]
    documents += DOCUMENTS
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    assert Collection.load(folder).documents["d1"] == "Cats purr"


def test_mteb_layout_repeats_and_gaps(tmp_path: Path) -> None:
    """The same document in two splits is one document; two texts for an id, or a missing config, are errors."""
    folder = mteb_folder(tmp_path / "mine")
    readme = folder / "README.md"
    more = readme.read_text(encoding="utf-8").replace(
        "    path: corpus.jsonl\n", "    path: corpus.jsonl\n  - split: dev\n    path: corpus_dev.jsonl\n"
    )
    readme.write_text(more, encoding="utf-8")
    (folder / "corpus_dev.jsonl").write_text(json.dumps(DOCUMENTS[0]) + "\n", encoding="utf-8")
    assert len(Collection.from_hub(folder).documents) == 2
    changed = {**DOCUMENTS[0], "text": "hiss"}
    (folder / "corpus_dev.jsonl").write_text(json.dumps(changed) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="document 'd1' has two texts"):
        Collection.from_hub(folder)
    (folder / "default.jsonl").write_text('{"query-id": "q1", "corpus-id": "d1"}\n', encoding="utf-8")
    (folder / "corpus_dev.jsonl").write_text(json.dumps(DOCUMENTS[0]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"judgements of split 'test' lack \['score'\]"):
        Collection.from_hub(folder)
    readme.write_text(re.sub("config_name: corpus", "config_name: passages", more), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no config 'corpus'.*only 'passages', 'queries', 'default'"):
        Collection.from_hub(folder)


@pytest.mark.slow
def test_hub_id_from_a_warm_cache_without_network(tmp_path: Path) -> None:
    """Offline, `datasets` forgets all configs but the default of a cached repository; a Hub id must read whole."""
    repository = tmp_path / "hub" / "datasets--org--mine"
    (repository / "refs").mkdir(parents=True)
    for branch, sha in (("main", "a" * 40), ("dev", "b" * 40)):
        mteb_folder(repository / "snapshots" / sha, split=branch)
        (repository / "refs" / branch).write_text(sha, encoding="utf-8")
    code = (
        "from st_wkl.data.collection import Collection\n"
        "collection = Collection.load('org/mine')\n"
        "print(collection.name, collection.qrels, *Collection.load('org/mine', revision='dev').qrels)\n"
        "try: Collection.load('org/absent')\n"
        "except FileNotFoundError as error: print('refused', 'org/absent' in str(error))\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["org/mine {'main': {'q1': {'d1': 2}}} dev", "refused True"], done.stderr


def test_load_tells_sources_apart(tmp_path: Path) -> None:
    """A collection passes through; a path that does not exist is no Hub id."""
    collection = Collection("mine", {"d": "text"}, {"q": "text"})
    assert Collection.load(collection) is collection
    for source in ("scifact", tmp_path / "absent", "./absent/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"neither a folder nor a Hub id\. Give"):
            Collection.load(source)


def test_valid_collections_do_not_warn(tmp_path: Path) -> None:
    """Warnings that always come are not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Collection.from_beir(beir(tmp_path))


def test_a_saved_collection_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    """What is loaded is what was saved: ids that look like others, gains, splits, and what BEIR has no file for."""
    ids = [*STRANGE_IDS, "a b", " a", "tab\tand\nline", "ünï ", "query-id", "\u2028", "a\0b"]
    texts = {key: f"Title {key}: body" for key in ids}
    judged = {key: {key: 1, other: gain} for key, other, gain in zip(ids, ids[1:], [0, -1, 3] * 9, strict=False)}
    qrels = {"train": judged, "v1.0": {"1": {"1": 2}}, "test.gz": {"query-id": {" a": 1}}}
    collection = Collection("of/mine", texts, texts, qrels, ignore_identical_ids=True)
    folder = collection.save(tmp_path / "saved")
    again = Collection.load(folder)
    assert again == collection
    assert again.fingerprint == collection.fingerprint
    assert [list(part) for part in (again.documents, again.queries, again.qrels["train"])] == [ids, ids, list(judged)]
    assert Collection.load(folder, name="other", ignore_identical_ids=False).name == "other"
    bare = Collection("bare", {"d": "text"}, {"q": "text"})
    assert Collection.load(bare.save(folder)) == bare  # takes the place of the other one
    assert not list(folder.glob("qrels/*"))


def test_what_cannot_be_saved_or_was_lost_is_said(tmp_path: Path) -> None:
    """A collection that comes back smaller, or as another one, must not do so silently."""
    collection = Collection("mine", {"d": " text"}, {"q": "text"}, {"a/b": {"q": {"d": 1}}})
    with (
        pytest.warns(UserWarning, match=r"1 documents of 'mine' begin or end with white space \(the first is 'd'\)"),
        pytest.raises(ValueError, match="split 'a/b' cannot be the name of a file"),
    ):
        collection.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    fine = Collection("mine", {"d": "text"}, {"q": "text"}, {"dev": {"q": {"d": 1}}})
    with pytest.raises(FileExistsError, match="holds something other than a saved collection"):
        fine.save(tmp_path / "notes")
    (fine.save(tmp_path / "saved") / "qrels" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="no judgements of the split 'dev': expected qrels"):
        Collection.load(tmp_path / "saved")
