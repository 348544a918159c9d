"""Adapters to AITER down to its machine code: adapter, AITER's own Python, the argument that its C++ packs, the wheel's
code object on the emulator, and the result held to fp64. And the wheel's signatures, as an adapter compares them."""

import sys

import pytest
import torch
from helpers_aiter import imported, lacking, native

from wave64 import OPS, backends, platform, quant
from wave64.backends import aiter
from wave64.ops.fp8_block_scaled_mm import make_case as product
from wave64.ops.fused_moe import make_case as mixture
from wave64.ops.mla_decode import make_case as latents
from wave64.ops.mla_decode_rope import make_case as latents_and_rope

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

EXPERTS = dict(experts=3, hidden=256, inter=256)
BLOCKS = dict(scales="block", block_shape=[128, 128])


@pytest.fixture(scope="module")
def wheel():
    with imported() as package:
        yield package


@pytest.fixture
def package(wheel, monkeypatch):
    monkeypatch.setattr(aiter, "package", lambda: wheel)
    native().launched.clear()
    return wheel


def wide(args: dict) -> dict:
    return {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype not in
            quant.FP8.values() else x for name, x in args.items()}


def of(x) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize(("op", "make", "arch", "launched"), [
    pytest.param("mla_decode", lambda: latents([70, 0, 3], heads=16), "gfx942", "mla/mla_dec_stage1_bf16_a16w16_subQ16",
                 id="mla_decode"),
    pytest.param("mla_decode", lambda: latents([130, 66], heads=20, queries=2, page_size=64), "gfx942", "mla/mla_dec_",
                 id="mla_decode-20-heads-2-tokens"),
    pytest.param("mla_decode_rope", lambda: latents_and_rope([40, 3], heads=5), "gfx942", "mla/mla_dec_",
                 id="mla_decode_rope"),
    pytest.param("fused_moe", lambda: mixture(5, **EXPERTS, **BLOCKS, dropped=0.3), "gfx942",
                 "fmoe/silu/fmoe_bf16_blockscaleFp8_g1u1", id="fused_moe-block"),
    pytest.param("fused_moe", lambda: mixture(40, **EXPERTS, scales="channel", routed=6, dropped=0.3), "gfx942",
                 "fmoe/silu/fmoe_bf16_pertokenFp8_g1u1_vs_silu", id="fused_moe-channel"),
    pytest.param("fused_moe", lambda: mixture(6, **EXPERTS, top_k=1, scales="channel", dropped=0.2,
                                              apply_router_weight_on_input=True), "gfx942",
                 "fmoe/silu/fmoe_bf16_pertokenFp8_g1u1_vs_tkw1", id="asm_moe_tkw1"),
    pytest.param("fp8_block_scaled_mm", lambda: product(5, 256, 512), "gfx950", "f8_block_scale_mi350_x32",
                 id="fp8_block_scaled_mm"),
    pytest.param("fp8_block_scaled_mm", lambda: product(40, 512, 640), "gfx950", "f8_block_scale_mi350_x128",
                 id="fp8_block_scaled_mm-40"),
])
def test_machine_code_of_the_wheel_gives_the_contracts_result(op, make, arch, launched, package, monkeypatch):
    chips = sys.modules["aiter.jit.utils.chip_info"]
    monkeypatch.setattr(chips, "get_gfx", lambda: arch)
    with platform.target(arch):
        torch.manual_seed(0)
        args = make()
        exact, own = (of(OPS[op].reference(**{name: x.clone() if isinstance(x, torch.Tensor) else x
                                             for name, x in each.items()})) for each in (wide(args), args))
        backend = OPS[op].backends["aiter"]
        assert backend.supports(**args) is None
        got = of(backend.run(**args))
    for mine, reference, result in zip(got, own, exact, strict=True):
        result, mine, reference = result.double(), mine.double(), reference.double()
        assert torch.equal(mine.isinf(), result.isinf())
        finite = ~result.isinf()
        off, allowed = ((x - result)[finite].abs().max() for x in (mine, reference))
        # As exact as the reference in the operator's dtype; AITER sums bf16 parts of a mixture's result by atomics.
        assert off <= 1.5 * allowed + 2e-3 * result[finite].abs().max()
    assert native().launched
    assert all(name.startswith(f"{arch}/{launched}") for name in native().launched)


def test_signatures_of_the_wheel_are_those_that_adapters_give(package):
    reasons = {op.name: op.backends["aiter"].absent(None) for op in OPS.values() if "aiter" in op.backends}
    assert len(reasons) >= 10
    assert not any(reasons.values()), reasons


def test_a_signature_of_the_wheel_that_is_another_is_a_reason(package):
    """AITER wraps its functions in one that takes anything: their parameters are those of torch's operators."""
    given = ["out", "input", "scales"]
    assert aiter.differs(package, "dynamic_per_token_scaled_quant", given) is None
    assert aiter.differs(package, "dynamic_per_token_scaled_quant", [*given, "columns"]) == (
        "this aiter's dynamic_per_token_scaled_quant takes no columns")
    assert aiter.differs(package, "dynamic_per_token_scaled_quant", given[:2]) == (
        "this aiter's dynamic_per_token_scaled_quant takes scales besides")
    assert backends.reason(OPS["rms_norm"], "aiter", "cpu") == "AITER's kernels want a GPU"
