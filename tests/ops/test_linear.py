"""`linear` where sums are exact, in machine code, and what the HIP backend leaves to torch's product."""

import pytest
import torch
from helpers import refused

from wave64 import ops, platform
from wave64.backends import hip
from wave64.testing.emulator.run import emulate

HIP = ops.linear.backends.get("hip")


@pytest.mark.skipif(HIP is None, reason="the extension is not built, or without this operator")
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_every_weight_counts_once(arch, tokens):
    """Columns end in the middle of a step, rows in the middle of a block. Token t has a 1 in column `which` alone, so
    that the result is that column of the weight, which no other one is like."""
    if arch not in hip.code_objects():
        pytest.skip(f"the package was built without {arch} code objects")
    rows, columns = 21, 1160
    weight = (torch.arange(rows * columns) % 251 - 125).view(rows, columns).bfloat16()
    which = torch.linspace(0, columns - 1, tokens).long() if tokens > 1 else torch.tensor([columns - 1])
    x = torch.nn.functional.one_hot(which, columns).bfloat16()
    with platform.target(arch), emulate(arch):
        y = HIP.run(x, weight)
        total = HIP.run(torch.ones_like(x), weight)
    assert torch.equal(y, weight[:, which].t())
    assert torch.equal(total, weight.float().sum(1).bfloat16().expand(tokens, rows))


@pytest.mark.skipif(HIP is None, reason="the extension is not built, or without this operator")
def test_hip_serves_a_small_decode_step():
    def why(tokens=1, columns=64, dtype=torch.bfloat16, at=0) -> str:
        x = torch.zeros(tokens, columns + 8, dtype=dtype)[:, at : at + columns]
        return HIP.supports(x, torch.zeros(4, columns, dtype=dtype)) or ""

    with platform.target("gfx942"):
        assert why() == ""
        assert why(32) == ""
        assert "32 tokens at" in why(33)
        assert "float32" in why(dtype=torch.float32)
        assert "16 bytes" in why(columns=60)
        assert "16 bytes" in why(at=1)
    with platform.target("gfx908"):
        assert "no matrix instructions of gfx908" in why()


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("x", torch.zeros(16), "[num_tokens, in_features]"), ("x", torch.zeros(2, 32)[:, ::2], "contiguous last dimension"),
    ("x", torch.zeros(2, 16).int(), "bf16, fp16 or fp32"), ("weight", torch.zeros(4, 8), "a column per column of x"),
    ("weight", torch.zeros(4, 16).half(), "that of x"), ("bias", torch.zeros(3), "a number per row of weight"),
    ("bias", torch.zeros(4).half(), "a number per row of weight")])
def test_refuses_by_name(argument, wrong, words):
    with refused("linear", argument, words):
        ops.linear(**dict(x=torch.zeros(2, 16), weight=torch.zeros(4, 16), bias=torch.zeros(4)) | {argument: wrong})
