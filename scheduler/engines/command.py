"""Any program that serves OpenAI's API on a port: llama.cpp, TGI, LM Studio, a script of one's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import aiohttp

from scheduler.engines.base import Progress, SpawnSpec
from scheduler.engines.probing import probe_openai
from scheduler.engines.sleeping import SleepControls

PERCENT = re.compile(r"\b(\d{1,3})(?:\.\d+)?\s?%")
NOTE_LIMIT = 160


class CommandKind:
    """One command line for one model.

    `${PORT}` and `${MODEL_PATH}` are replaced in `argv` and in the values of `env`; PORT is also in the environment.
    `upstream_model` is what the program itself calls the model. Raises ValueError for what can never start.
    """

    name = "command"
    sleep_controls: SleepControls | None = None

    def __init__(
        self,
        *,
        model: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        task: str = "generate",
        upstream_model: str | None = None,
        model_path: str | None = None,
    ) -> None:
        if not argv:
            raise ValueError(f"model {model}: `command` is empty; name the program and its arguments")
        env = dict(env or {})
        if model_path is None and any("${MODEL_PATH}" in text for text in (*argv, *env.values())):
            raise ValueError(f"model {model}: `command` has ${{MODEL_PATH}}, and the model has no `path`")
        self.model, self.task = model, task
        self._argv, self._env, self._cwd = tuple(argv), env, cwd
        self._upstream_model = upstream_model or model
        self._model_path = model_path or ""

    def spawn_spec(self, port: int, device_env: Mapping[str, str]) -> SpawnSpec:
        """The command line for a start on this loopback port. The model's own environment wins over the device's."""

        def filled(text: str) -> str:
            return text.replace("${PORT}", str(port)).replace("${MODEL_PATH}", self._model_path)

        env = {**device_env, "PORT": str(port), **{name: filled(value) for name, value in self._env.items()}}
        return SpawnSpec(argv=tuple(filled(part) for part in self._argv), env=env, cwd=self._cwd)

    def progress(self, line: str) -> Progress | None:
        """A line with a percentage in it; what the number counts is the program's business, so it is shown whole."""
        found = PERCENT.search(line)
        if found is None:
            return None
        return Progress(min(int(found[1]), 100) / 100, line.strip()[:NOTE_LIMIT])

    def explain(self, log_tail: Sequence[str]) -> str | None:
        """The program's last words: a program that we do not know explains itself best."""
        return log_tail[-1].strip()[:NOTE_LIMIT] if log_tail else None

    async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
        """One token, or one embedding; see `probe_openai`."""
        return await probe_openai(session, base_url, self._upstream_model, self.task)
