"""Generates text on an emulated MI300X or MI355X, in this process, and says what each step would cost on the card.

    python -m wave64 emulate --model-path demo-deepseek-fp8 --prompt "Four score and" --device gfx942 --max-tokens 4

Prints tokens as they come, each with the wave instructions that were executed for it, then the bound of a step by
operator: of the prompt's and of the first that decodes. What follows is not counted, which is faster. Further flags
are the server's (--kv-cache-dtype fp8_e4m3, --chunked-prefill-size 16, --disable-cuda-graph).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

import wave64
from wave64.arch import EMULATED
from wave64.serve.args import LEVELS, ArgsError, ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.rank import SAID_IN_WORDS, named_backends
from wave64.serve.logs import LINE
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model_path import resolve_model_path
from wave64.testing.step_cost import LEFT_OUT, Step, StepCosts, table

DECODE = "a decode step"
#: One request runs at a time, so that one decode graph is captured.
DEFAULTS = ["--max-running-requests", "1", "--max-total-tokens", "2048"]


class Generation:
    """One request on an engine inside wave64.emulate: steps, with the cost of each."""

    def __init__(self, args: ServerArgs, prompt: str, max_tokens: int, costs: StepCosts) -> None:
        self._costs, self._engine = costs, Engine(args)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(args.model_path, args.revision))
        ids = self._tokenizer(prompt).input_ids
        self._engine.add(Request("0", ids, SamplingParams(max_new_tokens=max_tokens, temperature=0)))
        self.token_ids: list[int] = []
        self.prompt_left = len(ids)
        self._said = ""

    @property
    def is_done(self) -> bool:
        return not self._engine.has_work

    def step(self) -> tuple[str, int, Step]:
        """(the text that a step adds, how many tokens of the prompt it computed, its cost). Raises RuntimeError where
        the step fails."""
        before = self._engine.statistics().prompt_tokens
        with self._costs.watching():
            outputs = self._engine.step()
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            self.token_ids += output.token_ids
        text = str(self._tokenizer.decode(self.token_ids)).removesuffix("\ufffd")
        new, self._said = text[len(self._said):], text
        return new, self._engine.statistics().prompt_tokens - before, self._costs.take()


def generate(args: ServerArgs, prompt: str, max_tokens: int) -> None:
    costs = StepCosts(args.device)
    steps: dict[str, Step] = {}
    with wave64.emulate(args.device, meter=costs) as device, named_backends(args):
        generation = Generation(args, prompt, max_tokens, costs)
        print(f"{args.model_path} on {device.name}\n{prompt}", flush=True)
        while not generation.is_done:
            began, before = time.monotonic(), device.counts.instructions
            costs.is_counting = DECODE not in steps
            text, prompt_tokens, step = generation.step()
            what = f"prompt, {prompt_tokens} tokens" if prompt_tokens else DECODE
            print(f"{text!r:24} {what}: {device.counts.instructions - before:,} wave instructions in "
                  f"{time.monotonic() - began:.1f} s"
                  + (f", bound {step.bound_us:.1f} us" if costs.is_counting else ""), flush=True)
            steps.setdefault(what, step)
        total, seconds = device.counts.instructions, device.counts.seconds
    product = costs.arch.product
    decode = steps.get(DECODE, Step())
    print(f"\n{total:,} wave instructions in {seconds:.1f} s. Bounds on {product}, the first step of each kind:\n")
    print(table(steps, product))
    print(f"\nNo step is faster than its launches' bounds one after another; most are slower.\n"
          f"{LEFT_OUT.format(others=decode.others)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64 emulate", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="demo-llama")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--device", choices=EMULATED, default=EMULATED[0])
    parser.add_argument("--max-tokens", type=int, default=8, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--log-level", default="warning", choices=LEVELS,
                        help="lowest level that is logged (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=own.log_level.upper(), format=LINE)
    flags = ["--model-path", own.model_path, "--device", own.device, "--log-level", own.log_level]
    torch.set_num_threads(1)
    try:
        args = ServerArgs.from_cli([*flags, *DEFAULTS, *rest])
        if args.tp_size > 1:
            raise ArgsError(f"--tp-size: expected 1, since this command is one process, got {args.tp_size}; python -m "
                            f"wave64.launch_server --device {own.device} --tp-size {args.tp_size} serves with several")
        generate(args, own.prompt, own.max_tokens)
    except (ArgsError, *SAID_IN_WORDS, RuntimeError) as error:
        parser.exit(1, f"wave64 emulate: error: {' '.join(str(error).split())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
