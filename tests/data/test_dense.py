"""Dense and sparse candidates: exact, from the right weights, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from st_wkl.data import search
from st_wkl.data.candidates import retriever_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.search import exact_top_k

SENTENCES = [f"{animal} {verb} {place}" for animal in ("cats", "dogs", "birds", "fish", "horses")
             for verb in ("sleep", "eat", "run") for place in ("outside", "in the house", "at night")]  # fmt: skip
COLLECTION = Collection(
    "mine",
    {f"d{n}": text for n, text in enumerate(SENTENCES)},
    {"q1": "what do dogs eat", "q2": "who is awake at night", "q3": "horses"},
)


@pytest.mark.parametrize("documents", [1, 5, 31, 32, 33, 1000, 20_001])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_exact_top_k_is_exact(monkeypatch: pytest.MonkeyPatch, documents: int, k: int) -> None:
    """The blocks, groups and merges must give what one product and one sort give."""
    monkeypatch.setattr(search, "_SCORES_AT_ONCE", 17 * 640)
    monkeypatch.setattr(search, "_QUERIES_AT_ONCE", 17)
    generator = torch.Generator().manual_seed(documents + k)
    # Whole numbers: sums are exact in any order, and there are ties.
    queries = torch.randint(-9, 10, (40, 16), generator=generator).float()
    vectors = torch.randint(-9, 10, (documents, 16), generator=generator).float()
    scores, places = exact_top_k(queries, vectors, k)
    expected = (queries @ vectors.T).sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(scores, expected)
    assert torch.equal((queries @ vectors.T).gather(1, places), scores)
    assert all(len(set(row)) == len(row) for row in places.tolist())


def test_exact_top_k_arguments() -> None:
    """Nothing to search for, equal scores in order, and shapes that do not fit."""
    vectors = torch.ones(4, 2)
    assert exact_top_k(vectors, vectors, 9)[1].tolist() == [[0, 1, 2, 3]] * 4
    assert exact_top_k(torch.empty(0, 2), vectors, 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="k must be 1"):
        exact_top_k(vectors, vectors, 0)
    with pytest.raises(ValueError, match="Expected"):
        exact_top_k(vectors, torch.ones(4, 3), 1)


def load(path: Path) -> Any:
    """Return the static student."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu")


def test_dense_candidates_are_those_of_semantic_search(
    static_student_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model and documents through sentence-transformers' own search, over several pieces."""
    from sentence_transformers.util import semantic_search

    monkeypatch.setattr(search, "_SHARD", 10)
    model = load(static_student_path)
    found = retriever_candidates(COLLECTION, model, ["q3", "q1"], top_k=7, show_progress=False)
    queries = model.encode_query([COLLECTION.queries[query_id] for query_id in found], convert_to_tensor=True)
    documents = model.encode_document(SENTENCES, convert_to_tensor=True)
    assert list(found) == ["q3", "q1"]
    for hits, expected in zip(found.values(), semantic_search(queries, documents, top_k=7), strict=True):
        assert [hit.document_id for hit in hits] == [f"d{hit['corpus_id']}" for hit in expected]
        assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in expected], abs=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, 8))
        assert hits[0].source.startswith("dense:")


def test_the_cache_knows_the_weights(
    static_student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are made once, and never taken for those of a model that was trained since, or of other texts."""
    monkeypatch.setattr(search, "_SHARD", 20)
    model = load(static_student_path)
    encoded: list[int] = []
    encode = model.encode_document

    def counted(texts: list[str], **options: Any) -> Any:
        encoded.append(len(texts))
        return encode(texts, **options)

    model.encode_document = counted
    options: dict[str, Any] = {"top_k": 5, "cache": tmp_path / "cache", "show_progress": False}
    first = retriever_candidates(COLLECTION, model, **options)
    assert encoded == [20, 20, 5]
    assert retriever_candidates(COLLECTION, model, **options) == first
    assert encoded == [20, 20, 5], "all from the cache"
    longer = Collection("longer", {**COLLECTION.documents, "new": "dogs eat"}, COLLECTION.queries)
    assert retriever_candidates(longer, model, **options)["q1"][0].document_id == "new"
    assert encoded == [20, 20, 5, 6], "only the piece that changed"
    retriever_candidates(COLLECTION, model, document_prompt="passage: ", **options)
    with torch.no_grad():
        model[0].embedding.weight[:, 0] += 1
    assert retriever_candidates(COLLECTION, model, **options) != first
    assert encoded[4:] == [20, 20, 5, 20, 20, 5]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".safetensors"]


def test_a_damaged_cache_file_is_set_aside(static_student_path: Path, tmp_path: Path) -> None:
    """A truncated file must not stop every later run, nor be read in half."""
    options: dict[str, Any] = {"cache": tmp_path, "show_progress": False}
    first = retriever_candidates(COLLECTION, str(static_student_path), **options)
    assert first["q1"][0].source == f"dense:{static_student_path.name}"
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"are damaged.*is now .*\.damaged-1"):
        assert retriever_candidates(COLLECTION, static_student_path, **options) == first
    assert retriever_candidates(COLLECTION, static_student_path, **options) == first
    assert len(list(tmp_path.rglob("*.damaged-1"))) == 1


def test_sparse_candidates(tiny_bert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SPLADE model's scores are its own, with and without the cache."""
    from sentence_transformers import SparseEncoder

    monkeypatch.setattr(search, "_SHARD", 16)
    model = SparseEncoder(str(tiny_bert_path), device="cpu")
    found = retriever_candidates(COLLECTION, model, top_k=4, cache=tmp_path, show_progress=False)
    queries = model.encode_query(list(COLLECTION.queries.values()), convert_to_tensor=True)
    documents = model.encode_document(SENTENCES, convert_to_tensor=True)
    expected = model.similarity(queries, documents)
    expected = (expected.to_dense() if expected.is_sparse else expected).topk(4, dim=1)
    for hits, scores in zip(found.values(), expected.values.tolist(), strict=True):
        assert [hit.score for hit in hits] == pytest.approx(scores, rel=1e-4)
        assert hits[0].source.startswith("sparse:")
    assert retriever_candidates(COLLECTION, model, top_k=4, cache=tmp_path, show_progress=False) == found


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_late_interaction_candidates(
    tiny_bert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, similarity: str
) -> None:
    """For each query token the best token of the document, summed, in a plain loop; from the cache the same again."""
    from sentence_transformers import MultiVectorEncoder

    monkeypatch.setattr(search, "_TOKEN_SHARD", 7)
    monkeypatch.setattr(search, "_QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(search, "_SCORES_AT_ONCE", 3_000)
    torch.manual_seed(0)  # for the projection, which is new
    MultiVectorEncoder(str(tiny_bert_path), device="cpu").save_pretrained(str(tmp_path / "model"))
    model = MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    model.similarity_fn_name = similarity
    # Documents of very different lengths, so that padding would show.
    documents = {key: text * (1 + place % 5) for place, (key, text) in enumerate(COLLECTION.documents.items())}
    collection = Collection("mine", documents, COLLECTION.queries)
    found = retriever_candidates(collection, model, top_k=9, cache=tmp_path, show_progress=False)
    for query_id, hits in found.items():
        query = model.encode_query(collection.queries[query_id])
        expected = {}
        for document_id, text in documents.items():
            products = query @ model.encode_document(text).T
            expected[document_id] = sum(max(row) for row in products.tolist())
            expected[document_id] /= len(query) if similarity == "meanmaxsim" else 1
        best = sorted(expected.values(), reverse=True)[:9]
        assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-5)
        assert [expected[hit.document_id] for hit in hits] == pytest.approx(best, rel=1e-5)
        assert hits[0].source.startswith("multi-vector:")
    monkeypatch.setattr(model, "encode_document", None)  # nothing is encoded twice
    assert retriever_candidates(collection, model, top_k=9, cache=tmp_path, show_progress=False) == found


def test_documents_without_a_token_are_no_candidates(tiny_bert_path: Path, tmp_path: Path) -> None:
    """A document of stop words alone has nothing to interact with; upstream's score for it is -1e9, or that over n."""
    from sentence_transformers import MultiVectorEncoder

    MultiVectorEncoder(str(tiny_bert_path), device="cpu").save_pretrained(str(tmp_path / "model"))
    model = MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    encode = model.encode_document
    model.encode_document = lambda texts, **options: [
        tokens[:0] if text == "eat" else tokens for text, tokens in zip(texts, encode(texts, **options), strict=True)
    ]
    collection = Collection("mine", {"none": "eat", "some": "dogs eat"}, {"q": "eat"})
    (hits,) = retriever_candidates(collection, model, show_progress=False).values()
    assert [hit.document_id for hit in hits] == ["some"]
    collection = Collection("mine", {"none": "eat"}, {"q": "eat"})
    assert retriever_candidates(collection, model, show_progress=False) == {"q": []}


def test_models_and_arguments_that_cannot_work(static_student_path: Path, tiny_bert_path: Path) -> None:
    """Each is refused before anything is encoded, or with the document that is to blame."""
    from sentence_transformers import CrossEncoder

    model = load(static_student_path)
    with pytest.raises(ValueError, match="1 query ids are not in 'mine', the first is 'q9'"):
        retriever_candidates(COLLECTION, model, ["q9"])
    with pytest.raises(ValueError, match="top_k must be 1"):
        retriever_candidates(COLLECTION, model, top_k=0)
    with pytest.raises(TypeError, match=r"got CrossEncoder.*read_run"):
        retriever_candidates(COLLECTION, CrossEncoder(str(tiny_bert_path), num_labels=1, device="cpu"))
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="'euclidean'; exact search has"):
        retriever_candidates(COLLECTION, model)
    model.similarity_fn_name = "dot"
    with torch.no_grad():
        model[0].embedding.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="document 'd0' holds NaN"):
        retriever_candidates(COLLECTION, model, show_progress=False)
