"""What Prometheus reads."""

import asyncio

import pytest
from scheduled import HeldDecoder, answer, decoder, in_one_loop, likeliest, request, samples, scheduling

from p828.serve.scheduling.metrics import Metrics, buckets_1_2_5
from p828.serve.scheduling.scheduler import Scheduler

# What the dashboard reads that vLLM has in its examples/online_serving/prometheus_grafana/grafana.json, and the names
# of later versions for the same.
DASHBOARD = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:time_per_output_token_seconds_sum",
    "vllm:time_per_output_token_seconds_count",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:gpu_cache_usage_perc",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
}


def test_the_dashboard_finds_its_names() -> None:
    names = {name for name, *_ in samples(Metrics("mine", 1000))}
    assert names >= DASHBOARD


def test_numbers_of_some_requests() -> None:
    metrics = Metrics("mine", 64)
    requests = [request(number, 1, 2, tokens=1 + number % 7) for number in range(40)]
    with scheduling(decoder(), metrics) as scheduler:
        got = in_one_loop(scheduler, *requests)

    found = samples(metrics)
    tokens = sum(map(len, got))
    assert got == [likeliest(one.prompt, one.config.max_new_tokens) for one in requests]
    ended = sum(answer[-1] == 96 for answer in got)
    assert found["vllm:prompt_tokens_total",] == 120
    assert found["vllm:generation_tokens_total",] == tokens
    assert found["vllm:request_success_total", "stop"] == ended
    assert found["vllm:request_success_total", "length"] == 40 - ended
    assert found["vllm:request_success_total", "abort"] == found["vllm:request_success_total", "error"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert found[f"vllm:{name}_seconds_count",] == 40
        assert found[f"vllm:{name}_seconds_bucket", "+Inf"] == 40
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert found[f"vllm:{name}_count",] == tokens - 40
    assert found["vllm:request_time_per_output_token_seconds_count",] == sum(len(answer) > 1 for answer in got)
    assert found["vllm:request_generation_tokens_sum",] == tokens
    assert found["vllm:request_prompt_tokens_bucket", "2.0"] == 0
    assert found["vllm:request_prompt_tokens_bucket", "5.0"] == 40
    assert found["vllm:request_max_num_generation_tokens_sum",] == sum(one.config.max_new_tokens for one in requests)
    whole, parts = "e2e_request_latency", ("request_queue_time", "request_prefill_time", "request_decode_time")
    assert found[f"vllm:{whole}_seconds_sum",] == pytest.approx(sum(found[f"vllm:{one}_seconds_sum",] for one in parts))
    assert found["vllm:num_requests_running",] == found["vllm:kv_cache_usage_perc",] == 0


def test_an_empty_prompt_has_no_tokens() -> None:
    metrics = Metrics("mine", 64)
    with scheduling(decoder(), metrics) as scheduler:
        assert in_one_loop(scheduler, request(tokens=3)) != [[]]
    assert samples(metrics)["vllm:prompt_tokens_total",] == 0
    assert samples(metrics)["vllm:request_prompt_tokens_sum",] == 0


def test_what_runs_and_waits_now() -> None:
    one = HeldDecoder(slots=2)
    metrics = Metrics("mine", 64)

    async def ask(scheduler: Scheduler) -> dict[tuple[str, ...], float]:
        submissions = [scheduler.submit(request(*[1] * 32, tokens=2)) for _ in range(4)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        submissions.pop().cancel()
        found = samples(metrics)
        one.may_go_on.set()
        await asyncio.gather(*map(answer, submissions))
        return found

    with scheduling(one, metrics, max_running=1) as scheduler:
        found = asyncio.run(ask(scheduler))
    assert found["vllm:num_requests_running",] == 1
    assert found["vllm:num_requests_waiting",] == 2
    assert found["vllm:kv_cache_usage_perc",] == found["vllm:gpu_cache_usage_perc",] == 32 / (2 * 64)
    assert found["vllm:request_success_total", "abort"] == 1
    assert samples(metrics)["vllm:request_success_total", "abort"] == 1


def test_buckets_of_lengths() -> None:
    assert buckets_1_2_5(100) == [1, 2, 5, 10, 20, 50, 100]
    assert buckets_1_2_5(1) == [1]
    assert buckets_1_2_5(2048)[-1] == 2000
