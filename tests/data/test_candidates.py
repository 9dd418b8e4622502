"""BM25 candidates: as good as the published numbers, and sane at the edges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from st_wkl.data.candidates import BM25, Candidate, Candidates, bm25_candidates, find_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dense import retriever_candidates
from tests.helpers.animals import small_collection


def collection(documents: list[str], *queries: str) -> Collection:
    """Make a collection with ids d0.. and q0.. ."""
    return Collection(
        "mine", {f"d{i}": text for i, text in enumerate(documents)}, {f"q{i}": text for i, text in enumerate(queries)}
    )


def found(documents: list[str], query: str, **options: object) -> list[str]:
    """Return the ids that BM25 finds for one query."""
    candidates = bm25_candidates(collection(documents, query), show_progress=False, **options)  # type: ignore[arg-type]
    return [candidate.document_id for candidate in candidates["q0"]]


@pytest.mark.parametrize(("name", "reference"), [("nfcorpus", 0.326), ("scifact", 0.688), ("cranfield", 0.428)])
@pytest.mark.filterwarnings("ignore:2 of 1,400 documents")
def test_quality_on_real_collections(shared_data: Path, name: str, reference: float) -> None:
    """A weak first stage gives easy negatives and flatters every student: nDCG@10 must not fall."""
    import pytrec_eval

    real = Collection.load(shared_data / name)
    qrels = real.judgements("test")
    candidates = bm25_candidates(real, qrels, show_progress=False)
    run = {query_id: {hit.document_id: hit.score for hit in hits} for query_id, hits in candidates.items()}
    per_query = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    mean = sum(measures["ndcg_cut_10"] for measures in per_query.values()) / len(qrels)
    assert mean == pytest.approx(reference, abs=0.003)


def test_without_language_matches_plain_bm25(shared_data: Path) -> None:
    """Without stemming and stop words SciFact gives the .667 that is published for plain BM25."""
    import pytrec_eval

    real = Collection.load(shared_data / "scifact")
    qrels = real.judgements("test")
    candidates = bm25_candidates(real, qrels, language=None, show_progress=False)
    run = {query_id: {hit.document_id: hit.score for hit in hits} for query_id, hits in candidates.items()}
    per_query = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    assert sum(measures["ndcg_cut_10"] for measures in per_query.values()) / len(qrels) == pytest.approx(
        0.667, abs=0.005
    )


def test_the_library_does_not_debug_into_the_users_log() -> None:
    """bm25s sets its logger to DEBUG when it is imported, which shows as soon as a program configures logging."""
    code = (
        "import logging; logging.basicConfig(level=logging.WARNING)\n"
        "from st_wkl.data.candidates import bm25_candidates; from st_wkl.data.collection import Collection\n"
        "bm25_candidates(Collection('c', {'d': 'cats'}, {'q': 'cat'}), show_progress=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bm25s" not in done.stderr


def test_lists_are_ranked_and_named() -> None:
    """Everything after this relies on best first, ranks from 1, and the source."""
    documents = ["cats", "a cat among cats and dogs", "dogs", "one dog, cats"]
    hits = bm25_candidates(collection(documents, "cat"), show_progress=False)["q0"]
    assert {hit.document_id for hit in hits} == {"d0", "d1", "d3"}
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert {hit.source for hit in hits} == {"bm25"}
    assert hits[-1].score > 0


def test_unknown_words_find_nothing() -> None:
    """bm25s fills up with documents of score 0, or with the empty documents: these are no candidates."""
    with pytest.warns(UserWarning, match="1 of 3 documents"):
        mine = collection(["cats purr", "", "dogs bark"], "zebra xylophone", "?!", "the")
    assert bm25_candidates(mine, show_progress=False) == {"q0": [], "q1": [], "q2": []}


def test_fewer_documents_than_asked_for() -> None:
    """bm25s raises when asked for more documents than there are."""
    assert found(["a cat", "a dog"], "cat", top_k=100) == ["d0"]
    assert len(found(["cat"] * 9, "cat", top_k=4)) == 4


def test_words_of_one_character_count() -> None:
    """The usual token pattern drops them: "vitamin d" becomes "vitamin", and a corpus of single letters crashes."""
    assert found(["vitamin b", "vitamin d", "vitamin e"], "vitamin d")[0] == "d1"
    assert found(["x", "y"], "y", language=None) == ["d1"]


def test_a_corpus_without_words_warns() -> None:
    """An empty vocabulary ends in an obscure error inside bm25s."""
    with pytest.warns(UserWarning, match="BM25 finds no word in any document of 'mine'"):
        assert found(["?!", "..."], "cat") == []


def test_stemming_follows_the_language() -> None:
    """Inflected words must meet, in the collection's own language; without a language they do not."""
    assert found(["running dogs"], "run dog") == ["d0"]
    assert found(["running dogs"], "run dog", language=None) == []
    assert found(["die Katzen schliefen"], "Katze", language="german") == ["d0"]
    with pytest.raises(ValueError, match=r"language must be None or one of .*german.*got 'klingon'"):
        found(["cat"], "cat", language="klingon")


def test_queries_do_not_influence_each_other() -> None:
    """Chunks on several threads must come back in order, and a new word in one query must not shift another's ids."""
    documents = [f"word{i} word{i + 1} common" for i in range(150)]
    queries = [f"new{i} word{i}" for i in range(149)]
    mine = collection(documents, *queries)
    together = bm25_candidates(mine, show_progress=False)
    assert list(together) == list(mine.queries)
    for query_id in ("q0", "q63", "q64", "q148"):
        assert together[query_id] == bm25_candidates(mine, [query_id], show_progress=False)[query_id]
    assert all({hit.document_id for hit in together[f"q{i}"]} == {f"d{i}", f"d{i - 1}"} for i in range(1, 149))


def test_choice_of_queries() -> None:
    """Only what is asked for is searched; an unknown id is a mistake, none is not."""
    mine = collection(["cat"], "cat", "dog")
    assert list(bm25_candidates(mine, ["q1"], show_progress=False)) == ["q1"]
    assert bm25_candidates(mine, [], show_progress=False) == {}
    with pytest.raises(ValueError, match="1 query ids are not in 'mine', the first is 'q7'"):
        bm25_candidates(mine, ["q1", "q7"], show_progress=False)
    with pytest.raises(ValueError, match="top_k must be 1 or more"):
        bm25_candidates(mine, top_k=0)


def test_parameters_reach_the_search_and_the_name_of_the_source() -> None:
    """Lists of another baseline under the default's name would be compared with the wrong one."""
    mine = collection(["cat cat cat cat dog dog", "cat", "cat dog a b c d e f"], "cat")
    found = {text: retriever_candidates(mine, text, show_progress=False)["q0"] for text in ("bm25", "bm25:k1=0,b=0")}
    assert found["bm25"] == bm25_candidates(mine, show_progress=False)["q0"]
    assert {hit.source for hit in found["bm25:k1=0,b=0"]} == {"bm25-k1-0.0-b-0.0"}
    assert len({hit.score for hit in found["bm25:k1=0,b=0"]}) == 1 < len({hit.score for hit in found["bm25"]})
    with pytest.raises(ValueError, match="write it as bm25:k1"):
        retriever_candidates(mine, "bm25:k2=1")


@pytest.mark.slow
def test_the_compiled_search_of_large_collections_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection that grows past the limit must not get other candidates for it."""
    collection = small_collection()
    plain = bm25_candidates(collection, show_progress=False)
    monkeypatch.setattr("st_wkl.data.bm25.COMPILE_ABOVE", 0)
    assert bm25_candidates(collection, show_progress=False) == plain


def test_bm25_may_be_spelt_as_everybody_does() -> None:
    """In capitals it was asked for at the Hub."""
    assert BM25.of("BM25") == BM25()
    assert BM25.of("BM25:k1=0.9") == BM25(k1=0.9)


def test_every_kind_of_source_in_one_call(static_student_path: Path, tmp_path: Path) -> None:
    """One function mines for builds, runs, rounds and refreshes: what one of them takes the others must not refuse."""
    mine = collection(["cats purr", "dogs bark", "birds sing"], "do cats purr", "who barks")
    (tmp_path / "run.trec").write_text("q0 Q0 d2 1 3.5 theirs\nq1 Q0 d1 1 2.5 theirs\n", encoding="utf-8")
    dense = retriever_candidates(mine, static_student_path, show_progress=False)
    run = {"q0": {"d1": 0.5, "d0": 0.7}, "q1": {"d2": 1.0}}
    sources = ["bm25", BM25(k1=0.9), tmp_path / "run.trec", str(static_student_path), dense, run]
    fused = find_candidates(mine, sources=sources, show_progress=False)
    name = f"dense:{static_student_path.name}"
    origins = {hit.document_id: [(one.source, one.rank) for one in hit.origins] for hit in fused["q0"]}
    first = next(hit.rank for hit in dense["q0"] if hit.document_id == "d0")
    assert origins["d0"] == [("bm25", 1), ("bm25-k1-0.9", 1), (name, first), (name, first), ("run", 1)]
    assert ("theirs", 1) in origins["d2"]
    assert Candidates.load(fused.save(tmp_path / "fused.trec.gz"), mine) == fused
    assert repr(fused).startswith("Candidates(2 queries, 6 documents, 3 to 3 a query, of bm25: 2, bm25-k1-0.9: 2, ")
    one = find_candidates(mine, ["q1"], run, top_k=1)
    assert one == {"q1": [Candidate("d2", 1.0, 1, "run")]}


def test_what_is_wrong_with_a_source_is_said_before_any_search(tmp_path: Path) -> None:
    """The third source's misspelt name used to be found out when the first two had searched for hours."""
    mine = collection(["cats purr", "dogs bark"], "do cats purr", "who barks")
    part, other = tmp_path / "part.trec", tmp_path / "other.trec"
    part.write_text("q0 Q0 d0 1 1.0 x\n", encoding="utf-8")
    other.write_text("q1 Q0 d0 1 1.0 x\n", encoding="utf-8")
    searched = BM25(language="klingon")  # it would stop at once if it were asked to search
    for source, error, message in [
        (tmp_path / "gone.trec.gz", FileNotFoundError, r"gone\.trec\.gz does not exist"),
        ("bm25:k2=1", ValueError, "write it as bm25:k1"),
        ({"q0": {"gone": 1.0}}, ValueError, "1 candidates are not in 'mine': the first is document 'gone'"),
        ({"q0": {"d0": float("nan")}}, ValueError, "Query 'q0', document 'd0': the score is nan"),
        (other, ValueError, r"other\.trec: there is no candidate for any of the 1 queries"),
    ]:
        with pytest.raises(error, match=message):
            find_candidates(mine, ["q0"], [searched, source])
    with pytest.warns(UserWarning, match=r"part\.trec: there is no candidate for 1 of 2 queries; the first is 'q1'"):
        assert find_candidates(mine, sources=part)["q1"] == []
    with pytest.raises(ValueError, match="no source of candidates"):
        find_candidates(mine, sources=[])
