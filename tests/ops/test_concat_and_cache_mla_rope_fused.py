"""`concat_and_cache_mla_rope_fused` against the two operators it is made of: the same bits, by the same backend."""

from typing import Any

import pytest
import torch
from helpers import refused
from helpers_rope import angles, rotated_without_a_slot, same_bits

from wave64 import ops, platform
from wave64.arch import lookup
from wave64.backends import hip
from wave64.quant import FP8
from wave64.testing import contract, lanes
from wave64.testing.emulator.run import emulate

FUSED = ops.concat_and_cache_mla_rope_fused
#: Sources with waves of 64 and of 32, and FP8 of both flavors; machine code, since only there products are fused.
HIP = [pytest.param(run, arch, id=f"{name}-{arch}") for name, run, archs in [
    ("lanes", lanes.on_cpu, ("gfx942", "gfx1201")), ("machine-code", emulate, ("gfx942", "gfx950"))] for arch in archs]
small = pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in FUSED.cases() if not (c.large or c.sparse)])


def separately(backend, positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, kv_cache, scale=None):
    ops.rotary_embedding.backends[backend].run(positions.contiguous(), q_pe, k_pe, q_pe.shape[2], cos_sin_cache,
                                               is_neox)
    ops.concat_and_cache_mla.backends[backend].run(kv_c, k_pe, kv_cache, slot_mapping, scale)


@small
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_has_the_bits_of_the_two_operators(backend, case, device):
    args = contract.draw(case, device, seed=1)
    supports = FUSED.backends[backend].supports
    if supports is not None and (why := supports(**args)):
        pytest.skip(why)
    fused, other = contract.copy(args), contract.copy(args)
    FUSED.backends[backend].run(**fused)
    separately(backend, **other)
    same_bits(FUSED, fused, other)


@pytest.mark.skipif("hip" not in FUSED.backends, reason="the extension is not built, or without this operator")
@small
@pytest.mark.parametrize(("run", "arch"), HIP)
def test_hip_has_the_bits_of_the_two_operators(run, arch, case):
    if run is emulate and arch not in hip.code_objects():
        pytest.skip(f"the package was built without {arch} code objects")
    with platform.target(arch):
        args = contract.draw(case, "cpu", seed=1)
        if why := FUSED.backends["hip"].supports(**args):
            pytest.skip(why)
        fused, other = contract.copy(args), contract.copy(args)
        other["positions"] = other["positions"].contiguous()  # here: a launch is made when its block ends
        with run(arch):
            FUSED.backends["hip"].run(**fused)
        with run(arch):
            separately("hip", **other)
    same_bits(FUSED, fused, other)


def arguments(tokens=3, heads=2, rank=16, rope=8, pages=4) -> dict[str, Any]:
    return dict(positions=torch.arange(1, tokens + 1), q_pe=torch.randn(tokens, heads, rope),
                k_pe=torch.randn(tokens, rope), kv_c=torch.randn(tokens, rank),
                cos_sin_cache=angles(40, rope // 2), is_neox=True,
                slot_mapping=torch.arange(tokens), kv_cache=torch.zeros(pages, 1, rank + rope))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("pages", [4, 0])
def test_a_token_without_a_slot_is_rotated_and_not_cached(backend, pages, device):
    """Also where the pool has no pages at all."""
    with torch.device(device):
        rotated_without_a_slot(FUSED, backend, arguments(pages=pages), "q_pe", "k_pe")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_beyond_two_to_the_31(backend, device):
    """Offsets in bytes need more than 32 bits. Memory that is never touched costs nothing on a CPU."""
    stride = 2**31 // 48 * 16 + 16
    args = arguments(4, 1, 512, 64)
    far = torch.empty(3 * stride + 576, dtype=torch.bfloat16, device=device).as_strided((4, 576), (stride, 1))
    far.copy_(torch.randn(4, 576))
    near = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    near |= dict(q_pe=near["q_pe"].bfloat16(), kv_cache=near["kv_cache"].bfloat16())
    fused = contract.copy(near | dict(kv_c=far[:, :512].contiguous(), k_pe=far[:, 512:].contiguous()))
    FUSED.backends[backend].run(**near | dict(kv_c=far[:, :512], k_pe=far[:, 512:]))
    FUSED.backends[backend].run(**fused)
    assert torch.equal(near["kv_cache"], fused["kv_cache"])
    assert torch.equal(far[:, 512:], fused["k_pe"])


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("positions", torch.zeros(3), "int64 or int32"), ("positions", torch.zeros(1, 3).long(), "int64 or int32"),
    ("q_pe", torch.zeros(3, 16), "[num_tokens, num_heads, rope_dim]"),
    ("q_pe", torch.zeros(2, 2, 8), "a row per position"),
    ("q_pe", torch.zeros(3, 2, 16)[..., ::2], "last dimension contiguous"),
    ("k_pe", torch.zeros(3, 6), "rope_dim of q_pe"), ("k_pe", torch.zeros(8), "rope_dim of q_pe"),
    ("k_pe", torch.zeros(2, 8), "a row per position"), ("k_pe", torch.zeros(3, 2, 8), "[3, 1, rope_dim]"),
    ("k_pe", torch.zeros(3, 8).half(), "that of q_pe"), ("kv_c", torch.zeros(2, 16), "a row per slot"),
    ("kv_c", torch.zeros(3, 32)[:, ::2], "last dimension contiguous"),
    ("q_pe", torch.zeros(3, 2, 8, device="meta"), "where positions is"),
    ("cos_sin_cache", torch.zeros(40, 6), "rope_dim of q_pe"), ("cos_sin_cache", torch.zeros(40, 10), "at most 8"),
    ("slot_mapping", torch.zeros(2).long(), "a slot per position"), ("slot_mapping", torch.zeros(3).int(), "int64"),
    ("kv_cache", torch.zeros(4, 1, 25), "[num_pages, page_size, 24]"),
    ("scale", torch.ones(1), "None for a torch.float32 cache")])
def test_refuses_by_name(argument, wrong, words):
    with refused("concat_and_cache_mla_rope_fused", argument, words):
        FUSED(**arguments() | {argument: wrong})


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_kernel_serves_the_fp8_of_its_architecture(arch):
    with platform.target(arch):
        for flavor, fp8 in FP8.items():
            args = arguments()
            args |= dict(kv_cache=args["kv_cache"].to(fp8))
            assert (FUSED.backends["triton"].supports(**args) is None) == (flavor == lookup(arch).fp8)
