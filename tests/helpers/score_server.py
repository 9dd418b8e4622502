"""A server on loopback that speaks the rerank and chat protocols, with any scorer behind it, and fails when it is told.

    with ScoreServer(score, api="tei") as server:
        server.faults += ["500", "half"]  # of the next two requests for scores
        RemoteTeacher(server.url)
    server.answered["query", "document"]  # how often

As a program it is a server that can be killed: `python -m tests.helpers.score_server API PORT TEACHER LOG`.
"""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Score = Callable[[Sequence[tuple[str, str]]], Any]
FAULTS = ("half", "cut", "nan", "short", "twice", "range", "null", "429", "500", "503", "hang", "deep")
PATHS = {
    "vllm": ("/score", "/v1/models", "/v1/chat/completions"),
    "tei": ("/rerank", "/info"),
    "openai-rerank": ("/v1/rerank", "/v1/models"),
    "cohere": ("/v2/rerank",),
    "jina": ("/v1/rerank",),
    "voyage": ("/v1/rerank",),
}


class ScoreServer:
    """The server; a context manager, which can be entered again on the same port."""

    def __init__(self, score: Score, api: str = "vllm", *, model: str = "small-reranker", port: int = 0) -> None:
        self.score, self.api, self.model, self.port = score, api, model, port
        self.revision = "1234abcd"
        self.activated = False  # gives probabilities, whatever it is asked
        self.strict = False  # refuses fields that it does not know
        self.key: str | None = None  # that it asks for
        self.longest = 10**9  # characters of a pair; longer ones are refused
        self.at_once = 32  # documents of a request, where the API has a limit
        self.seconds = 0.0  # of each answer
        self.first_place = 0.0  # logits for what a judge is shown first
        self.faults: deque[str] = deque()
        self.poison: dict[str, str] = {}  # document → fault, whenever it is asked about
        self.answered: Counter[tuple[str, str]] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.log: Path | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        here = {"/v1/models": self.models, "/info": self.info, "/v1/chat/completions": self.chat}
        routes = [
            Route(path, here.get(path, self.rerank), methods=["GET" if path in ("/v1/models", "/info") else "POST"])
            for path in PATHS[self.api]
        ]
        return Starlette(routes=routes)

    def __enter__(self) -> ScoreServer:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(self.app(), log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=10)

    async def models(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        entry = {"id": self.model, "object": "model", "root": self.model, "max_model_len": 512}
        return JSONResponse({"object": "list", "data": [entry | ({"owned_by": "vllm"} if self.api == "vllm" else {})]})

    async def info(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        told: dict[str, Any] = {
            "model_id": self.model,
            "model_sha": self.revision,
            "model_dtype": "float32",
            "max_input_length": 512,
        }
        told["max_client_batch_size"] = self.at_once
        return JSONResponse(told | {"model_type": {"reranker": {"id2label": {"0": "LABEL_0"}}}})

    def _refused(self, request: Request) -> Response | None:
        key = request.headers.get("authorization", "")
        self.keys.add(key)
        if self.key is None or key == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": f"the key {key} is wrong"}, 401)  # which says it, as some do

    async def rerank(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if (refused := self._refused(request)) is not None:
            return refused
        query = body["text_1" if self.api == "vllm" else "query"]
        documents = body[{"vllm": "text_2", "tei": "texts"}.get(self.api, "documents")]
        fault = self.faults.popleft() if self.faults else ""
        fault = next((self.poison[text] for text in documents if text in self.poison), fault)
        if (early := await self._early(fault)) is not None:
            return early
        if self.strict and body.keys() & {"raw_scores", "use_activation"}:
            return JSONResponse({"error": "extra fields"}, 422)
        if len(documents) > self.at_once and self.api == "tei":
            return JSONResponse({"error": f"batch size {len(documents)} > maximum allowed"}, 413)
        if any(len(query) + len(text) > self.longest for text in documents):
            return JSONResponse({"error": "inputs must have less than 512 tokens"}, 413)
        scores = await run_in_threadpool(self._scores, [(query, text) for text in documents])
        text = self._written(body, scores, fault)
        if not fault:
            self._note([(query, document) for document in documents])
        if fault == "half":
            return Response(text[: len(text) // 2], media_type="application/json")
        if fault == "cut":
            return Response(text[:-9], headers={"content-length": str(len(text))}, media_type="application/json")
        return Response(text, media_type="application/json")

    def _written(self, body: dict[str, Any], scores: list[float], fault: str) -> str:
        """Return an answer as each API has it; with a fault, one that looks like an answer and is none."""
        raw = body.get("raw_scores") or body.get("use_activation") is False
        asked_for_raw = raw or self.api in ("openai-rerank", "cohere", "jina", "voyage")
        if self.activated or not asked_for_raw:
            scores = [1 / (1 + math.exp(-score)) for score in scores]
        field = "score" if self.api in ("vllm", "tei") else "relevance_score"
        rows = [{"index": place, field: score} for place, score in enumerate(scores)]
        if self.api != "vllm":
            rows.sort(key=lambda row: -row[field])
        if fault == "short":
            rows = rows[:-1]
        elif fault == "twice":
            rows[-1] = rows[0] if len(rows) > 1 else {"index": 7, field: 1.0}
        elif fault == "range":
            rows[-1]["index"] = len(rows)
        elif fault in ("nan", "null"):
            rows[0][field] = float("nan") if fault == "nan" else None
        answer: Any = rows if self.api == "tei" else {"results": rows, "model": self.model}
        if self.api in ("vllm", "voyage"):
            answer = {"data": rows, "model": self.model}
        if isinstance(answer, dict):
            answer["usage"] = {"total_tokens": len(json.dumps(body))}
        if self.api == "cohere":
            answer = {"results": rows, "meta": {"billed_units": {"search_units": 1}}}
        return json.dumps(answer)

    async def _early(self, fault: str) -> Response | None:
        await anyio.sleep(self.seconds)
        if fault == "hang":
            await anyio.sleep(20)
        if fault == "deep":
            return Response("[" * 100_000, media_type="application/json")
        if fault == "redirect":
            return Response(status_code=307, headers={"location": "http://other.example/score"})
        if fault in ("429", "503"):
            return JSONResponse({"error": "busy"}, int(fault), headers={"retry-after": "1"})
        return JSONResponse({"error": f"failed with {fault}"}, int(fault)) if fault.isdigit() else None

    def _scores(self, pairs: list[tuple[str, str]]) -> list[float]:
        with self.lock:
            return [float(score) for score in self.score(pairs)]

    def _note(self, pairs: list[tuple[str, str]]) -> None:
        with self.lock:
            self.answered.update(pairs)
            if self.log is not None:
                with self.log.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(pair)}\n" for pair in pairs)

    async def chat(self, request: Request) -> Response:
        """Judge by the scorer: two documents by its logits, or a list's passages."""
        body = await request.json()
        self.requests.append(body)
        if (refused := self._refused(request)) is not None:
            return refused
        fault = self.faults.popleft() if self.faults else ""
        if (early := await self._early(fault)) is not None:
            return early
        text = body["messages"][0]["content"]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if body.get("logprobs"):
            query, first, second = re.findall(r"(?:Query|Document [AB]): (.*)", text)
            one, other = self._scores([(query, first), (query, second)])
            better = 1 / (1 + math.exp(other - one - self.first_place))
            options = [
                {"token": token, "logprob": math.log(share)} for token, share in (("A", better), (" B", 1 - better))
            ]
            if fault == "talk":
                options = [{"token": "Sure", "logprob": -0.001}]
            choice |= {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": options}]}}
            self._note([(query, f"{first}|{second}")])
        else:
            query = re.findall(r"search query: (.*)\.\n", text)[0]
            passages = re.findall(r"\[\d+\] (.+)", text.split("Search Query:")[0])
            scores = self._scores([(query, passage) for passage in passages])
            order = sorted(range(len(passages)), key=lambda place: -scores[place])
            said = " > ".join(f"[{place + 1}]" for place in order)
            choice["message"] = {"content": f"Sure: {said}" if fault == "talk" else said}
            self._note([(query, " ".join(sorted(passages)))])
        return JSONResponse({"choices": [choice], "model": self.model, "usage": {"total_tokens": len(text)}})


if __name__ == "__main__":
    from st_wkl.data.cross_encoder import CrossEncoderTeacher

    api, port, teacher, log = sys.argv[1:]
    with ScoreServer(CrossEncoderTeacher(teacher, batch_size=1).score, api, port=int(port)) as serving:
        serving.log, serving.seconds = Path(log), 0.02
        while True:
            time.sleep(60)
