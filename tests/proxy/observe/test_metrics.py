"""The metrics page: what several processes have counted stands on one."""

from __future__ import annotations

import msgspec
from prometheus_client import generate_latest

from proxy.observe.metrics import Counts, Metrics
from proxy.observe.outcome import Outcome


def outcome(model: str = "m", status: int = 200, **more: object) -> Outcome:
    made = Outcome("id", "POST", "/v1/chat/completions", 0.0, **more)  # type: ignore[arg-type]
    made.model, made.backend, made.latency_class, made.status = model, "local/sim", "standard", status
    made.first_byte_s, made.duration_s = 0.02, 0.3
    return made


def counted(*outcomes: Outcome, begun: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.in_flight = lambda: begun
    for each in outcomes:
        metrics.finished(each)
    return metrics


def page(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_counts_of_several_processes_are_added_up_on_one_page() -> None:
    first = counted(outcome(prompt_tokens=3, output_tokens=4), outcome(status=503), begun=1)
    second = counted(outcome(output_tokens=6, queue_s=2.0), outcome("n"), begun=2)
    sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(each.snapshot()), type=Counts) for each in (first, second)]
    lines = page(Metrics(lambda: sent))
    early, late = 'backend="local/sim",class="standard"', 'model="m"'
    labels = f"{early},{late}"
    assert f'vramp_requests_total{{{labels},status_class="2xx"}} 2.0' in lines
    assert f'vramp_requests_total{{{labels},status_class="5xx"}} 1.0' in lines
    assert f'vramp_request_duration_seconds_bucket{{{early},le="0.5",{late}}} 3.0' in lines
    assert f'vramp_request_duration_seconds_bucket{{{early},le="0.25",{late}}} 0.0' in lines
    assert 'vramp_tokens_total{model="m",type="output"} 10.0' in lines
    assert 'vramp_wait_seconds_sum{model="m",phase="queue"} 2.0' in lines
    assert 'vramp_wait_seconds_count{model="m",phase="queue"} 3.0' in lines
    assert "vramp_requests_in_flight 3.0" in lines


def test_a_page_adds_up_anew_each_time() -> None:
    first = counted(outcome())
    sent = first.snapshot()
    both = Metrics(lambda: [sent])
    assert page(both) == page(both)
    assert sent.series["m", "local/sim", "standard"].statuses == {2: 1}
