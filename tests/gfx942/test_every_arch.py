"""Triton compiles for every row of the capability table, with the row's wave size and matrix instructions; and tuned
launch configurations fit its LDS: what does not fit is refused at the first request."""

import re

import pytest

from wave64 import OPS
from wave64.arch import ARCHS, Arch, lookup
from wave64.testing import tune

MATRIX = {"mfma": r"\bv_mfma_", "wmma": r"\bv_wmma_", "wgmma": r"\bwgmma\."}


def assembly(op: str, arch: str) -> str:
    """Of the first kernel that the operator's first large case launches."""
    from wave64.testing.compile import compile_case

    asm = compile_case(OPS[op], next(case for case in OPS[op].cases() if case.large), arch)[0].kernel.asm
    return asm.get("amdgcn") or asm["ptx"]


def lds_bytes(ops: list[str], arch: str) -> dict[str, int]:
    """By operator, case and kernel, of the first large case of each."""
    from wave64.testing.compile import compile_case

    cases = {op: next(case for case in OPS[op].cases() if case.large) for op in ops}
    return {f"{op} {case.id} {launch.kernel.name}": launch.kernel.metadata.shared
            for op, case in cases.items() for launch in compile_case(OPS[op], case, arch)}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_a_kernel_compiles_for_every_row(arch: Arch, compiling):
    asm = compiling.submit(assembly, "rms_norm", arch.name).result()
    if arch.vendor == "amd":
        assert re.findall(r"^\t\.amdgcn_target .*-(\w+)\"$", asm, re.MULTILINE) == [arch.name]
        assert re.findall(r"^ +\.wavefront_size: +(\d+)$", asm, re.MULTILINE) == [str(arch.wave_size)]
    else:
        assert re.findall(r"^\.target (\w+)", asm, re.MULTILINE) == [f"{arch.name}a"]


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_products_are_the_matrix_cores(arch: Arch, compiling):
    """In FP8 where the table says that they take it."""
    asm = compiling.submit(assembly, "fp8_scaled_mm" if arch.fp8 else "prefill_attention", arch.name).result()
    found = {kind for kind, name in MATRIX.items() if re.search(name, asm)}
    assert found == {arch.matrix}


@pytest.mark.parametrize("arch", ["gfx1100", *(pytest.param(name, marks=pytest.mark.long) for name in (
    "gfx90a", "gfx1151", "gfx1200", "gfx1201", "gfx1250"))])  # of the same tables
def test_the_first_large_case_of_each_tuned_operator_fits(arch, compiling):
    names = [name for name in tune.tunable() if lookup(arch).fp8 or "fp8" not in name]
    found = compiling.submit(lds_bytes, names, arch).result()
    assert {name.split()[0] for name in found} == set(names) <= set(OPS)
    limit = lookup(arch).lds_bytes
    assert not {name: used for name, used in found.items() if used > limit}
