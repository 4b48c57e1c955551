"""The engines' own metrics, on our page and under our names: asked when we are asked, within half a second.

Names are mapped in one table (`scheduler.engines.vllm_metrics`), since engines rename theirs and dashboards should not
have to notice. What is not in the table is not passed on, and an engine that does not answer is left out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping

import aiohttp

from scheduler.engines.vllm_metrics import METRICS

LIMIT_S = 0.5
MOST_BYTES = 4 << 20
_QUOTED = r'"(?:[^"\\\n]|\\.)*+"'
_LABELS = rf"(?:[^\"}}\n]|{_QUOTED})*+"
_SAMPLE = re.compile(rf"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{{(?P<labels>{_LABELS})\}})? (?P<value>\S+)$", re.M)
_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.M)
_DROPPED = re.compile(rf"\b(?:engine|model_name)={_QUOTED},?")


class EngineScraper:
    """`engines` gives (model, base URL) by engine id."""

    def __init__(self, session: aiohttp.ClientSession, engines: Callable[[], Mapping[str, tuple[str, str]]]) -> None:
        self._session = session
        self._engines = engines

    async def text(self) -> bytes:
        """Prometheus text of all engines that answer; empty when none does."""
        engines = list(self._engines().values())
        pages = await asyncio.gather(*(self._page(url) for _, url in engines))
        return merge((model, page) for (model, _), page in zip(engines, pages, strict=True)).encode()

    async def _page(self, url: str) -> str:
        try:
            async with self._session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=LIMIT_S)) as answer:
                if answer.status != 200:
                    return ""
                return (await answer.content.read(MOST_BYTES)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ""


def merge(pages: Iterator[tuple[str, str]]) -> str:
    """One page of several engines' pages (model, text): a metric's samples stand together, as the format demands."""
    types: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for model, page in pages:
        types |= dict(_TYPE.findall(page))
        for source, line in _translated(page, model):
            samples.setdefault(source, []).append(line)
    blocks = []
    for source, lines in samples.items():
        name, meaning = METRICS[source]
        blocks += [f"# HELP {name} {meaning}", f"# TYPE {name} {types.get(source, 'untyped')}", *lines]
    return "".join(f"{line}\n" for line in blocks)


def _translated(page: str, model: str) -> Iterator[tuple[str, str]]:
    """(the engine's metric, our line) for every sample that the table knows. Linear in the page."""
    escaped = model.replace("\\", r"\\").replace('"', r"\"")
    for match in _SAMPLE.finditer(page):
        source, suffix = _family(match["name"])
        if source is None:
            continue
        rest = _DROPPED.sub("", match["labels"] or "").strip(",")
        labels = f'model="{escaped}"' + (f",{rest}" if rest else "")
        yield source, f"{METRICS[source][0]}{suffix}{{{labels}}} {match['value']}"


def _family(name: str) -> tuple[str | None, str]:
    """The table's entry that a sample belongs to, and the suffix that histograms add."""
    if name in METRICS:
        return name, ""
    for suffix in ("_bucket", "_sum", "_count"):
        if name.endswith(suffix) and name.removesuffix(suffix) in METRICS:
            return name.removesuffix(suffix), suffix
    return None, ""
