"""The models of the configuration as deployments and groups. Immutable: a reload builds a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from proxy.config import LOCAL_KINDS, BackendConfig, Config, ModelConfig
from proxy.dialects.call import Task

PROFILE = (
    "strengths",
    "weaknesses",
    "avg_ttft_ms",
    "avg_tokens_per_sec",
    "max_context",
    "memory_bytes",
    "supports_streaming",
    "supports_tools",
    "cost_tier",
    "licence",
)


class Deployment(msgspec.Struct, frozen=True):
    """One model on one backend. `name` is unique among deployments and is what the scheduler calls it."""

    name: str
    model: ModelConfig
    backend: BackendConfig

    @property
    def local(self) -> bool:
        """Whether an engine of ours runs it."""
        return self.backend.kind in LOCAL_KINDS

    @property
    def ranks(self) -> bool:
        """Whether its engine serves requests in the order of their `priority`. Arguments of one's own are believed."""
        args = (*self.backend.args, *self.model.args)
        own_policy = any(arg.startswith("--scheduling-policy") for arg in args)
        return self.backend.kind == "vllm" and self.model.task == "generate" and not own_policy

    @property
    def where(self) -> str:
        """The backend as response headers show it."""
        return f"{'local' if self.local else 'remote'}/{self.backend.name}"

    def serves(self, task: Task) -> bool:
        """Whether a path with this task can be called on it."""
        return task is Task.ANY or self.model.task == task.value


class Catalog:
    """Groups of deployments by model id, in the order written."""

    def __init__(self, config: Config) -> None:
        backends = {backend.name: backend for backend in config.backends}
        self._groups: dict[str, list[Deployment]] = {}
        taken: set[str] = set()
        for model in config.models:
            name = _unique_name(model, taken)
            taken.add(name)
            self._groups.setdefault(model.id, []).append(Deployment(name, model, backends[model.backend]))
        self._defaults = {task: self._only_one_for(task) for task in Task}

    @property
    def ids(self) -> list[str]:
        """Model ids in the order written."""
        return list(self._groups)

    def __iter__(self) -> Iterator[Deployment]:
        for group in self._groups.values():
            yield from group

    def group(self, model_id: str) -> list[Deployment]:
        """The deployments of a model, none if it is unknown."""
        return self._groups.get(model_id, [])

    def default_for(self, task: Task) -> str | None:
        """The model meant by a request that names none: the only one that serves the task, if there is only one."""
        return self._defaults[task]

    def _only_one_for(self, task: Task) -> str | None:
        serving = [name for name, group in self._groups.items() if any(each.serves(task) for each in group)]
        return serving[0] if len(serving) == 1 else None

    def entry(self, model_id: str, created: int, state: Callable[[Deployment], str]) -> dict[str, object] | None:
        """One model as OpenAI's model object, with our profile under `vramp`. `created` is in Unix seconds."""
        group = self._groups.get(model_id)
        if not group:
            return None
        model = group[0].model
        profile: dict[str, object] = {name: getattr(model, name) for name in PROFILE}
        profile["task"] = model.task
        profile["deployments"] = [{"name": each.name, "backend": each.where, "state": state(each)} for each in group]
        entry: dict[str, object] = {"id": model_id, "object": "model", "created": created, "owned_by": "vramp"}
        if model.max_context is not None:
            entry["max_model_len"] = model.max_context  # vLLM's word for it, which its clients read
        return entry | {"vramp": profile}


def _unique_name(model: ModelConfig, taken: set[str]) -> str:
    """The model's id while that is free; then with its backend; then numbered."""
    names = [model.id, f"{model.id}@{model.backend}"]
    name = next((each for each in names if each not in taken), None)
    number = 2
    while name is None or name in taken:
        name = f"{names[1]}:{number}"
        number += 1
    return name
