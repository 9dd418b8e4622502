"""Queries that nobody has judged: lists with the teacher's scores alone, or with its best as positive."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.leaks import find_leaks
from st_wkl.data.report import teacher_report
from st_wkl.data.selection import NOTHING_RELEVANT, Selection, lead
from st_wkl.losses.make import make_loss
from st_wkl.models import load_model
from st_wkl.packaged import STATIC_STUDENT, fetch
from st_wkl.record import Exposure, TrainingRecord
from st_wkl.training.distillation import distill
from tests.helpers.animals import WordOverlap, small_collection, write_beir
from tests.helpers.command import st_wkl

TOLD = NOTHING_RELEVANT.format("this dataset")
DOCUMENTS = {
    "cats": "Cats purr when they are happy.",
    "again": "When they are happy, cats purr!",
    "dogs": "Dogs bark when they are angry.",
    "birds": "Birds sing when they are awake.",
    "fish": "Fish swim when they are awake.",
    "cows": "Cows moo.",
}
ASKED = {"a": "when do animals purr and who are they", "b": "they bark when angry", "c": "moo"}
SCORES = {
    "a": {"cats": 4.0, "again": 3.9, "dogs": 1.0, "birds": 0.5, "fish": 0.4},
    "b": {"cats": 1.5, "again": 1.5, "dogs": 2.0, "birds": 1.0, "fish": 0.0},
}


class Table:
    """A teacher whose scores stand in a table, through a function if wanted."""

    def __init__(self, change: Any = lambda score: score) -> None:
        self.change = change
        self.identity = {"model": "table"}

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        queries, documents = ({text: key for key, text in texts.items()} for texts in (ASKED, DOCUMENTS))
        found = [SCORES[queries[query]][documents[text]] for query, text in pairs]
        return np.array([self.change(score) for score in found], np.float32)


def collection(**changes: Any) -> Collection:
    return Collection(**{"name": "mine", "documents": DOCUMENTS, "queries": ASKED, **changes})


def build(of: Collection | None = None, teacher: Any = None, **options: Any) -> DistillationDataset:
    selection = Selection(**{name: options.pop(name) for name in list(options) if name in vars(Selection())})
    options = {"num_negatives": 3, "store": ":memory:", "selection": selection, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistillationDatasetBuilder(of or collection(), teacher or Table(), **options).build(show_progress=False)


def rows(dataset: DistillationDataset) -> dict[str, dict[str, int]]:
    found = dataset.train.with_format(None).to_list()
    return {row["query_id"]: dict(zip(row["document_ids"], row["labels"], strict=True)) for row in found}


@pytest.fixture(scope="module")
def student() -> Any:
    return load_model(fetch(STATIC_STUDENT))[0]


def test_a_collection_without_judgements_is_enough() -> None:
    """A log and a corpus are what people have; its lists have no positive, and nothing is made up."""
    with pytest.warns(UserWarning, match="2 of 2 queries have no judged positive.*train with KL"):
        dataset = DistillationDatasetBuilder(collection(), Table(), num_negatives=3, store=":memory:").build(False)
    assert {key: (len(found), {*found.values()}) for key, found in rows(dataset).items()} == {
        "a": (4, {0}),
        "b": (4, {0}),
    }
    provenance = dataset.provenance
    assert provenance["dropped"]["queries_without_negative"] == 1, "c has one candidate, which cannot be ranked"
    assert (provenance["counts"]["unjudged_queries"], provenance["counts"]["teacher_positives"]) == (2, 0)
    assert (provenance["selection"]["positives"], provenance["report"]["precision_at_1"]) == ("optional", None)
    assert dataset.unjudged() == {"unjudged_queries": 2, "teacher_positives": 0}


def test_judged_collections_stay_as_they_were() -> None:
    """Identities that users have name no option that they could not have given."""
    later = {"positives", "positive_margin"}
    assert vars(Selection()).keys() - Selection().to_dict().keys() == later
    assert not later & {*repr(Selection(choice="random")).replace("=", " ").replace("(", " ").split()}
    judged = collection(qrels={"train": {"a": {"cats": 1}, "b": {"dogs": 0}}})
    dataset = build(judged)
    assert dataset.train["query_id"] == ["a"], "b is judged and has no positive, c is not judged"
    assert dataset.provenance["dropped"]["queries_without_positive"] == 1
    assert not {"unjudged_queries", "teacher_positives"} & dataset.provenance["counts"].keys()
    assert build(judged, positives="judged").train.to_list() == dataset.train.to_list()
    with pytest.raises(ValueError, match="has no split 'trian'"):
        build(collection(qrels={"test": {"a": {"cats": 1}}}), split="trian")


def test_judged_and_unjudged_queries_together() -> None:
    """A judged positive stays one; queries of another split are not learnt from."""
    judged = collection(qrels={"train": {"a": {"dogs": 2}}, "test": {"c": {"cows": 1}}})
    assert rows(build(judged, positives="optional")) == {
        "a": {"dogs": 2, "cats": 0, "again": 0, "birds": 0},
        "b": {"dogs": 0, "cats": 0, "again": 0, "birds": 0},
    }
    found = rows(build(judged, positives="teacher", positive_margin=0.4))
    assert [next(iter(found["a"].items())), next(iter(found["b"].items()))] == [("dogs", 2), ("dogs", 1)]


def test_the_teachers_best_is_a_positive_where_it_is_ahead() -> None:
    """The best of near equals would be a positive with its like as negative; a near copy of it is none."""
    dataset = build(positives="teacher")
    assert rows(dataset) == {
        "a": {"cats": 1, "dogs": 0, "birds": 0},
        "b": {"cats": 0, "again": 0, "dogs": 0, "birds": 0},
    }
    provenance = dataset.provenance
    assert provenance["dropped"]["near_copies_of_positives"] == 1
    assert (provenance["counts"]["unjudged_queries"], provenance["counts"]["teacher_positives"]) == (2, 1)
    assert teacher_report(dataset).precision_at_1 is provenance["report"]["precision_at_1"] is None, "of itself"
    assert rows(build(positives="teacher", positive_margin=0.5))["b"]["dogs"] == 1
    filtered = build(positives="teacher", positive_margin=0.5, absolute_margin=0.9)
    assert rows(filtered)["b"] == {"dogs": 1, "birds": 0, "fish": 0}, "the margins are measured from it"


def test_probabilities_are_compared_as_logits() -> None:
    """A sigmoid's .982 and .731 are .25 apart, and the logits 3: no margin would hold for both kinds of teacher."""
    sigmoid = build(teacher=Table(lambda score: 1 / (1 + np.exp(-score))), positives="teacher")
    assert rows(sigmoid) == rows(build(positives="teacher"))
    assert lead(1.0, [1.0], probabilities=True) == 0.0
    assert lead(1.0, []) == np.inf


def test_a_teacher_that_is_nowhere_ahead_gives_no_positives() -> None:
    """Asked for positives, a dataset without any would train something else than was asked for."""
    message = r"ahead of the next by 9 in none of 2 lists; the leads are 1\.75 at the median, and 3 at most\. Lower"
    with pytest.raises(ValueError, match=message):
        build(positives="teacher", positive_margin=9.0)
    with pytest.raises(ValueError, match="in none of 2 lists"):  # equals are not ahead, whatever the margin
        build(teacher=Table(lambda score: 1.0), positives="teacher", positive_margin=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"absolute_margin": 1.0}, "absolute_margin needs positives, and no query of 'mine'"),
        ({"label_correction": "swap_positives"}, "label_correction needs positives"),
        ({"positive_margin": 2.0}, "positive_margin is the lead of the teacher's best"),
        ({"positives": "teacher", "positive_margin": -1.0}, "positive_margin must be 0 or more"),
        ({"positives": "best"}, "positives must be one of"),
        ({"positives": "judged"}, "has no split 'train'; it has none"),
    ],
)
def test_options_that_mean_nothing_without_positives(options: dict[str, Any], message: str) -> None:
    """A margin that is measured from nothing would be ignored, and the user would believe in it."""
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_test_question_in_a_log_is_a_leak() -> None:
    """Unjudged or not, the student has seen the question, and perhaps its answer as the teacher's best."""
    asked = {**ASKED, "t": "WHEN do animals purr and who are they"}
    of = collection(queries=asked, qrels={"test": {"t": {"cats": 1}}})
    dataset = build(of, positives="teacher")
    report = find_leaks(dataset, of)
    assert (report.equal_queries, report.shared_documents) == ({"t": ["a"]}, {"t": ["cats"]})
    assert dataset.provenance["leaks"] == report.to_dict()
    assert (report.to_dict()["unjudged_queries"], report.to_dict()["teacher_positives"]) == (2, 1)
    assert "2 training queries have no judged positive; of 1 the teacher's best" in repr(report)
    assert build(of, positives="optional", drop_leaks=True).train["query_id"] == ["b"]
    other = collection(queries={**ASKED, "t": "which pet is loud"}, qrels={"test": {"t": {"cats": 1}}})
    barred = build(other, positives="teacher", positive_margin=0.5, drop_leaks=True)
    assert set(rows(barred)["a"].values()) == {0}
    assert rows(barred)["b"]["dogs"] == 1
    assert barred.provenance["dropped"]["leaked_positives"] == 1


def test_what_is_known_to_be_relevant_is_no_negative() -> None:
    """A query that loses its positive to the test split is unjudged then, but that document is no negative of it."""
    of = collection(qrels={"train": {"b": {"cats": 1}, "a": {"fish": 1}}, "test": {"c": {"cats": 1}}})
    dataset = build(of, positives="teacher", positive_margin=0.5, drop_leaks=True)
    assert rows(dataset)["b"] == {"dogs": 1, "again": 0, "birds": 0, "fish": 0}


def test_losses_that_compare_positives_refuse(student: Any, tmp_path: Path) -> None:
    """They would train hours without learning anything; the way out is in the message, the same everywhere."""
    dataset = build()
    for name in ("weighted-kl", "margin-kl", "margin-mse", "list-contrastive", "in-batch", "adaptive-margin"):
        with pytest.raises(ValueError, match=f"{TOLD}.*would learn nothing. Train with KL.*'teacher'"):
            distill(student, dataset, make_loss(student, name), output_dir=tmp_path / name)
    with pytest.raises(ValueError, match=f"{TOLD}, and columns begin with one. Train with KL"):
        dataset.to_columns(3)


def test_lists_without_positives_train(student: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the default loss, whose contrast is silent; folder, card and hashes say what the student has learnt from."""
    dataset = build()
    with caplog.at_level(logging.WARNING):
        distill(student, dataset, output_dir=tmp_path / "student")
    assert f"{TOLD} (the highest gain is 0): InBatchContrastiveLoss adds nothing" in caplog.text
    exposure = Exposure.load(tmp_path / "student")
    assert exposure is not None
    assert (len(exposure.queries), len(exposure.positives), exposure.unjudged_queries) == (2, 2, 2)
    assert "2 queries without a judged one" in repr(exposure)
    counts = TrainingRecord.load(tmp_path / "student").dataset["counts"]
    assert (counts["unjudged_queries"], counts["teacher_positives"]) == (2, 0)


def test_cards_say_where_positives_come_from(student: Any, tmp_path: Path) -> None:
    """A label that no person gave must not pass for a judgement."""
    dataset = build(positives="teacher")
    card = (dataset.save(tmp_path / "dataset") / "README.md").read_text(encoding="utf-8")
    assert "2 queries have no judged positive; in the lists of 1 the label 1 is the teacher's best" in card
    distill(student, dataset, "weighted-kl", output_dir=tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert "2 without a judged positive; the teacher's best document as positive of 1" in card
    seen = Exposure.load(tmp_path / "student")
    assert seen is not None
    assert (seen.unjudged_queries, seen.teacher_positives, len(seen.positives)) == (2, 1, 2)


def test_a_file_of_lines_is_enough(tmp_path: Path) -> None:
    """What a search engine logs: empty lines, and questions that many people ask; both are counted."""
    log = tmp_path / "asked.txt"
    log.write_text("who purrs\n\nWho  PURRS\nwho barks\n  \nwho purrs\nwhat is 2021-05-01\n", encoding="utf-8")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": k, "title": "", "text": t}) + "\n" for k, t in DOCUMENTS.items()))
    with pytest.warns(UserWarning, match="3 queries of 7 lines; 2 are empty, 2 repeat another one"):
        found = Collection.load(corpus, queries=log)
    assert sorted(found.queries.values()) == ["what is 2021-05-01", "who barks", "who purrs"]
    assert (found.documents, found.qrels) == (DOCUMENTS, {})
    assert Collection.load(corpus, queries=["who purrs", "who barks", "what is 2021-05-01"]).queries == found.queries
    log.write_text("1\twho purrs\n2\twho barks\n")
    with pytest.raises(ValueError, match=r"asked\.txt: each line has a tab.*call the file \.tsv"):
        Collection.load(corpus, queries=log)
    with pytest.raises(TypeError, match="number 2: a query is text"):
        Collection.load(corpus, queries=["who purrs", 7])


def test_queries_of_a_judged_collection_are_taken_in_place_of_its_training_split(tmp_path: Path) -> None:
    """The judged queries of the split would be learnt from beside them, and the log be ignored, without a word."""
    folder = write_beir(small_collection(), tmp_path / "animals")
    test_query = small_collection().queries["q0-0"]
    found = Collection.load(folder, queries=["do cats drink", test_query])
    assert list(found.qrels) == ["test"]
    assert found.documents == small_collection().documents
    assert sorted(found.learnt_from("train")) == sorted({*found.queries} - {*found.qrels["test"]})
    dataset = build(found, WordOverlap())
    assert sorted(dataset.queries["text"]) == ["do cats drink", test_query]
    assert list(find_leaks(dataset, found).equal_queries) == ["q0-0"]


def test_command_line_and_configuration_take_a_log(tmp_path: Path) -> None:
    """One option on each surface, and the same dataset from all of them."""
    folder = write_beir(small_collection(), tmp_path / "animals")
    log = tmp_path / "asked.txt"
    log.write_text("do cats like fish\ndo wolves like fruit\n", encoding="utf-8")
    told = ("--queries", log, "--teacher", fetch(STATIC_STUDENT), "--teacher-kind", "retriever", "--quiet")
    code, out, error = st_wkl("build", folder, *told, "--output", tmp_path / "built", "--store", tmp_path / "s")
    assert code == 0, error
    assert "2 have no judged positive, and 0 the teacher's best as one." in out
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\ncollection: {{source: {folder}, queries: {log}}}\n"
        f"teacher: {{model: {fetch(STATIC_STUDENT)}, kind: retriever, store: {tmp_path / 's'}}}\n"
        f"student: {{model: {fetch(STATIC_STUDENT)}}}\nloss: {{name: kl}}\ntraining: {{num_train_epochs: 1}}\n"
    )
    code, out, error = st_wkl("run", config, "--quiet")
    assert code == 0, error
    built, ran = (DistillationDataset.load(tmp_path / place) for place in ("built", "run/dataset"))
    assert built.train.to_list() == ran.train.to_list()
    assert len(built) == 2
    code, _, error = st_wkl("build", folder, *told, "--split", "test", "--output", tmp_path / "other")
    assert code
    assert "--split is 'test', and queries that nobody has judged take its place" in error
