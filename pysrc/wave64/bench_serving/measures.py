"""What a run's answers come to: SGLang's figures, by its definitions, under its labels and field names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wave64.bench_serving.backends import Answer

Json = dict[str, Any]

KINDS = {"e2e_latency": ("End-to-End Latency", "E2E Latency"), "ttft": ("Time to First Token", "TTFT"),
         "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"), "itl": ("Inter-Token Latency", "ITL")}
GOODPUT_KEYS = ("ttft", "tpot", "e2el")
WIDTH = 50


@dataclass
class Run:
    """One run under one load."""

    answers: list[Answer]
    duration: float  # s
    retokenized: int  # tokens of the generated texts, encoded again
    request_rate: float
    max_concurrency: int | None
    client_busy: float = 0.0  # fraction of a core that the client took

    def measures(self) -> Json:
        """The fields of a JSON line that are measured. Times in ms, throughputs per second."""
        good = [answer for answer in self.answers if answer.success]
        output = sum(answer.output_len for answer in good)
        prompt = sum(answer.sent_len or answer.prompt_len for answer in good)
        tokens_per_s, concurrent = self._by_second(good)
        found: Json = {
            "duration": self.duration, "completed": len(good), "total_input_tokens": prompt,
            "total_input_text_tokens": prompt, "total_input_vision_tokens": 0, "total_output_tokens": output,
            "total_output_tokens_retokenized": self.retokenized, "request_throughput": len(good) / self.duration,
            "input_throughput": prompt / self.duration, "output_throughput": output / self.duration,
            "total_throughput": (prompt + output) / self.duration,
        }  # fmt: skip
        times = {"e2e_latency": [answer.latency for answer in good], "ttft": [answer.ttft for answer in good],
                 "tpot": [tpot(answer) for answer in good if answer.output_len > 1],
                 "itl": [gap for answer in good for gap in answer.itl]}  # fmt: skip
        for kind, values in times.items():
            found |= {f"{name}_{kind}_ms": value for name, value in spread(values).items()}
        found["max_itl_ms"] = 1000 * max(times["itl"], default=0.0)
        return found | {
            "concurrency": sum(times["e2e_latency"]) / self.duration, "accept_length": None,
            "max_output_tokens_per_s": tokens_per_s, "max_concurrent_requests": concurrent,
            "client_busy": self.client_busy,
        }  # fmt: skip

    def _by_second(self, good: list[Answer]) -> tuple[float, int]:
        """Of the seconds since the first request: the most tokens that came in one, and the most requests alive."""
        if not good:
            return 0.0, 0
        first = min(answer.start for answer in good)
        tokens: dict[int, int] = {}
        alive: dict[int, int] = {}
        for answer in good:
            moments = answer.start + answer.ttft - first + np.cumsum([0.0, *answer.itl])
            for second, count in zip(*np.unique(moments.astype(int), return_counts=True), strict=True):
                tokens[int(second)] = tokens.get(int(second), 0) + int(count)
            for second in range(int(answer.start - first), int(answer.start + answer.latency - first) + 1):
                alive[second] = alive.get(second, 0) + 1
        return float(max(tokens.values())), max(alive.values())


def tpot(answer: Answer) -> float:
    """Seconds per output token behind the first."""
    return (answer.latency - answer.ttft) / max(1, answer.output_len - 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, median, std and percentiles, in ms, of seconds; zeros for none."""
    ms = 1000 * np.array(values or [0.0])
    percentiles = {f"p{p}": float(np.percentile(ms, p)) for p in (90, 95, 99)}
    return {"mean": float(ms.mean()), "median": float(np.median(ms)), "std": float(ms.std()), **percentiles}


def goodput(answers: list[Answer], limits: dict[str, float], duration: float) -> Json:
    """Requests that kept every limit, in ms; an error keeps none."""
    observed = [{"ttft": a.ttft, "tpot": tpot(a) if a.output_len > 1 else 0.0, "e2el": a.latency} if a.success else {}
                for a in answers]  # fmt: skip
    kept = [{key: 1000 * seen.get(key, math.inf) <= limit for key, limit in limits.items()} for seen in observed]
    count, all_kept = max(1, len(answers)), sum(all(keys.values()) for keys in kept)
    return {"goodput_slos_ms": limits, "request_goodput": all_kept / duration, "slo_attainment": all_kept / count,
            "slo_attainment_by_metric": {key: sum(keys[key] for keys in kept) / count for key in limits}}  # fmt: skip


def cache_report(answers: list[Answer]) -> Json:
    """What of the prompts the server had in its prefix cache."""
    prompt = sum(answer.prompt_len for answer in answers if answer.success)
    cached = sum(answer.cached_tokens for answer in answers if answer.success)
    return {"total_prompt_tokens": prompt, "total_cached_tokens": cached,
            "cache_hit_rate_pct": round(100 * cached / max(1, prompt), 2), "device_cached_tokens": None,
            "host_cached_tokens": None, "storage_cached_tokens": None, "storage_backend": None}  # fmt: skip


def report(found: Json) -> str:
    """The run's figures, for people."""
    limit = found["max_concurrency"]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", _line("Backend:", found["backend"]),
             _line("Traffic request rate:", found["request_rate"]),
             _line("Max request concurrency:", limit if limit else "not set")]  # fmt: skip
    for label, name in (
        ("Successful requests:", "completed"), ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"), ("Total input text tokens:", "total_input_text_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Total generated tokens (retokenized):", "total_output_tokens_retokenized"),
        ("Request throughput (req/s):", "request_throughput"), ("Input token throughput (tok/s):", "input_throughput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_throughput"), ("Concurrency:", "concurrency"),
    ):  # fmt: skip
        lines.append(_line(label, found[name]))
    if "goodput_slos_ms" in found:
        limits = " ".join(f"{key}:{limit:g}" for key, limit in found["goodput_slos_ms"].items())
        lines += [f"{'Goodput':-^{WIDTH}}", _line("SLOs (ms):", limits),
                  _line("Request goodput (req/s):", found["request_goodput"]),
                  _line("SLO attainment (%):", 100 * found["slo_attainment"])]  # fmt: skip
        lines += [_line(f"{key.upper()} SLO attainment (%):", 100 * fraction)
                  for key, fraction in found["slo_attainment_by_metric"].items()]  # fmt: skip
    for kind, (title, short) in KINDS.items():
        lines.append(f"{title:-^{WIDTH}}")
        for name, word in (("mean", "Mean"), ("median", "Median"), ("p90", "P90"), ("p95", "P95"), ("p99", "P99")):
            lines.append(_line(f"{word} {short} (ms):", found[f"{name}_{kind}_ms"]))
    lines.append(_line("Max ITL (ms):", found["max_itl_ms"]))
    if "cache_report" in found:
        cached = found["cache_report"]
        lines += [f"{'Cache Hit Details':-^{WIDTH}}", _line("Total prompt tokens:", cached["total_prompt_tokens"]),
                  _line("Total cached tokens:", cached["total_cached_tokens"]),
                  f"{'Cache hit rate:':<40} {cached['cache_hit_rate_pct']:.1f}%"]  # fmt: skip
    return "\n".join([*lines, "=" * WIDTH])


def _line(label: str, value: object) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else f"{value}"
    return f"{label:<40} {shown:<10}"
