"""GET /metrics for Prometheus: SGLang's names, and vLLM's where both have one.

What the engine counts is read when it is asked for; latencies are taken where outputs arrive.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

from wave64.serve.messages import Ready, Statistics

CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
REQUEST_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)

# what Statistics says -> kind, SGLang's name, vLLM's, help
OF_STATISTICS: tuple[tuple[Callable[[Statistics], float], type[Metric], str, str, str], ...] = (
    (lambda now: now.running, GaugeMetricFamily, "num_running_reqs", "num_requests_running", "Requests that run."),
    (lambda now: now.waiting, GaugeMetricFamily, "num_queue_reqs", "num_requests_waiting", "Requests that wait."),
    (lambda now: now.pages_used / max(1, now.pages_total), GaugeMetricFamily, "token_usage", "kv_cache_usage_perc",
     "Used part of the KV pool, 0 to 1."),
    (lambda now: now.prompt_tokens, CounterMetricFamily, "prompt_tokens", "prompt_tokens", "Prompt tokens computed."),
    (lambda now: now.generated_tokens, CounterMetricFamily, "generation_tokens", "generation_tokens",
     "Tokens generated."),
    (lambda now: now.preemptions, CounterMetricFamily, "num_retracted_reqs", "num_preemptions",
     "Times that a request lost its pages and was computed anew."),
    (lambda now: now.cached_tokens, CounterMetricFamily, "cached_tokens", "prefix_cache_hits",
     "Prompt tokens that the prefix cache had."),
    (lambda now: now.cached_tokens + now.prompt_tokens, CounterMetricFamily, "queried_tokens", "prefix_cache_queries",
     "Prompt tokens that the prefix cache was asked for."),
)  # fmt: skip
# of Metrics.__init__ -> vLLM's name
ALIASES = {"sglang:time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
           "sglang:inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
           "sglang:e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
           "sglang:prompt_tokens_histogram": "vllm:request_prompt_tokens",
           "sglang:generation_tokens_histogram": "vllm:request_generation_tokens"}  # fmt: skip


class Metrics:
    """The metrics of one server, for Prometheus."""

    def __init__(self, model: str, engine: Any) -> None:
        """engine: has `statistics` and `ready`."""
        self._engine = engine
        self._labels = {"model_name": model}
        self._registry = CollectorRegistry()
        own = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, self._labels.keys(), registry=own, buckets=buckets)
            return made.labels(*self._labels.values())

        self.first_token = histogram("sglang:time_to_first_token_seconds", "Until the first token.", FIRST_TOKEN_S)
        self.next_token = histogram("sglang:inter_token_latency_seconds", "Between tokens.", NEXT_TOKEN_S)
        self.request = histogram("sglang:e2e_request_latency_seconds", "Until the last token.", REQUEST_S)
        self.prompt = histogram("sglang:prompt_tokens_histogram", "Tokens of a prompt.", TOKENS)
        self.generated = histogram("sglang:generation_tokens_histogram", "Tokens of an answer.", TOKENS)
        labels = (*self._labels, "finished_reason")
        self._ended = Counter("vllm:request_success", "Requests, by why they ended.", labels, registry=own)
        self._status = Counter("wave64:http_responses", "Answers, by status.", (*self._labels, "status"), registry=own)
        self._histograms = own
        self._registry.register(self)  # pyright: ignore[reportArgumentType]: it has collect()

    def ended(self, reason: str) -> None:
        """A request has ended; reason: its finish_reason, "abort" or "error"."""
        self._ended.labels(*self._labels.values(), reason).inc()

    def answered(self, status: int) -> None:
        """An answer was sent."""
        self._status.labels(*self._labels.values(), str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return exposition.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry: what it is now."""
        for metric in self._histograms.collect():
            yield metric
            if metric.name in ALIASES:
                yield _renamed(metric, ALIASES[metric.name])
            if metric.name == "vllm:request_success":
                yield from self._requests(metric)
        now: Statistics = self._engine.statistics or Statistics()
        for value, kind, *names, text in OF_STATISTICS:
            for prefix, name in zip(("sglang", "vllm"), names, strict=True):
                yield self._family(kind, f"{prefix}:{name}", text, value(now))
        yield self._family(GaugeMetricFamily, "sglang:cache_hit_rate", "Part of prompts that the prefix cache had.",
                           now.cached_tokens / max(1, now.cached_tokens + now.prompt_tokens))  # fmt: skip
        steps = SummaryMetricFamily("wave64:step_seconds", "Time that steps of the engine take.",
                                    labels=list(self._labels))  # fmt: skip
        steps.add_metric(list(self._labels.values()), now.steps, now.step_seconds)
        yield steps
        ready: Ready | None = self._engine.ready
        if ready is None:
            return
        yield self._family(GaugeMetricFamily, "sglang:max_total_num_tokens", "Tokens that the KV pool holds.",
                           ready.max_total_num_tokens)
        serving = GaugeMetricFamily("wave64:backend", "What serves an operator.",
                                    labels=(*self._labels, "op", "backend"))  # fmt: skip
        for row in (row for row in ready.backends if row["status"] == "bound"):
            serving.add_metric((*self._labels.values(), str(row["op"]), str(row["backend"])), 1)
        yield serving

    def _requests(self, ended: Metric) -> Iterator[Metric]:
        """SGLang counts all, and those that were aborted."""
        counts = {sample.labels["finished_reason"]: sample.value for sample in ended.samples
                  if sample.name.endswith("_total")}  # fmt: skip
        for name, value in (("num_requests", sum(counts.values())), ("num_aborted_requests", counts.get("abort", 0))):
            yield self._family(CounterMetricFamily, f"sglang:{name}", "Requests that ended.", value)

    def _family(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family = kind(name, text, labels=self._labels.keys())
        family.add_metric(self._labels.values(), value)
        return family


class Watch:
    """Measures one request."""

    def __init__(self, metrics: Metrics, num_prompt: int) -> None:
        self._metrics, self._num_prompt = metrics, num_prompt
        self._began = self._last = time.perf_counter()
        self._tokens = 0

    def tokens(self, count: int) -> None:
        """So many have come."""
        now = time.perf_counter()
        for _ in range(count):
            if self._tokens:
                self._metrics.next_token.observe(now - self._last)
            else:
                self._metrics.first_token.observe(now - self._began)
            self._tokens, self._last = self._tokens + 1, now

    def end(self, reason: str) -> None:
        """It has ended; reason: as Metrics.ended."""
        self._metrics.ended(reason)
        self._metrics.prompt.observe(self._num_prompt)
        self._metrics.generated.observe(self._tokens)
        self._metrics.request.observe(time.perf_counter() - self._began)


def _renamed(metric: Metric, name: str) -> Metric:
    made = Metric(name, metric.documentation, metric.type, metric.unit)
    made.samples = [sample._replace(name=sample.name.replace(metric.name, name)) for sample in metric.samples]
    return made
