"""The command engine: placeholders, readiness, and what it makes of strange servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from scheduler.engines.base import ProbeError, Progress
from scheduler.engines.command import CommandKind

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKEN = (200, {"choices": [{"text": "a"}]})
Probe = Callable[..., Awaitable[bool]]


def kind(**options: Any) -> CommandKind:
    return CommandKind(**{"model": "m", "argv": ["serve", "--port", "${PORT}"], **options})


def test_placeholders_are_filled_in_arguments_and_environment() -> None:
    made = kind(
        argv=["serve", "--port=${PORT}", "${MODEL_PATH}", "$PORT", "${OTHER}"],
        env={"URL": "http://127.0.0.1:${PORT}", "CUDA_VISIBLE_DEVICES": "7"},
        model_path="/models/a b",
        cwd="/srv",
    )
    spec = made.spawn_spec(8123, {"CUDA_VISIBLE_DEVICES": "0", "GPU": "x"})
    assert spec.argv == ("serve", "--port=8123", "/models/a b", "$PORT", "${OTHER}")
    assert spec.env == {"PORT": "8123", "URL": "http://127.0.0.1:8123", "CUDA_VISIBLE_DEVICES": "7", "GPU": "x"}
    assert (spec.cwd, spec.warm) == ("/srv", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"argv": []}, "model m: `command` is empty; name the program and its arguments"),
        ({"argv": ["${MODEL_PATH}"]}, "model m: `command` has ${MODEL_PATH}, and the model has no `path`"),
        ({"env": {"A": "${MODEL_PATH}"}}, "model m: `command` has ${MODEL_PATH}, and the model has no `path`"),
    ],
)
def test_what_can_never_start_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="model m") as raised:
        kind(**options)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        ("loading tensors:  45.7 % done", Progress(0.45, "loading tensors:  45.7 % done")),
        ("100%|####| 3/3", Progress(1.0, "100%|####| 3/3")),
        ("250% of the estimate", Progress(1.0, "250% of the estimate")),
        ("listening on port 8000", None),
    ],
)
def test_percentages_are_progress(line: str, progress: Progress | None) -> None:
    assert kind().progress(line) == progress


def test_a_failed_start_is_explained_by_the_last_words() -> None:
    assert kind().explain(["loading", " error: no such file "]) == "error: no such file"
    assert kind().explain([]) is None


@pytest.fixture
async def probe() -> AsyncIterator[Probe]:
    """Probe a server that answers each path with the given status and body; all others with 404."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def ask(answers: dict[str, tuple[int, Any]], **options: Any) -> bool:
            async def answer(request: web.Request) -> web.Response:
                status, body = answers.get(request.path, (404, {"detail": "Not Found"}))
                if callable(body):
                    body(await request.json())
                    body = TOKEN[1]
                return web.json_response(body, status=status)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", answer)
            server = await stack.enter_async_context(TestServer(app))
            return await kind(**options).probe(session, str(server.make_url("")).rstrip("/"))

        yield ask


@pytest.mark.parametrize(
    ("answers", "ready"),
    [
        ({"/health": (200, ""), CHAT: TOKEN}, True),
        ({"/v1/models": (200, {}), CHAT: TOKEN}, True),  # no /health
        ({"/health": (501, ""), "/v1/models": (200, {}), CHAT: TOKEN}, True),  # likewise
        ({CHAT: TOKEN}, False),  # neither
        ({"/health": (503, {"error": "Loading model"}), CHAT: TOKEN}, False),  # llama.cpp while it loads
        ({"/health": (200, ""), CHAT: (503, "")}, False),
        ({"/health": (200, ""), CHAT: (429, "")}, False),
        ({"/health": (200, ""), CHAT: (500, "")}, False),
        ({"/health": (200, ""), CHAT: (200, {"error": "no"})}, False),
        ({"/health": (200, ""), CHAT: (200, "words")}, False),
        ({"/health": (200, ""), CHAT: (400, "no chat template"), COMPLETIONS: TOKEN}, True),
    ],
)
async def test_ready_means_that_a_real_request_was_answered(
    probe: Probe, answers: dict[str, tuple[int, Any]], ready: bool
) -> None:
    assert await probe(answers) is ready


async def test_a_refusal_of_every_request_is_final_and_quoted(probe: Probe) -> None:
    with pytest.raises(ProbeError, match=r"it refuses /v1/completions with 401: \"no key\""):
        await probe({"/health": (200, ""), CHAT: (401, "no key"), COMPLETIONS: (401, "no key")})


async def test_an_embedding_model_is_asked_for_an_embedding_by_its_own_name(probe: Probe) -> None:
    asked: list[dict[str, Any]] = []
    answers = {"/health": (200, ""), EMBEDDINGS: (200, asked.append)}
    assert await probe(answers, task="embed", upstream_model="bge")
    assert asked == [{"model": "bge", "input": "Hi"}]


async def test_nobody_there_is_not_yet() -> None:
    async with aiohttp.ClientSession() as session:
        assert not await kind().probe(session, "http://127.0.0.1:1")
