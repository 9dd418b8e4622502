"""The builder and its dataset: the right documents with the right scores, and files that others can read."""

from __future__ import annotations

import errno
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.candidates import Candidate, Candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset, features
from st_wkl.data.selection import Selection

DOCUMENTS = {
    "cat": "cats purr softly",
    "cat2": "a cat purrs when happy",
    "hidden": "feline vocalisation",  # relevant, but no word that BM25 could find
    "dog": "dogs do not purr",
    "engine": "engines purr and hum",
    "bird": "birds sing",
    "unused": "nothing to see",
}
QUERIES = {"q1": "what animal purrs", "q2": "which bird sings", "q3": "no judgement purr", "q4": "zebra"}
QRELS = {
    "train": {
        "q1": {"hidden": 1, "cat2": 2, "dog": 0, "cat": 2},
        "q2": {"bird": 1},
        "q4": {"unused": 1},
    }
}


class LengthTeacher:
    """A teacher whose score can be told from the text: its length, minus 10."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.scored = 0

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name it."""
        return {"model": "length", "scale": self.scale}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Score by length."""
        self.scored += len(pairs)
        return np.array([self.scale * (len(document) - 10) for _, document in pairs], dtype=np.float32)


def collection(**changes: Any) -> Collection:
    """Return the small collection, changed."""
    return Collection(**{"name": "mine", "documents": DOCUMENTS, "queries": QUERIES, "qrels": QRELS, **changes})


def ranked(**lists: str) -> Candidates:
    """Make candidates from space-separated document ids, best first."""
    return {
        query_id: [
            Candidate(document_id, -float(rank), rank, "hand") for rank, document_id in enumerate(ids.split(), 1)
        ]
        for query_id, ids in lists.items()
    }


def build(**options: Any) -> DistillationDataset:
    """Build from the small collection, without any file and without a word about what is dropped."""
    options = {"collection": collection(), "teacher": LengthTeacher(), "store": ":memory:", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistillationDatasetBuilder(**options).build(show_progress=False)


HAND = ranked(q1="engine cat dog bird cat2 unused", q2="cat bird dog cat")


def test_positives_are_always_in_the_list() -> None:
    """BM25 cannot find `hidden`; a student that never sees it as relevant learns that it is not."""
    row = build(query_ids=["q1"]).train[0]
    assert set(row["document_ids"]) == {"cat", "cat2", "hidden", "dog", "engine"}
    assert row["labels"] == [2, 2, 1, 0, 0]


def test_order_labels_and_scores() -> None:
    """Positives by gain and then by the first stage, negatives as the first stage ranked them; scores follow."""
    dataset = build(query_ids=["q1"], candidates=HAND, num_negatives=3)
    row = dataset.train[0]
    assert row["document_ids"] == ["cat", "cat2", "hidden", "engine", "dog", "bird"]
    assert row["labels"] == [2, 2, 1, 0, 0, 0]
    assert row["scores"] == [len(DOCUMENTS[document_id]) - 10 for document_id in row["document_ids"]]
    assert {name: getattr(dataset, name).features for name in ("train", "queries", "documents")} == {
        name: features(name) for name in ("train", "queries", "documents")
    }


def test_only_used_texts_are_kept() -> None:
    """The dataset is meant to be shared: it must not carry a whole corpus."""
    dataset = build(query_ids=["q2"], candidates=HAND)
    assert dataset.queries.to_list() == [{"query_id": "q2", "text": QUERIES["q2"]}]
    assert set(dataset.documents["document_id"]) == {"bird", "cat", "dog"}
    assert dataset.train[0]["document_ids"] == ["bird", "cat", "dog"], "a repeated candidate is one document"


def test_what_is_left_out_of_lists_is_no_dropped_query() -> None:
    """With "0 of 1 queries are dropped; in all: 1 repeated candidates" it reads like a loss of queries."""
    builder = DistillationDatasetBuilder(collection(), LengthTeacher(), query_ids=["q2"], store=":memory:")
    with pytest.warns(UserWarning, match=r"^All 1 queries stay\. Left out of their lists: 3 repeated documents\.$"):
        builder._say_dropped(1, {"repeated_documents": 3, "empty_documents": 0})


def test_dropped_queries_are_counted() -> None:
    """A third of the training set may vanish here; the count is printed and travels with the dataset."""
    candidates = ranked(q1="cat dog", q2="bird")
    builder = DistillationDatasetBuilder(
        collection(), LengthTeacher(), query_ids=["q1", "q2", "q3", "q4"], candidates=candidates, store=":memory:"
    )
    message = "3 of 4 queries are dropped; in all: 1 queries without positive, 1 queries without candidate, 1 queries "
    with pytest.warns(UserWarning, match=message):
        dataset = builder.build(show_progress=False)
    assert dataset.train["query_id"] == ["q1"]
    assert {what: count for what, count in dataset.provenance["dropped"].items() if count} == {
        "queries_without_positive": 1,
        "queries_without_candidate": 1,
        "queries_without_negative": 1,
    }
    with pytest.raises(ValueError, match=r"None of 2 queries of split 'train' of 'mine' can be used.*A query needs"):
        build(query_ids=["q2", "q3"], candidates=candidates)


def test_queries_without_a_bm25_candidate_are_counted() -> None:
    """No word of q4 is in the corpus: BM25 finds nothing, and nothing must be made up."""
    dataset = build()
    assert dataset.train["query_id"] == ["q1"]  # all that BM25 finds for q2 is its positive
    dropped = dataset.provenance["dropped"]
    assert (dropped["queries_without_candidate"], dropped["queries_without_negative"]) == (1, 1)
    assert dataset.provenance["candidates"] == {"sources": {"bm25": 5}, "top_k": 23}


def test_empty_documents_teach_nothing() -> None:
    """An empty positive would teach that the empty text is relevant to everything."""
    with pytest.warns(UserWarning, match="have no text"):
        holey = collection(documents={**DOCUMENTS, "hidden": "", "engine": " "})
    dataset = build(collection=holey, query_ids=["q1"], candidates=HAND, num_negatives=2)
    assert dataset.train[0]["document_ids"] == ["cat", "cat2", "dog", "bird"]
    assert dataset.provenance["dropped"]["empty_documents"] == 2


def test_arguments_that_cannot_work() -> None:
    """Each is found before mining and scoring, and says what is wrong."""
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train'"):
        build(split="test")
    with pytest.raises(ValueError, match="1 of the query ids are not in 'mine'; the first is 'q9'"):
        build(query_ids=["q1", "q9"])
    with pytest.raises(ValueError, match="num_negatives must be 1 or more"):
        build(num_negatives=0)
    with pytest.raises(ValueError, match="1 candidates are not in 'mine': the first is document 'gone' of query 'q1'"):
        build(candidates=ranked(q1="cat gone"))
    with pytest.raises(TypeError, match="a Hub id, a folder or a CrossEncoder"):
        build(teacher=object())


def test_scores_are_kept_between_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default in the user's cache: whoever builds twice, or with more negatives, pays for the new pairs only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher = LengthTeacher()
    first = build(teacher=teacher, candidates=HAND, num_negatives=2, store=None)
    scored = teacher.scored
    again = build(teacher=teacher, candidates=HAND, num_negatives=2, store=None)
    assert teacher.scored == scored == first.provenance["counts"]["pairs"]
    build(teacher=teacher, candidates=HAND, num_negatives=3, store=tmp_path / "st_wkl" / "scores.sqlite3")
    assert teacher.scored == scored + 1
    assert again.train.to_list() == first.train.to_list()


def test_provenance_is_complete_json() -> None:
    """Whoever finds the dataset in a year must know what made it."""
    provenance = build(query_ids=["q1"], candidates=HAND).provenance
    assert json.loads(json.dumps(provenance, allow_nan=False)) == provenance
    assert provenance["collection"] == {"name": "mine", "fingerprint": collection().fingerprint}
    assert provenance["teacher"] == LengthTeacher().identity
    assert provenance["candidates"] == {"sources": {"hand": 6}}
    counts = {"queries": 1, "pairs": 7, "different_pairs": 7, "cut_pairs": None, "documents": 7}
    assert provenance["counts"] == counts
    assert provenance["teacher_license"] is None
    assert provenance["command"] == "DistillationDatasetBuilder('mine', 'length').build()"
    assert {"datasets", "torch", "bm25s"} <= set(provenance["versions"])


class CountingTokens(LengthTeacher):
    """A teacher that says how long it reads."""

    license = "apache-2.0"

    @property
    def identity(self) -> dict[str, str | int | float | None]:
        """Name it, and its length."""
        return {"model": "length", "max_length": 20}

    def token_lengths(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Take a letter for a token."""
        return np.array([len(document) for _, document in pairs])


def test_cut_pairs_and_licence(tmp_path: Path) -> None:
    """A teacher that read half of every document has to show in the dataset, from a warm store too."""
    for _ in range(2):
        dataset = build(query_ids=["q1"], candidates=HAND, teacher=CountingTokens(), store=tmp_path / "scores")
        assert dataset.provenance["counts"]["cut_pairs"] == sum(len(DOCUMENTS[key]) > 20 for key in DOCUMENTS)
        assert dataset.provenance["teacher_license"] == "apache-2.0"


def test_several_teachers_are_z_scored() -> None:
    """Two teachers' logits share no scale; the one with the wider scores would decide alone."""
    wide = build(query_ids=["q1"], candidates=HAND, teacher=[LengthTeacher(), LengthTeacher(scale=100.0)])
    scores = np.array(wide.train[0]["scores"])
    assert wide.provenance["teacher"]["calibration"] == "z-score"
    assert scores.mean() == pytest.approx(0, abs=1e-6)
    assert scores.std() == pytest.approx(1)


def test_teacher_report() -> None:
    """P@1, spread and margin tell before training whether the teacher has anything to teach."""
    candidates = ranked(q1="engine bird", q2="dog")
    report = build(query_ids=["q1", "q2"], candidates=candidates).provenance["report"]
    # q1: cat2 22, hidden 19, cat 16, engine 20, bird 10 characters; q2: bird 10, dog 16.
    expected = {"precision_at_1": 0.5, "mean_spread": 9.0, "mean_margin": -2.0, "lowest_score": 0, "highest_score": 12}
    assert {name: report[name] for name in expected} == pytest.approx(expected)


def kept(**options: Any) -> tuple[list[str], dict[str, int]]:
    """Return the documents of q1's list and what was dropped."""
    dataset = build(query_ids=["q1"], candidates=HAND, **options)
    dropped = {what: count for what, count in dataset.provenance["dropped"].items() if count}
    return dataset.train[0]["document_ids"], dropped


def test_false_negatives_are_filtered() -> None:
    """Candidates that score like the best positive are no negatives; how many went is counted."""
    # Scores: cat2 12 (best positive), hidden 9, cat 6; engine 10, dog 6, unused 4, bird 0.
    margin = Selection(absolute_margin=3.0)
    assert kept(selection=margin, num_negatives=2) == (["cat", "cat2", "hidden", "dog", "bird"], {"false_negatives": 1})
    worst = Selection(absolute_margin=3.0, reference="worst")
    assert kept(selection=worst)[0] == ["cat", "cat2", "hidden", "bird"]
    with pytest.raises(ValueError, match=r"1 queries without negative, 4 false negatives.*A query needs"):
        kept(selection=Selection(absolute_margin=50.0))
    # 0.1 (len - 10): sigmoid(1.2) = .77, so 0.9 of it takes out what is at .69 or above: engine at 0.73.
    relative = Selection(relative_margin=0.9)
    assert kept(selection=relative, teacher=LengthTeacher(0.1))[1] == {"false_negatives": 1}


def test_probabilities_are_not_squashed_again() -> None:
    """A teacher with a sigmoid gives probabilities: a second one would call everything a false negative."""
    teacher = LengthTeacher(1 / 12)  # cat2 1.0, engine 0.83, dog 0.5
    documents, _ = kept(selection=Selection(relative_margin=0.6), teacher=teacher)
    assert documents == ["cat", "cat2", "hidden", "dog", "bird", "unused"]


def test_choice_of_negatives_is_seeded_and_recorded() -> None:
    """Another seed is another dataset; the same seed is the same, whatever other queries there are."""
    options = [Selection(choice=choice, seed=seed) for choice in ("random", "quantiles") for seed in range(8)]
    rows = {option: build(candidates=HAND, num_negatives=2, selection=option) for option in options}
    for option, dataset in rows.items():
        alone = build(query_ids=["q1"], candidates=HAND, num_negatives=2, selection=option)
        assert alone.train[0] == dataset.train[0]
        assert dataset.provenance["selection"]["seed"] == option.seed
    assert len({tuple(dataset.train[0]["document_ids"][3:]) for dataset in rows.values()}) > 3
    strata = [{"engine", "dog"}, {"unused", "bird"}]
    for dataset in (rows[option] for option in options[8:]):
        assert sorted(len(stratum & set(dataset.train[0]["document_ids"])) for stratum in strata) == [1, 1]


def test_copies_of_positives_are_no_negatives() -> None:
    """The same text under another id is relevant, whatever the judgements say; so is nearly the same text."""
    documents = {
        **DOCUMENTS,
        "copy": "Cats  PURR softly",
        "near": "softly, cats purr!",
        "dog2": "Dogs do not purr",
    }
    candidates = ranked(q1="copy near engine dog dog2 bird")
    options: dict[str, Any] = {"collection": collection(documents=documents), "query_ids": ["q1"]}
    dataset = build(candidates=candidates, **options)
    assert dataset.train[0]["document_ids"][3:] == ["engine", "dog", "bird"]
    dropped = dataset.provenance["dropped"]
    assert [dropped[f"{name}copies_of_positives"] for name in ("", "near_")] == [1, 1]
    assert dropped["repeated_documents"] == 1
    exact = build(candidates=candidates, selection=Selection(near_duplicates=None), **options)
    assert exact.train[0]["document_ids"][3:] == ["near", "engine", "dog", "bird"]


def test_further_positives_never_become_negatives() -> None:
    """Leaving out a positive for space must not teach that it is irrelevant."""
    documents, dropped = kept(selection=Selection(max_positives=1))
    assert documents == ["cat", "engine", "dog", "bird", "unused"]
    assert dropped == {"further_positives": 2}


@pytest.mark.parametrize(("correction", "scores"), [("raise_positives", [30, 30, 30]), ("swap_positives", [30, 6, 9])])
def test_label_corrections(correction: Any, scores: list[float]) -> None:
    """Stored scores follow the judgements where the teacher contradicts them; the report is of the teacher itself."""
    documents = {**DOCUMENTS, "long": "x" * 40}
    dataset = build(
        collection=collection(documents=documents),
        query_ids=["q1", "q2"],
        candidates=ranked(q1="long dog", q2="unused"),
        selection=Selection(label_correction=correction),
    )
    assert dataset.train[0]["scores"][:3] == scores
    assert dataset.provenance["counts"]["corrected_lists"] == 2
    assert dataset.provenance["report"]["precision_at_1"] == 0


def leaking() -> Collection:
    """Return the small collection with a test split that shares a query and documents."""
    queries = {**QUERIES, "t1": "What animal  purrs", "t2": "melodious animals"}
    qrels = {**QRELS, "test": {"t1": {"dog": 1}, "t2": {"bird": 1, "cat": 1}}}
    return collection(queries=queries, qrels=qrels)


def test_leaks_are_always_reported() -> None:
    """Who evaluates on the test split must hear of it before training, and readers of the dataset too."""
    builder = DistillationDatasetBuilder(leaking(), LengthTeacher(), candidates=HAND, store=":memory:")
    with pytest.warns(UserWarning, match=r"Of 2 queries of mine, test, 1 \(50\.0%\) have a relevant document"):
        dataset = builder.build(show_progress=False)
    leaks = dataset.provenance["leaks"]
    assert (leaks["equal_queries"], leaks["shared_judgements"], leaks["test_judgements"]) == (1, 2, 3)
    assert "leaks" not in build().provenance, "no test split, nothing to compare"
    assert (
        "leaks"
        not in build(
            collection=leaking(), split="test", query_ids=["t1", "t2"], candidates=ranked(t1="cat", t2="dog")
        ).provenance
    )


def test_learning_from_the_test_split_is_called_a_leak() -> None:
    """`--split test` compared the split with nothing, so that the greatest leak of all was the only one not named."""
    with pytest.warns(UserWarning, match="Split 'test' of 'mine' is learnt from, and is the test split too: all of it"):
        DistillationDatasetBuilder(leaking(), LengthTeacher(), split="test", store=":memory:")


def test_leaks_are_dropped_on_request() -> None:
    """No test query and no test document as a positive is left, nor a known relevant one as a negative."""
    qrels = {**leaking().qrels, "train": {**QRELS["train"], "q3": {"cat": 1, "unused": 1}}}
    whole = collection(queries=leaking().queries, qrels=qrels)
    candidates = {**HAND, **ranked(q3="cat engine dog")}
    dataset = build(collection=whole, candidates=candidates, drop_leaks=True)
    assert dataset.train.to_list() == [
        {"query_id": "q3", "document_ids": ["unused", "engine", "dog"], "scores": [4, 10, 6], "labels": [1, 0, 0]}
    ]
    leaks, dropped = dataset.provenance["leaks"], dataset.provenance["dropped"]
    assert (leaks["equal_queries"], leaks["near_queries"], leaks["shared_judgements"]) == (0, 0, 0)
    assert (dropped["leaked_queries"], dropped["leaked_positives"], dropped["unusable_documents"]) == (1, 2, 1)
    with pytest.raises(ValueError, match="drop_leaks needs a split"):
        build(drop_leaks=True)
    with pytest.raises(ValueError, match="has no split 'validation'"):
        build(against="validation")


def test_useless_teachers_are_reported() -> None:
    """One score for everything is not P@1 = 1 because positives stand first; a sigmoid is not a logit."""

    def warned(scale: float) -> tuple[DistillationDataset, str]:
        with pytest.warns(UserWarning) as caught:  # noqa: PT030
            dataset = DistillationDatasetBuilder(
                collection(), LengthTeacher(scale), candidates=HAND, query_ids=["q1", "q2"], store=":memory:"
            ).build(show_progress=False)
        return dataset, str(caught[0].message)

    dataset, message = warned(0.0)
    assert "all documents of 2 of 2 queries one score" in message
    assert dataset.provenance["report"]["precision_at_1"] == 0
    assert "between 0 and 1, as after a sigmoid" in warned(0.01)[1]


def test_columns_for_stock_trainers() -> None:
    """The best positive first, other positives nowhere, negatives in candidate order, scores in the same order."""
    columns = build(candidates=HAND, query_ids=["q1", "q2"], num_negatives=3).to_columns(3)
    assert columns.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    assert columns[0] == {
        "query": QUERIES["q1"],
        "positive": DOCUMENTS["cat2"],  # gain 2 as `cat`, but the teacher prefers it
        "negative_1": DOCUMENTS["engine"],
        "negative_2": DOCUMENTS["dog"],
        "label": [12.0, 10.0, 6.0],
    }
    assert columns.features["label"].feature.dtype == "float32"
    assert columns[1]["positive"] == DOCUMENTS["bird"]


def test_columns_drop_short_rows_and_say_so() -> None:
    """Columns need one length; what does not fit is counted, and if nothing fits the error says what would."""
    dataset = build(candidates=HAND, query_ids=["q1", "q2"], num_negatives=4)
    with pytest.warns(UserWarning, match="1 of 2 rows are dropped: 1 have fewer than 4 negatives, 0 no positive"):
        assert len(dataset.to_columns()) == 1  # by default the builder's number of negatives
    assert len(dataset.to_columns(3)) == 2
    with pytest.raises(ValueError, match=r"None of 2 rows can be used with n=9.*The largest n that works is 5\."):
        dataset.to_columns(9)
    with pytest.raises(ValueError, match="from 2 on, got 1"):
        dataset.to_columns(1)


def test_lists_keep_everything() -> None:
    """Ragged lists with all positives, for listwise training."""
    lists = build(candidates=HAND, query_ids=["q1", "q2"], num_negatives=2).to_lists()
    assert [len(documents) for documents in lists["documents"]] == [5, 3]
    assert lists[1] == {
        "query": QUERIES["q2"],
        "documents": [DOCUMENTS["bird"], DOCUMENTS["cat"], DOCUMENTS["dog"]],
        "scores": [0.0, 6.0, 6.0],
        "labels": [1, 0, 0],
    }


def test_saved_dataset_reads_back(tmp_path: Path) -> None:
    """Everything survives the disk, also of tables that were filtered, formatted or made by hand, and once more."""
    dataset = build(candidates=HAND, query_ids=["q1", "q2"])
    by_hand = Dataset.from_list(dataset.train.to_list())  # doubles and long integers
    dataset.train = by_hand.select([1]).with_format("torch")
    build(candidates=HAND, query_ids=["q1"]).save_to_disk(tmp_path / "new" / "dataset")
    dataset.save_to_disk(tmp_path / "new" / "dataset")
    loaded = DistillationDataset.load_from_disk(tmp_path / "new" / "dataset")
    assert loaded.train["query_id"] == ["q2"]
    assert loaded.train.features == features("train")
    assert loaded.to_lists().to_list() == dataset.to_lists().to_list()
    assert loaded.documents.to_list() == dataset.documents.to_list()
    assert loaded.provenance == dataset.provenance
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dataset"], "no temporary folder stays"


def test_two_builds_write_the_same_bytes(tmp_path: Path) -> None:
    """A dataset can be made again and compared; a date in it would hide every real difference."""
    folders = [build(candidates=HAND).save_to_disk(tmp_path / name) for name in ("first", "second")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "train.parquet", "queries.parquet", "documents.parquet", "provenance.json", "README.md"
    }  # fmt: skip


def test_a_failed_save_leaves_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of writing must not leave half a dataset, or none."""
    folder = build(candidates=HAND, query_ids=["q1"]).save_to_disk(tmp_path / "dataset")
    other = build(candidates=HAND, query_ids=["q2"])

    def full(self: Dataset, path: Path) -> None:
        Path(path).write_bytes(b"PAR1 and then the disk was full")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Dataset, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        other.save_to_disk(folder)
    assert DistillationDataset.load_from_disk(folder).train["query_id"] == ["q1"]
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    """A typo in a path must not cost somebody's files."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds something other than a distillation dataset"):
        build(candidates=HAND).save_to_disk(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_damaged_datasets_are_refused(tmp_path: Path) -> None:
    """A file that is missing, cut off or foreign is named, with what to do."""
    folder = build(candidates=HAND).save_to_disk(tmp_path / "dataset")

    def broken(name: str) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        return copy / name

    broken("documents.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no documents\.parquet.*Copy or build it again"):
        DistillationDataset.load_from_disk(tmp_path / "copy")
    path = broken("train.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"train\.parquet is damaged.*Copy or build it again"):
        DistillationDataset.load_from_disk(tmp_path / "copy")
    path = broken("provenance.json")
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"provenance\.json is damaged"):
        DistillationDataset.load_from_disk(tmp_path / "copy")
    shutil.copy(folder / "queries.parquet", broken("documents.parquet"))
    with pytest.raises(ValueError, match=r"'documents' has the columns \['query_id', 'text'\]"):
        DistillationDataset.load_from_disk(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, math.nan]}, "query 'q' has a score that is not finite"),
        ({"scores": [1.0, math.inf]}, "query 'q' has a score that is not finite"),
        ({"scores": [1.0, None]}, "query 'q' has a score that is not finite"),
        ({"scores": [1.0]}, "query 'q' has lists of different lengths"),
        ({"document_ids": ["d", "gone"]}, "names the document 'gone', which has no text"),
        ({"query_id": "p"}, "names the query 'p', which has no text"),
    ],
)
def test_tables_must_belong_together(change: dict[str, Any], message: str) -> None:
    """Datasets that were edited by hand must not train a model of NaNs."""
    row = {"query_id": "q", "document_ids": ["d", "e"], "scores": [1.0, 2.0], "labels": [1, 0], **change}
    queries = Dataset.from_list([{"query_id": "q", "text": "query"}])
    documents = Dataset.from_list([{"document_id": key, "text": key} for key in "de"])
    with pytest.raises(ValueError, match=message):
        DistillationDataset(Dataset.from_list([row], features=features("train")), queries, documents)
    with pytest.raises(ValueError, match="document ids are not unique: 3 rows, 2 ids"):
        DistillationDataset(
            Dataset.from_list([row], features=features("train")),
            queries,
            Dataset.from_list([{"document_id": key, "text": key} for key in "ded"]),
        )


def test_sentence_transformers_and_datasets_read_the_folder(tmp_path: Path) -> None:
    """Anyone can train on it without this package: `load_dataset` and `resolve_ids` are all that it takes."""
    from sentence_transformers.util import resolve_ids

    dataset = build(candidates=HAND, query_ids=["q1", "q2"], num_negatives=2)
    folder = dataset.save_to_disk(tmp_path / "dataset")

    def load(name: str) -> Dataset:
        return load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"))

    lookups = {"query_id": load("queries"), "document_ids": load("documents")}
    lists = load("train")
    lists.set_transform(resolve_ids(lookups, keep_columns=("scores", "labels"), output_format="lists"))
    assert lists[:] == dataset.to_lists().to_dict()
    columns = load("train")
    columns.set_transform(resolve_ids(lookups, keep_columns=("scores",), max_list_length=3))
    assert columns[1] == {
        "query": QUERIES["q2"],
        "document_1": DOCUMENTS["bird"],
        "document_2": DOCUMENTS["cat"],
        "document_3": DOCUMENTS["dog"],
        "scores": [0.0, 6.0, 6.0],
    }


def test_load_dataset_sees_a_rebuilt_folder(tmp_path: Path) -> None:
    """`datasets` caches a folder by name and card: without a hash in the card it serves the data of the last build."""
    options: dict[str, Any] = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    for query_id in ("q1", "q2"):
        folder = build(candidates=HAND, query_ids=[query_id]).save_to_disk(tmp_path / "dataset")
        assert load_dataset(str(folder), "train", **options)["query_id"] == [query_id]


def test_columns_train_a_stock_trainer(tmp_path: Path, static_student_path: Path) -> None:
    """The whole point: rows go into sentence-transformers' own trainer and loss as they are."""
    import torch
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    student = SentenceTransformer(str(static_student_path), device="cpu")
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    dataset = build(candidates=HAND, query_ids=["q1", "q2"], num_negatives=2)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    loss = DistillKLDivLoss(student)
    output = SentenceTransformerTrainer(
        model=student, args=arguments, train_dataset=dataset.to_columns(), loss=loss
    ).train()
    assert 0 < output.training_loss < math.inf
    assert any(not torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_collection_and_teacher(shared_data: Path, cross_encoder_onnx_path: Path, tmp_path: Path) -> None:
    """The real parts fit: a BEIR folder, BM25, the int8 reranker, and scores that mean something."""
    query_ids = list(Collection.load(shared_data / "scifact").judgements("train"))[100:106]
    builder = DistillationDatasetBuilder(
        str(shared_data / "scifact"),
        str(cross_encoder_onnx_path),
        query_ids=query_ids,
        num_negatives=4,
        store=":memory:",
    )
    dataset = builder.build(show_progress=False)
    assert len(dataset) == 6
    assert dataset.provenance["teacher"]["model"] == cross_encoder_onnx_path.name
    assert dataset.provenance["report"]["lowest_score"] < -1
    assert dataset.provenance["report"]["highest_score"] > 1, "logits, not probabilities"
    assert set(dataset.to_columns().column_names) == {
        "query",
        "positive",
        "label",
        *(f"negative_{i}" for i in range(1, 5)),
    }
