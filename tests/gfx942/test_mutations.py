"""Deliberate bugs in HIP kernels, compiled for gfx942 and executed on the emulator: every one is caught, by the
contract or by what the emulator checks besides it, in a case that the source as it stands keeps."""

import functools
import re
import shutil
from pathlib import Path

import pytest

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.op import Case, Op
from wave64.testing import built, contract
from wave64.testing.emulator import EmulationError, code_object, emulate, run
from wave64.testing.emulator.machine import Program

HIP = Path(__file__).parents[2] / "hip"
ARCH = "gfx942"
FAR = r"ContractError: \w+: result \d: error \S+ against fp64"
RACE = r"EmulationError: .* of LDS, which wave \d+ .*, with no barrier between"
UNWRITTEN = r"EmulationError: .* comes from a register that was never written"
OUTSIDE = r"EmulationError: .* (reads|writes) \d+ bytes at 0x\w+, \d+ bytes (into|before) "

#: what is wrong -> (operator, file under hip/, what stands there once or more, what the first of them becomes, how it
#: shows)
BUGS = {
    "weights dropped": ("rms_norm", "include/wave64/rms.h", "    y *= weight.numbers();\n", "", FAR),
    "barrier missing in a sum over waves": ("rms_norm", "include/wave64/device.h", "    block_barrier();\n", "", RACE),
    "waves share one place in LDS": (
        "rms_norm", "include/wave64/device.h", "lds[lane_in_block() / wave_size()] = x", "lds[0] = x", RACE),
    "LDS of waves that are not there": (
        "rms_norm", "include/wave64/device.h", "lane < num_waves ? lds[lane] : 0", "lds[lane]", UNWRITTEN),
    "lanes swapped in a sum": ("rms_norm", "include/wave64/amd.h", "0x4E", "0xB1", FAR),
    "sum not written back": (
        "fused_add_rms_norm", "ops/fused_add_rms_norm.hip", "        residual.store(i, rounded);\n", "", FAR),
    "gate read twice": ("silu_and_mul", "include/wave64/gated.h", "(x + args.d)", "(x)", FAR),
    "rows beyond the last": (
        "silu_and_mul", "include/wave64/gated.h",
        "            if (i > 0 && token + i * rows.step >= args.num_tokens) break;\n            gate",
        "            gate", OUTSIDE),
    "activation without its input": (
        "silu_and_mul", "include/wave64/gated.h", "silu(Floats2 x) { return x * logistic(x)",
        "silu(Floats2 x) { return logistic(x)", FAR),
    "rotation the other way": (
        "rotary_embedding", "include/wave64/rope.h", "fma(-b,", "fma(b,", FAR),
    "pairs of the other style": (
        "rotary_embedding", "include/wave64/rope.h", "is_neox ? pack * N : 2 * pack * N",
        "is_neox ? 2 * pack * N : pack * N", "ContractError: .* changed outside its view"),
    "skipped slots written": (
        "reshape_and_cache", "include/wave64/cache_write.h", "if (slot[i] >= 0) store_pack", "store_pack", OUTSIDE),
    "wrong stride of heads": (
        "reshape_and_cache", "include/wave64/cache_write.h", "head * part.head_stride", "head * part.head", FAR),
    "half of a row's packs looked at for amax": (
        "per_token_quant_fp8", "include/wave64/device.h", "amax = max_magnitude(amax, at[i], at[i + (N > 1)])",
        "amax = max_magnitude(amax, at[i], at[i])", "AssertionError: Tensor-likes are not close"),
    "a row of another token in a run of lanes": (
        "topk_softmax", "ops/topk_softmax.hip", "row * stride + lane", "lane", FAR),
    "runs of lanes beyond the last token": (
        "topk_softmax", "ops/topk_softmax.hip", "lane < args.top_k && row < rows", "lane < args.top_k", OUTSIDE),
    "both sides weighed alike": ("merge_attn_states", "ops/merge_attn_states.hip", "weights.b", "weights.a", FAR),
    "absent side counted": (
        "merge_attn_states", "ops/merge_attn_states.hip", "lse_max == absent() ? 0 : lse_max", "lse_max", FAR),
    "ties to the higher index": (
        "topk_softmax", "include/wave64/topk.h", "lowest = key[i] == best ? ~(first + i * step)",
        "lowest = key[i] == best ? (first + i * step)", FAR),
    "groups tied to the higher index": (
        "grouped_topk", "ops/grouped_topk.hip", "&& other < group", "&& other > group",
        "AssertionError: .* expected experts"),
    "no minimum of amax": (
        "per_token_group_quant_fp8", "include/wave64/quant.h", "bits > least ? bits : least", "bits",
        "AssertionError: Tensor-likes are not close"),
    "other FP8's largest number": (
        "per_token_quant_fp8", "include/wave64/fp8.h", "kFp8Max = 240", "kFp8Max = 224",
        "AssertionError: Tensor-likes are not close"),
    "a lane's amax for its group's": (
        "fused_add_rms_norm_quant_fp8", "ops/fused_add_rms_norm_quant_fp8.hip", "run_max(amax, 1 << args.group_bits)",
        "run_max(amax, 1)", "AssertionError: Tensor-likes are not close"),
    "the gate's amax for the product's": (
        "silu_and_mul_per_token_group_quant_fp8", "ops/silu_and_mul_per_token_group_quant_fp8.hip",
        "y.amax()", "gate.numbers().amax()",
        "AssertionError: Tensor-likes are not close"),
    "barrier missing in the sort": (
        "moe_align_block_size", "ops/moe_align_block_size.hip", "    block_barrier();\n", "", RACE),
    "slots out of range read": (
        "transfer_kv", "ops/transfer_kv.hip", "uint64_t(from[i]) < uint64_t(args.num_src_slots) && ", "", OUTSIDE),
    "counts cleared while they are read": (
        "sample", "ops/sample.hip", "block_barrier();  // the last round", "//", RACE),
    "barrier missing in a search": ("sample", "include/wave64/search.h", "        block_barrier();\n", "", RACE),
    "table cleared while it is read": (
        "apply_penalties", "ops/apply_penalties.hip", "        block_barrier();\n", "", RACE),
    "keys beyond the length": (
        "paged_attention", "ops/paged_attention.hip", "length < args.capacity ? length : args.capacity",
        "length < args.capacity ? length + 1 : args.capacity", FAR),
    "half of each wide head": (
        "paged_attention", "include/wave64/attention_cdna.h", "j < kKeyPacks; j++) {\n                const auto x",
        "j < kKeyPacks / (D / 64); j++) {\n                const auto x", FAR),
    "values past the keys": (
        "paged_attention", "include/wave64/attention_cdna.h", "row > last ? last : row", "row", FAR),
    "window ignored": (
        "paged_attention", "ops/paged_attention.hip", "args.window > 0 && end > args.window", "false", OUTSIDE),
    "slots of 32 bits": (
        "reshape_and_cache", "include/wave64/cache_write.h", "to + slot[i] * part.slot_stride",
        "to + int(slot[i] * part.slot_stride)", OUTSIDE),
    "waves' sums read before they are there": (
        "fp8_block_scaled_mm", "ops/fp8_block_scaled_mm.hip", "    block_barrier();\n    for (int i = wave",
        "    for (int i = wave", RACE),
    "columns behind the last": (
        "fp8_block_scaled_mm", "include/wave64/fp8_matrix.h", "16 * chunk < left ? at : kNowhere", "at", FAR),
    "scales of the first group": (
        "fp8_block_scaled_mm", "ops/fp8_block_scaled_mm.hip", "int(group * token_step)", "0", FAR),
    "chunks read where they are not": (
        "fp8_block_scaled_mm", "include/wave64/fp8_tile.h", "part_of_lane() ^ line % 8", "part_of_lane()", FAR),
    "tokens of the next step over this one's": (
        "fp8_block_scaled_mm", "include/wave64/fp8_tile.h", "if (kTileBuffers == 1) block_barrier();", "", RACE),
    "the first step's scales for the next": (
        "fp8_block_scaled_mm", "include/wave64/fp8_tile.h", "= lds.scales[scaled];", "= lds.scales[0];", FAR),
    "weights of a product's first rows in both halves": (
        "fused_moe", "include/wave64/fp8_matrix.h", "load_chunk(further + apart,", "load_chunk(further,", FAR),
    "gate and up summed before they are there": (
        "fused_moe", "ops/fused_moe.hip", "    block_barrier();\n", "", RACE),
    "amax of half a group": (
        "fused_moe", "ops/fused_moe.hip", "max(amax, from_other_half<32>(amax))", "amax", FAR),
    "up's scales for gate": (
        "fused_moe", "ops/fused_moe.hip", "load_scale(up_scales, step)", "load_scale(gate_scales, step)", FAR),
    "waves' amax read before it is there": (
        "fused_moe", "ops/fused_moe.hip", "    }\n    block_barrier();\n", "    }\n", RACE),
    "pairs of a block's first half in both": (
        "fused_moe", "include/wave64/fp8_tile.h", "rows * i % 64 + Tile::row(0)", "Tile::row(0)", FAR),
    "the last pairs' products skipped": (
        "fused_moe", "include/wave64/fp8_tile.h", "16 * i >= live", "16 * i + 16 >= live", FAR),
    "rows of weights behind the last": (
        "fused_moe", "ops/fused_moe.hip", "any ? kTileDownColumns / kTileWaves : 0", "kTileDownColumns / kTileWaves",
        OUTSIDE),
    "latents transposed to the next column": (
        "mla_decode", "include/wave64/latents.h", "n == lane.line ? 1", "n == (lane.line ^ 1) ? 1", FAR),
    "waves' sums joined before they are there": (
        "mla_decode", "include/wave64/latents.h", "            }\n            block_barrier();\n", "            }\n",
        RACE),
    "queries that see each other's keys": (
        "mla_decode", "include/wave64/latents.h", "keys - args.new_tokens + 1 + state.token", "keys", FAR),
    "new latents not rotated": (
        "mla_decode_rope", "include/wave64/latents.h", ": rotated_columns<T>(args, pe, index, column - kRank)",
        ": load_pack<T, 8>(pe + column - kRank)", FAR),
    "new tokens that see later ones": (
        "mla_decode_rope", "include/wave64/latents.h", "key <= state.token && ", "", FAR),
    "weights of many heads read before they are there": (
        "mla_decode", "include/wave64/wide_latents.h", "raised;\n        block_barrier();\n", "raised;\n", RACE),
    "columns of all waves the first's": (
        "mla_decode_rope", "include/wave64/wide_latents.h", "return kColumns * wave + ", "return ", FAR),
    "latents of all tiles and columns at one place": (
        "mla_decode_rope", "include/wave64/latents.h", "+ State::kPack * part;", ";", FAR),
    "keys stored over those still read": (
        "prefill_attention", "include/wave64/prefill.h",
        "            if (active) state.accumulate(lds_values, weights);\n            block_barrier();\n",
        "            if (active) state.accumulate(lds_values, weights);\n", RACE),
    "keys before the window": (
        "prefill_attention", "include/wave64/prefill.h", "if (key < first || key >= end)", "if (key >= end)", FAR),
    "rows of keys in their own order": (
        "varlen_attention", "include/wave64/prefill.h", "(key & 4) * 2 + (key & 8) / 2", "(key & 12)", FAR),
    "weights of half the keys in a row's sum": (
        "varlen_attention", "include/wave64/prefill.h", "    row_sum += from_lane(row_sum, state.lane ^ 32);\n", "",
        FAR),
    "keys behind the last": (
        "varlen_attention", "include/wave64/prefill.h", "count < kWaveKeys ? count : kWaveKeys", "kWaveKeys", OUTSIDE),
    "an older maximum's values": (
        "varlen_attention", "include/wave64/prefill.h",
        "            for (Floats16& tile : acc) tile *= shrink;\n", "", FAR),
    "pages of 32 bits": (
        "paged_attention", "include/wave64/attention.h", "page * page_bytes", "int(page * page_bytes)", OUTSIDE),
}
#: Others of the same kernels stay in every tier.
LONG = ("counts cleared while they are read", "waves' sums read before they are there",
        "a lane's amax for its group's", "the gate's amax for the product's", "columns behind the last",
        "scales of the first group", "tokens of the next step over this one's", "amax of half a group",
        "up's scales for gate", "pairs of a block's first half in both", "the last pairs' products skipped",
        "rows of weights behind the last", "queries that see each other's keys", "new latents not rotated",
        "latents of all tiles and columns at one place", "waves' sums joined before they are there",
        "weights of many heads read before they are there", "columns of all waves the first's",
        "new tokens that see later ones", "rows of keys in their own order", "keys behind the last",
        "weights of half the keys in a row's sum", "keys before the window", "an older maximum's values")
#: Of those that show beyond 2 GiB only, the cases.
CASES = dict.fromkeys(("slots of 32 bits", "pages of 32 bits"), "pool-5gib")


@functools.cache
def as_shipped(op: str) -> Program:
    """Of the package's code object: to compile the source as it stands takes as long as to compile a bug."""
    return Program(code_object.load(hip.code_object(ARCH, op)))


def complaint(op: Op, program: Program, case: Case) -> str:
    """What running the case brings; "" where it keeps the contract."""
    def call(**args):
        with emulate(ARCH):
            return op.backends["hip"].run(**args)

    whole, own = run._program, hip.code_object(ARCH, op.name)  # other operators' kernels take part as they are
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_program", lambda code: program if code == own else whole(code))
        try:
            contract.verify(op, "hip", case, "cpu", run=call)
        except (AssertionError, EmulationError) as e:
            return f"{type(e).__name__}: {e}"
    return ""


@pytest.mark.parametrize("bug", [
    pytest.param(bug, marks=pytest.mark.long) if bug in LONG else bug for bug in BUGS])
def test_a_bug_is_caught(bug, tmp_path):
    name, file, stands, becomes, shows = BUGS[bug]
    sources, op = tmp_path / "hip", OPS[name]
    shutil.copytree(HIP, sources)
    text = (sources / file).read_text()
    assert stands in text
    (sources / file).write_text(text.replace(stands, becomes, 1))
    wrong = Program(code_object.load(built.code_object(sources, name, ARCH).read_bytes()))
    why, supports = "", op.backends["hip"].supports
    with platform.target(ARCH):
        for case in (case for case in op.cases() if not case.large and CASES.get(bug, "") in case.id):
            declined = supports is not None and supports(**contract.draw(case, "cpu", 0))
            if not declined and (why := complaint(op, wrong, case)):
                break
        assert re.match(shows, why, re.DOTALL), why
        assert complaint(op, as_shipped(name), case) == ""
