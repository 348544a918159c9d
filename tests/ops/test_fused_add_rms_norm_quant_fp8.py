"""`fused_add_rms_norm_quant_fp8` against the operators it is made of: the same bits, by the same backend."""

import pytest
import torch
from helpers import refused

from wave64 import ops, platform
from wave64.backends import hip
from wave64.ops.fused_add_rms_norm_quant_fp8 import PER_TOKEN
from wave64.testing import contract, lanes
from wave64.testing.emulator.run import emulate

FUSED = ops.fused_add_rms_norm_quant_fp8
CASES = {case.id: case for case in FUSED.cases() if not case.large}
#: Groups of a part of a wave and whole rows, with a residual and without.
HIP_CASES = ("3x384-torch.bfloat16-group128", "3x384-torch.float16-group-1-alone", "2x7168-group128", "zeros")


def separately(backend, x, residual, weight, eps, group_size, scale_ue8m0=False):
    """What the operator returns and leaves in `residual`, by three others."""
    def run(op, *args):
        return op.backends[backend].run(*args)

    if residual is None:
        x = run(ops.rms_norm, x, weight, eps)
    else:
        x = x.clone()
        run(ops.fused_add_rms_norm, x, residual, weight, eps)
    if group_size == PER_TOKEN:
        return run(ops.per_token_quant_fp8, x)
    return run(ops.per_token_group_quant_fp8, x, group_size, scale_ue8m0)


def assert_same_bits(got, args, expected, its_args):
    for one, other in zip((*got, args["residual"]), (*expected, its_args["residual"]), strict=True):
        assert one is other is None or contract.same_bits(one, other)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.id != "ue8m0-group-1"], ids=lambda case: case.id)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_has_the_bits_of_the_operators_it_is_made_of(backend, case, device):
    args = contract.draw(case, device, seed=1)
    other = contract.copy(args)
    got = FUSED.backends[backend].run(**args)
    assert_same_bits(got, args, separately(backend, **other), other)


@pytest.mark.skipif("hip" not in FUSED.backends, reason="the extension is not built, or without this operator")
@pytest.mark.parametrize("case", HIP_CASES)
@pytest.mark.parametrize(("run", "arch"), [(lanes.on_cpu, "gfx1201"), (emulate, "gfx942"), (emulate, "gfx950")],
                         ids=["lanes-gfx1201", "gfx942", "gfx950"])
def test_so_has_hip(run, arch, case):
    if run is emulate and arch not in hip.code_objects():
        pytest.skip(f"the package was built without {arch} code objects")
    with platform.target(arch):
        args = contract.draw(CASES[case], "cpu", seed=1)
        other = contract.copy(args)
        with run(arch):
            got = FUSED.backends["hip"].run(**args)
        normed = other["x"].clone()
        with run(arch):  # a launch is made when its block ends
            if other["residual"] is None:
                normed = ops.rms_norm.backends["hip"].run(normed, other["weight"], other["eps"])
            else:
                ops.fused_add_rms_norm.backends["hip"].run(normed, other["residual"], other["weight"], other["eps"])
        with run(arch):
            if other["group_size"] == PER_TOKEN:
                expected = ops.per_token_quant_fp8.backends["hip"].run(normed)
            else:
                expected = ops.per_token_group_quant_fp8.backends["hip"].run(normed, other["group_size"])
    assert_same_bits(got, args, expected, other)


@pytest.mark.skipif("hip" not in FUSED.backends, reason="the extension is not built, or without this operator")
def test_what_hip_declines():
    def why(columns=256, tokens=2, dtype=torch.bfloat16, padded=0, at=0, ue8m0=False, group_size=128) -> str:
        x = torch.empty(tokens, columns + padded + at, dtype=dtype)[:, at : at + columns]
        weight = torch.empty(columns, dtype=dtype)
        return FUSED.backends["hip"].supports(x, x.clone(), weight, 1e-6, group_size, ue8m0) or ""

    with platform.target("gfx942"):
        assert why() == why(tokens=1, padded=1) == why(16384) == ""
        assert "powers of two" in why(ue8m0=True)
        assert "more than 32768 bytes" in why(16384 + 128)
        assert "more than 32768 bytes" in why(8192 + 128, dtype=torch.float32)
        assert "16 bytes" in why(97, group_size=PER_TOKEN)
        assert "16 bytes" in why(padded=1)
        assert "16 bytes" in why(at=1)
    with platform.target("gfx90a"):
        assert why() == "gfx90a has no FP8 conversion"


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("x", torch.zeros(4), "[num_tokens, hidden]"), ("x", torch.zeros(2, 64).int(), "bf16, fp16 or fp32"),
    ("residual", torch.zeros(3, 64), "as x"), ("residual", torch.zeros(2, 64).half(), "as x"),
    ("weight", torch.zeros(32), "one value per column"), ("group_size", 48, "a divisor of 64"),
    ("group_size", 128, "a divisor of 64"), ("group_size", 0, "-1 for one scale a token")])
def test_refuses_by_name(argument, wrong, words):
    with refused("fused_add_rms_norm_quant_fp8", argument, words):
        FUSED(**dict(x=torch.zeros(2, 64), residual=torch.zeros(2, 64), weight=torch.zeros(64), eps=1e-6,
                     group_size=32) | {argument: wrong})
