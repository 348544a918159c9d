"""Decode speed and memory of the engine on a CPU, next to transformers' generate on the same weights in the same run.

    python tests/bench/decode_cpu.py [--rounds N] [--tokens N] [--threads N] [--dtype D ...] [--batch B ...]

Builds one random Llama of 113 M parameters, saves it to a temporary folder in Hugging Face format, and lets both sides
decode greedily from the same prompts, in turns, since a machine's speed wanders. A speed is printed only where the
tokens were checked: equal in fp32; in bf16 none of ours may be a worse choice, by the fp32 logits, than twice the
worst of transformers' own. Next to it stands the floor: the time that reading the weights once takes on this machine.

Memory is that of a fresh process per dtype (memory_cpu.py). The exit status is 1 if a check fails or a target is
missed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams

VOCAB, CONTEXT = 49152, 2048
MODEL = LlamaConfig(
    vocab_size=VOCAB, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_id=None,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
TARGETS = {1: 1.0, 8: 1.2}  # batch -> tokens/s over those of transformers
Tokens = list[list[int]]


@dataclass
class Run:
    """The tokens of every sequence, and the seconds from the first one's end to the last one's."""

    tokens: Tokens
    seconds: float


class Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def run_transformers(model: Any, prompts: torch.Tensor, count: int) -> Run:
    """Greedy generate of `count` tokens for prompts [B, L]."""
    clock = Clock()
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True)
    out = model.generate(prompts, settings, attention_mask=torch.ones_like(prompts), stopping_criteria=[clock])
    return Run(out[:, prompts.shape[1] :].tolist(), clock.times[-1] - clock.times[0])


def run_engine(engine: Engine, prompts: torch.Tensor, count: int) -> Run:
    """The same through our engine."""
    tokens: Tokens = [[] for _ in prompts]
    for i, ids in enumerate(prompts.tolist()):
        engine.add(Request(str(i), ids, SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)))
    begin = 0.0
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.rid)] += output.token_ids
        if not begin and all(tokens):
            begin = time.perf_counter()
    return Run(tokens, time.perf_counter() - begin)


@torch.inference_mode()
def worst_choice(model: LlamaForCausalLM, prompts: torch.Tensor, tokens: Tokens) -> float:
    """By how much, at most, a chosen token's logit lies under the best one's in the model given (the fp32 one)."""
    chosen = torch.tensor(tokens)
    logits = model(torch.cat((prompts, chosen), 1)[:, :-1]).logits[:, prompts.shape[1] - 1 :].float()
    return (logits.amax(-1) - logits.gather(2, chosen[..., None])[..., 0]).max().item()


def read_seconds(size: int) -> float:
    """Seconds to read `size` bytes of memory once with all threads, at best."""
    block = torch.ones(size // 4)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - begin)
    return best


def compare(folder: str, dtype: str, batches: list[int], rounds: int, count: int, exact: LlamaForCausalLM) -> bool:
    """Print the rows of one dtype; True if the tokens are right and the targets are met."""
    engine = Engine(ServerArgs(model_path=folder, device="cpu", dtype=dtype))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    size = sum(weight.nbytes for weight in theirs.parameters())
    floor = read_seconds(size)
    fine = True
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(VOCAB, (batch, 32), generator=generator)
        run_transformers(theirs, prompts, 4)
        run_engine(engine, prompts, 4)
        pairs = [(run_transformers(theirs, prompts, count), run_engine(engine, prompts, count)) for _ in range(rounds)]
        their_tokens, our_tokens = pairs[0][0].tokens, pairs[0][1].tokens
        if dtype == "float32":
            right = our_tokens == their_tokens
            why = "other tokens than transformers'"
        else:
            ours, allowed = (worst_choice(exact, prompts, tokens) for tokens in (our_tokens, their_tokens))
            right = ours <= 2 * allowed + 0.01
            why = f"a token {ours:.3f} under the best logit, where transformers' worst is {allowed:.3f}"
        if not right or any(ours.tokens != our_tokens for _, ours in pairs):
            print(f"| {dtype} | {batch} | WRONG: {why if not right else 'tokens change from run to run'} |")
            fine = False
            continue
        produced = batch * (count - 1)
        hf, w64 = (produced / statistics.median(run.seconds for run in side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
        target = TARGETS.get(batch)
        met = target is None or ratio >= target
        fine &= met
        aim = "" if target is None else f"{target:.1f} {'met' if met else 'MISSED'}"
        print(f"| {dtype} | {batch} | {hf:.1f} | {w64:.1f} | {ratio:.2f} | {aim} | {batch / w64 * 1e3:.1f} "
              f"| {floor * 1e3:.1f} ({size / 1e6:.0f} MB at {size / floor / 1e9:.0f} GB/s) |", flush=True)  # fmt: skip
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode speed and memory on a CPU, next to transformers.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=49, help="tokens per sequence and turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="default: %(default)s")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    exact = LlamaForCausalLM(MODEL).eval()
    parameters = sum(weight.numel() for weight in exact.parameters())
    print(f"{parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{args.rounds} turns of {args.tokens} tokens after prompts of 32\n")  # fmt: skip
    fine = True
    with tempfile.TemporaryDirectory(prefix="wave64-bench-") as folder:
        exact.save_pretrained(folder)
        print("| dtype | batch | transformers tok/s | wave64 tok/s | ratio | target | ms per step | floor, ms |")
        print("|---|---|---|---|---|---|---|---|")
        for dtype in args.dtype:
            fine &= compare(folder, dtype, args.batch, args.rounds, args.tokens, exact)
        print("\n| dtype | peak MB | weights | KV pool | the rest | of that, imports | at most |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for dtype in args.dtype:
            command = [sys.executable, Path(__file__).with_name("memory_cpu.py"), folder, dtype]
            fine &= subprocess.run(command).returncode == 0
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
