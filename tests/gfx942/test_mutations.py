"""Deliberate bugs in HIP kernels, compiled for gfx942 and executed on the emulator: every one is caught, by the
contract or by what the emulator checks beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator import code_object, emulate, run
from wave64.testing.emulator.machine import Program

HIP = Path(__file__).parents[2] / "hip"
ARCH = "gfx942"

#: what is wrong -> (operator, file under hip/, what stands there once or more, what the first of them becomes)
BUGS = {
    "weights dropped": ("rms_norm", "include/wave64/rms.h", " * scale * float(weights.at[i])", " * scale"),
    "barrier missing in a sum over waves": ("rms_norm", "include/wave64/device.h", "    block_barrier();\n", ""),
    "waves share one place in LDS": ("rms_norm", "include/wave64/device.h", "lds[lane_in_block() / wave_size()] = x",
                                     "lds[0] = x"),
    "LDS of waves that are not there": ("rms_norm", "include/wave64/device.h", "lane < num_waves ? lds[lane] : 0",
                                        "lds[lane]"),
    "lanes swapped in a sum": ("rms_norm", "include/wave64/amd.h", "0x4E", "0xB1"),
    "sum not written back": ("fused_add_rms_norm", "ops/fused_add_rms_norm.hip",
                             "        residual.store(i, rounded);\n",
                             ""),
    "gate read twice": ("silu_and_mul", "include/wave64/gated.h", " + args.d);\n        }", ");\n        }"),
    "rows beyond the last": ("silu_and_mul", "include/wave64/gated.h",
                             "            if (token >= args.num_tokens) break;\n            gate", "            gate"),
    "activation without its input": ("silu_and_mul", "ops/silu_and_mul.hip", "return x * logistic(x)",
                                     "return logistic(x)"),
    "rotation the other way": ("rotary_embedding", "include/wave64/rope.h", "a * angles.cos[i] - b",
                               "a * angles.cos[i] + b"),
    "pairs of the other style": ("rotary_embedding", "include/wave64/rope.h", "is_neox ? pack * N : 2 * pack * N",
                                 "is_neox ? 2 * pack * N : pack * N"),
    "skipped slots written": ("reshape_and_cache", "include/wave64/cache_write.h", "if (slot[i] >= 0) store_pack",
                              "store_pack"),
    "wrong stride of heads": ("reshape_and_cache", "include/wave64/cache_write.h", "head * part.head_stride",
                              "head * part.head"),
    "both sides weighed alike": ("merge_attn_states", "ops/merge_attn_states.hip", "weights.b", "weights.a"),
    "absent side counted": ("merge_attn_states", "ops/merge_attn_states.hip", "peak == absent() ? 0 : peak", "peak"),
    "ties to the higher index": ("topk_softmax", "include/wave64/topk.h",
                                 "lowest = key[i] == best ? ~(first + i * step)",
                                 "lowest = key[i] == best ? (first + i * step)"),
    "groups tied to the higher index": ("grouped_topk", "ops/grouped_topk.hip", "&& other < group", "&& other > group"),
    "no least amax": ("per_token_group_quant_fp8", "include/wave64/quant.h", "    amax = max(amax, kLeastAmax);\n", ""),
    "other FP8's largest number": ("per_token_quant_fp8", "include/wave64/fp8.h", "kFp8Max = 240", "kFp8Max = 224"),
    "barrier missing in the sort": ("moe_align_block_size", "ops/moe_align_block_size.hip",
                                    "    block_barrier();\n", ""),
    "slots out of range read": ("transfer_kv", "ops/transfer_kv.hip",
                                "uint64_t(from[i]) < uint64_t(args.num_src_slots) && ",
                                ""),
    "counts cleared while they are read": ("sample", "ops/sample.hip", "block_barrier();  // the last round", "//"),
    "barrier missing in a search": ("sample", "include/wave64/search.h", "        block_barrier();\n", ""),
    "table cleared while it is read": ("apply_penalties", "ops/apply_penalties.hip", "        block_barrier();\n", ""),
    "keys beyond the length": ("paged_attention", "ops/paged_attention.hip", "length < args.room ? length : args.room",
                               "length < args.room ? length + 1 : args.room"),
    "window ignored": ("paged_attention", "ops/paged_attention.hip", "args.window > 0 && end > args.window", "false"),
}


def compiled(sources: Path, op: str, folder: Path) -> bytes:
    """As cmake/code_objects.cmake does it."""
    ziglang = [sys.executable, "-m", "ziglang"]
    bitcode, unlinked, linked = folder / "k.bc", folder / "k.o", folder / "k.co"
    for command in (["clang", "-x", "hip", f"--offload-arch={ARCH}", "--cuda-device-only", "--no-gpu-bundle-output",
                     "-nogpulib", "-nogpuinc", "-fuse-cuid=none", "-O3", "-std=c++17", f"-I{sources / 'include'}", "-c",
                     "-emit-llvm", "-o", bitcode, sources / "ops" / f"{op}.hip"],
                    ["clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={ARCH}", "-nogpulib", "-O3", "-c", "-o", unlinked,
                     bitcode],
                    ["ld.lld", "-shared", "-o", linked, unlinked]):
        subprocess.run([*ziglang, *command], check=True, capture_output=True, text=True)
    return linked.read_bytes()


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, tmp_path, monkeypatch):
    name, file, stands, becomes = BUGS[bug]
    sources = tmp_path / "hip"
    shutil.copytree(HIP, sources)
    text = (sources / file).read_text()
    assert stands in text
    (sources / file).write_text(text.replace(stands, becomes, 1))
    program = Program(code_object.load(compiled(sources, name, tmp_path)))
    monkeypatch.setattr(run, "_program", lambda code: program)
    op, caught = OPS[name], []

    def call(**args):
        with emulate(ARCH):
            return op.backends["hip"].run(**args)

    with platform.target(ARCH):
        for case in (case for case in op.cases() if not case.large):
            supports = op.backends["hip"].supports
            if supports is None or supports(**contract.draw(case, "cpu", 0)) is None:
                try:
                    contract.verify(op, "hip", case, "cpu", run=call)
                except (AssertionError, RuntimeError) as e:
                    caught.append(f"{case.id}: {e}")
                    break
    assert caught
