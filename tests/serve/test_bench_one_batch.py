"""One batch on the engine alone: what is run, and what is said of it."""

import json
import re
from types import SimpleNamespace

import pytest

from wave64 import bench_one_batch
from wave64.serve.messages import Output

SIZES = ["--batch-size", "1", "3", "--input-len", "12", "--output-len", "4"]


def test_a_batch_on_the_demo(tmp_path, capsys, device):
    path = tmp_path / "result.jsonl"
    flags = ["--model-path", "demo-llama", "--device", device, "--run-name", "r", "--result-filename", str(path)]
    assert bench_one_batch.main([*flags, *SIZES]) == 0
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(line["batch_size"], line["input_len"], line["output_len"]) for line in lines] == [(1, 12, 4), (3, 12, 4)]
    for line in lines:
        assert line["run_name"] == "r"
        assert line["prefill_throughput"] == pytest.approx(line["batch_size"] * 12 / line["prefill_latency"])
        assert line["median_decode_throughput"] == pytest.approx(line["batch_size"] / line["median_decode_latency"])
        assert line["overall_throughput"] == pytest.approx(line["batch_size"] * 16 / line["total_latency"])
    shown = capsys.readouterr().out
    seconds, rate = r"latency: +[\d.]+ s, ", r"throughput: +[\d.]+ token/s\n"
    decodes = "".join(rf"Decode {i}\. Batch size: 3, {seconds}{rate}" for i in range(3))
    ends = rf"Decode\.  median {seconds}median {rate}Total\. {seconds}{rate}$"
    assert re.search(rf"Prefill\. {seconds}{rate}{decodes}{ends}", shown)


class Steps:
    """Stands in for an engine whose results come a step late, on a clock of its own."""

    def ready(self) -> SimpleNamespace:
        return SimpleNamespace(vocab_size=9)

    def __init__(self, now: list[float], error: str | None = None) -> None:
        self.now, self.error, self.asked, self.count = now, error, [], 0

    def add(self, request) -> None:
        self.asked.append(request)

    @property
    def has_work(self) -> bool:
        return self.count < 4

    def step(self) -> list[Output]:
        self.now[0] += [0.001, 0.5, 0.25, 0.125][self.count]
        self.count += 1
        return [Output(request.rid, [1], error=self.error) for request in self.asked] if self.count > 1 else []


def test_times_are_between_tokens_however_late_they_come(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(bench_one_batch.time, "perf_counter", lambda: now[0])
    engine = Steps(now)
    assert bench_one_batch.run_batch(engine, 2, 5, 3) == pytest.approx([0.501, 0.25, 0.125])
    assert [(len(request.input_ids), request.params.max_new_tokens) for request in engine.asked] == [(5, 3)] * 2
    assert engine.asked[0].input_ids != engine.asked[1].input_ids
    with pytest.raises(RuntimeError, match="no memory"):
        bench_one_batch.run_batch(Steps(now, "no memory"), 1, 5, 3)


def test_the_engine_has_what_the_batches_need():
    args, settings = bench_one_batch.parse([*SIZES, "--load-format", "dummy"])
    assert (settings.load_format, settings.max_running_requests, settings.chunked_prefill_size) == ("dummy", 3, -1)
    assert settings.max_prefill_tokens == 36
    assert settings.max_total_tokens >= 3 * 16
    assert settings.disable_radix_cache
    assert bench_one_batch.parse([*SIZES, "--max-total-tokens=64"])[1].max_total_tokens == 64
    assert args.output_len == [4]


@pytest.mark.parametrize(("argv", "reason"), [(["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
                                              (["--output-len", "1"], "--output-len: expected at least 2"),
                                              (["--tp-size", "2"], "--tp-size: expected 1"),
                                              (["--nonsense"], "--nonsense")])  # fmt: skip
def test_bad_flags_are_refused_in_words(argv, reason, capsys):
    with pytest.raises(SystemExit):
        bench_one_batch.parse(argv)
    assert reason in capsys.readouterr().err
