"""Deliberate bugs in Triton kernels, compiled for gfx942 and executed on the emulator: every one is caught, for the
reason that it should be, in a case that the kernel as it stands keeps.

A changed copy of a module takes the module's place in a process of its own, one in which Triton compiles.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from wave64 import OPS, triton_ops
from wave64.testing.emulator import jit
from wave64.testing.emulator.check import check

ARCH = "gfx942"
SOURCES = Path(triton_ops.__file__).parent
FAR = r"ContractError: \w+: result \d: error \S+ against fp64"
OUTSIDE = r"EmulationError: .*buffer_{}_\w+ .* \d+ bytes at 0x\w+, .* bytes into {}"
ELSEWHERE = r"EmulationError: .* (reads|writes) \d+ bytes at 0x\w+, \d+ bytes (before|into) \w+_ptr"
#: what is wrong -> (operator, module, what stands there once or more, what the first of them becomes, how it shows)
BUGS = {
    "store without its mask": (
        "rms_norm", "rms_norm", "y.to(y_ptr.dtype.element_ty), mask=mask)", "y.to(y_ptr.dtype.element_ty))",
        OUTSIDE.format("store", "y_ptr")),
    "stride of a dense row": ("rms_norm", "rms_norm", "x_ptr + row * x_stride", "x_ptr + row * hidden", FAR),
    "largest for sum": ("rms_norm", "rms_norm", "tl.sum(x * x, 0)", "tl.max(x * x, 0)", FAR),
    "half the block": ("fused_add_rms_norm", "fused_add_rms_norm", "BLOCK=block,", "BLOCK=block // 2,", FAR),
    "last step left out": (
        "per_token_quant_fp8", "per_token_quant_fp8", "BELOW)\n        for start in range(0, columns, BLOCK)",
        "BELOW)\n        for start in range(0, columns - BLOCK, BLOCK)", r"AssertionError: \d+ of .* got \[nan"),
    "loop ends one early": (
        "apply_penalties", "apply_penalties", "for start in range(0, width, BLOCK)",
        "for start in range(0, width - 1, BLOCK)", FAR),
    "padding taken for a token": (
        "apply_penalties", "apply_penalties", "mask=offs < width, other=-1)", "mask=offs < width)", FAR),
    "padding taken for an expert": (
        "moe_align_block_size", "moe_align_block_size", "mask=offs < end, other=-1)", "mask=offs < end)",
        OUTSIDE.format("store", "sorted_ptr")),
    "slot 0 skipped": ("reshape_and_cache", "reshape_and_cache", "if slot >= 0:", "if slot > 0:", FAR),
    "wrong stride of heads": (
        "reshape_and_cache", "reshape_and_cache", "offs_h * head_stride", "offs_h * head_dim", FAR),
    "absent side weighed": (
        "merge_attn_states", "merge_attn_states", "tl.where(lse_max == float(\"-inf\"), 0.0, lse_max)", "lse_max",
        "ContractError: .* error inf against fp64"),
    "bits of the next group": (
        "apply_token_bitmask", "apply_token_bitmask", "offs_g // 32", "(offs_g + N) // 32",
        OUTSIDE.format("load", "bitmask_ptr")),
    "ties to the higher index": (
        "topk_softmax", "topk", "tl.min(tl.where(key == best, ids, MAX_INT), 0)",
        "tl.max(tl.where(key == best, ids, -1), 0)", r"ContractError: .* \d+ of \d+ integers differ"),
    "one round too few": ("topk_softmax", "topk", "for j in range(TOP_K):", "for j in range(TOP_K - 1):", FAR),
    "gate read twice": ("silu_and_mul", "gated", "x_ptr + d + offs", "x_ptr + offs", FAR),
    "last key counted twice": ("paged_attention", "paged_attention", "(offs_n < end)", "(offs_n <= end)", FAR),
    "earlier keys not rescaled": ("paged_attention", "paged_attention", "acc * rescale[:, None])", "acc)", FAR),
    "columns beyond the last": (
        "fp8_scaled_mm", "fp8_mm", "mask=offs_k < K - first", "mask=offs_k <= K - first",
        OUTSIDE.format("load", "[ab]_ptr")),
    "slots of 32 bits": (
        "reshape_and_cache", "reshape_and_cache", "slot * (heads * head_dim)",
        "(slot * (heads * head_dim)).to(tl.int32)", ELSEWHERE),
    "pages of 32 bits": (
        "paged_attention", "attention", "return any(sum(", "return False and any(sum(", ELSEWHERE),
}
#: Of those that show beyond 2 GiB only, the case.
CASES = {"slots of 32 bits": "pool-5gib-page-16-fp8", "pages of 32 bits": "pool-5gib-page-16-fp8"}


@contextmanager
def _in_place(op: str, module: str, source: str, folder: Path) -> Iterator[None]:
    """Inside, the operator's Triton backend is made of `source` in place of the module's."""
    registered, loaded = OPS[op].backends["triton"], {}
    folder.mkdir(exist_ok=True)
    changed = folder / f"{module}.py"  # Triton reads a function's source from the file that defines it
    changed.write_text(source)
    try:
        for each in dict.fromkeys((module, op)):
            name = f"{triton_ops.__name__}.{each}"
            loaded[name] = sys.modules[name]
            spec = importlib.util.spec_from_file_location(name, changed if each == module else SOURCES / f"{op}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        assert OPS[op].backends["triton"] is not registered
        yield
    finally:
        sys.modules.update(loaded)
        OPS[op].backends["triton"] = registered


def first_failure(op: str, module: str, stands: str, becomes: str, folder: Path, part: str) -> tuple[str, str]:
    """What the changed kernel breaks first, and what the unchanged one, by the same way, breaks in that case."""
    text = (SOURCES / f"{module}.py").read_text()
    assert stands in text
    for case in (case for case in OPS[op].cases() if not case.large and part in case.id):
        with _in_place(op, module, text.replace(stands, becomes, 1), folder / "changed"):
            wrong = check(OPS[op], "triton", ARCH, [case]).failures
        if wrong:
            with _in_place(op, module, text, folder / "unchanged"):
                right = check(OPS[op], "triton", ARCH, [case]).failures
            return wrong[case.id], right.get(case.id, "")
    return "", ""


def with_half_the_lds(op: str, case: str) -> tuple[str, str]:
    """What a launch with half of its dynamic LDS brings in a case, and what the right one."""
    execute, found = jit.execute, []
    chosen = [one for one in OPS[op].cases() if one.id == case]
    for divisor in (2, 1):
        jit.execute = lambda launch, *rest, divisor=divisor: execute(
            replace(launch, lds_bytes=launch.lds_bytes // divisor), *rest)
        try:
            found.append(check(OPS[op], "triton", ARCH, chosen).failures.get(case, ""))
        finally:
            jit.execute = execute
    return found[0], found[1]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, compiling, tmp_path):
    *what, shows = BUGS[bug]
    wrong, right = compiling.submit(first_failure, *what, tmp_path, CASES.get(bug, "")).result()
    assert right == ""
    assert re.match(shows, wrong, re.DOTALL), wrong


def test_too_little_lds_is_caught(compiling):
    wrong, right = compiling.submit(with_half_the_lds, "rms_norm", "1x4096-torch.bfloat16").result()
    assert right == ""
    assert re.match(r"EmulationError: .*: LDS bytes \d+ to \d+, of \d+ allocated", wrong), wrong
