"""Puts a load on a server and says what came of it."""

import argparse
import asyncio
import contextlib
import gc
import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from wave64.bench_serving import flags, measures
from wave64.bench_serving.backends import Answer, Target
from wave64.bench_serving.datasets import BadSetting, Row, Words, load
from wave64.bench_serving.http import fetch

Json = dict[str, Any]

PAUSE_S = 1.0  # before a run, for what warmed the server up to end
BUSY = 0.9  # fraction of a core above which the client itself may be what limits
#: --summary's loads: what they are, requests, how many run at a time, tokens to generate.
SUMMARY = (("1000 x 128/128 at once", 1000, None, 128),
           ("64 clients of 128/128, the next request as the last ends", 640, 64, 128),
           ("an idle server, 128 tokens", 32, 1, 8))  # fmt: skip


class Unreachable(RuntimeError):
    """No server answers, or not as one should."""


class Bench:
    """A server, and how it is asked."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._words: Words | None = None
        self._vocab_size = 0
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        assert self._target is not None  # since open()
        return self._target

    async def open(self) -> None:
        """Wait for the server and learn what it serves. Raises Unreachable or BadSetting."""
        args = self.args
        flags.check_ids(args)
        models = await self._models()
        info = await self.get("/model_info") or {}
        model: str | None = args.model or (models[0]["id"] if models else None)
        if model is None:
            raise BadSetting(f"--model: expected a name, as {args.base_url}/v1/models names none")
        tokenizer = args.tokenizer or info.get("tokenizer_path") or (models[0].get("root") if models else None) or model
        if flags.needs_text(args):
            self._words = await asyncio.to_thread(Words.open, tokenizer)
        self._vocab_size = self._words.vocab_size if self._words else info.get("vocab_size") or 0
        if not self._vocab_size:
            raise BadSetting("--tokenizer: expected one, as the server does not say how large its vocabulary is")
        logprobs = {"return_logprob": True, "logprob_start_len": args.logprob_start_len} if args.return_logprob else {}
        if args.top_logprobs_num:
            logprobs["top_logprobs_num"] = args.top_logprobs_num
        if args.token_ids_logprob is not None:
            logprobs["token_ids_logprob"] = args.token_ids_logprob
        self._target = Target(args.backend, args.base_url, args.served_model_name or model, args.headers,
                              not args.disable_stream, not args.disable_ignore_eos, args.temperature, args.top_p,
                              logprobs, args.extra_request_body)  # fmt: skip

    async def _models(self) -> list[Json]:
        until = time.monotonic() + self.args.ready_check_timeout_sec
        while True:
            try:
                status, body = await fetch("GET", f"{self.args.base_url}/v1/models", self.args.headers)
                if status == 200:
                    return json.loads(body).get("data", [])
                if status in (401, 403):
                    got = "another" if self.args.api_key else "none"
                    raise BadSetting(f"--api-key: expected the server's, got {got}")
                reason = f"status {status}"
            except (OSError, ValueError) as error:
                if isinstance(error, BadSetting):
                    raise
                reason = str(error)
            if time.monotonic() >= until:
                if self.args.ready_check_timeout_sec == 0:
                    return []
                raise Unreachable(f"no server at {self.args.base_url}: {reason}")
            await asyncio.sleep(0.5)

    async def get(self, path: str) -> Any:
        """The JSON of an endpoint; None where the server has no such."""
        try:
            status, body = await fetch("GET", self.args.base_url + path, self.args.headers)
            return json.loads(body) if status == 200 else None
        except (OSError, ValueError):
            return None

    def rows(self) -> list[Row]:
        """What the flags say is sent. Raises BadSetting."""
        return load(self.args, self._words, self._vocab_size)

    async def run(self, rows: list[Row], rate: float, limit: int | None) -> measures.Run:
        """One run under one load. Raises Unreachable if the server cannot answer the first row."""
        args = self.args
        await self._warm_up(rows[0], limit)
        await asyncio.sleep(PAUSE_S)
        if args.profile:
            await self._post("/start_profile")
        gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
        bar = _bar(len(rows), args.disable_tqdm)

        async def one(row: Row) -> list[Answer]:
            async with gate:
                answers = await self.target.talk(row)
            bar(answers)
            if args.print_requests:
                for answer in answers:
                    print(json.dumps({"output_len": answer.output_len, "latency": answer.latency, "text": answer.text,
                                      "error": answer.error}, ensure_ascii=False), flush=True)  # fmt: skip
            return answers

        had_frozen = gc.get_freeze_count() > 0  # the process around this
        gc.collect()
        gc.freeze()  # a thousand rows are not looked at again while tokens come
        began, busy = time.perf_counter(), time.process_time()
        tasks = [asyncio.create_task(one(row)) async for row in _arrivals(rows, rate, args.seed)]
        answers = [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        duration = time.perf_counter() - began
        busy = (time.process_time() - busy) / duration
        if not had_frozen:
            gc.unfreeze()
        bar(None)
        if args.profile:
            await self._post("/stop_profile")
        good = [answer.text for answer in answers if answer.success]
        retokenized = sum(len(self._words.encode(text, special=False)) for text in good) if self._words else 0
        return measures.Run(answers, duration, retokenized, rate, limit, busy)

    async def _warm_up(self, row: Row, limit: int | None) -> None:
        count = self.args.warmup_requests
        first = Row(row.turns[:1], row.prompt_len, min(row.output_len, 32), row.extra)
        gate = asyncio.Semaphore(limit or max(1, count))

        async def one() -> Answer:
            async with gate:
                return (await self.target.talk(first))[0]

        answers = await asyncio.gather(*(one() for _ in range(count)))
        if count and not any(answer.success for answer in answers):
            raise Unreachable(f"the first request failed: {answers[0].error}")
        if self.args.flush_cache:
            await self._post("/flush_cache")

    async def _post(self, path: str) -> None:
        status, body = await fetch("POST", self.args.base_url + path, self.args.headers)
        if status != 200:
            raise Unreachable(f"{path}: status {status}: {body.decode(errors='replace')[:300]}")

    def line(self, run: measures.Run, server_info: Any) -> Json:
        """The run's JSON line."""
        args = self.args
        found: Json = {
            "tag": args.tag, "backend": args.backend, "dataset_name": args.dataset_name,
            "request_rate": run.request_rate, "max_concurrency": run.max_concurrency,
            "sharegpt_output_len": args.sharegpt_output_len, "random_input_len": args.random_input_len,
            "random_output_len": args.random_output_len, "random_range_ratio": args.random_range_ratio,
            "server_info": server_info, **run.measures(),
        }  # fmt: skip
        if args.goodput:
            found |= measures.goodput(run.answers, dict(args.goodput), run.duration)
        if args.cache_report:
            found["cache_report"] = measures.cache_report(run.answers)
        return found


async def _arrivals(rows: list[Row], rate: float, seed: int) -> AsyncIterator[Row]:
    """The rows at the times of a Poisson process, measured from its start, so that delays do not add up."""
    rng, at = np.random.default_rng(seed), time.perf_counter()
    for row in rows:
        if rate != float("inf"):
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            at += rng.exponential(1 / rate)
        yield row


def _bar(count: int, is_disabled: bool) -> Callable[[list[Answer] | None], None]:
    """A progress bar of requests; it is called with answers, and with None at the end."""
    if is_disabled:
        return lambda answers: None
    from tqdm import tqdm

    bar = tqdm(total=count, unit="req")
    tokens = 0
    began = time.perf_counter()

    def update(answers: list[Answer] | None) -> None:
        nonlocal tokens
        if answers is None:
            bar.close()
            return
        tokens += sum(answer.output_len for answer in answers)
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tok/s", refresh=False)
        bar.update()

    return update


def output_file(args: Namespace) -> Path:
    """Where lines are appended."""
    is_random = args.dataset_name.startswith("random")
    sizes = f"{args.random_input_len}_{args.random_output_len}" if is_random else args.dataset_name
    return args.output_file or Path(f"{args.backend}_{datetime.now():%m%d}_{args.num_prompts}_{sizes}.jsonl")


async def bench(args: Namespace) -> list[Json]:
    """The JSON lines of all runs, each printed and appended to the output file as it ends. Raises Unreachable or
    BadSetting."""
    made = Bench(args)
    await made.open()
    rows, lines, path = made.rows(), [], output_file(args)
    for rate, limit in flags.loads(args):
        run = await made.run(rows, rate, limit)
        found = made.line(run, await made.get("/server_info"))
        print(measures.report(found), flush=True)
        say_what_is_wrong(run)
        details = _details(run.answers) if args.output_details else {}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found | details) + "\n")
        lines.append(found)
    return lines


def _details(answers: list[Answer]) -> Json:
    return {"input_lens": [a.prompt_len for a in answers], "output_lens": [a.output_len for a in answers],
            "ttfts": [a.ttft for a in answers], "itls": [a.itl for a in answers],
            "generated_texts": [a.text for a in answers], "errors": [a.error for a in answers],
            "cached_tokens": [a.cached_tokens for a in answers]}  # fmt: skip


def say_what_is_wrong(run: measures.Run) -> None:
    """On stderr: errors, and a client that was too busy to measure well."""
    errors = [answer.error for answer in run.answers if answer.error]
    if errors:
        print(f"{len(errors)} of {len(run.answers)} requests failed; the first: {errors[0]}", file=sys.stderr)
    if run.client_busy > BUSY:
        print(f"this client took {100 * run.client_busy:.0f} % of a core: it may be what limits, not the server",
              file=sys.stderr)  # fmt: skip


async def summary(args: Namespace) -> list[tuple[str, str]]:
    """The lines of --summary's table: what was measured, and the figure. Raises Unreachable or BadSetting."""
    sizes = dict(dataset_name="random-ids", random_input_len=128, random_output_len=128, random_range_ratio=1.0,
                 num_prompts=2 * sum(count for _, count, *_ in SUMMARY))  # fmt: skip
    args = Namespace(**{**vars(args), **sizes})
    made = Bench(args)
    await made.open()
    rows = iter(made.rows())  # none is asked twice: the server would have it in its prefix cache
    table = []
    for load_name, count, limit, output_len in SUMMARY:
        warm, chosen = ([replace(row, output_len=length) for row in islice(rows, count)] for length in (8, output_len))
        await made.run(warm, float("inf"), limit)  # what a server makes at a load's first sight, it makes now
        run = await made.run(chosen, float("inf"), limit)
        found = run.measures()
        say_what_is_wrong(run)
        if found["completed"] < count:
            raise Unreachable(f"{load_name}: {count - found['completed']} of {count} requests failed")
        if limit != 1:
            table.append((f"{load_name}: output tok/s", f"{found['output_throughput']:.0f}"))
        if limit == 64:
            table.append((f"{load_name}: gap between tokens, p99, ms", f"{found['p99_itl_ms']:.2f}"))
        if limit == 1:
            table.append((f"{load_name}: time to first token, median, ms", f"{found['median_ttft_ms']:.2f}"))
        else:
            table.append((f"{load_name}: time to first token, median, ms", f"{found['median_ttft_ms']:.0f}"))
        table.append((f"{load_name}: the client's part of a core", f"{run.client_busy:.2f}"))
    return table


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    args = flags.parse(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for each request
    try:
        if args.plot is not None:
            from wave64.bench_serving import plot  # first, so that a run is not lost for want of a package

            plot.check()
        if args.summary:
            print("\n".join(["| | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in
                                                              run_loop(summary(args)))]))  # fmt: skip
            return 0
        lines = run_loop(bench(args))
        if args.plot is not None:
            plot.draw(output_file(args), args.plot)
            print(f"drew {args.plot}")
        return 0 if all(line["completed"] for line in lines) else 1
    except KeyboardInterrupt:
        return 130
    except (BadSetting, Unreachable, argparse.ArgumentTypeError) as error:
        print(f"wave64.bench_serving: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def run_loop(work: Any) -> Any:
    """asyncio.run, on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
