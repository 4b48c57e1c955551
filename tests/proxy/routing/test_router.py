from __future__ import annotations

import pytest

from proxy.catalog.catalog import Catalog
from proxy.config import BackendConfig, Config, ModelConfig
from proxy.dialects.call import Call, Task
from proxy.dialects.endpoints import ENDPOINTS
from proxy.errors import InvalidRequest, NotFound
from proxy.routing.router import Router

CONFIG = Config(
    backends=(
        BackendConfig(name="gpu", kind="vllm"),
        BackendConfig(name="far", kind="openai", base_url="http://a"),
        BackendConfig(name="further", kind="openai", base_url="http://b"),
    ),
    models=(
        ModelConfig(id="big", backend="further"),
        ModelConfig(id="big", backend="gpu"),
        ModelConfig(id="big", backend="far"),
        ModelConfig(id="big", backend="far"),
        ModelConfig(id="words", backend="gpu", task="embed", max_context=512, strengths=("code",)),
    ),
)


def call(model: str, path: str = "/v1/chat/completions") -> Call:
    return Call(endpoint=ENDPOINTS[path], body=b"{}", model=model)


def test_local_comes_first_then_remotes_in_the_order_written() -> None:
    decision = Router(Catalog(CONFIG)).decide(call("big"))
    assert [each.deployment.where for each in decision.candidates] == [
        "local/gpu", "remote/further", "remote/far", "remote/far"
    ]  # fmt: skip
    assert [each.reason for each in decision.candidates] == ["local"] + ["fallback-remote"] * 3
    assert decision.reason == "local"


def test_deployments_have_names_of_their_own() -> None:
    assert [each.name for each in Catalog(CONFIG)] == ["big", "big@gpu", "big@far", "big@far:2", "words"]


def test_unknown_models_are_answered_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="Did you mean words") as caught:
        Router(Catalog(CONFIG)).decide(call("word"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(NotFound, match="GET /v1/models"):
        Router(Catalog(CONFIG)).decide(call("zzzz"))


def test_a_task_that_no_deployment_has_is_refused() -> None:
    router = Router(Catalog(CONFIG))
    with pytest.raises(InvalidRequest, match="'words' is for task 'embed'"):
        router.decide(call("words"))
    assert router.decide(call("words", "/v1/embeddings")).candidates[0].deployment.name == "words"
    assert router.decide(call("words", "/tokenize")).candidates[0].deployment.name == "words"


def test_only_a_single_model_of_a_task_is_its_default() -> None:
    catalog = Catalog(CONFIG)
    assert (catalog.default_for(Task.GENERATE), catalog.default_for(Task.EMBED)) == ("big", "words")
    assert catalog.default_for(Task.ANY) is None


def test_a_model_is_shown_with_its_profile_and_states() -> None:
    entry = Catalog(CONFIG).entry("words", 7, lambda deployment: f"state of {deployment.name}")
    assert entry is not None
    assert entry["max_model_len"] == 512
    profile = entry["vramp"]
    assert isinstance(profile, dict)
    assert profile["strengths"] == ("code",)
    assert profile["deployments"] == [{"name": "words", "backend": "local/gpu", "state": "state of words"}]
    assert Catalog(CONFIG).entry("nope", 7, lambda _: "") is None


def test_a_call_with_nothing_in_it_is_refused_before_a_local_model_and_left_to_a_remote_one() -> None:
    router = Router(Catalog(CONFIG))
    nothing = call("words", "/v1/embeddings")
    nothing.lacks = "input"
    with pytest.raises(InvalidRequest, match="Field 'input' is missing or empty") as caught:
        router.decide(nothing)
    assert caught.value.param == "input"
    nothing = call("away")
    nothing.lacks = "messages"
    away = Config(backends=CONFIG.backends, models=(ModelConfig(id="away", backend="far"),))
    assert Router(Catalog(away)).decide(nothing).reason == "remote"
