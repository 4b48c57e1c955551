"""Embedding inputs of different callers in one upstream call, split again so that no caller can tell.

A caller who is alone is sent on at once, bytes untouched. While an engine works on one call, others with the same
parameters gather, for `[limits] embed_window_ms` at most; then they go as one call, each caller's inputs in a row. On
vLLM with a small model that takes a tenth to a fifth less time than the same calls one by one (`docs/fairness.md`).

Packed is only what can be split *exactly*, usage included. Engines report one sum for a call, so every input's tokens
must be known: a list of tokens is counted as it is; a text is counted by vLLM's own `/tokenize`, asked at the same
time as the embeddings, and not at all on other engines. If the counts do not add up to the sum that the engine
reports, its texts or tokens are never packed again. Completions are never packed: nothing can split their sum.

Whatever goes wrong with a pack goes wrong for each caller as if it had been alone: a refusal (4xx, 500) says nothing of
whose input it was, so each is sent again by itself; a lost connection is every caller's own lost connection. Each
caller holds a lease of its own all the while and may leave at any time; the call is cancelled when the last has left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate

import msgspec
import orjson

from proxy.providers.base import Broken, Provider, Unreachable, Upstream

log = logging.getLogger("vramp.server")

PATH, TOKENIZE = "/v1/embeddings", "/tokenize"
MOST_INPUTS = 64  # of one pack: a larger one would make the first caller wait for the last one's result
MOST_OWN = 16  # of one caller: with more it fills an engine's batch by itself
MOST_BODY = 64 << 10
MOST_ANSWER = 64 << 20
MOST_INEXACT = 256
SHARED_STATUSES = frozenset({429, 502, 503, 504})  # of the engine, not of an input: everybody is told
PARAMETERS = frozenset({"model", "encoding_format", "dimensions", "user"})

Parameters = tuple[tuple[str, bytes], ...]  # sorted; the values are JSON as it was written
Key = tuple[str, bool, Parameters]  # base URL, texts or tokens
After = Callable[[float, Callable[[], None]], asyncio.TimerHandle]


class Engine(msgspec.Struct, frozen=True):
    """Where a call goes. `name` is the deployment's; `tokenizes`: it counts texts as vLLM does."""

    name: str
    provider: Provider
    base_url: str
    tokenizes: bool


class Part(msgspec.Struct, frozen=True):
    """One caller's call, taken apart. `inputs` are JSON as it was written."""

    inputs: tuple[bytes, ...]
    texts: bool
    parameters: Parameters

    @property
    def model(self) -> bytes:
        """The model as the body names it."""
        return dict(self.parameters)["model"]


class Split(msgspec.Struct, frozen=True):
    """One caller's part of a packed answer, as an `Upstream`."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    callers: int

    def arrived(self) -> bytes:
        """The body."""
        return self.body

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body."""
        yield self.body


class _Members(msgspec.Struct, frozen=True):
    input: str | list[int | str | list[int]]


_members = msgspec.json.Decoder(_Members)
_raws = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_list = msgspec.json.Decoder(list[msgspec.Raw])


def take_apart(body: bytes) -> Part | None:
    """The call, if it is one that may be packed: small, of texts or of token lists, with parameters that we know."""
    if len(body) > MOST_BODY:
        return None
    try:
        given, members = _members.decode(body).input, _raws.decode(body)
        raw = bytes(members.pop("input"))
        kinds = {str} if isinstance(given, str) else {type(each) for each in given}
        one = isinstance(given, str) or kinds == {int}
        inputs = (raw,) if one else tuple(bytes(each) for each in _list.decode(raw))
    except (msgspec.MsgspecError, KeyError):
        return None  # the engine is to say what is wrong with it
    if not members.keys() <= PARAMETERS or "model" not in members or len(kinds) != 1 or len(inputs) > MOST_OWN:
        return None
    return Part(inputs, kinds == {str}, tuple(sorted((name, bytes(value)) for name, value in members.items())))


class _Alone(Exception):
    """To be sent by itself."""


class _Pack:
    """Callers who go together, and their answers. Who leaves before it is `complete` is not in it."""

    def __init__(self, key: Key, engine: Engine) -> None:
        self.key = key
        self.engine = engine
        self.parts: list[Part] = []
        self.answers: list[asyncio.Future[Split]] = []
        self.inputs = 0
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def join(self, part: Part) -> asyncio.Future[Split]:
        answer: asyncio.Future[Split] = asyncio.get_running_loop().create_future()
        self.parts.append(part)
        self.answers.append(answer)
        self.inputs += len(part.inputs)
        return answer

    def complete(self) -> bool:
        """Whether there are several still. Who is left alone is told so."""
        if self.timer is not None:
            self.timer.cancel()
        here = [at for at, answer in enumerate(self.answers) if not answer.cancelled()]
        self.parts, self.answers = [self.parts[at] for at in here], [self.answers[at] for at in here]
        if len(here) > 1:
            return True
        self.fail(_Alone)
        return False

    def fail(self, kind: type[Exception], *words: object) -> None:
        """An exception of its own for each who is still there."""
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(kind(*words))

    def leave(self) -> None:
        """Somebody has left (a cancelled answer). Without the last one there is nothing to wait for."""
        if self.task is not None and all(answer.cancelled() for answer in self.answers):
            self.task.cancel()


def _after(delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(delay_s, call)


class Packer:
    """Everything of one configuration that is packed or could be. `after(delay_s, call)` is the clock."""

    def __init__(self, window_s: float, after: After = _after) -> None:
        self._window_s, self._after = window_s, after
        self._busy: dict[str, int] = {}  # by deployment: embedding calls on their way
        self._packs: dict[Key, _Pack] = {}  # those that gather
        self._inexact: set[tuple[str, bool]] = set()

    def is_busy(self, name: str) -> bool:
        """Whether a call on its way to this deployment makes others gather."""
        return name in self._busy

    def gathering(self, name: str) -> int:
        """How many callers gather for this deployment, whoever has left included."""
        return sum(len(pack.answers) for pack in self._packs.values() if pack.engine.name == name)

    def begin(self, name: str) -> None:
        """A call is on its way to this deployment."""
        self._busy[name] = self._busy.get(name, 0) + 1

    def end(self, name: str) -> None:
        """It is over. Nobody needs to gather while nothing is on its way."""
        self._busy[name] -= 1
        if self._busy[name]:
            return
        del self._busy[name]
        for pack in [each for each in self._packs.values() if each.engine.name == name]:
            self._close(pack)

    @asynccontextmanager
    async def send(self, engine: Engine, body: bytes) -> AsyncIterator[Upstream]:
        """As `Provider.send` to an embeddings engine; the answer may be a part of one that several share."""
        if self.is_busy(engine.name) and (part := self._packable(engine, body)) is not None:
            split = await self._packed(engine, part)
            if split is not None:
                yield split
                return
        self.begin(engine.name)
        try:
            async with _straight(engine, body) as upstream:
                yield upstream
        finally:
            self.end(engine.name)

    def _packable(self, engine: Engine, body: bytes) -> Part | None:
        part = take_apart(body)
        if part is None or (part.texts and not engine.tokenizes) or (engine.base_url, part.texts) in self._inexact:
            return None
        return part

    async def _packed(self, engine: Engine, part: Part) -> Split | None:
        """The caller's part of a pack; None where it is to go alone after all."""
        key = (engine.base_url, part.texts, part.parameters)
        pack = self._packs.get(key)
        if pack is None:
            pack = self._packs[key] = _Pack(key, engine)
            pack.timer = self._after(self._window_s, partial(self._close, pack))
        answer = pack.join(part)
        if pack.inputs + MOST_OWN > MOST_INPUTS:
            self._close(pack)
        try:
            return await answer
        except _Alone:
            return None
        finally:
            pack.leave()

    def _close(self, pack: _Pack) -> None:
        """Nobody joins any more: send those who have gathered."""
        del self._packs[pack.key]
        if pack.complete():
            self.begin(pack.engine.name)
            pack.task = asyncio.get_running_loop().create_task(self._run(pack), name="packed embeddings")
            # not in a `finally` of the task: one that is cancelled before its first step never comes there
            pack.task.add_done_callback(lambda _: self.end(pack.engine.name))

    async def _run(self, pack: _Pack) -> None:
        try:
            splits = await self._ask(pack.engine, pack.parts)
            for answer, split in zip(pack.answers, splits, strict=True):
                if not answer.done():
                    answer.set_result(split)
        except (_Alone, Unreachable, Broken) as problem:
            pack.fail(type(problem), *problem.args)
        except Exception:
            log.exception("embeddings could not be packed")
            pack.fail(_Alone)

    async def _ask(self, engine: Engine, parts: Sequence[Part]) -> list[Split]:
        """Raises `_Alone` where each is to be sent by itself, `Unreachable` and `Broken` as a provider does."""
        inputs = [each for part in parts for each in part.inputs]
        counting = asyncio.ensure_future(_counts(engine, parts[0], inputs))
        try:
            async with _straight(engine, _join(parts[0], inputs)) as upstream:
                status, body = upstream.status, await _whole(upstream)
                headers = {name.lower(): value for name, value in upstream.headers.items()}
            if status in SHARED_STATUSES:
                return [Split(status, headers, body, len(parts))] * len(parts)
            if status != 200:
                raise _Alone
            bodies = split(body, [len(part.inputs) for part in parts], await counting)
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
        if bodies is None:
            self._do_not_pack(engine, texts=parts[0].texts)
            raise _Alone
        return [Split(status, headers | {"content-length": str(len(each))}, each, len(parts)) for each in bodies]

    def _do_not_pack(self, engine: Engine, *, texts: bool) -> None:
        if len(self._inexact) >= MOST_INEXACT:
            self._inexact.clear()  # of engines long gone, most of them
        self._inexact.add((engine.base_url, texts))
        what = "texts" if texts else "token lists"
        log.warning("%s for embeddings of %s are not packed: its usage is not their sum", what, engine.base_url)


def split(body: bytes, sizes: Sequence[int], counts: Sequence[int]) -> list[bytes] | None:
    """The bodies of callers with so many inputs each, of so many tokens; None where the answer does not fit those.

    What is not counted stays as the engine wrote it, the numbers of the vectors to the last digit.
    """
    try:
        answer = _raws.decode(body)
        items = _items.decode(answer["data"])
        items.sort(key=lambda item: int(bytes(item["index"])))
        usage = _raws.decode(answer["usage"])
        total = int(bytes(usage["prompt_tokens"]))
    except (msgspec.MsgspecError, KeyError, ValueError):
        return None
    if [bytes(item["index"]) for item in items] != [b"%d" % at for at in range(sum(sizes))] or total != sum(counts):
        return None
    out = []
    for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        tokens = msgspec.Raw(b"%d" % sum(counts[end - size : end]))
        mine = items[end - size : end]
        changed: dict[str, object] = {
            "data": [item | {"index": at} for at, item in enumerate(mine)],
            "usage": usage | {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        name = msgspec.json.decode(answer["id"]) if "id" in answer else None
        if isinstance(name, str):
            changed["id"] = f"{name}-{number}"
        out.append(msgspec.json.encode(answer | changed))
    return out


def _join(part: Part, inputs: Sequence[bytes]) -> bytes:
    members = [b"%b:%b" % (orjson.dumps(name), value) for name, value in part.parameters]
    return b'{%b,"input":[%b]}' % (b",".join(members), b",".join(inputs))


async def _counts(engine: Engine, part: Part, inputs: Sequence[bytes]) -> list[int]:
    """The tokens of every input. Raises `_Alone` where the engine does not tell."""
    if not part.texts:
        return [len(_list.decode(each)) for each in inputs]
    asked = {each: asyncio.ensure_future(_count(engine, part.model, each)) for each in dict.fromkeys(inputs)}
    try:
        return [await asked[each] for each in inputs]
    finally:
        for each in asked.values():
            each.cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)


async def _count(engine: Engine, model: bytes, text: bytes) -> int:
    body = b'{"model":%b,"prompt":%b}' % (model, text)
    try:
        async with engine.provider.send(TOKENIZE, body, {}, base_url=engine.base_url) as upstream:
            answer = await _whole(upstream)
        if upstream.status != 200:
            raise _Alone
        return int(bytes(_raws.decode(answer)["count"]))
    except (Unreachable, Broken, msgspec.MsgspecError, KeyError, ValueError):
        raise _Alone from None


@asynccontextmanager
async def _straight(engine: Engine, body: bytes) -> AsyncIterator[Upstream]:
    async with engine.provider.send(PATH, body, {}, base_url=engine.base_url) as upstream:
        yield upstream


async def _whole(upstream: Upstream) -> bytes:
    body = bytearray()
    async for chunk in upstream.chunks():
        body += chunk
        if len(body) > MOST_ANSWER:
            raise _Alone
    return bytes(body)
