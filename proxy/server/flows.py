"""What the relay needs to let the requests of one kind go without asking: the decision on the first, taken apart.

Everything here is made of what the ordinary steps are made of: the key's and the model's meters, the backend's slots,
the tally, the facts in an answer's head, the fields of the two logs. `ext._gate` takes these steps as `FastLane.decide`
and `Exchange` do; a test sends the same calls each way and compares all that comes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ext.body_scan import Spans
from ext.json_lines import line
from ext.relay import Field, Flow, Form, Gate, Pool
from proxy.accounting import usage
from proxy.dialects.decode import BYTES_PER_TOKEN, SPLICED
from proxy.dialects.splice import edits_of
from proxy.gate.limits import output_of
from proxy.observe import access_log
from proxy.observe.outcome import Outcome
from proxy.server.answer import STREAM_HEADERS
from proxy.server.fast_plans import Plan
from proxy.server.handler import Handler
from proxy.server.record import withholds_usage

NAMED_S = 1.0  # how long a flow trusts a host name's address
_VARYING = {
    "request_id": Field.REQUEST_ID,
    "remote": Field.REMOTE,
    "upstream_s": Field.FIRST_BYTE,  # without a wait for a lease or a load it begins with the request
    "first_byte_s": Field.FIRST_BYTE,
    "duration_s": Field.DURATION,
    "bytes_in": Field.BYTES_IN,
    "bytes_out": Field.BYTES_OUT,
    "prompt_tokens": Field.PROMPT_TOKENS,
    "cached_tokens": Field.CACHED_TOKENS,
    "output_tokens": Field.OUTPUT_TOKENS,
    "finish_reason": Field.FINISH_REASON,
}
_STREAM_LINES = "".join(f"{name}: {value}\r\n" for name, value in STREAM_HEADERS.items() if name != "content-type")


def flow_of(
    handler: Handler,
    origin: object,
    plan: Plan,
    outcome: Outcome,
    spans: Spans,
    pool: Pool | None,
    head: bytes,
    *,
    until_s: float,
) -> Flow:
    """The flow of calls like this one. `outcome` is of a call that has begun and is not ended. Without a `pool` each is
    for an engine, and needs a lease."""
    state, slots = plan.state, None if plan.candidate.local else plan.provider.slots
    stated, guessed = output_of(plan.call)
    gate = Gate(
        flying=handler.flying,
        slots=None if slots is None else slots.places,
        limits=state.limits.meters(outcome.tenant, plan.call.model),
        stated=stated,
        guessed=guessed,
        bytes_per_token=BYTES_PER_TOKEN,
        tally=handler.metrics.tally(outcome),
        facts=_facts(outcome),
        forms=_forms(handler, outcome),
    )
    return Flow(
        origin,
        gate,
        pool,
        head,
        _changes(plan.changes, spans),
        plan.limits,
        stream_lines=_STREAM_LINES.encode("ascii"),
        withhold_usage=withholds_usage(plan.call),
        until_s=until_s,
    )


def _facts(outcome: Outcome) -> tuple[bytes, bytes, bytes]:
    """The lines of what is known of a call, cut where its id and its milliseconds upstream are."""
    facts = {**outcome.facts(), "x-request-id": "\0", "x-vramp-wait-ms": "queue=0,load=0,upstream=\0"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in facts.items())
    before, between, after = lines.encode("utf-8", "surrogateescape").split(b"\0")
    return before, between, after


def _changes(changes: dict[str, bytes], spans: Spans) -> list[tuple[int, bytes]]:
    """What is changed in the body, by the place of its member; a member is or is not there in all calls of a kind."""
    members = {spans[name]: at for at, name in enumerate(SPLICED) if name in spans}
    return [(members.get((start, end), -1), text) for start, end, text in edits_of(spans, changes)]


def _forms(handler: Handler, outcome: Outcome) -> list[tuple[Form, Callable[[bytes], None]]]:
    """The lines of a call that ended well, and who takes them."""
    ended = outcome.__copy__()  # type: ignore[attr-defined]
    ended.status = 200
    made: list[tuple[Form, Callable[[bytes], None]]] = []
    if handler.access_log.writer is not None:
        values = access_log.values_of(ended)
        made.append((_form(access_log.NAMES, values, Field.AT_MS, sparse=True), handler.access_log.take))
    if handler.usage.writer is not None and outcome.tenant:
        made.append((_form(usage.NAMES, usage.values_of(ended), Field.AT), handler.usage.take))
    return made


def _form(names: Sequence[str], values: Sequence[object], at: Field, *, sparse: bool = False) -> Form:
    """A line as `ext.json_lines.line` writes it. `names` begin with the time, which `values` lack."""
    text = b'{"%b":' % names[0].encode()
    fields: list[tuple[bytes, int]] = [(text, at)]
    text = b""
    for name, value in zip(names[1:], values, strict=True):
        field = _VARYING.get(name)
        if field is not None:
            fields += [(text, Field.NOTHING), (b',"%b":' % name.encode(), field)]
            text = b""
        elif not (sparse and (value is None or value == "")):
            text += b"," + line((name,), (value,))[1:-2]
    return Form([*fields, (text + b"}\n", Field.NOTHING)], sparse=sparse)
