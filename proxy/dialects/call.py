"""The canonical form of a request: what the gate, routing and the scheduler need to know of it.

The body stays the caller's bytes. A `Call` never holds a decoded message: pass-through needs none, and what is not
parsed cannot be re-serialised wrongly.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ext.body_scan import Spans
from scheduler.model import LatencyClass


class Dialect(StrEnum):
    """Whose envelope errors and events wear. Responses shares OpenAI's envelope and has error events of its own."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


class Task(StrEnum):
    """What an engine must be able to do to serve a path."""

    GENERATE = "generate"
    EMBED = "embed"
    ANY = "any"


class Endpoint(msgspec.Struct, frozen=True):
    """One path of the API. `upstream_path` is what an engine calls it."""

    path: str
    dialect: Dialect
    task: Task
    upstream_path: str
    streams: bool = True


class Call(msgspec.Struct):
    """One request, decoded as far as deciding needs. Weights are in tokens; `body` is as it came.

    `names_model` is False when the body has no model and `model` is the default. `spans` says where the members lie
    that may be spliced, if a scan found them. `lacks` is the member without which there is nothing to ask, where it is
    missing or empty. `session` is what the caller says its conversation is.
    """

    endpoint: Endpoint
    body: bytes
    model: str
    names_model: bool = True
    stream: bool = False
    wants_usage: bool = False
    prompt_tokens_estimate: int = 1
    max_output_tokens: int | None = None
    latency_class: LatencyClass = LatencyClass.STANDARD
    deadline_ms: float | None = None
    session: str = ""
    priority: int | None = None
    lacks: str = ""
    request_id: str = ""
    tenant: str = ""
    spans: Spans | None = None
