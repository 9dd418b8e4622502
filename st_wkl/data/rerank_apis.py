"""What differs between the rerank APIs: paths, fields, what makes scores raw, how a server describes itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RerankAPI:
    """One API.

    Args:
        path: Where scores are asked for.
        about: Where the server says which model it has; None where it does not.
        query: Field of the query.
        documents: Field of the documents.
        fixed: Fields that are always sent.
        raw: Fields that ask for raw logits.
        length: Field with the tokens to cut at.
        results: Field of the answer that holds the scores; None where the answer is the list itself.
        score: Field of a score.
        at_once: Documents of one request, as servers allow by default, or as they are billed.
        names_model: Whether requests name the model.
        key: Environment variable in which its users have their key.
        owners: Domains whose servers get that key unasked.
    """

    path: str
    about: str | None = None
    query: str = "query"
    documents: str = "documents"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    length: str | None = None
    results: str | None = "results"
    score: str = "relevance_score"
    at_once: int = 64
    names_model: bool = True
    key: str | None = None
    owners: tuple[str, ...] = ()

    def body(self, model: str | None, query: str, documents: list[str], **options: Any) -> dict[str, Any]:
        """Return a request for the scores of some documents."""
        named = {"model": model} if self.names_model and model is not None else {}
        return {**named, self.query: query, self.documents: documents, **self.fixed, **options}

    def scores(self, answer: Any, count: int) -> np.ndarray:
        """Return the scores of an answer in the order of the documents, float64 of shape (count,).

        Raises:
            ValueError: Scores are missing, there twice or no finite numbers.
        """
        rows = answer if self.results is None else answer[self.results]
        if not isinstance(rows, list) or len(rows) != count:
            raise ValueError(f"{len(rows) if isinstance(rows, list) else rows!r} scores for {count} documents")
        scores = np.full(count, np.nan)
        for row in rows:
            place, score = row["index"], row[self.score]
            if type(place) is not int or not 0 <= place < count:
                raise ValueError(f"a score for document {place!r} of {count}")
            if not np.isnan(scores[place]):
                raise ValueError(f"two scores for document {place} of {count}")
            if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
                raise ValueError(f"score {score!r} for document {place} of {count}")
            scores[place] = float(score)
        return scores


# vLLM: docs.vllm.ai, entrypoints/pooling/score/protocol (text_1 and text_2 are known to all versions; `use_activation`
# was called `activation` before 0.12). TEI: /docs of a running server. The others: their API references.
APIS = {
    "vllm": RerankAPI(
        "/score",
        "/v1/models",
        query="text_1",
        documents="text_2",
        fixed={"truncate_prompt_tokens": -1},
        raw={"use_activation": False},
        length="truncate_prompt_tokens",
        results="data",
        score="score",
    ),
    "tei": RerankAPI(
        "/rerank",
        "/info",
        documents="texts",
        fixed={"truncate": True},
        raw={"raw_scores": True},
        results=None,
        score="score",
        at_once=32,
        names_model=False,
        key="HF_TOKEN",
        owners=("huggingface.cloud", "huggingface.co"),
    ),
    # vLLM's, infinity's, llama.cpp's and others' /v1/rerank; whether the flags are known is found out by asking.
    "openai-rerank": RerankAPI(
        "/v1/rerank",
        "/v1/models",
        raw={"raw_scores": True, "use_activation": False},
        key="OPENAI_API_KEY",
        owners=("openai.com",),
    ),
    "cohere": RerankAPI(
        "/v2/rerank",
        length="max_tokens_per_doc",
        at_once=100,  # one search unit
        key="COHERE_API_KEY",
        owners=("cohere.com", "cohere.ai"),
    ),
    "jina": RerankAPI("/v1/rerank", fixed={"return_documents": False}, key="JINA_API_KEY", owners=("jina.ai",)),
    "voyage": RerankAPI(
        "/v1/rerank",
        fixed={"return_documents": False, "truncation": True},
        results="data",
        key="VOYAGE_API_KEY",
        owners=("voyageai.com",),
    ),
}


def described(answer: Any, model: str | None) -> dict[str, Any]:
    """Return what a server says of its model, from TEI's `/info` or from `/v1/models`.

    Raises:
        LookupError: The server does not have the model, or several, or one that scores no pairs, or says nothing.
    """
    if isinstance(answer, dict) and "model_id" in answer:
        if "reranker" not in (answer.get("model_type") or {"reranker": {}}):
            raise LookupError(f"{answer['model_id']} is served as {answer['model_type']}, and scores no pairs.")
        names = {"model": "model_id", "revision": "model_sha", "dtype": "model_dtype", "max_length": "max_input_length"}
        there = answer["model_id"]
        if model is not None and model != there and not there.startswith(("/", ".")):  # a folder has no name of its own
            raise LookupError(f"It has {there!r}, not {model!r}.")
        return {name: answer.get(theirs) for name, theirs in names.items()} | {"model": model or there}
    try:
        there = {entry["id"]: entry for entry in answer["data"]}
    except (TypeError, KeyError):
        raise LookupError("It says nothing of its models.") from None
    if model is None and len(there) == 1:
        model = next(iter(there))
    if model not in there:
        asked = "Name one of its models" if model is None else f"It has no model {model!r}. It has"
        raise LookupError(f"{asked}: {', '.join(map(repr, there)) or 'none'}.")
    entry = there[model]
    found = {"model": model, "max_length": entry.get("max_model_len")}
    return found if entry.get("root") in (None, model) else {**found, "root": entry["root"]}
