"""What the tests of several operators share."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

from wave64 import BadArgument, platform
from wave64.op import Op

BACKENDS = ("reference", "triton")
#: With the CPU's own backend, for the operators that have one.
CPU_BACKENDS = BACKENDS if torch.cuda.is_available() else (*BACKENDS, "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
#: Unit roundoff of a dtype, and half the smallest step of what fp16 rounds to.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
HALF_STEP = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}


def examples(count: int) -> settings:
    """So many examples of hypothesis, the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True)


def run(op: Op, backend: str, *args, **kwargs):
    """The operator by that backend. What a GPU's architecture cannot serve is skipped; the interpreter serves all."""
    chosen = op.backends[backend]
    if chosen.supports is not None and (why := chosen.supports(*args, **kwargs)):
        assert platform.arch() is not None, why
        pytest.skip(why)
    return chosen.run(*args, **kwargs)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().cpu().view(torch.uint8)


def on(device: str, args: dict) -> dict:
    """The arguments, with tensors on the device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in args.items()}


@contextmanager
def refused(op: str, argument: str, words: str = ""):
    """The call inside raises BadArgument, whose message names operator and argument ("": any) and has the words."""
    with pytest.raises(BadArgument) as refusal:
        yield
    assert str(refusal.value).startswith(f"{op}: {argument}: " if argument else f"{op}: ")
    assert words in str(refusal.value)
