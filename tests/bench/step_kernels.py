"""Where a step of Llama-3.1-8B goes on one GPU, kernel by kernel, and what each of its products takes next to reading.

    python tests/bench/step_kernels.py decode [--batch 1 64 256] [--context 1100]
    python tests/bench/step_kernels.py prefill [--context 8160]
    python tests/bench/step_kernels.py products [--batch 1 4 16 64]

decode and prefill: an engine with random weights, bf16; of its steps a profile, all kernels by name: launches and
microseconds a step, the longest first, then one layer's kernels in their order with the time from each one's start to
the next one's. products: each product of a step by torch and, of few tokens, by `linear`, after the cache was
overwritten, next to a kernel that only reads as many bytes; both results agree, else it ends.
`--tiny` takes a small model and works on a CPU, whose operators stand for kernels: it is there to test this file.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from engine_steps import end, engine_of, requests, start, step
from floor import read_us
from ranks_serving import MODELS, TINY
from torch.nn import functional as F

from wave64 import ops
from wave64.serve.model.cpu import DECODE_TOKENS
from wave64.testing import timing

MODEL = "llama-8b"
WIDTH = 110  # of a printed name


@dataclasses.dataclass(frozen=True)
class Span:
    """A kernel's, or a copy's, time on the device."""

    name: str
    begin_ns: int
    ns: int


def spans(run: Callable[[], object], device: str) -> list[Span]:
    """What ran on the device meanwhile, in its order; on a CPU, which has no kernels, torch's operators."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    found = [Span(event.name(), event.start_ns(), event.duration_ns())
             for event in profile.profiler.kineto_results.events()
             if event.device_type().name == device.upper()]
    return sorted(found, key=lambda span: span.begin_ns)


def report(found: list[Span], steps: int) -> None:
    spent, launches = collections.Counter(), collections.Counter()
    busy, reached = 0, 0
    for span in found:
        spent[span.name] += span.ns
        launches[span.name] += 1
        busy += max(0, span.begin_ns + span.ns - max(span.begin_ns, reached))
        reached = max(reached, span.begin_ns + span.ns)
    whole = (reached - found[0].begin_ns) / steps
    print(f"launches {len(found) / steps:.1f}, busy {busy / 1e3 / steps:.1f} us, "
          f"first to last {whole / 1e3:.1f} us a step")
    for name, ns in spent.most_common(24):
        print(f"  {ns / 1e3 / steps:9.1f} us {launches[name] / steps:6.1f} x {ns / 1e3 / launches[name]:8.2f}"
              f"  {name[:WIDTH]}")


def one_layer(found: list[Span], marks: str) -> None:
    """The kernels between two launches of the kernel whose name has `marks` in it, from the middle of the profile."""
    at = [i for i, span in enumerate(found) if marks in span.name]
    if len(at) < 3:
        return
    first, last = at[len(at) // 2 - 1], at[len(at) // 2]
    for span, behind in zip(found[first:last], found[first + 1 : last + 1], strict=True):
        print(f"    {span.ns / 1e3:8.2f} us, next after {(behind.begin_ns - span.begin_ns) / 1e3:8.2f}"
              f"  {span.name[:WIDTH]}")


def decode(options: argparse.Namespace, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True, max_prefill_ms=0)
        for batch in options.batch:
            tokens = start(engine, requests(options, batch, engine.config.vocab_size, options.profiled + 100))
            for _ in range(8):
                step(engine, tokens)

            def run(tokens=tokens):
                for _ in range(options.profiled):
                    step(engine, tokens)

            found = spans(run, device)
            print(f"decode, batch {batch}, context {options.context}: ", end="")
            report(found, options.profiled)
            one_layer(found, options.marks)
            end(engine, tokens)


def prefill(options: argparse.Namespace, device: str) -> None:
    options.batch = [1]
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True, max_prefill_ms=0)
        end(engine, start(engine, requests(options, 1, engine.config.vocab_size, 2)))
        tokens: dict[str, list[int]] = {}

        def run():
            tokens.update(start(engine, requests(options, 1, engine.config.vocab_size, 2)))

        found = spans(run, device)
        print(f"prefill of {options.context} tokens: ", end="")
        report(found, 1)
        one_layer(found, "prefill_attention")
        end(engine, tokens)


def products(options: argparse.Namespace, device: str) -> None:
    of = (TINY if options.tiny else MODELS)[MODEL]
    hidden, inter, head = of["hidden_size"], of["intermediate_size"], of["head_dim"]
    width, kv_width = of["num_attention_heads"] * head, of["num_key_value_heads"] * head
    shapes = {"qkv": (width + 2 * kv_width, hidden), "o": (hidden, width), "gate_up": (2 * inter, hidden),
              "down": (hidden, inter), "head": (of["vocab_size"], hidden)}
    print("| M | product | N x K | torch us | linear us | reading us | torch, % of reading | linear, % |\n"
          "|---:|---|---|---:|---:|---:|---:|---:|")
    for m in options.batch:
        for name, (n, k) in shapes.items():
            x, weight = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
            calls = [F.linear, ops.linear] if m <= DECODE_TOKENS else [F.linear]
            us = [timing.median_ms(timing.captured(functools.partial(call, x, weight), device), device, repeat_ms=20)
                  * 1e3 for call in calls]  # fmt: skip
            if len(us) > 1:
                torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight), rtol=0.02, atol=0.02 * k**0.5)
            floor = read_us(weight.nbytes + x.nbytes + 2 * m * n, device)
            took, shares = ([*map(form.format, values), "-"][:2] for form, values in (
                ("{:.1f}", us), ("{:.0f}", [100 * floor / each for each in us])))
            row = [m, name, f"{n} x {k}", *took, f"{floor:.1f}", *shares]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "prefill", "products"])
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--context", type=int)
    parser.add_argument("--profiled", type=int, default=10, help="steps (default: %(default)s)")
    parser.add_argument("--marks", default="paged_attention", help="of the kernel that a layer begins with")
    parser.add_argument("--quantization", choices=["fp8"], help="weights per output feature, inputs per token")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    options.steps, options.deterministic = 0, False
    options.batch = options.batch or ([1, 4, 16, 64] if options.what == "products" else [1, 64, 256])
    options.context = options.context or (8160 if options.what == "prefill" else 1100)
    if options.tiny:
        options.batch, options.context, options.profiled = [1, 3], 20, 2
    device = "cpu" if options.tiny else "cuda"
    gc.freeze()
    with torch.inference_mode():
        {"decode": decode, "prefill": prefill, "products": products}[options.what](options, device)
    gc.unfreeze()
    return 0


if __name__ == "__main__":
    sys.exit(main())
