"""`python -m wave64.bench_one_batch`: how long the engine alone takes for one batch, by SGLang's flags and labels.

    python -m wave64.bench_one_batch --model-path demo-llama --batch-size 1 16 --input-len 64 --output-len 8

A line for the prompts (one step computes them all), for the first decode steps, and for their median. No server, no
tokenizer: prompts are token ids drawn at random, and a batch is run once before it is timed. Every other flag is the
server's: --load-format dummy, --kv-cache-dtype fp8_e4m3, --device gfx942.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wave64.serve.args import ArgsError, ServerArgs

if TYPE_CHECKING:
    from wave64.serve.engine.engine import Engine

SHOWN = 5  # decode steps that have a line, unless --log-decode-step says otherwise
Json = dict[str, Any]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ServerArgs]:
    """The benchmark's flags and the engine's. A bad one ends the process: one line on stderr, status 2."""
    parser = argparse.ArgumentParser(prog="python -m wave64.bench_one_batch", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    lengths = ("--input-len", 1024, "tokens of a prompt"), ("--output-len", 16, "tokens to generate")
    for flag, default, text in (("--batch-size", 1, "requests in the batch"), *lengths):
        parser.add_argument(flag, type=int, nargs="+", default=[default], metavar="N",
                            help=f"{text}; several: a run each (default: {default})")  # fmt: skip
    parser.add_argument("--run-name", default="default", help="a field of the JSON line")
    parser.add_argument("--result-filename", type=Path, default=Path("result.jsonl"),
                        help="JSON lines are appended (default: %(default)s)")  # fmt: skip
    parser.add_argument("--log-decode-step", type=int, default=0, metavar="N", help="a line for every Nth decode step")
    args, rest = parser.parse_known_args(argv)
    for flag, sizes, smallest in (("--batch-size", args.batch_size, 1), ("--input-len", args.input_len, 1),
                                  ("--output-len", args.output_len, 2)):  # fmt: skip
        if min(sizes) < smallest:
            parser.error(f"{flag}: expected at least {smallest}, got {min(sizes)}")
    rows, tokens = max(args.batch_size), max(args.input_len) + max(args.output_len)
    given = {word.split("=")[0] for word in rest}
    for flag, value in (("--max-running-requests", rows), ("--max-prefill-tokens", rows * max(args.input_len)),
                        ("--chunked-prefill-size", -1), ("--max-total-tokens", rows * (tokens + 64))):  # fmt: skip
        if flag not in given:
            rest += [flag, str(value)]
    settings = ServerArgs.from_cli([*rest, "--disable-radix-cache"])
    if settings.tp_size > 1:
        parser.error(f"--tp-size: expected 1, as one process measures one rank, got {settings.tp_size}; "
                     "wave64.bench_serving measures several")  # fmt: skip
    return args, settings


def run_batch(engine: "Engine", batch: int, input_len: int, output_len: int) -> list[float]:
    """Seconds until every row has its first token, then of each decode step. Raises RuntimeError if a request fails."""
    from wave64.serve.messages import Request, SamplingParams

    drawn, vocab = random.Random(batch), engine.ready().vocab_size
    for row in range(batch):
        ids = [drawn.randrange(vocab) for _ in range(input_len)]
        engine.add(Request(str(row), ids, SamplingParams(max_new_tokens=output_len, temperature=0, ignore_eos=True)))
    counts, seconds, began = dict.fromkeys(map(str, range(batch)), 0), [], time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            counts[output.rid] += len(output.token_ids)
        now = time.perf_counter()
        if min(counts.values()) > len(seconds):
            seconds.append(now - began)
            began = now
    return seconds


def measure(engine: "Engine", args: argparse.Namespace, batch: int, input_len: int, output_len: int) -> Json:
    """Runs a batch twice, and prints what the second took. Returns the fields of its JSON line."""
    print("Warmup ...", flush=True)
    run_batch(engine, batch, input_len, min(output_len, 8))
    print("Benchmark ...", flush=True)
    prefill, *decodes = run_batch(engine, batch, input_len, output_len)

    def line(what: str, seconds: float, tokens: int, median: str = "") -> None:
        rate = f"{median}throughput: {tokens / seconds:9.2f} token/s"
        print(f"{what}{median}latency: {seconds:6.5f} s, {rate}", flush=True)

    line("Prefill. ", prefill, batch * input_len)
    for i, seconds in enumerate(decodes):
        if i % args.log_decode_step == 0 if args.log_decode_step else i < SHOWN:
            line(f"Decode {i}. Batch size: {batch}, ", seconds, batch)
    median, total = statistics.median(decodes), prefill + sum(decodes)
    line("Decode.  ", median, batch, "median ")
    line("Total. ", total, batch * (input_len + output_len))
    return {
        "run_name": args.run_name, "batch_size": batch, "input_len": input_len, "output_len": output_len,
        "prefill_latency": prefill, "prefill_throughput": batch * input_len / prefill, "median_decode_latency": median,
        "median_decode_throughput": batch / median, "total_latency": total,
        "overall_throughput": batch * (input_len + output_len) / total,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    args, settings = parse([*(sys.argv[1:] if argv is None else argv)])
    from wave64.serve.engine.engine import Engine

    try:
        engine = Engine(settings)
        for batch in args.batch_size:
            for input_len in args.input_len:
                for output_len in args.output_len:
                    found = measure(engine, args, batch, input_len, output_len)
                    with args.result_filename.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
    except (ArgsError, RuntimeError, ValueError) as error:
        print(f"wave64.bench_one_batch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
