"""A reranker behind HTTP as a teacher: vLLM, text-embeddings-inference, and what speaks the common `/v1/rerank`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from st_wkl.data.endpoint import Endpoint, ModelChanged, Watched, check_url, find_key
from st_wkl.data.provenance import stated_license
from st_wkl.data.rerank_apis import APIS, RerankAPI, described
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.teacher import Pair, RemoteError, from_parts, shown
from st_wkl.ranges import check_options

logger = logging.getLogger(__name__)

_QUERY = "how many people live in Berlin"
_DOCUMENTS = [
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometres.",
    "In Berlin leben heute mehr Menschen als vor zwanzig Jahren.",
    "New York City is famous for the Metropolitan Museum of Art.",
    "Bread is baked from flour, water and salt.",
]
# What stands behind the address of a server in others' manuals.
_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/v1")
_CLOSEST = 1e-7  # to 0 and to 1, about float32's resolution: ±16.1 as a logit
_CHARACTERS = 6  # more than a token has, on average, in any language


class RemoteTeacher:
    """A reranker on a server: one query with many documents in a request, several requests at once.

    Requests that fail in passing (429, 502 to 504, a connection that is refused, hangs or breaks) are made again with
    back-off, or after what `Retry-After` says; what is no answer (500, half a JSON, a wrong number of scores, NaN) a
    few times. What ends a run ends it with an error that names the pair, and everything that was answered is kept.
    The server's description and the scores of four fixed texts are looked at again every 5 to 15 seconds: if either has
    changed (a score by more than .05 and 2 %, as batches and half precision move them, too), the run stops, and no
    answer since the last look is kept. A process that is killed without warning loses the answers since that look. The
    fixed texts' scores lie in the store, so that another run notices another model under an old name.

    Args:
        url: The server, such as `http://127.0.0.1:8000`.
        model: What the server calls it. `None` takes what a vLLM or TEI server has.
        api: `"vllm"` (`/score`), `"tei"` (`/rerank`), `"openai-rerank"` (`/v1/rerank` of vLLM, infinity, llama.cpp
            and others), `"cohere"`, `"jina"`, `"voyage"`, or `"auto"`: by the host, or what the server says of itself.
        revision: Commit or version of the model. It is part of the identity, and stated by you where the server does
            not say it: then nothing else tells the scores of two versions of one name apart.
        max_length: Tokens to cut at, where the API takes it (`vllm` for a pair, `cohere` for a document). `None` takes
            what the server reads.
        activation: What the server does to the logits. `"auto"` asks for raw ones where the API can, and finds out by
            the fixed texts: scores that all lie within 0 and 1 went through a sigmoid, and are turned back into logits,
            which is said. `"identity"` takes scores as they come, `"sigmoid"` turns them back in any case.
        api_key_env: Environment variable with the key. `None` takes the API's usual one (`COHERE_API_KEY`,
            `JINA_API_KEY`, `VOYAGE_API_KEY`, `OPENAI_API_KEY`, `HF_TOKEN`) for servers of its owner, else none.
        timeout: Seconds of one request.
        give_up_after: Seconds in which a request is made again while the server cannot be reached, or asks to wait.
            Five minutes are enough for a restart.
        concurrency: Requests at once.
        requests_per_minute: At most; `None` for no limit.
        price_per_1000_requests: For the cost in the bar and in estimates; in any currency.
        price_per_million_tokens: The same, where the server counts tokens.

    Attributes:
        saturated_scores: Scores so far that were 0 or 1 to within 1e-7: as logits they are cut to ±16.1.

    Raises:
        ValueError: An option does not fit, or the key's variable is not set.
        RemoteError: The server cannot be reached, refuses, has no such model, or gives no scores.

    Example:
        >>> teacher = RemoteTeacher("http://127.0.0.1:8000", "BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
        >>> teacher.score([("how many people live in Berlin", "Berlin has 3.5 million inhabitants.")])  # doctest: +SKIP
        array([8.9], dtype=float32)
    """

    # Given to it at once: enough for all requests that run together. Read by `score_pairs`.
    chunk_pairs = 8_192

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api: Literal["auto", "vllm", "tei", "openai-rerank", "cohere", "jina", "voyage"] = "auto",
        revision: str | None = None,
        max_length: int | None = None,
        activation: Literal["auto", "identity", "sigmoid"] = "auto",
        api_key_env: str | None = None,
        **requests: Any,
    ) -> None:
        if api != "auto" and api not in APIS:
            raise ValueError(f"api must be auto or one of {', '.join(APIS)}, got {api!r}.")
        if activation not in ("auto", "identity", "sigmoid"):
            raise ValueError(f'activation must be "auto", "identity" or "sigmoid", got {activation!r}.')
        check_options(max_length=max_length)
        check_url(url)
        url = url.rstrip("/")
        url = url.removesuffix(next((path for path in _PATHS if url.endswith(path)), ""))
        self.api = _by_host(url) if api == "auto" else api
        self._api: RerankAPI = APIS.get(self.api, APIS["openai-rerank"])
        key, said = find_key(url, api_key_env, self._api.key, self._api.owners)
        self._endpoint = Endpoint(url, key=key, said=said, **requests)
        if self.api == "auto":
            self.api = _asked(self._endpoint)
            self._api = APIS[self.api]
        if max_length is not None and self._api.length is None:
            raise ValueError(f"max_length cannot be told to a server with the API {self.api!r}: set it at its start.")
        if model is None and self._api.about is None:
            raise ValueError(f"A server with the API {self.api!r} has many models: give model.")
        self._options: dict[str, Any] = dict(self._api.raw) if activation != "sigmoid" else {}
        if max_length is not None and self._api.length is not None:
            self._options[self._api.length] = max_length
        self._model, self.saturated_scores, self._said_long = model, 0, False
        self._at_once = self._api.at_once
        self._inverts, self._answers_as = False, None  # until the first scores are there
        tolerance = (0.05, 0.02)
        self._watched = Watched(self._endpoint, self._describe, self._probe, tolerance=tolerance)
        self._activation = self._find_activation(activation)
        self._identity = self._identified(revision, max_length)

    def __repr__(self) -> str:
        return f"RemoteTeacher({self._endpoint.url!r}, model={self._model!r}, api={self.api!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """API, model, revision, dtype and length, as the server or else you state them, and the activation.

        Where the server is, how it is asked and by whom has no part in it.
        """
        return dict(self._identity)

    @property
    def progress(self) -> str:
        """Requests so far, and their cost if a price was told."""
        return self._endpoint.progress

    @property
    def license(self) -> str | None:
        """The licence that the model's card on the Hub states; None for others."""
        return stated_license(str(self._model)) if str(self._model).count("/") == 1 else None

    def __reduce__(self) -> Any:
        """Refuse to travel: it would take the key along, and workers would be no faster."""
        raise TypeError("a RemoteTeacher asks many pairs at once already, and its server does the work")

    def requests_for(self, pairs: Sequence[Pair]) -> int:
        """Return how many requests pairs take."""
        return sum(1 for _ in self._jobs(pairs))

    def cost_of(self, requests: float, tokens: float) -> float | None:
        """Return what requests and tokens cost, None where no price was told."""
        return self._endpoint.price(requests, tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the server has counted so far; 0 where it does not."""
        return self._endpoint.tokens

    @property
    def pairs_at_once(self) -> int:
        """Pairs that are under way together."""
        return self._at_once * self._endpoint.concurrency

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the scores of n pairs, float32 of shape (n,).

        Raises:
            RemoteError: The server gives none; the message names the pair.
        """
        return from_parts(self.score_parts(pairs), len(pairs))

    def score_parts(self, pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in `pairs` and their scores, as soon as the model was looked at after they came.

        Raises:
            RemoteError: As `score`, after what could be kept was yielded.
        """
        if len(pairs):
            self._say_long(pairs)
            yield from self._watched.answers(self._jobs(pairs), lambda job, found: self._ask(pairs, job, found))
            if self.saturated_scores:
                told = (
                    "%d scores so far are 0 or 1: the server's sigmoid has no more digits for them. Raw logits would."
                )
                logger.warning(told, self.saturated_scores)

    def check_stored(self, store: ScoreStore) -> None:
        """Compare the scores of the fixed texts with those that a store has of an earlier run, or keep them there.

        Raises:
            ModelChanged: Another version answers under the same name, and its scores would be mixed with the first's.
        """
        pairs, now = [(_QUERY, document) for document in _DOCUMENTS], self._watched.probed
        there = store.get(self.identity, pairs).astype(np.float64)
        if np.isnan(there).any():
            store.put(self.identity, pairs, self._logits(now) if self._inverts else now)
        elif not self._watched.agrees(1 / (1 + np.exp(-there)) if self._inverts else there):
            raise ModelChanged(
                f"{self} gives {now.round(4).tolist()} for fixed texts for which the store {store.path} has "
                f"{there.round(4).tolist()}: another version that answered under its name in an earlier run. State the "
                "revision, and their scores are kept apart."
            )

    def _jobs(self, pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
        """Yield the places of each request: documents of one query."""
        by_query: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(place)
        for places in by_query.values():
            for start in range(0, len(places), self._at_once):
                yield np.array(places[start : start + self._at_once])

    def _ask(self, pairs: Sequence[Pair], places: np.ndarray, found: list[Any]) -> None:
        first = pairs[places[0]]
        about = shown(first) if len(places) == 1 else f"{len(places)} pairs, the first of which is {shown(first)}"
        try:
            found.append((places, self._scores(first[0], [pairs[place][1] for place in places], about)))
        except RemoteError as error:
            # Too many, too long, or one that the server fails at: half of them, and so on, leaves that one.
            if len(places) == 1 or not (error.answered or error.status in (400, 413, 422)):
                raise
            for half in np.array_split(places, 2):
                self._ask(pairs, half, found)

    def _scores(self, query: str, documents: list[str], about: str, patience: float | None = None) -> np.ndarray:
        body = self._api.body(self._model, query, documents, **self._options)

        def read(answer: Any) -> np.ndarray:
            scores = self._read(answer, len(documents))
            return self._logits(scores) if self._inverts else scores

        scores: np.ndarray = self._endpoint.ask(self._api.path, body, read=read, about=about, patience=patience)
        return scores

    def _read(self, answer: Any, count: int) -> np.ndarray:
        name = answer.get("model") if isinstance(answer, dict) else None
        if self._answers_as is None:
            self._answers_as = name
        elif name != self._answers_as:
            raise ModelChanged(f"{self._endpoint.url} answers as {name!r}, and answered as {self._answers_as!r}.")
        return self._api.scores(answer, count)

    def _logits(self, scores: np.ndarray) -> np.ndarray:
        if scores.min() < 0 or scores.max() > 1:
            wrong = scores[(scores < 0) | (scores > 1)][0]
            raise ValueError(f"score {wrong}, where all were within 0 and 1 before: set activation to identity")
        cut = np.clip(scores, _CLOSEST, 1 - _CLOSEST)
        self.saturated_scores += int((cut != scores).sum())
        return np.log(cut) - np.log1p(-cut)

    def _describe(self, patience: float | None) -> dict[str, Any]:
        """Return what the server says of the model; nothing where it says nothing."""
        if self._api.about is None:
            return {}
        try:
            answer = self._endpoint.ask(self._api.about, patience=patience)
            if self.api == "tei" and type(most := answer.get("max_client_batch_size")) is int:
                self._at_once = max(1, min(most, 64))
            found = described(answer, self._model)
        except RemoteError as error:
            if self.api == "openai-rerank" and error.status in (404, 405):
                return {}
            raise
        self._model = found["model"]
        return found

    def _probe(self, patience: float | None) -> np.ndarray:
        """Return the scores of the fixed texts, as they come."""
        scores: np.ndarray
        body = self._api.body(self._model, _QUERY, _DOCUMENTS, **self._options)
        try:
            scores = self._endpoint.ask(
                self._api.path,
                body,
                read=lambda answer: self._read(answer, len(_DOCUMENTS)),
                about=f"{len(_DOCUMENTS)} fixed texts",
                patience=patience,
            )
        except RemoteError as error:
            if self.api != "openai-rerank" or error.status not in (400, 422) or not self._options:
                raise
            self._options = {}  # a strict server, which does not know the flags
            return self._probe(patience)
        return scores

    def _find_activation(self, activation: str) -> str:
        """Return what was done to the scores, and say what is done about it."""
        probed = self._watched.probed
        within = bool(probed.min() >= 0 and probed.max() <= 1)
        self._inverts = activation == "sigmoid" or (activation == "auto" and within)
        if self._inverts and not within:
            raise ValueError(f"activation is sigmoid, and the server gives {probed.round(3).tolist()}.")
        flags = ", ".join(f"{name}={value}".lower() for name, value in self._api.raw.items())
        asked = f"though raw ones were asked for ({flags})" if flags else "and the API cannot give raw ones"
        if within and activation == "auto":
            logger.warning(
                "%s gives scores within 0 and 1, %s: they are turned back into logits, log(p / (1 - p)), since between "
                '0 and 1 little is left of the differences. activation="identity" takes them as they are.',
                self,
                asked,
            )
        elif within and activation == "identity":
            logger.warning("%s gives scores within 0 and 1, %s. They are taken as they are.", self, asked)
        return "sigmoid, inverted" if self._inverts else "identity"

    def _identified(self, revision: str | None, max_length: int | None) -> dict[str, Any]:
        told = self._watched.described
        if self._model is None:
            raise ValueError(f"A server with the API {self.api!r} does not say which model it has: give model.")
        if revision is not None and told.get("revision") not in (None, revision):
            raise ValueError(f"The server has revision {told['revision']!r} of {self._model}, not {revision!r}.")
        if told.get("revision") is None and revision is None:
            logger.warning(
                "%s does not say which revision it has. Its scores are kept under its name alone: state the revision, "
                "or another version under this name would be taken for it.",
                self,
            )
        return {
            "kind": "remote",
            "model": self._model,
            "revision": told.get("revision") or revision,
            "api": self.api,
            "dtype": told.get("dtype"),
            "max_length": max_length or told.get("max_length"),
            "activation": self._activation,
            **({"root": told["root"]} if "root" in told else {}),
            **({"answers_as": self._answers_as} if self._answers_as not in (None, self._model) else {}),
        }

    def _say_long(self, pairs: Sequence[Pair]) -> None:
        """Say once that the server will cut, which it does not report."""
        limit = self._identity["max_length"]
        if limit is None or self._said_long:
            return
        long = [pair for pair in pairs if len(pair[0]) + len(pair[1]) > _CHARACTERS * limit]
        if long:
            self._said_long = True
            logger.warning(
                "%d of %d pairs have more than %d characters for each of the %d tokens that the server reads, and are "
                "cut there, which it does not report; the first is %s.",
                *(len(long), len(pairs), _CHARACTERS, limit, shown(long[0])),
            )


def _by_host(url: str) -> str:
    host = urlsplit(url).hostname or ""
    owned = (name for name in ("cohere", "jina", "voyage") if host.endswith(APIS[name].owners))
    return next(owned, "auto")


def _asked(endpoint: Endpoint) -> str:
    """Return the API that a server speaks, by what it says of itself."""
    for path in ("/info", "/v1/models"):
        try:
            answer = endpoint.ask(path, patience=10.0)
        except RemoteError as error:
            if error.status not in (404, 405):
                raise
            continue
        if isinstance(answer, dict) and "model_id" in answer:
            return "tei"
        rows = answer.get("data") if isinstance(answer, dict) else None
        if isinstance(rows, list) and any(isinstance(row, dict) and row.get("owned_by") == "vllm" for row in rows):
            return "vllm"
    return "openai-rerank"
