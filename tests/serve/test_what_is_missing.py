"""`--device gfx942` where a package is not installed that it needs: one line at the start, which says how to get it."""

import os
import re
import subprocess
import sys

import pytest
import torch

#: Hides packages from every import and from importlib.metadata, as where they are not installed; then starts engines.
START = """
import importlib.machinery
import sys

hidden, found = "", importlib.machinery.PathFinder

class Finder(found):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == hidden else found.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return [each for each in found.find_distributions(*context) if each.metadata["Name"] != hidden]

sys.meta_path[sys.meta_path.index(found)] = Finder

import logging
from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.rank import refuse, surroundings
from wave64.serve.messages import Request, SamplingParams

logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
for case in sys.argv[1:]:
    hidden, model = case.split(" in ")
    args = ServerArgs.from_cli(["--model-path", model, "--device", "gfx942", "--max-running-requests", "1",
                                "--max-total-tokens", "64"])
    for start in refuse, Engine:
        try:
            with surroundings(args):
                started = start(args)
                if start is Engine:
                    started.add(Request("0", [1], SamplingParams(max_new_tokens=2, ignore_eos=True)))
                    print(model, "says", sum(len(each.token_ids) for _ in range(2) for each in started.step()))
        except ValueError as error:
            print(model, start.__name__, "refused:", error)
"""
EXPERTS = ("--device: gfx942 computes the experts of this model by Triton's kernels, and triton is not installed; pip "
           "install triton")
DECODER = ("emulate: the package tinygrad, whose tables decode machine code, is not installed; pip install "
           "'wave64[emulator]'")
SLOW = ("the emulator executes with NumPy alone, which takes many times as long: no package ziglang, which compiles "
        "the core; pip install 'wave64[emulator]'")


def start(*cases: str) -> list[str]:
    """Each case is "PACKAGE in MODEL". What is said of refusals, of tokens, and by the emulator."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", START, *cases], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^.* (?:refused:|says|NumPy alone).*$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="next to a GPU wave64 imports Triton, which is hidden too late")
def test_the_emulated_device_is_refused_without_what_a_model_needs():
    """Before other ranks are started, and before weights are loaded."""
    assert start("tinygrad in demo-llama", "triton in demo-deepseek") == [
        f"demo-llama refuse refused: {DECODER}", f"demo-llama Engine refused: {DECODER}",
        f"demo-deepseek refuse refused: {EXPERTS}", f"demo-deepseek Engine refused: {EXPERTS}"]


@pytest.mark.long
@pytest.mark.parametrize(("hidden", "said"), [("triton", []), ("ziglang", [SLOW])])
def test_a_dense_model_is_served_without_what_it_does_not_need(hidden, said):
    assert start(f"{hidden} in demo-llama") == [*said, "demo-llama says 2"]
