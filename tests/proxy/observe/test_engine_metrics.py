"""The engines' pages become one page under our names."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.engine_metrics import merge

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo-chat"} 3.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="demo-chat"} 812.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="demo-chat"} 1.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="demo-chat"} 1.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="demo-chat"} 0.0007
# TYPE vllm:something_new gauge
vllm:something_new{engine="0"} 1.0
"""


def test_samples_get_our_names_and_the_model_and_keep_their_other_labels() -> None:
    page = merge(iter([("chat", PAGE)]))
    assert 'vramp_engine_requests_running{model="chat"} 3.0' in page
    assert 'vramp_engine_time_to_first_token_seconds_bucket{model="chat",le="0.001"} 1.0' in page
    assert "something_new" not in page


def test_two_engines_make_one_page_that_prometheus_can_read() -> None:
    families = list(text_string_to_metric_families(merge(iter([("chat", PAGE), ("code", PAGE), ("down", "")]))))
    running = next(family for family in families if family.name == "vramp_engine_requests_running")
    assert {sample.labels["model"] for sample in running.samples} == {"chat", "code"}
    assert len({family.name for family in families}) == len(families)


@pytest.mark.parametrize("name", ['a "good" one', "c:\\models", "a}b", "a,b", "ü"])
def test_a_model_may_have_any_name(name: str) -> None:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    page = merge(iter([(name, PAGE.replace("demo-chat", escaped)), ("code", PAGE)]))
    for family in text_string_to_metric_families(page):
        assert {sample.labels["model"] for sample in family.samples} == {name, "code"}
        assert not {"model_name", "engine"} & {label for sample in family.samples for label in sample.labels}


def test_no_engine_makes_an_empty_page() -> None:
    assert merge(iter([])) == ""
