"""What a server counts and times, in Prometheus' text format and under the names that vLLM's dashboards read.

Names, labels and buckets are those of vLLM's `v1/metrics/loggers.py`; what vLLM renamed has both names.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Outcome = Literal["stop", "length", "abort", "error"]
"""Why a request ended: the model or a stop string, a limit of its length, given up or timed out, a failure."""

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
NEXT_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FINE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005)
"""Below the shortest of vLLM's between two tokens, 10 ms, which a small model stays under."""


class Metrics:
    """Of one server. Its numbers are in a registry of its own, and may be changed and read from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, max_length: int) -> None:
        """`model_name` is the label of all; `max_length`, the tokens of a slot, bounds the buckets of lengths."""
        self._registry, self._model_name = CollectorRegistry(), model_name
        self.running = self._gauge("num_requests_running", "Requests that have a slot.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for a slot.")
        self.cache_usage = self._gauge(
            "kv_cache_usage_perc", "Used fraction of the key-value cache, from 0 to 1.", "gpu_cache_usage_perc"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts read.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._outcomes = self._counters("request_success", "Requests that ended, by how.", "finished_reason")
        seconds = self._histogram
        self.first_token = seconds(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.next_token = seconds(
            "inter_token_latency_seconds",
            "From one token of a request to the next.",
            FINE_BUCKETS + NEXT_TOKEN_BUCKETS,
            "time_per_output_token_seconds",
        )
        self.mean_token = seconds(
            "request_time_per_output_token_seconds",
            "A request's mean from one token to the next.",
            FINE_BUCKETS + NEXT_TOKEN_BUCKETS,
        )
        self.whole = seconds("e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS)
        self.queue = seconds("request_queue_time_seconds", "From arrival to a slot.", REQUEST_BUCKETS)
        self.prefill = seconds("request_prefill_time_seconds", "From a slot to the first token.", REQUEST_BUCKETS)
        self.decode = seconds("request_decode_time_seconds", "From the first token to the last.", REQUEST_BUCKETS)
        self.inference = seconds("request_inference_time_seconds", "From a slot to the last token.", REQUEST_BUCKETS)
        lengths = buckets_1_2_5(max_length)
        self.prompt_length = seconds("request_prompt_tokens", "Tokens of a request's prompt.", lengths)
        self.generated_length = seconds("request_generation_tokens", "Tokens generated for a request.", lengths)
        self.max_new_tokens = seconds("request_max_num_generation_tokens", "Tokens that a request asked for.", lengths)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them: UTF-8 of `content_type`."""
        return generate_latest(self._registry)

    def request(self, max_new_tokens: int) -> "RequestMetrics":
        """Of a request that arrives now."""
        return RequestMetrics(self, max_new_tokens)

    def count_end(self, outcome: Outcome) -> None:
        self._outcomes.labels(self._model_name, outcome).inc()

    def _gauge(self, name: str, words: str, old_name: str = "") -> Gauge:
        gauge = Gauge(f"vllm:{name}", words, ["model_name"], registry=self._registry)
        self._also_as(old_name, gauge)
        return gauge.labels(self._model_name)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"vllm:{name}", words, ["model_name"], registry=self._registry).labels(self._model_name)

    def _counters(self, name: str, words: str, label: str) -> Counter:
        counter = Counter(f"vllm:{name}", words, ["model_name", label], registry=self._registry)
        for outcome in get_args(Outcome):  # so that each is there, and 0, from the start
            counter.labels(self._model_name, outcome)
        return counter

    def _histogram(self, name: str, words: str, buckets: Sequence[float], old_name: str = "") -> Histogram:
        histogram = Histogram(f"vllm:{name}", words, ["model_name"], buckets=buckets, registry=self._registry)
        self._also_as(old_name, histogram)
        return histogram.labels(self._model_name)

    def _also_as(self, old_name: str, metric: MetricWrapperBase) -> None:
        if old_name:
            self._registry.register(_OldName(metric, f"vllm:{old_name}"))


class RequestMetrics:
    """The times of one request. Each method is called by one thread at a time."""

    def __init__(self, metrics: Metrics, max_new_tokens: int) -> None:
        self._metrics, self._max_new_tokens = metrics, max_new_tokens
        self._arrived = time.monotonic()
        self._admitted = self._first = self._last = self._arrived
        self._tokens = 0

    def admit(self) -> None:
        """It has a slot now."""
        self._admitted = time.monotonic()
        self._metrics.queue.observe(self._admitted - self._arrived)

    def token(self, now: float, prompt_length: int) -> None:
        """One more token came, at `now` of `time.monotonic`; with the first one, the prompt was read."""
        metrics = self._metrics
        if not self._tokens:
            self._first = now
            metrics.first_token.observe(now - self._arrived)
            metrics.prompt_tokens.inc(prompt_length)
            metrics.prompt_length.observe(prompt_length)
        else:
            metrics.next_token.observe(now - self._last)
        self._tokens += 1
        self._last = now

    def end(self, outcome: Outcome) -> None:
        """Times of the whole are those of whole answers."""
        metrics = self._metrics
        metrics.count_end(outcome)
        if outcome not in ("stop", "length") or not self._tokens:
            return
        metrics.whole.observe(self._last - self._arrived)
        metrics.prefill.observe(self._first - self._admitted)
        metrics.decode.observe(self._last - self._first)
        metrics.inference.observe(self._last - self._admitted)
        metrics.generated_length.observe(self._tokens)
        metrics.max_new_tokens.observe(self._max_new_tokens)
        if self._tokens > 1:
            metrics.mean_token.observe((self._last - self._first) / (self._tokens - 1))


class _OldName(Collector):
    """The numbers of a metric once more, under another name."""

    def __init__(self, metric: MetricWrapperBase, name: str) -> None:
        self._metric, self._name = metric, name

    def collect(self) -> Iterator[Metric]:
        for metric in self._metric.collect():
            renamed = Metric(self._name, metric.documentation, metric.type)
            renamed.samples = [
                sample._replace(name=sample.name.replace(metric.name, self._name, 1)) for sample in metric.samples
            ]
            yield renamed


def buckets_1_2_5(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    buckets = [float(digit * 10**power) for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= most]
