"""`rotary_embedding_and_cache` against the two operators it is made of: the same bits, by the same backend."""

from typing import Any

import pytest
import torch
from helpers import refused
from helpers_rope import angles, rotated_without_a_slot, same_bits

from wave64 import ops, platform
from wave64.backends import hip
from wave64.testing import contract, lanes
from wave64.testing.emulator.run import emulate

FUSED = ops.rotary_embedding_and_cache
CASES = {case.id: case for case in FUSED.cases() if not (case.large or case.sparse)}
#: Whole packs and single numbers, both styles, a part of a head rotated, FP8.
HIP_CASES = ("heads-torch.bfloat16", "odd-torch.float16", "fp8-partial-interleaved", "many-tokens")
some_hip_cases = pytest.mark.parametrize("case", [CASES[name] for name in HIP_CASES], ids=HIP_CASES)


def separately(backend, positions, query, key, value, cos_sin_cache, key_cache, value_cache, slot_mapping, is_neox=True,
               k_scale=None, v_scale=None):
    ops.rotary_embedding.backends[backend].run(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    ops.reshape_and_cache.backends[backend].run(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_has_the_bits_of_the_two_operators(backend, case, device):
    args = contract.draw(case, device, seed=1)
    supports = FUSED.backends[backend].supports
    if supports is not None and (why := supports(**args)):
        pytest.skip(why)
    fused, other = contract.copy(args), contract.copy(args)
    FUSED.backends[backend].run(**fused)
    separately("reference" if backend == "cpu" else backend, **other)
    same_bits(FUSED, fused, other)


@pytest.mark.skipif("hip" not in FUSED.backends, reason="the extension is not built, or without this operator")
@some_hip_cases
@pytest.mark.parametrize(("run", "arch"), [(lanes.on_cpu, "gfx1201"), (emulate, "gfx942"), (emulate, "gfx950")],
                         ids=["lanes-gfx1201", "gfx942", "gfx950"])
def test_hip_has_the_bits_of_the_two_operators(run, arch, case):
    if run is emulate and arch not in hip.code_objects():
        pytest.skip(f"the package was built without {arch} code objects")
    with platform.target(arch):
        args = contract.draw(case, "cpu", seed=1)
        fused, other = contract.copy(args), contract.copy(args)
        with run(arch):
            FUSED.backends["hip"].run(**fused)
        with run(arch):
            separately("hip", **other)
    same_bits(FUSED, fused, other)


def arguments(tokens=3, pages=4) -> dict[str, Any]:
    caches = torch.zeros(2, pages, 1, 1, 10)
    return dict(positions=torch.arange(1, tokens + 1), query=torch.randn(tokens, 2, 10), key=torch.randn(tokens, 1, 10),
                value=torch.randn(tokens, 1, 10), cos_sin_cache=angles(40, 4),
                key_cache=caches[0], value_cache=caches[1], slot_mapping=torch.arange(tokens))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("pages", [4, 0])
def test_a_token_without_a_slot_is_rotated_and_not_cached(backend, pages, device):
    """Also where the pool has no pages at all."""
    with torch.device(device):
        rotated_without_a_slot(FUSED, backend, arguments(pages=pages), "query", "key")


@pytest.mark.parametrize(("argument", "wrong", "words"), [
    ("positions", torch.zeros(3), "int64 or int32"), ("query", torch.zeros(3, 20), "[num_tokens, num_heads, head_dim]"),
    ("query", torch.zeros(2, 2, 10), "a row per position"), ("key", torch.zeros(3, 1, 8), "head_dim of query"),
    ("key", torch.zeros(3, 1, 10).half(), "that of query"), ("value", torch.zeros(3, 2, 10), "dtype and shape of key"),
    ("value", torch.zeros(3, 1, 10).half(), "dtype and shape of key"),
    ("cos_sin_cache", torch.zeros(40, 12), "at most 10"), ("slot_mapping", torch.zeros(3).int(), "int64"),
    ("slot_mapping", torch.zeros(2).long(), "a slot per position"),
    ("key_cache", torch.zeros(4, 1, 1, 8), "[num_pages, page_size, 1, 10]"),
    ("value_cache", torch.zeros(5, 1, 1, 10), "the pages of key_cache"),
    ("k_scale", torch.ones(1), "None for a torch.float32 cache")])
def test_refuses_by_name(argument, wrong, words):
    with refused("rotary_embedding_and_cache", argument, words):
        FUSED(**arguments() | {argument: wrong})
