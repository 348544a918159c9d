"""Serving by several GPUs of one host: decode steps at each number of ranks, the same tokens, and the end of a rank.

    python tests/bench/ranks_serving.py [--tp 1 2 ...] [--model NAME ...] [--batch N ...]
        [--part steps tokens kills] [--tiny] [--out FILE.json]

Steps: an engine with random weights in the shape of the published model, its other ranks in processes of their own,
decodes so many sequences behind 1,000 tokens each; the time of a step is the mean of what rank 0 sees, scheduling and
sampling included. llama-70b-8 and deepseek-v3-4 are the published models cut to so many layers. Tokens: demo-llama,
demo-deepseek and demo-deepseek-fp8 in fp32 and in their own dtype, each against one rank. Kills: a server under load
loses a rank by SIGKILL, and must end within ten seconds, with a line that names it. `--tiny` takes small sizes and
works on a CPU: it is there to test this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__)
sys.path.append(str(HERE.resolve().parents[1]))  # tests

from helpers_processes import engines  # noqa: E402

CONTEXT, STEPS = 1000, 30
CHUNK = 8192  # tokens of prompts in a step on a GPU
PARTS = ("steps", "tokens", "kills")
KILLS = ((1, 2.0), (1, 0.5), (0, 1.0))  # the rank, and seconds of load before
END_S = 10.0
PROMPT = "Four score and"

_LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], hidden_act="silu", vocab_size=128256, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=500000.0, torch_dtype="bfloat16", head_dim=128, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=False, num_key_value_heads=8)
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
    "llama-70b-8": _LLAMA | dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                                 num_hidden_layers=8),
    "deepseek-v3-4": dict(
        architectures=["DeepseekV3ForCausalLM"], hidden_act="silu", num_hidden_layers=4, vocab_size=129280,
        max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=10000.0, torch_dtype="bfloat16", kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, moe_layer_freq=1,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, attention_bias=False, hidden_size=7168,
        intermediate_size=18432, moe_intermediate_size=2048, num_attention_heads=128, num_key_value_heads=128,
        q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
        topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                                 weight_block_size=[128, 128])),
}
TINY: dict[str, dict[str, Any]] = {
    "llama-8b": MODELS["llama-8b"] | dict(hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                          num_key_value_heads=2, head_dim=16, num_hidden_layers=2, vocab_size=256)}
#: What is timed for each model: flags behind --tp.
WAYS: dict[str, list[list[str]]] = {"deepseek-v3-4": [[], ["--enable-dp-attention", "--dp-size", "{tp}"]]}

#: Blocks of its FP8 scales are wider than two ranks' heads.
TOGETHER = {"demo-deepseek-fp8": ("--enable-dp-attention", "--dp-size", "{tp}")}


def main() -> int:
    options = read_options()
    if options.child:
        return child(json.loads(options.child))
    report: dict[str, Any] = {"steps": [], "tokens": [], "kills": []}
    known = TINY if options.tiny else MODELS
    for model in options.model or known if "steps" in options.part else ():
        for tp in options.tp:
            for way in WAYS.get(model, [[]]) if tp > 1 else [[]]:
                flags = [each.format(tp=tp) for each in way]
                report["steps"] += steps(model, known[model], tp, flags, options)
                save(report, options.out)
    many = [tp for tp in options.tp if tp > 1]
    demos = ("demo-llama", "demo-deepseek", "demo-deepseek-fp8") if "tokens" in options.part else ()
    for demo in demos[: 1 if options.tiny else None]:
        for dtype in ["float32", "auto"][: 1 if demo.endswith("fp8") or options.tiny else None]:
            alone = recited(demo, 1, dtype, options)
            for tp in many:
                together = recited(demo, tp, dtype, options, [each.format(tp=tp) for each in TOGETHER.get(demo, ())])
                row = {"model": demo, "dtype": dtype, "tp": tp, "same": alone == together and "tokens" in alone,
                       "alone": alone, "together": together}
                report["tokens"].append(row)
                print(f"{demo} {dtype} --tp {tp}: {'the same tokens' if row['same'] else row}", flush=True)
                save(report, options.out)
    for rank, after in KILLS[: 1 if options.tiny else None] if many and "kills" in options.part else ():
        report["kills"].append(kill(many[-1], rank, after, options))
        save(report, options.out)
    fine = all(row["same"] for row in report["tokens"]) and all(row["fine"] for row in report["kills"])
    return 0 if fine and not any("error" in row for row in report["steps"]) else 1


def read_options() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the server, as --flag=--name")
    parser.add_argument("--limit", type=float, default=120, help="seconds that one engine may take")
    parser.add_argument("--out", type=Path, help="where to write all results as JSON, after each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def save(report: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1))


def steps(model: str, config: dict[str, Any], tp: int, flags: list[str], options: argparse.Namespace) -> list[Any]:
    """A row for each batch: milliseconds of a decode step."""
    context, count = (8, 3) if options.tiny else (CONTEXT, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        made = run_child({
            "flags": ["--model-path", folder, "--load-format", "dummy", "--tp", str(tp), "--disable-radix-cache",
                      "--max-prefill-ms", "0",  # chunks as counted below, however long the first steps compile
                      "--max-total-tokens", str((context + count + 96) * max(options.batch)), *flags, *options.flag],
            "batches": options.batch, "context": context, "steps": count}, options)
    if "error" in made:
        print(f"{model} --tp {tp} {' '.join(flags)}: {made['error']}", flush=True)
        return [{"model": model, "tp": tp, "flags": flags, **made}]
    for batch, ms in made["ms"].items():
        print(f"{model} --tp {tp} {' '.join(flags)} B={batch}: {ms:.3f} ms a step", flush=True)
    return [{"model": model, "tp": tp, "flags": flags, "batch": int(batch), "ms": ms}
            for batch, ms in made["ms"].items()]


def recited(demo: str, tp: int, dtype: str, options: argparse.Namespace, flags: Sequence[str] = ()) -> dict[str, Any]:
    """{"tokens": what follows the prompt}, or {"error": ...}."""
    return run_child({"flags": ["--model-path", demo, "--dtype", dtype, "--tp", str(tp), *flags, *options.flag],
                      "prompt": PROMPT, "tokens": 4 if options.tiny else 60}, options)


def run_child(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds: an engine's memory and its ranks end with it."""
    command = [sys.executable, str(HERE), "--child", json.dumps(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired as late:
        return {"error": f"took more than {options.limit} s: {str(late.stderr or late.stdout)[-400:]}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines and not done.returncode else {"error": (done.stderr or done.stdout)[-1500:]}


def child(work: dict[str, Any]) -> int:
    """An engine as rank 0, with its other ranks; prints what was asked for as JSON."""
    from transformers import AutoTokenizer

    from wave64.serve.args import ServerArgs
    from wave64.serve.engine.engine import Engine
    from wave64.serve.engine.team import Team
    from wave64.serve.messages import Request, SamplingParams
    from wave64.serve.model_path import resolve_model_path

    args = ServerArgs.from_cli(work["flags"])
    path = resolve_model_path(args.model_path, args.revision)
    team = Team(args, path, lambda message: None) if args.tp_size > 1 else None
    engine = Engine(args, team)
    found: dict[str, Any] = {}
    if "prompt" in work:
        ids = AutoTokenizer.from_pretrained(path)(work["prompt"]).input_ids
        engine.add(Request("0", ids, SamplingParams(max_new_tokens=work["tokens"], temperature=0, ignore_eos=True)))
        found["tokens"] = [token for outputs in run_dry(engine) for output in outputs for token in output.token_ids]
    else:
        found["ms"] = {batch: decode_ms(engine, batch, work["context"], work["steps"]) for batch in work["batches"]}
    print(json.dumps(found), flush=True)
    if team is not None:
        team.close()
    os._exit(0)


def run_dry(engine: Any) -> Iterator[list[Any]]:
    while engine.has_work:
        yield engine.step()


def decode_ms(engine: Any, batch: int, context: int, count: int) -> float:
    """Milliseconds of a step that decodes `batch` sequences behind `context` tokens."""
    from wave64.serve.messages import Request, SamplingParams

    warm, prefills = 5, batch * context // CHUNK + 2  # while which the first decode
    vocab = engine.config.vocab_size
    for number in range(batch):
        ids = [(number * 7919 + i * 31) % (vocab - 8) + 4 for i in range(context)]
        engine.add(Request(str(number), ids, SamplingParams(max_new_tokens=count + warm + prefills + 8, temperature=0,
                                                            ignore_eos=True)))
    seen: set[str] = set()
    while len(seen) < batch:
        outputs = engine.step()
        if bad := next((output.error for output in outputs if output.error), None):
            raise RuntimeError(bad)
        seen |= {output.rid for output in outputs if output.token_ids}
    for _ in range(warm):
        engine.step()
    began = time.perf_counter()
    for _ in range(count):
        engine.step()
    ms = (time.perf_counter() - began) * 1e3 / count
    assert engine.statistics().running == batch, "some sequences ended before the clock did"
    for number in range(batch):
        engine.abort(str(number))
    for _ in run_dry(engine):
        pass
    return ms


def kill(tp: int, rank: int, after: float, options: argparse.Namespace) -> dict[str, Any]:
    """A server under load, one rank of which is killed: how long until it has ended, and its words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "wave64.launch_server", "--model-path", "demo-llama", "--tp",
                                   str(tp), "--port", str(port), *options.flag], stdout=log, stderr=log,
                                  start_new_session=True)  # fmt: skip
        try:
            seconds = under_load(server, port, rank, after, options)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
        log.seek(0)
        words = [line for line in log.read().splitlines() if re.search(r"rank \d", line)][-3:]
    fine = seconds is not None and seconds <= END_S and (rank == 0 or any(f"rank {rank}" in line for line in words))
    row = {"tp": tp, "rank": rank, "seconds": seconds, "words": words, "fine": fine}
    print(f"SIGKILL of rank {rank} of {tp}: {row}", flush=True)
    return row


def under_load(server: subprocess.Popen[bytes], port: int, rank: int, after: float,
               options: argparse.Namespace) -> float | None:
    """Seconds from the kill to the end of the server; None where it did not end, or did not start."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    until = time.monotonic() + options.limit
    while True:
        try:
            client.completions.create(model="demo-llama", prompt=PROMPT, max_tokens=1)  # answers once it has loaded
            break
        except openai.APIError:
            if time.monotonic() > until or server.poll() is not None:
                return None
            time.sleep(0.3)

    def load(_: int) -> None:
        while server.poll() is None:
            try:
                client.completions.create(model="demo-llama", prompt=PROMPT, max_tokens=200,
                                          extra_body={"ignore_eos": True})
            except openai.APIError:
                time.sleep(0.05)

    victim = engines(server.pid)[rank]
    with ThreadPoolExecutor(8) as clients:
        for number in range(8):
            clients.submit(load, number)
        time.sleep(after)
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        while server.poll() is None and time.monotonic() - began < 3 * END_S:
            time.sleep(0.02)
        ended = time.monotonic() - began if server.poll() is not None else None
        if ended is None:
            server.kill()
    return ended


if __name__ == "__main__":
    sys.exit(main())
