"""The HIP kernels of MLA decode on shapes that no case of the operators has: sequences in several splits, other dtypes,
pages of any size, several tiles of rows; what they decline; and how much they execute for a key."""

import pytest
import torch

from wave64 import OPS, platform, pools
from wave64.backends.hip_ops import mla_decode as adapter
from wave64.op import Case
from wave64.ops.mla_decode import make_case as make_decode
from wave64.ops.mla_decode_rope import make_case as make_rope
from wave64.testing import contract
from wave64.testing.emulator.run import emulate

HALF = torch.float16
#: of both operators
SHAPES = {
    "in-splits": dict(seq_lens=[270, 0, 5], heads=3, page_size=64),
    "fp16": dict(seq_lens=[205, 3], heads=16, dtype=HALF, page_size=35),
    "fp16-from-fp8": dict(seq_lens=[33], heads=2, dtype=HALF, fp8=True),
    "two-tiles-in-splits": dict(seq_lens=[200, 260], heads=20, page_size=32),
    "64-rows-in-splits": dict(seq_lens=[97, 0, 5], heads=40, page_size=32),
    "64-rows-fp16": dict(seq_lens=[3, 18], heads=33, dtype=HALF, page_size=1),
    "64-rows-from-fp8": dict(seq_lens=[20], heads=64, fp8=True),
    "64-rows-fp16-from-fp8": dict(seq_lens=[18], heads=33, dtype=HALF, fp8=True, page_size=7),
    "128-rows": dict(seq_lens=[1], heads=128),
    "128-rows-fp16": dict(seq_lens=[19, 1], heads=65, dtype=HALF),
    "128-rows-from-fp8": dict(seq_lens=[20], heads=72, fp8=True),
    "128-rows-fp16-from-fp8": dict(seq_lens=[17], heads=65, dtype=HALF, fp8=True),
    "two-tiles-of-128-rows": dict(seq_lens=[17], heads=72, queries=2),
}
ROPE = {
    "new-tokens": dict(seq_lens=[3, 40], heads=5, queries=5, is_neox=True),
    "fp8-neox": dict(seq_lens=[17, 1], heads=4, queries=2, fp8=True, is_neox=True),
    "64-rows-of-new-tokens": dict(seq_lens=[3, 20, 2], heads=9, queries=5, is_neox=True),
}
CASES = [("mla_decode", Case(name, lambda options=options: make_decode(**options)))
         for name, options in SHAPES.items()]
CASES += [("mla_decode_rope", Case(name, lambda options=options: make_rope(**options)))
          for name, options in {**SHAPES, **ROPE}.items()]


def in_a_large_pool(op: str, heads: int, fp8: bool) -> Case:
    """Beyond 2**31 bytes, in FP8 beyond 2**32."""
    make, slots = (make_decode, []) if op == "mla_decode" else (make_rope, ["slot_mapping"])
    size, page_size = (5 if fp8 else 3) * pools.GIB, 16
    return Case(f"pool-of-{heads}-heads{'-fp8' if fp8 else ''}", lambda: pools.spread(
        make([3 * page_size + 3, 2], heads=heads, page_size=page_size, fp8=fp8), ("kv_cache",), size, page_size,
        ["page_table"], slots), sparse=("kv_cache",))


CASES += [(op, in_a_large_pool(op, heads, fp8)) for op in ("mla_decode", "mla_decode_rope")
          for heads, fp8 in ((3, True), (33, True), (65, False))]
#: The kernels of many rows: all on either architecture.
WIDE = tuple(dict.fromkeys(case.id for _, case in CASES if "-rows" in case.id))
#: Whose plan has splits, so that a merge follows.
SPLIT = ("in-splits", "two-tiles-in-splits", "fp16", "64-rows-in-splits")
#: Of kernels that no small case of the operators reaches: on either architecture.
ON_BOTH = ("in-splits", "fp16", "fp16-from-fp8", "64-rows-in-splits", *WIDE)


def executed(arch: str, op: str, case: Case, record_property) -> int:
    """Launches of kernels, of a call that keeps the contract."""
    launches, kernels, instructions = 0, set(), 0

    def call(**args):
        nonlocal launches, instructions
        with emulate(arch) as ran:
            result = OPS[op].backends["hip"].run(**args)
        launches = ran.launches
        kernels.update(ran.kernels)
        instructions += ran.instructions
        return result

    with platform.target(arch):
        assert OPS[op].backends["hip"].supports(**contract.draw(case, "cpu", 0)) is None
        contract.verify(OPS[op], "hip", case, "cpu", run=call)
    record_property("emulated", {"arch": arch, "kernels": sorted(kernels), "instructions": instructions})
    return launches


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.id}") for op, case in CASES])
def test_machine_code_keeps_the_contract(op, case, record_property):
    """Where sequences can have several splits, their merge runs, too."""
    for arch in ("gfx942", "gfx950") if case.id in ON_BOTH else ("gfx942",):
        assert executed(arch, op, case, record_property) == (2 if case.id in SPLIT else 1)


@pytest.mark.parametrize(("options", "words"), [
    (dict(rank=256), "serves latents of 512 + 64, these are 256 + 64"),
    (dict(dtype=torch.float32), "multiplies bf16 and fp16, not torch.float32"),
    (dict(seq_lens=[1] * 64, heads=17), "does not serve 17 to 32 rows (heads of new tokens) per sequence from 64"),
])
def test_what_is_declined(options, words):
    args = make_decode(**dict(seq_lens=[3]) | options)
    with platform.target("gfx942"):
        assert words in (OPS["mla_decode"].backends["hip"].supports(**args) or "")
    with platform.target("gfx1201"):
        assert "CDNA's matrix instructions" in (OPS["mla_decode"].backends["hip"].supports(**args) or "")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_instructions_for_a_key(arch, monkeypatch):
    """Of 16 heads, of all waves of an unsplit sequence, in the steady state: AITER's assembly takes 26.5 on gfx942."""
    monkeypatch.setattr(adapter, "num_splits", lambda *args: 0)
    counts = []
    for keys in (256, 512):
        with platform.target(arch), emulate(arch) as ran:
            OPS["mla_decode"].backends["hip"].run(**make_decode([keys], page_size=64))
        counts.append(ran.instructions)
    assert 12 < (counts[1] - counts[0]) / 256 < 20


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("seqs", "heads", "rounds"), [
    (1, 16, 1), (32, 16, 1), (128, 16, 1), (64, 128, 1), (256, 16, 2)])
def test_splits_come_in_whole_rounds(arch, seqs, heads, rounds):
    """Of long sequences, as long as each other: no round has a few blocks only."""
    with platform.target(arch), emulate(arch):
        planned, units = adapter.planned_splits(seqs, 10**6, heads), platform.compute_units()
    assert 0.8 * rounds * units - seqs < planned < rounds * units
    work = 1000  # groups of a sequence; splits.h cuts them so, one sequence into one split more than planned
    size = -(-seqs * work // planned)
    blocks = planned + 1 if seqs == 1 else seqs * max(1, (work + size // 2) // size)
    assert 0.8 * rounds * units < blocks <= rounds * units
