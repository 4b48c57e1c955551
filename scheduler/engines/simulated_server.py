"""The simulated engine's process: `python -m scheduler.engines.simulated_server --port N --model NAME ...`.

It answers as vLLM does (bodies, stream framing, usage, errors), at a pace from its settings, with text that says that
no model ran. Faults are asked for by `--fault`, by the header `x-vramp-simulate: FAULT`, or by `[[fault:FAULT]]` in
what was said last: slow (ten times slower), crash (the process ends after the first token), garbage (bytes that are
not the protocol), hang (silence after the first token). GET /stats counts requests, for tests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Never

from aiohttp import web

from scheduler.engines import simulated_text as text
from scheduler.engines.simulated import FAULTS
from scheduler.engines.simulated_frames import Answer, Chat, Completion, Dialect, Messages, Responses

CONTEXT_TOKENS = 131_072
COMPLETION_TOKENS = 16
BODY_LIMIT = 256 << 20
SLOWER = 10.0
CRASH_STATUS = 70
LOGPROB = -0.1  # of every token: nothing here is probable or not
GARBAGE = b'\xff\xfedata: {"choices": [{"delta": \n\n%%% \x00\n\n'
MARKER = re.compile(r"\[\[fault:(\w+)\]\]")
LIMIT_KEYS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


class Settings(argparse.Namespace):
    """The command line. Times are in the units of their names."""

    port: int
    model: str
    task: str
    ttft_ms: float
    tokens_per_s: float
    load_s: float
    max_sequences: int
    fault: str
    fault_after: int


class Engine:
    """The state of one simulated engine. Holds: running is at most `max_sequences`, the others wait in order."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.max_sequences)
        self._numbers = itertools.count(1)
        self._answered = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self._slept = False
        self._stats = {"requests": 0, "running": 0, "waiting": 0, "finished": 0, "aborted": 0}

    def app(self) -> web.Application:
        """The routes of this task; those of the other one are 404, as on vLLM."""
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_error_shape])
        app.router.add_get("/health", _empty)
        app.router.add_get("/ping", _empty)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/stats", self.stats)
        app.router.add_get("/is_sleeping", self.is_sleeping)
        app.router.add_post("/sleep", self.sleep)
        app.router.add_post("/wake_up", self.wake_up)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/detokenize", self.detokenize)
        routes = self._embed_routes() if self._settings.task == "embed" else self._generate_routes()
        for path, handler in routes:
            app.router.add_post(path, handler)
        return app

    def _generate_routes(self) -> Iterator[tuple[str, Any]]:
        for path, dialect in (
            ("/v1/chat/completions", Chat),
            ("/v1/responses", Responses),
            ("/v1/messages", Messages),
        ):
            yield path, self._handler(dialect)
        yield "/v1/completions", self.completions
        yield "/v1/messages/count_tokens", self.count_tokens

    def _embed_routes(self) -> Iterator[tuple[str, Any]]:
        yield "/v1/embeddings", self.embeddings
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            yield path, self.rerank
        for path in ("/score", "/v1/score"):
            yield path, self.score

    # -- what is asked of any engine ----------------------------------------------------------------------------------

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        card = {"id": self._settings.model, "object": "model", "created": int(time.time()), "owned_by": "simulated"}
        return web.json_response({"object": "list", "data": [{**card, "max_model_len": CONTEXT_TOKENS}]})

    async def stats(self, _: web.Request) -> web.Response:
        """GET /stats: requests, running, waiting, finished, aborted (the client left first)."""
        return web.json_response(self._stats)

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics, the gauges that matter most, by vLLM's names."""
        label = f'{{engine="0",model_name="{self._settings.model}"}}'
        share = self._stats["running"] / self._settings.max_sequences
        lines = [
            f"vllm:num_requests_running{label} {self._stats['running']}",
            f"vllm:num_requests_waiting{label} {self._stats['waiting']}",
            f"vllm:kv_cache_usage_perc{label} {share}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def is_sleeping(self, _: web.Request) -> web.Response:
        """GET /is_sleeping."""
        return web.json_response({"is_sleeping": not self._awake.is_set()})

    async def sleep(self, _: web.Request) -> web.Response:
        """POST /sleep: requests hang from now on, as on vLLM."""
        self._awake.clear()
        self._slept = True
        return web.Response()

    async def wake_up(self, _: web.Request) -> web.Response:
        """POST /wake_up."""
        self._awake.set()
        return web.Response()

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        ids = [text.token_id(token) for token in text.tokens(text.prompt_of(await self._body(request)))]
        return web.json_response(
            {"count": len(ids), "max_model_len": CONTEXT_TOKENS, "tokens": ids, "token_strs": None}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize; the pieces cannot be had back from their ids, so it names them."""
        return web.json_response({"prompt": text.named((await self._body(request)).get("tokens") or [])})

    async def count_tokens(self, request: web.Request) -> web.Response:
        """POST /v1/messages/count_tokens."""
        body = await self._body(request)
        return web.json_response({"input_tokens": len(text.tokens(text.prompt_of(body)))})

    # -- generation ---------------------------------------------------------------------------------------------------

    def _handler(self, dialect: Dialect) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._generate(request, await self._body(request), dialect)

        return handle

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions: one choice for each prompt of a list."""
        body = await self._body(request)
        prompts = body.get("prompt")
        if not isinstance(prompts, list) or len(prompts) < 2 or isinstance(prompts[0], int):
            return await self._generate(request, body, Completion)
        if body.get("stream"):
            _refuse("the simulated engine streams one prompt at a time")
        answers = [self._answer(request, {**body, "prompt": prompt}, Completion) for prompt in prompts]
        async with self._counted(request):
            whole = []
            for answer, prompt in zip(answers, prompts, strict=True):
                planned, answer.finish = _plan(answer.model, {**body, "prompt": prompt}, COMPLETION_TOKENS)
                async for _ in self._tokens(answer, planned, "none"):
                    pass
                whole.append(Completion.whole(answer))
        choices = [{**each["choices"][0], "index": index} for index, each in enumerate(whole)]
        usage = {key: sum(each["usage"][key] for each in whole) for key in whole[0]["usage"]}
        return web.json_response({**whole[0], "choices": choices, "usage": usage})

    async def _generate(self, request: web.Request, body: dict[str, Any], dialect: Dialect) -> web.StreamResponse:
        answer = self._answer(request, body, dialect)
        planned, answer.finish = _plan(answer.model, body, COMPLETION_TOKENS if dialect is Completion else None)
        if self._slept and self._settings.fault == "corrupt":
            planned = [f"~{token}" for token in planned]
        fault = self._fault(request, body)
        async with self._counted(request):
            tokens = self._tokens(answer, planned, fault)
            if body.get("stream"):
                return await _stream(request, dialect, answer, tokens, fault)
            said = [token async for token, _ in tokens]
            whole = dialect.whole(answer)
            if dialect is Completion and body.get("logprobs"):
                whole["choices"][0]["logprobs"] = {"tokens": said, "token_logprobs": [LOGPROB] * len(said)}
            return _plain(whole, fault)

    def _answer(self, request: web.Request, body: dict[str, Any], dialect: Dialect) -> Answer:
        name = request.headers.get("x-request-id") or f"simulated-{next(self._numbers)}"
        prompt_tokens = len(text.tokens(text.prompt_of(body)))
        if prompt_tokens > CONTEXT_TOKENS:
            _refuse(f"the prompt has {prompt_tokens} tokens, and the model's context is {CONTEXT_TOKENS}")
        options = body.get("stream_options") or {}
        return Answer(
            id=dialect.prefix + name,
            model=self._settings.model,
            created=int(time.time()),
            prompt_tokens=prompt_tokens,
            wants_usage=bool(isinstance(options, dict) and options.get("include_usage")),
        )

    async def _tokens(self, answer: Answer, planned: list[str], fault: str) -> AsyncIterator[tuple[str, str | None]]:
        """Tokens in time, each with the finish reason if it is the last; `answer` grows along."""
        slower = SLOWER if fault == "slow" else 1.0
        loop = asyncio.get_running_loop()
        due_s = loop.time() + slower * self._settings.ttft_ms / 1000
        for index, token in enumerate(planned):
            # By due times, not by pauses: a pause is always a little too long, and the rate would fall short.
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            due_s += slower / self._settings.tokens_per_s
            answer.text += token
            answer.count += 1
            yield token, answer.finish if index == len(planned) - 1 else None
            if fault == "crash":
                print("simulated crash", flush=True)
                os._exit(CRASH_STATUS)
            if fault == "hang":
                await asyncio.Event().wait()

    # -- embeddings ---------------------------------------------------------------------------------------------------

    async def embeddings(self, request: web.Request) -> web.Response:
        """POST /v1/embeddings, float or base64."""
        body = await self._body(request)
        inputs = body.get("input", body.get("messages"))
        texts = inputs if isinstance(inputs, list) and inputs and isinstance(inputs[0], str | list) else [inputs]
        words = [text.prompt_of({"input": each}) for each in texts]
        fault = self._fault(request, body)
        async with self._counted(request):
            await self._pause(fault)
            as_base64 = body.get("encoding_format") == "base64"
            rows = [
                {"index": index, "object": "embedding", "embedding": _encoded(text.embedding(each), as_base64)}
                for index, each in enumerate(words)
            ]
            return _plain({**self._list(words), "data": rows}, fault)

    async def rerank(self, request: web.Request) -> web.Response:
        """POST /rerank: the documents, nearest to the query first."""
        body = await self._body(request)
        documents = [text.prompt_of({"input": each}) for each in body.get("documents") or []]
        query = text.prompt_of({"input": body.get("query")})
        fault = self._fault(request, {"input": query})
        async with self._counted(request):
            await self._pause(fault)
            results: list[dict[str, Any]] = [
                {"index": index, "document": {"text": each}, "relevance_score": _nearness(query, each)}
                for index, each in enumerate(documents)
            ]
            results.sort(key=lambda result: result["relevance_score"], reverse=True)
            return _plain({**self._list([query, *documents]), "results": results[: body.get("top_n")]}, fault)

    async def score(self, request: web.Request) -> web.Response:
        """POST /score: how near each second text is to the first."""
        body = await self._body(request)
        first = text.prompt_of({"input": body.get("text_1")})
        second = body.get("text_2")
        others = [text.prompt_of({"input": each}) for each in (second if isinstance(second, list) else [second])]
        fault = self._fault(request, {"input": first})
        async with self._counted(request):
            await self._pause(fault)
            rows = [
                {"index": index, "object": "score", "score": _nearness(first, each)}
                for index, each in enumerate(others)
            ]
            return _plain({**self._list([first, *others]), "data": rows}, fault)

    def _list(self, words: list[str]) -> dict[str, Any]:
        count = sum(len(text.tokens(each)) for each in words)
        head = {"id": f"embd-simulated-{next(self._numbers)}", "object": "list", "model": self._settings.model}
        return {**head, "created": int(time.time()), "usage": {"prompt_tokens": count, "total_tokens": count}}

    async def _pause(self, fault: str) -> None:
        if fault == "crash":
            os._exit(CRASH_STATUS)
        if fault == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(self._settings.ttft_ms / 1000 * (SLOWER if fault == "slow" else 1.0))

    # -- any request --------------------------------------------------------------------------------------------------

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            _refuse(f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            _refuse("the body is not a JSON object")
        model = body.get("model")
        if model not in (None, self._settings.model):
            _refuse(f"The model `{model}` does not exist.", status=404, kind="NotFoundError", param="model")
        return body

    def _fault(self, request: web.Request, body: dict[str, Any]) -> str:
        if "x-vramp-probe" in request.headers:
            return "none"
        self._answered += 1
        marker = MARKER.search(text.last_words(body))
        asked = request.headers.get("x-vramp-simulate") or (marker[1] if marker else None)
        if asked in FAULTS:
            return asked
        return self._settings.fault if self._answered > self._settings.fault_after else "none"

    @asynccontextmanager
    async def _counted(self, request: web.Request) -> AsyncIterator[None]:
        await self._awake.wait()
        if "x-vramp-probe" in request.headers:
            yield
            return
        self._stats["requests"] += 1
        self._stats["waiting"] += 1
        state = "waiting"
        try:
            async with self._slots:
                self._stats["waiting"] -= 1
                self._stats["running"] += 1
                state = "running"
                yield
        except (asyncio.CancelledError, ConnectionError):
            self._stats["aborted"] += 1
            raise
        else:
            self._stats["finished"] += 1
        finally:
            self._stats[state] -= 1


async def _stream(
    request: web.Request,
    dialect: Dialect,
    answer: Answer,
    tokens: AsyncIterator[tuple[str, str | None]],
    fault: str,
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for frame in dialect.opening(answer):
        await response.write(frame)
    async for token, finish in tokens:
        await response.write(dialect.piece(answer, token, finish))
        if fault == "garbage":
            await response.write(GARBAGE)
            return response
    for frame in dialect.closing(answer):
        await response.write(frame)
    return response


def _plain(body: dict[str, Any], fault: str) -> web.Response:
    if fault == "garbage":
        return web.Response(body=GARBAGE, content_type="application/json")
    return web.json_response(body)


def _plan(model: str, body: dict[str, Any], default: int | None) -> tuple[list[str], str]:
    """The tokens to say, and why they end."""
    limit = next((body[key] for key in LIMIT_KEYS if body.get(key) is not None), default)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        _refuse(f"max_tokens must be at least 1, got {limit}.", param="max_tokens")
    if limit is not None and limit > CONTEXT_TOKENS:
        _refuse(f"max_tokens is {limit}, and the model's context is {CONTEXT_TOKENS}.", param="max_tokens")
    natural = text.answer(model, text.last_words(body))
    at_least = body.get("min_tokens") or 0
    if body.get("ignore_eos"):
        at_least = limit or CONTEXT_TOKENS
    planned = list(itertools.islice(natural, limit))
    planned += itertools.islice(text.endless(), max(0, min(at_least, limit or at_least) - len(planned)))
    ended = next(natural, None) is None and len(planned) != limit
    return planned, "stop" if ended else "length"


def _encoded(vector: list[float], as_base64: bool) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector


def _nearness(one: str, other: str) -> float:
    return sum(a * b for a, b in zip(text.embedding(one), text.embedding(other), strict=True))


def _refuse(message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None) -> Never:
    error = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    made = web.HTTPNotFound if status == 404 else web.HTTPBadRequest
    raise made(text=json.dumps(error), content_type="application/json")


@web.middleware
async def _error_shape(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        if error.content_type == "application/json":
            raise
        return web.json_response({"detail": error.reason}, status=error.status)
    return response


async def _empty(_: web.Request) -> web.Response:
    return web.Response()


async def _load(settings: Settings) -> None:
    for step in range(1, 11):
        await asyncio.sleep(settings.load_s / 10)
        print(f"{settings.model}: loaded {step * 10} % (simulated)", flush=True)


async def _serve(settings: Settings) -> None:
    await _load(settings)  # nothing listens before: so it is with a real engine
    runner = web.AppRunner(Engine(settings).app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", settings.port, backlog=1024)
    await site.start()
    await asyncio.Event().wait()  # until SIGTERM, which ends a simulation at once


def _settings() -> Settings:
    parser = argparse.ArgumentParser(prog="simulated_server", description="An inference engine that runs no model.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=("generate", "embed"), default="generate")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--tokens-per-s", type=float, default=200.0)
    parser.add_argument("--load-s", type=float, default=1.0)
    parser.add_argument("--max-sequences", type=int, default=32)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--fault-after", type=int, default=0)
    return parser.parse_args(namespace=Settings())


if __name__ == "__main__":
    asyncio.run(_serve(_settings()))
