"""A language model behind a chat API as a judge: which of two documents is better, or in which order a list belongs."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from st_wkl.data.endpoint import Endpoint, ModelChanged, Watched, check_url, find_key
from st_wkl.data.rerank_apis import described
from st_wkl.data.teacher import Lists, RemoteError, from_parts, text_key
from st_wkl.progress import progress

logger = logging.getLogger(__name__)

# PairDistill's judge (arXiv 2410.01383; github.com/MiuLab/PairDistill).
PAIRWISE_PROMPT = (
    "Which document is more relevant to the query? Answer only 'A' or 'B'.\n\n"
    "Query: {query}\n\nDocument A: {first}\n\nDocument B: {second}"
)
# RankZephyr's, after RankGPT (arXiv 2312.02724, 2304.09542).
LISTWISE_PROMPT = (
    "I will provide you with {count} passages, each indicated by a numerical identifier []. Rank the passages based on "
    "their relevance to the search query: {query}.\n\n{passages}\n\nSearch Query: {query}.\n\n"
    "Rank the {count} passages above based on their relevance to the search query. All the passages should be included "
    "and listed using identifiers, in descending order of relevance. The output format should be [] > [], e.g., "
    "[4] > [2]. Only respond with the ranking results, do not say any word or explain."
)
_AGAIN = "That does not name each of [1] to [{count}] once, as [] > []. Answer with the ranking alone."
_PATH = "/v1/chat/completions"
_FORM = re.compile(r"\s*\[\d+\](?:\s*>\s*\[\d+\])*\s*")
_LEAST = 0.05  # of the probability, on the two answers: below it the model was about to say something else
_PROBE = ("which animal purrs", "Cats purr when they are content.", "Bread is baked from flour, water and salt.")


class _Chat:
    """The chat API of a server, with one model."""

    def __init__(self, url: str, model: str | None, revision: str | None, api_key_env: str | None, requests: Any):
        check_url(url)
        url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        key, said = find_key(url, api_key_env, "OPENAI_API_KEY", ("openai.com",))
        self._endpoint = Endpoint(url, key=key, said=said, **requests)
        self._model, self._revision, self._answers_as = model, revision, None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.url!r}, model={self._model!r})"

    @property
    def progress(self) -> str:
        """Requests so far, and their cost if a price was told."""
        return self._endpoint.progress

    def __reduce__(self) -> Any:
        """Refuse to travel: it would take the key along."""
        raise TypeError(f"a {type(self).__name__} asks many questions at once already, and its server does the work")

    def _named(self) -> dict[str, Any]:
        told = {"model": self._model, "revision": self._revision, "max_length": self._watched.described["max_length"]}
        if "root" in self._watched.described:
            told["root"] = self._watched.described["root"]
        return told

    _watched: Watched

    def _describe(self, patience: float | None) -> dict[str, Any]:
        found = described(self._endpoint.ask("/v1/models", patience=patience), self._model)
        self._model = found["model"]
        return found

    def _chat(
        self, messages: list[dict[str, str]], read: Any, about: str, patience: float | None, **options: Any
    ) -> Any:
        def checked(answer: Any) -> Any:
            name = answer.get("model")
            if self._answers_as is None:
                self._answers_as = name
            elif name != self._answers_as:
                raise ModelChanged(f"{self._endpoint.url} answers as {name!r}, and answered as {self._answers_as!r}.")
            return read(answer["choices"][0])

        body = {"model": self._model, "messages": messages, "temperature": 0, **options}
        return self._endpoint.ask(_PATH, body, read=checked, about=about, patience=patience)


class ChatPairwiseTeacher(_Chat):
    """A language model that is asked which of two documents is better, in both orders.

    The probability of an answer is that of its token among the first token's most likely ones, over both answers; that
    of the first document is the mean over the two orders, so that a liking for the first place falls out. How large
    that liking is, is counted. It is a `PairwiseTeacher`; `preferences`, and a builder's `pairwise`, keep each answer.

    Args:
        url: A server with `/v1/chat/completions` and log-probabilities, such as vLLM's.
        model: What the server calls it; `None` where it has one only.
        prompt: With `{query}`, `{first}` and `{second}`. Default: PairDistill's judge.
        answers: What the model says for the first and for the second document: one token each.
        revision: Commit or version of the model, which chat servers do not say.
        api_key_env: Environment variable with the key. `None` sends `OPENAI_API_KEY` to OpenAI, and no key elsewhere.
        requests: As for `RemoteTeacher`: `timeout`, `give_up_after`, `concurrency`, `requests_per_minute`,
            `price_per_1000_requests`, `price_per_million_tokens`.

    Raises:
        ValueError: The prompt lacks a part, or an option does not fit.
        RemoteError: The server cannot be reached or refuses, or the model answers something else.

    Example:
        >>> judge = ChatPairwiseTeacher("http://127.0.0.1:8000", "Qwen/Qwen3-4B-Instruct-2507")  # doctest: +SKIP
        >>> judge.prefer(["red cats"], ["Some cats are red."], ["Dogs bark."])  # doctest: +SKIP
        array([0.98], dtype=float32)
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        prompt: str | None = None,
        answers: tuple[str, str] = ("A", "B"),
        revision: str | None = None,
        api_key_env: str | None = None,
        **requests: Any,
    ) -> None:
        prompt = PAIRWISE_PROMPT if prompt is None else prompt
        _check_prompt(prompt, "query", "first", "second")
        if len(answers) != 2 or answers[0] == answers[1]:
            raise ValueError(f"answers must be two different words, got {answers!r}.")
        super().__init__(url, model, revision, api_key_env, requests)
        self._prompt, self._answers = prompt, tuple(answers)
        self._counts: dict[str, float] = {"asked": 0, "reversed": 0, "first_place": 0.0}
        # Half precision and batches move probabilities near a half by a few hundredths.
        self._watched = Watched(self._endpoint, self._describe, self._probe, tolerance=(0.15, 0.0))

    @property
    def identity(self) -> dict[str, Any]:
        """Model, revision, prompt, answers, and that both orders are asked."""
        asked = {"prompt": self._prompt, "answers": list(self._answers), "orders": "both"}
        return {"kind": "pairwise chat", **self._named(), **asked}

    @property
    def order_bias(self) -> dict[str, Any]:
        """Of the pairs asked so far: how many, how many had another winner in the other order, the first place's gain.

        `first_place` is by how much the probability of a document is higher, on average, when it is shown first.
        """
        asked = self._counts["asked"]
        return {**self._counts, "first_place": round(self._counts["first_place"] / asked, 6) if asked else 0.0}

    def prefer(self, query: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Return the probability that `first[i]` is better than `second[i]`, float32 of shape (n,).

        Raises:
            RemoteError: The server, or the model, gives no answer; the message names the texts.
        """
        return from_parts(self.prefer_parts(query, first, second), len(query))

    def prefer_parts(
        self, query: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places and probabilities as they are answered: what can be kept."""

        def work(place: int, found: list[Any]) -> None:
            forth, back = self._both(query[place], first[place], second[place], None)
            with self._lock:
                self._counts["asked"] += 1
                self._counts["reversed"] += (forth > 0.5) != (back > 0.5)
                self._counts["first_place"] += forth - back
            found.append((np.array([place]), np.array([(forth + back) / 2], dtype=np.float32)))

        yield from self._watched.answers(range(len(query)), work)
        bias = self.order_bias
        logger.info("%s: %s", self, bias)
        if bias["asked"] >= 20 and bias["reversed"] > bias["asked"] / 2:
            logger.warning(
                "%s prefers another document of %d of %d pairs when their order is turned: its answers say more about "
                "places than about documents.",
                *(self, bias["reversed"], bias["asked"]),
            )

    def _probe(self, patience: float | None) -> np.ndarray:
        return np.array(self._both(*_PROBE, patience))

    def _both(self, query: str, first: str, second: str, patience: float | None) -> tuple[float, float]:
        """Return the probability that `first` is better, once shown first and once second."""
        forth = self._one(query, first, second, patience)
        return forth, 1 - self._one(query, second, first, patience)

    def _one(self, query: str, first: str, second: str, patience: float | None) -> float:
        about = f"query {query[:80]!r} and documents {first[:80]!r} and {second[:80]!r}"

        def read(choice: Any) -> float:
            mass: dict[str, float] = defaultdict(float)
            for option in choice["logprobs"]["content"][0]["top_logprobs"]:
                mass[option["token"].strip(" \n'\"Ġ▁")] += math.exp(min(0.0, float(option["logprob"])))
            one, other = (mass[answer] for answer in self._answers)
            if not one + other >= _LEAST:
                likely = ", ".join(
                    f"{word!r} {share:.2f}" for word, share in sorted(mass.items(), key=lambda one: -one[1])[:3]
                )
                raise ValueError(
                    f"{self._answers[0]!r} and {self._answers[1]!r} have a probability of {one + other:.3f} together; "
                    f"the most likely words are {likely}"
                )
            return one / (one + other)

        text = self._prompt.format(query=query, first=first, second=second)
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        found: float = self._chat([{"role": "user", "content": text}], read, about, patience, **options)
        return found


class ChatListTeacher(_Chat):
    """A language model that is asked to bring a query's documents into order, as RankGPT and RankZephyr are.

    Long lists are ranked in windows from the end to the front, so that the best rise. In which order documents are
    shown is by their texts, not by the list's: a builder's lists begin with the judged positives. A document's score
    is minus its rank, 0 for the best; a teacher temperature above 1 makes the steps smaller. An answer that is no
    permutation is counted and asked for once more; if that is none either, all of the list gets one score, and is said.

    Args:
        url: A server with `/v1/chat/completions`.
        model: What the server calls it; `None` where it has one only.
        prompt: With `{query}`, `{count}` and `{passages}`. Default: RankZephyr's.
        window: Documents of one question.
        step: How far the window moves.
        max_words: Words of a document that are shown, as RankGPT cuts them; the number of those cut is said.
        revision: Commit or version of the model, which chat servers do not say.
        api_key_env: As for `ChatPairwiseTeacher`.
        requests: As for `RemoteTeacher`.

    Attributes:
        unparsed: Answers so far that were no permutation.
        unranked: Lists so far that have one score for that reason.

    Raises:
        ValueError: The prompt lacks a part, or an option does not fit.
        RemoteError: The server cannot be reached or refuses, or more than a tenth of the lists get no order.

    Example:
        >>> teacher = ChatListTeacher("http://127.0.0.1:8000", "castorini/rank_zephyr_7b_v1_full")  # doctest: +SKIP
        >>> DistillationDatasetBuilder("mteb/nfcorpus", teacher).build()  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        prompt: str | None = None,
        window: int = 20,
        step: int = 10,
        max_words: int = 300,
        revision: str | None = None,
        api_key_env: str | None = None,
        **requests: Any,
    ) -> None:
        prompt = LISTWISE_PROMPT if prompt is None else prompt
        _check_prompt(prompt, "query", "count", "passages")
        if not 0 < step <= window or window < 2 or max_words < 1:
            raise ValueError(f"window must be 2 or more and step from 1 to window, got {window} and {step}.")
        super().__init__(url, model, revision, api_key_env, requests)
        self._prompt, self._window, self._step, self._max_words = prompt, window, step, max_words
        self.unparsed, self.unranked, self._ranked = 0, 0, 0
        # A model that is asked for words may hesitate between two: its description alone is looked at.
        self._watched = Watched(self._endpoint, self._describe, lambda patience: np.zeros(0), tolerance=(0.0, 0.0))

    @property
    def identity(self) -> dict[str, Any]:
        """Model, revision, prompt, windows, and what a score is."""
        asked = {"prompt": self._prompt, "window": self._window, "step": self._step, "max_words": self._max_words}
        return {"kind": "listwise chat", **self._named(), **asked, "score": "minus rank"}

    def score_lists(self, lists: Lists, *, show_progress: bool = True) -> list[np.ndarray]:
        """Return for each `(query, documents)` minus the ranks of its documents, float32.

        Raises:
            RemoteError: The server gives no answer; the message names the query.
        """
        found = [np.zeros(len(documents), dtype=np.float32) for _, documents in lists]
        for place, scores in progress(
            self.list_parts(lists), desc="Judging", total=len(lists), unit=" lists", disable=not show_progress
        ):
            found[place] = scores
        return found

    def list_parts(self, lists: Lists) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the place of a list and its scores, as they are finished: what can be kept."""

        def work(place: int, found: list[Any]) -> None:
            found.append((place, self._rank(*lists[place])))

        long = sum(len(text.split()) > self._max_words for _, documents in lists for text in documents)
        if long:
            logger.warning("%s shows the first %d words of %d documents.", self, self._max_words, long)
        yield from self._watched.answers(range(len(lists)), work)
        if self.unparsed:
            logger.warning(
                "%s: %d answers were no permutation and asked for again; %d of %d lists have no order, all their "
                "documents one score: they teach nothing.",
                *(self, self.unparsed, self.unranked, self._ranked),
            )

    def _rank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        order: list[int] = sorted(range(len(documents)), key=lambda place: text_key(f"{query}\n{documents[place]}"))
        ranked = True
        end = len(order)
        while ranked and end > 1:
            start = max(0, end - self._window)
            if (found := self._permutation(query, [documents[place] for place in order[start:end]])) is None:
                ranked = False
            else:
                order[start:end] = [order[start + place] for place in found]
            end = end - self._step if start else 0
        with self._lock:
            self._ranked += 1
            self.unranked += not ranked
            if self._ranked >= 20 and self.unranked > self._ranked / 10:
                raise RemoteError(
                    f"{self} ranks {self._ranked - self.unranked} of {self._ranked} lists; the last without an order "
                    f"is of query {query[:80]!r}. Give it a prompt that it follows, or another model."
                )
        scores = np.zeros(len(documents), dtype=np.float32)
        if ranked:
            scores[order] = 0.0 - np.arange(len(order), dtype=np.float32)
        return scores

    def _permutation(self, query: str, documents: list[str]) -> list[int] | None:
        """Return the places in their order, best first; None where the model gives none, asked twice."""
        count = len(documents)
        texts = [" ".join(text.split()[: self._max_words]) for text in documents]
        passages = "\n".join(f"[{place}] {text}" for place, text in enumerate(texts, 1))
        messages = [{"role": "user", "content": self._prompt.format(query=query, count=count, passages=passages)}]
        for _ in range(2):
            about = f"query {query[:80]!r} and {count} documents, the first of which is {documents[0][:80]!r}"
            said: str = self._chat(messages, _content, about, None, max_tokens=16 + 8 * count)
            if (found := parsed(said, count)) is not None:
                return found
            with self._lock:
                self.unparsed += 1
            logger.info("no permutation of %d: %s", count, json.dumps(self._endpoint.scrub(said[:200])))
            told = _AGAIN.format(count=count)
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": told}]
        return None


def parsed(said: str, count: int) -> list[int] | None:
    """Return the places, from 0, that an answer such as `[2] > [1]` names; None if it is no permutation of all.

    Example:
        >>> parsed("[2] > [3] > [1]", 3), parsed("[2] > [1]", 3), parsed("[1] > [1] > [2]", 3), parsed("1 > 2", 2)
        ([1, 2, 0], None, None, None)
    """
    if _FORM.fullmatch(said) is None:
        return None
    found = [int(number) - 1 for number in re.findall(r"\d{1,6}", said)]
    return found if sorted(found) == list(range(count)) else None


def _content(choice: Any) -> str:
    said = choice["message"]["content"]
    if not isinstance(said, str):
        raise TypeError(f"content is {said!r}")
    return said


def _check_prompt(prompt: str, *parts: str) -> None:
    try:
        made = prompt.format(**{part: f"<{part}>" for part in parts})
    except (LookupError, ValueError) as error:
        raise ValueError(f"prompt cannot be filled in ({error!r}): it may have {', '.join(parts)} in braces.") from None
    if absent := [part for part in parts if f"<{part}>" not in made and part != "count"]:
        raise ValueError(f"prompt does not have {{{absent[0]}}}.")
