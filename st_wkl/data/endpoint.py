"""One HTTP endpoint that answers in JSON: concurrency, time-outs, retries, a limit on the rate, and a key unshown."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import tenacity

from st_wkl.data.teacher import RemoteError
from st_wkl.ranges import check_options

logger = logging.getLogger(__name__)

# Answers that are none (500, half a JSON, NaN): so many attempts, since most of them would be the same for ever.
_ATTEMPTS = 3
_LATER = frozenset({408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_LARGEST = 1 << 28  # bytes of an answer
# Answers are handed on once the model was looked at again: at most so often, and after so many requests, one of which
# is the look itself, or, of a slow server, after so many seconds.
_SECONDS, _REQUESTS, _LONGEST = 5.0, 20, 15.0
_FIRST_PATIENCE = 10.0  # a wrong address is told soon


class ModelChanged(RemoteError):
    """The server answers with another model than at the beginning."""


class Unanswered(RemoteError):
    """A request that may succeed when it is made again."""

    def __init__(self, told: str, *, after: float = 0.0, status: int | None = None, answered: bool = False) -> None:
        super().__init__(told, status=status, answered=answered)
        self.after = after


class Endpoint:
    """A server that is asked from several threads.

    Args:
        url: Address without the path of a call.
        key: Sent as `Authorization: Bearer`; in no message, whatever the server echoes.
        said: What a refused key's message says of where it came from.
        timeout: Seconds of one request.
        give_up_after: Seconds in which a request is made again while the server cannot be reached or asks to wait.
        concurrency: Requests at once.
        requests_per_minute: At most; `None` for no limit.
        price_per_1000_requests: In any currency.
        price_per_million_tokens: In the same.

    Raises:
        ValueError: An option is out of range, or the address is none, or holds a password.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        said: str = "",
        timeout: float = 60.0,
        give_up_after: float = 300.0,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        price_per_1000_requests: float | None = None,
        price_per_million_tokens: float | None = None,
    ) -> None:
        prices: dict[str, Any] = {
            "price_per_1000_requests": price_per_1000_requests,
            "price_per_million_tokens": price_per_million_tokens,
        }
        check_options(timeout=timeout, give_up_after=give_up_after, concurrency=concurrency, **prices)
        check_options(requests_per_minute=requests_per_minute)
        check_url(url)
        self.url, self.concurrency, self.patience = url.rstrip("/"), concurrency, give_up_after
        self.requests, self.tokens = 0.0, 0
        self._key, self._said, self._timeout = key, said, timeout
        self._prices = (price_per_1000_requests, price_per_million_tokens)
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock, self._closing = 0.0, threading.Lock(), threading.Event()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=concurrency + 1),
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def price(self, requests: float, tokens: float) -> float | None:
        """Return what so many requests and tokens cost, None where no price was told."""
        if self._prices == (None, None):
            return None
        return requests * (self._prices[0] or 0.0) / 1e3 + tokens * (self._prices[1] or 0.0) / 1e6

    @property
    def progress(self) -> str:
        """What was asked so far, for a bar."""
        cost = self.price(self.requests, self.tokens)
        return f"{self.requests:,.0f} requests" + ("" if cost is None else f", cost {cost:,.2f}")

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], Any] = lambda answer: answer,
        about: str = "",
        patience: float | None = None,
    ) -> Any:
        """Make one request, and again where that may help, and return what `read` makes of the answer.

        Args:
            path: Behind the address.
            body: Sent as JSON by POST; `None` is a GET.
            read: Gets the decoded answer, and raises ValueError, TypeError or LookupError where it is none.
            about: What is asked, for messages.
            patience: In place of the endpoint's own.

        Raises:
            RemoteError: With what the server said, less the key.
        """
        wrong, limit = 0, self.patience if patience is None else patience

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal wrong
            error = state.outcome.exception() if state.outcome else None
            wrong += bool(getattr(error, "answered", False))
            late = (state.seconds_since_start or 0.0) + state.upcoming_sleep > limit
            return self._closing.is_set() or wrong >= _ATTEMPTS or late

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(backoff(state), getattr(error, "after", 0.0))

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            level = logging.WARNING if state.upcoming_sleep >= 5 else logging.INFO
            logger.log(level, "%s Asked again in %.1f s.", error, state.upcoming_sleep)

        backoff = tenacity.wait_exponential_jitter(initial=0.25, max=20.0, jitter=0.25)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unanswered),
            wait=pause,
            stop=stop,
            before_sleep=tell,
            sleep=tenacity.sleep_using_event(self._closing),
            reraise=True,
        )
        try:
            return retrying(self._once, path, body, read, f" It was asked about {about}." if about else "")
        except Unanswered as error:
            if not error.answered and patience is None:
                error.args = (f"{error} It is waited for {limit:g} s (give_up_after); the same command goes on.",)
            raise

    def _once(self, path: str, body: Any, read: Callable[[Any], Any], about: str) -> Any:
        self._take_turn()
        url = self.url + path
        try:
            status, headers, content = self._exchange(url, body)
        except httpx.TransportError as error:
            raise Unanswered(
                f"{url} cannot be reached ({type(error).__name__}: {self.scrub(str(error))}).{about}"
            ) from None
        except (httpx.HTTPError, UnicodeError) as error:
            told = f"{url}: {type(error).__name__}: {self.scrub(str(error))}.{about}"
            raise Unanswered(told, answered=True) from None
        if status >= 300:
            raise self._refusal(url, status, headers, content, about)
        try:
            answer = json.loads(content)
            found = read(answer)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            kind = headers.get("content-type", "no type")
            told = f"{url} answered ({kind}) with something that is no answer ({type(error).__name__}: {error})."
            raise Unanswered(self.scrub(told)[:600] + about, answered=True) from None
        if body is not None:
            self._count(answer)
        return found

    def _exchange(self, url: str, body: Any) -> tuple[int, httpx.Headers, bytes]:
        # Text of the web may hold lone surrogates, which are no UTF-8, but escaped they are JSON.
        content = None if body is None else json.dumps(body).encode("ascii")
        headers = {} if body is None else {"Content-Type": "application/json"}
        deadline, found = time.monotonic() + self._timeout, bytearray()
        with self._client.stream("GET" if body is None else "POST", url, content=content, headers=headers) as response:
            for part in response.iter_bytes():
                found += part
                # A server that sends a byte from time to time would never run into the time-out of a single read.
                if time.monotonic() > deadline or len(found) > _LARGEST:
                    raise httpx.ReadTimeout(f"no complete answer after {len(found):,} bytes")
        return response.status_code, response.headers, bytes(found)

    def _refusal(self, url: str, status: int, headers: httpx.Headers, content: bytes, about: str) -> RemoteError:
        body = " ".join(self.scrub(content[:4096].decode("utf-8", "replace")).split())[:300]
        told = f"{url} answered with status {status}: {body or 'nothing'}.{about}"
        if status < 400:
            where = self.scrub(headers.get("location", "elsewhere"))
            return RemoteError(
                f"{told} It points to {where}, where no key was sent: give that address if you trust it."
            )
        if status in (401, 403):
            return RemoteError(f"{told} {self._said}", status=status)
        if status not in _LATER and status < 500:
            return RemoteError(told, status=status)
        after = _seconds(headers.get("retry-after"))
        if status in _LATER and after:
            with self._lock:  # for all threads: the limit is the account's
                self._next = max(self._next, time.monotonic() + after)
            told += f" It asks to wait for {after:,.0f} s."
        return Unanswered(told, after=after, status=status, answered=status not in _LATER)

    def _count(self, answer: Any) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        tokens = (usage.get("total_tokens") or usage.get("prompt_tokens") or 0) if isinstance(usage, dict) else 0
        meta = answer.get("meta") if isinstance(answer, dict) else None
        billed = meta.get("billed_units") if isinstance(meta, dict) else None
        units = billed.get("search_units", 1) if isinstance(billed, dict) else 1
        with self._lock:
            self.requests += units if isinstance(units, int | float) else 1
            self.tokens += tokens if isinstance(tokens, int) else 0

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._interval
        if at > now and self._closing.wait(at - now):
            raise RemoteError(f"{self.url} was not asked, since another request had failed.")

    def scrub(self, text: str) -> str:
        """Return a text without the key."""
        for form in {self._key, quote(self._key, safe="")} if self._key else ():
            text = text.replace(form, "***")
        return text

    def each(self, jobs: Iterable[Any], work: Callable[[Any], object]) -> Iterator[None]:
        """Work on jobs concurrently; yields after each, and at an error ends those that are under way first."""
        running: set[Future] = set()
        failed: BaseException | None = None
        waiting = iter(jobs)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="st-wkl")
        try:
            while True:
                while failed is None and len(running) < 2 * self.concurrency:
                    if (job := next(waiting, None)) is None:
                        break
                    running.add(pool.submit(work, job))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if future.cancelled() or (error := future.exception()) is None:
                        yield
                    elif failed is None:
                        failed = error
                        self._closing.set()  # those that wait for their next attempt wait no longer
                        for other in running:
                            other.cancel()
            if failed is not None:
                raise failed
        finally:
            self._closing.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._closing.clear()


class Watched:
    """A model behind an endpoint, which is looked at again and again: is it still the one that it was?

    Args:
        endpoint: Where it is.
        describe: Returns what the server says of it; LookupError says that it is not there.
        probe: Returns its answers to questions that are always the same, in numbers.
        tolerance: How far these may be from those of the beginning: absolutely, and relatively beside it. Batches and
            half precision move the answers of one model, too.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        describe: Callable[[float | None], dict[str, Any]],
        probe: Callable[[float | None], np.ndarray],
        *,
        tolerance: tuple[float, float],
    ) -> None:
        self.endpoint, self._describe, self._probe, self._tolerance = endpoint, describe, probe, tolerance
        soon = min(_FIRST_PATIENCE, endpoint.patience)
        self.described = self._look(soon, RemoteError)
        self.probed = probe(None if self.described else soon)
        self._at = time.monotonic()

    def _look(self, patience: float | None, kind: type[RemoteError]) -> dict[str, Any]:
        try:
            return self._describe(patience)
        except LookupError as error:
            raise kind(f"{self.endpoint.url}: {error}") from None

    def check(self, patience: float | None = None) -> None:
        """Look at the model.

        Raises:
            ModelChanged: It is another one.
            RemoteError: It cannot be looked at.
        """
        described, probed = self._look(patience, ModelChanged), self._probe(patience)
        self._at = time.monotonic()
        remedy = "Nothing of the answers since the last look is kept. Start the first model again, or begin anew."
        if described != self.described:
            names = sorted(key for key in described | self.described if described.get(key) != self.described.get(key))
            told = ", ".join(f"{key} {self.described.get(key)!r} → {described.get(key)!r}" for key in names)
            raise ModelChanged(f"The model at {self.endpoint.url} was changed in the middle: {told}. {remedy}")
        if not self.agrees(probed):
            raise ModelChanged(
                f"The model at {self.endpoint.url} was changed in the middle: it gave {self.probed.round(4).tolist()} "
                f"for texts for which it now gives {probed.round(4).tolist()}. {remedy}"
            )

    def agrees(self, probed: np.ndarray) -> bool:
        """Return whether answers to the fixed questions are those of the beginning, within the tolerance."""
        absolute, relative = self._tolerance
        return np.allclose(probed, self.probed, atol=absolute, rtol=relative)

    def answers(self, jobs: Iterable[Any], work: Callable[[Any, list[Any]], None]) -> Iterator[Any]:
        """Yield what `work(job, answers)` appends, from several threads, once the model was looked at after it came.

        At an error, what came before is yielded first; unless the model has changed, when nothing of it is.
        """
        answers: list[Any] = []
        since, asked = time.monotonic(), self.endpoint.requests
        if since - self._at > _SECONDS:
            self.check()
        try:
            for _ in self.endpoint.each(jobs, lambda job: work(job, answers)):
                late = time.monotonic() - since
                many = late >= _SECONDS and self.endpoint.requests - asked >= _REQUESTS
                if (many or late >= _LONGEST) and answers:
                    count = len(answers)  # what comes during the look waits for the next
                    self.check()
                    yield from answers[:count]
                    del answers[:count]
                    since, asked = time.monotonic(), self.endpoint.requests
            self.check()
        except ModelChanged:
            raise
        except (Exception, KeyboardInterrupt):
            if answers:
                try:
                    self.check(patience=0.0)
                except ModelChanged:
                    raise
                except RemoteError:  # it is gone: its answers came after the last look, before it went
                    pass
                yield from answers
            raise
        yield from answers


def check_url(url: str) -> None:
    """Refuse what is no address of a server, and one that holds a secret, which would stand in messages.

    Raises:
        ValueError: Without showing it.
    """
    try:
        parts = urlsplit(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        there = False
    if not there:
        raise ValueError("url must be the address of a server, such as http://127.0.0.1:8000.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "url must hold neither user, password nor query, which would be written down with it. Keys are read from "
            "an environment variable: api_key_env."
        )


def find_key(url: str, variable: str | None, usual: str | None, owners: Iterable[str]) -> tuple[str | None, str]:
    """Return the key to send, and what to say if it is refused; never the key in a message.

    Args:
        url: Where it goes.
        variable: Environment variable that the user names.
        usual: The one that users of the API have. It is sent to its owner's hosts only: a key of one company is
            nothing for the server of another.
        owners: These hosts' domains.

    Raises:
        ValueError: The named variable is not set, or holds what cannot be sent.
    """
    host, name = urlsplit(url).hostname or "", variable
    owned = any(host == owner or host.endswith(f".{owner}") for owner in owners)
    if name is None and usual is not None and owned:
        name = usual
    if name is None:
        hint = f" {usual} is for its owner's servers." if usual and usual in os.environ else ""
        return None, f"No key was sent: name the environment variable that holds it as api_key_env.{hint}"
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"The key for {host} is read from the environment variable {name}, which is not set.")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"The environment variable {name} holds characters that no key has, such as a line's end.")
    if urlsplit(url).scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        logger.warning("The key in %s is sent to %s in the clear: http has no encryption.", name, host)
    return key, f"The key is read from the environment variable {name}: is it right, and may it use this model?"


def _seconds(header: str | None) -> float:
    """Return the seconds of a Retry-After, which is a number or a date."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header)) if header.strip().isdigit() else max(0.0, _until(header))
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
