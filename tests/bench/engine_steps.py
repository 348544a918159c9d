"""What a step of the engine costs beyond the device's work, where steps overlap and in the plain loop, in one run.

    python tests/bench/engine_steps.py decode [--batch 1 64 256] [--context 1100] [--out FILE.json]
    python tests/bench/engine_steps.py chats                      # turns of chats, with the prefix cache and without
    python tests/bench/engine_steps.py prefill                    # 8192 tokens of one prompt, one token out
    python tests/bench/engine_steps.py load                       # 1000 requests of 128 tokens in, 128 out, at once
    python tests/bench/engine_steps.py mixed [--batch 1 64 255]   # decodes, with a prompt of 128 tokens in every step
    python tests/bench/engine_steps.py grammar [--batch 64]       # decodes, with and without a grammar of its own a row
    python tests/bench/engine_steps.py host [--batch 256]         # any machine: scheduling, committing, a step's arrays
    python tests/bench/engine_steps.py fp8 [--batch 1 64]         # decode and prefill in bf16 and in FP8, one run
    python tests/bench/engine_steps.py all                        # every one of these

decode: an engine with random weights in the shape of Llama-3.1-8B, bf16, decodes greedily behind so many tokens. Both
loops say the same tokens, else there is no row. `step` is the mean time between two steps' results, with scheduling,
sampling and hand-over; `busy` the time that the device computes or copies in a step, from a profile of further steps of
the same batch; `idle` what is left. chats: prompt tokens per second, over turns that each add new tokens to a chat.
load: with --max-prefill-ms as it is by default, and without a limit; `gap_ms` is the longest time between two tokens of
one answer, and its 99th percentile. mixed: decodes and prompt by one graph; the decodes by a graph, then the prompt
kernel by kernel; or both in one batch, kernel by kernel. grammar: JSON schemas, a different one a row, over a
vocabulary of made-up words as large as the model's; `mask_ms` is what filling the step's masks takes,
the mean of further ones.
`--tiny` takes a small model and works on a CPU: it is there to test this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher
from ranks_serving import MODELS, TINY
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import MAX_PREFILL_MS, Engine
from wave64.serve.engine.grammar import bitmask
from wave64.serve.engine.pace import Pace
from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.rank import PREFILL_CHUNK
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampled, Sampling
from wave64.serve.engine.scheduler import Scheduler, Sequence
from wave64.serve.messages import Request, SamplingParams, Vocabulary
from wave64.serve.model.config import ModelConfig

MODEL = "llama-8b"
WARM, CHECKED = 8, 24  # steps before the clock starts; tokens of each sequence that both loops have to agree on


def engine_of(folder: Path, options: argparse.Namespace, **flags: Any) -> Engine:
    config = (TINY if options.tiny else MODELS)[MODEL]
    config = config | dict(max_position_embeddings=max(config["max_position_embeddings"], 2 * options.context))
    (folder / "config.json").write_text(json.dumps(config))
    tokens = max(options.batch) * (options.context + options.steps + options.profiled + CHECKED + 64)
    given = dict(model_path=str(folder), load_format="dummy", device="cpu" if options.tiny else "cuda",
                 max_total_tokens=tokens, max_running_requests=max(options.batch),
                 enable_deterministic_inference=options.deterministic, quantization=options.quantization) | flags
    return Engine(ServerArgs(**given))


def requests(options: argparse.Namespace, batch: int, vocab: int, count: int) -> Iterator[Request]:
    """Prompts drawn for this batch; nothing that ends them but `count`."""
    drawn = random.Random(batch)
    for number in range(batch):
        ids = [drawn.randrange(4, vocab) for _ in range(options.context)]
        yield Request(f"{number}", ids, SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True))


def start(engine: Engine, asked: Iterator[Request]) -> dict[str, list[int]]:
    """Run until all decode; the tokens so far."""
    tokens: dict[str, list[int]] = {}
    for each in asked:
        engine.add(each)
        tokens[each.rid] = []
    while not all(tokens.values()):
        step(engine, tokens)
    return tokens


def step(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for output in engine.step():
        if output.error:
            raise RuntimeError(output.error)
        tokens[output.rid] += output.token_ids


def timed(engine: Engine, tokens: dict[str, list[int]], steps: int) -> list[float]:
    """Milliseconds of so many steps, behind some that are not timed."""
    for _ in range(WARM):
        step(engine, tokens)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step(engine, tokens)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def end(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for rid in tokens:
        engine.abort(rid)
    while engine.has_work:
        engine.step()
    engine.flush()


def busy_ms(engine: Engine, tokens: dict[str, list[int]], count: int) -> float:
    """Milliseconds in which the device does something, per step, from a profile of `count` steps; nan without one."""
    if engine.device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(count):
            step(engine, tokens)
        torch.cuda.synchronize()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns())
                   for event in profile.profiler.kineto_results.events()
                   if event.device_type().name == "CUDA")
    busy, reached = 0, 0
    for first, last in spans:
        busy += max(0, last - max(first, reached))
        reached = max(reached, last)
    return busy / 1e6 / count


def decode(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Chunks of prompts by size alone: by time they would differ from one loop to the other, and so would tokens.
        engine = engine_of(Path(folder), options, disable_radix_cache=True, max_prefill_ms=0)
        for batch in options.batch:
            said, found = {}, {}
            for overlaps in (False, True):
                engine.overlaps = overlaps
                prefills = batch * options.context // PREFILL_CHUNK["cuda"] + 2  # while which the first decode
                count = max(CHECKED, WARM + options.steps + options.profiled) + prefills + 4
                tokens = start(engine, requests(options, batch, engine.config.vocab_size, count))
                times = timed(engine, tokens, options.steps)
                mean = statistics.mean(times)
                busy = busy_ms(engine, tokens, options.profiled)
                said[overlaps] = {rid: ids[:CHECKED] for rid, ids in tokens.items()}
                found[overlaps] = dict(step_ms=mean, worst_ms=max(times), busy_ms=busy, idle_ms=mean - busy)
                end(engine, tokens)
            for overlaps, numbers in found.items():
                right = said[False] == said[True]
                rows.append(dict(batch=batch, loop="overlap" if overlaps else "plain", same_tokens=right)
                            | (numbers if right else {}))
                print(line(rows[-1]), flush=True)
    return rows


def chats(options: argparse.Namespace) -> list[dict[str, Any]]:
    """`chats` chats of `turns` turns, `new` more tokens in each, one token out."""
    count, turns, new = (3, 3, 40) if options.tiny else (64, 8, 1000)
    options.batch, options.context = [count], turns * (new + 2)
    rows = []
    for without in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            engine, drawn = engine_of(Path(folder), options, disable_radix_cache=without), random.Random(1)
            texts: dict[str, list[int]] = {f"{i}": [] for i in range(count)}
            total, seconds = 0, 0.0
            for _ in range(turns):
                for rid, text in texts.items():
                    text += [drawn.randrange(4, engine.config.vocab_size) for _ in range(new)]
                    total += len(text)
                    engine.add(Request(rid, list(text), SamplingParams(max_new_tokens=1, temperature=0,
                                                                       ignore_eos=True)))  # fmt: skip
                began = time.perf_counter()
                while engine.has_work:
                    step(engine, texts)
                seconds += time.perf_counter() - began
            cached = engine.statistics().cached_tokens
            del engine
            gc.collect()
            torch.cuda.empty_cache()
        rows.append(dict(prefix_cache=not without, prompt_tokens=total, cached=cached, tokens_per_s=total / seconds))
        print(line(rows[-1]), flush=True)
    return rows


def prefill(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The best and the mean of a few prompts, each alone."""
    options.batch, options.context = [1], 40 if options.tiny else 8192
    times = []
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True)
        for number in range(7):
            drawn = random.Random(number)
            ids = [drawn.randrange(4, engine.config.vocab_size) for _ in range(options.context)]
            engine.add(Request("a", ids, SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)))
            began, tokens = time.perf_counter(), {"a": list[int]()}
            while engine.has_work:
                step(engine, tokens)
            assert len(tokens["a"]) == 1
            times.append(1e3 * (time.perf_counter() - began))
    row = dict(prompt_tokens=options.context, best_ms=min(times[2:]), mean_ms=statistics.mean(times[2:]))
    print(line(row), flush=True)
    return [row]


def load(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All requests at once; a first round, whose times do not count, compiles."""
    count, length = (8, 12) if options.tiny else (1000, 128)
    options.batch, options.context = [8 if options.tiny else 256], 2 * length
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True)
        default = engine._pace
        generated, seconds, gaps = 0, 0.0, list[float]()
        for limit in (0.0, MAX_PREFILL_MS):
            for rounds in range(2):
                engine._pace = Pace(limit, engine.scheduler.prefill_budget)
                drawn = random.Random(rounds)
                for number in range(count if rounds else count // 4):
                    ids = [drawn.randrange(4, engine.config.vocab_size) for _ in range(length)]
                    engine.add(Request(f"{number}", ids, SamplingParams(
                        max_new_tokens=length, temperature=0, ignore_eos=True)))
                began, generated, gaps, heard = time.perf_counter(), 0, [], dict[str, float]()
                while engine.has_work:
                    outputs = engine.step()
                    now = time.perf_counter()
                    for output in outputs:
                        assert output.error is None
                        gaps.append(1e3 * (now - heard.get(output.rid, now)))
                        heard[output.rid] = now
                        generated += len(output.token_ids)
                seconds = time.perf_counter() - began
            gaps.sort()
            rows.append(dict(requests=count, max_prefill_ms=limit, output_tokens=generated,
                             tokens_per_s=generated / seconds, gap_p99_ms=gaps[int(0.99 * len(gaps))], gap_ms=gaps[-1]))
            print(line(rows[-1]), flush=True)
        engine._pace = default
    return rows


def mixed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every timed step computes a prompt of its own and decodes `batch` sequences."""
    rows, length = [], 12 if options.tiny else 128
    batches, options.batch = options.batch, [max(options.batch) + 8]
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True, max_prefill_ms=0)
        for batch in batches:
            prompt_graphs = engine.runner._prompt_graphs
            for launched in ("graph", "split", "eager"):
                engine.runner._prompt_graphs = prompt_graphs if launched == "graph" else None
                engine.runner.max_split = batch if launched == "split" else 0
                prefills = batch * options.context // PREFILL_CHUNK["cuda"] + 2
                count = WARM + options.steps + prefills + 8
                tokens = start(engine, requests(options, batch, engine.config.vocab_size, count))
                times, drawn = [], random.Random(0)
                for number in range(WARM + options.steps):
                    ids = [drawn.randrange(4, engine.config.vocab_size) for _ in range(length)]
                    tokens[f"new {number}"] = []
                    engine.add(Request(f"new {number}", ids, SamplingParams(max_new_tokens=1, ignore_eos=True)))
                    began = time.perf_counter()
                    step(engine, tokens)
                    times.append(1e3 * (time.perf_counter() - began))
                end(engine, tokens)
                rows.append(dict(batch=batch, prompt=length, launched=launched,
                                 step_ms=statistics.mean(times[WARM:])))  # fmt: skip
                print(line(rows[-1]), flush=True)
            engine.runner._prompt_graphs = prompt_graphs
    return rows


def vocabulary(size: int) -> Vocabulary:
    """So many tokens: bytes, and words of letters and of JSON."""
    drawn, words = random.Random(0), dict.fromkeys(sorted(ByteLevel.alphabet()))
    while len(words) < size - 1:
        word = "".join(drawn.choices("etaoinshrdlcumwfgypbvkETAOINSHRDL", k=drawn.randint(2, 9)))
        words[drawn.choice(("", "", "\u0120", '"', "\u0120\"", ',"', "1")) + word] = None
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate([*words][: size - 1])}, []))
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<end>"])
    return Vocabulary(tokenizer.to_str(), [size - 1])


def schema(row: int) -> str:
    """The grammar of answers that do not end for long, in llguidance's form."""
    item = {"type": "object", "properties": {f"name_{row}": {"type": "string"}, "count": {"type": "integer"}},
            "required": [f"name_{row}", "count"], "additionalProperties": False}  # fmt: skip
    return LLMatcher.grammar_from_json_schema({"type": "array", "items": item, "minItems": 10**4})


def grammar(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options, disable_radix_cache=True, max_prefill_ms=0)
        vocab = engine.config.vocab_size
        engine.grammars.learn(vocabulary(vocab))
        engine.overlaps = True
        for batch in options.batch[-1:] if options.tiny else options.batch:
            for has_grammar in (False, True):
                count = WARM + options.steps + batch * options.context // PREFILL_CHUNK["cuda"] + 64
                asked = list(requests(options, batch, vocab, count))
                for row, each in enumerate(asked):
                    each.grammar = schema(row) if has_grammar else None
                tokens = start(engine, iter(asked))
                times = timed(engine, tokens, options.steps)
                found = dict(step_ms=statistics.mean(times), worst_ms=max(times), mask_ms=0.0)
                if has_grammar:
                    live = [(i, seq.grammar) for i, seq in enumerate(engine.scheduler.running) if seq.grammar]
                    assert len(live) == batch
                    began = time.perf_counter()
                    for _ in range(options.steps):
                        bitmask(Sampling(rows=[*range(batch)], grammars=live), vocab)
                    found["mask_ms"] = 1e3 * (time.perf_counter() - began) / options.steps
                end(engine, tokens)
                rows.append(dict(batch=batch, grammar=has_grammar) | found)
                print(line(rows[-1]), flush=True)
    return rows


def host(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of the host's part of a decode step, the best of many: nothing here touches a device."""
    rows, folder = [], Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(TINY[MODEL] | dict(max_position_embeddings=8192)))
    config = ModelConfig.from_folder(folder)
    for batch in options.batch:
        pages = -(-(options.context + 400) // 16) * batch
        scheduler = Scheduler(PagePool(pages, 16), batch, 1 << 20)
        runner = Runner(torch.nn.Linear(1, 1), config, torch.float32, torch.device("cpu"), pages, 16, batch, False)
        for each in requests(options, batch, 256, 400):
            scheduler.add(Sequence(each, frozenset([2]), random.Random(0)))
        scheduler.schedule()
        answer = Sampled([5] * batch, [None] * batch)
        scheduler.sampling()
        best = dict.fromkeys(("schedule", "batch", "commit", "sampling"), float("inf"))
        for _ in range(200):
            marks = [time.perf_counter()]
            schedule = scheduler.schedule()
            assert schedule.tokens[0] == LAST_SAMPLED
            marks.append(time.perf_counter())
            runner._inputs(schedule)
            marks.append(time.perf_counter())
            scheduler.commit(answer)
            marks.append(time.perf_counter())
            scheduler.sampling()
            marks.append(time.perf_counter())
            for name, first, last in zip(best, marks[:-1], marks[1:], strict=True):
                best[name] = min(best[name], 1e3 * (last - first))
        rows.append(dict(batch=batch) | {f"{name}_ms": value for name, value in best.items()})
        print(line(rows[-1]), flush=True)
    return rows


def fp8(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decodes and prompts with weights in bf16, then in FP8, and how many times as fast those are."""
    rows = []
    for method in (None, "fp8"):
        for way in (decode, prefill):
            given = argparse.Namespace(**vars(options) | dict(quantization=method))
            rows += [dict(weights=method or "bf16") | row for row in way(given) if row.get("loop") != "plain"]
            gc.collect()
            torch.cuda.empty_cache()
    half = len(rows) // 2
    for plain, small in zip(rows[:half], rows[half:], strict=True):
        key = "step_ms" if "step_ms" in plain else "best_ms"
        if key in plain and key in small:
            small["times_as_fast"] = plain[key] / small[key]
            print(line(small), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"decode": decode, "prefill": prefill, "load": load, "chats": chats, "mixed": mixed, "grammar": grammar,
            "host": host, "fp8": fp8}
    parser.add_argument("what", choices=[*ways, "all"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--steps", type=int, default=100, help="that are timed (default: %(default)s)")
    parser.add_argument("--profiled", type=int, default=10, help="further ones (default: %(default)s)")
    parser.add_argument("--deterministic", action="store_true", help="with --enable-deterministic-inference")
    parser.add_argument("--quantization", choices=["fp8"], help="weights per output feature, inputs per token")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.tiny:
        options.batch, options.context, options.steps, options.profiled = [1, 3], 20, 20, 1
    gc.freeze()  # as a server does
    rows = []
    for name in ways if options.what == "all" else [options.what]:
        rows += [{"what": name} | row for row in ways[name](argparse.Namespace(**vars(options)))]
        torch.cuda.empty_cache()
    gc.unfreeze()
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not all(row.get("same_tokens", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
