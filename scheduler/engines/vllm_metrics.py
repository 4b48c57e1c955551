"""vLLM's metrics under our names: what operators see of an engine without knowing which kind it is.

Only what says something about load, speed and memory; vLLM's own page has some hundred more. Histograms keep their
buckets, so `_bucket`, `_sum` and `_count` follow the name. The label `model_name` becomes `model`, `engine` is dropped.
"""

from __future__ import annotations

METRICS: dict[str, tuple[str, str]] = {
    "vllm:num_requests_running": ("vramp_engine_requests_running", "Requests that the engine computes now."),
    "vllm:num_requests_waiting": ("vramp_engine_requests_waiting", "Requests that wait inside the engine."),
    "vllm:kv_cache_usage_perc": ("vramp_engine_kv_cache_used_ratio", "Part of the KV cache in use, 0 to 1."),
    "vllm:num_preemptions_total": (
        "vramp_engine_preemptions_total",
        "Requests set back for want of KV cache, to be computed again.",
    ),
    "vllm:prompt_tokens_total": ("vramp_engine_prompt_tokens_total", "Prompt tokens computed or found in the cache."),
    "vllm:generation_tokens_total": ("vramp_engine_generation_tokens_total", "Tokens generated."),
    "vllm:request_success_total": (
        "vramp_engine_requests_total",
        "Requests finished, by finished_reason; those whose client left are not among them.",
    ),
    "vllm:prefix_cache_queries_total": (
        "vramp_engine_prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "vllm:prefix_cache_hits_total": (
        "vramp_engine_prefix_cache_hits_total",
        "Prompt tokens found in the prefix cache.",
    ),
    "vllm:time_to_first_token_seconds": (
        "vramp_engine_time_to_first_token_seconds",
        "From the engine's receipt of a request to its first token.",
    ),
    "vllm:inter_token_latency_seconds": (
        "vramp_engine_inter_token_latency_seconds",
        "Between two tokens of an answer.",
    ),
    "vllm:e2e_request_latency_seconds": (
        "vramp_engine_request_seconds",
        "From the engine's receipt of a request to its last token.",
    ),
    "vllm:request_queue_time_seconds": ("vramp_engine_request_queue_seconds", "Spent waiting inside the engine."),
}
