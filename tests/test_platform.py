"""The capability table, held to what clang knows of each architecture; what has no row, or no code objects, is said."""

import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from wave64 import OPS, backends, platform
from wave64.arch import ARCHS, HIP_TARGETS, known, lookup, warning

AMD = [name for name, arch in ARCHS.items() if arch.vendor == "amd"]
SOURCE = """
__constant int has_mfma = __has_builtin(__builtin_amdgcn_mfma_f32_16x16x16f16);
__constant int has_wmma = __has_builtin(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32);
__constant int has_fp8 = __has_builtin(__builtin_amdgcn_cvt_f32_fp8);
__kernel void k(__global int *p, int i) {
    __local char x[LDS];
    x[i] = has_mfma + has_wmma + has_fp8;
    __builtin_amdgcn_s_barrier();
    p[i] = x[i + 1];
}
"""


def compiled(arch: str, lds_bytes: int) -> str:
    """Assembly of SOURCE, or the compiler's words."""
    pytest.importorskip("ziglang")
    done = subprocess.run([sys.executable, "-m", "ziglang", "clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}",
                           "-nogpulib", "-O0", f"-DLDS={lds_bytes}", "-S", "-o", "-", "-x", "cl", "-cl-std=CL2.0",
                           "-cl-no-stdinc", "-"], input=SOURCE, capture_output=True, text=True)
    return done.stdout + done.stderr


def constant(assembly: str, name: str) -> int:
    found = re.search(rf"^{name}:\n\s+\.long\s+(\d+)", assembly, re.MULTILINE)
    assert found, assembly[-2000:]
    return int(found[1])


@pytest.mark.parametrize("name", AMD)
def test_a_row_is_what_the_compiler_knows(name):
    arch = ARCHS[name]
    assembly = compiled(name, arch.lds_bytes)
    assert f".wavefront_size: {arch.wave_size}\n" in assembly
    assert (arch.matrix == "mfma", arch.matrix == "wmma", arch.fp8 is not None) == tuple(
        bool(constant(assembly, f"has_{what}")) for what in ("mfma", "wmma", "fp8"))
    assert f"local memory ({arch.lds_bytes + 1}) exceeds limit ({arch.lds_bytes})" in compiled(name, arch.lds_bytes + 1)


def test_the_table_has_the_cards_that_are_served():
    assert {"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1200", "gfx1201", "gfx1250"} == set(AMD)
    assert set(HIP_TARGETS) == set(AMD) - {"gfx1151", "gfx1200"}
    assert [name for name in AMD if ARCHS[name].fp8 == "e4m3fnuz"] == ["gfx942"]
    for arch in ARCHS.values():
        assert arch.fp8 is None or arch.matrix is not None
        assert (arch.fp8 is None) <= (arch.fp8_tflops == 0)


@pytest.mark.parametrize(("name", "wave_size"), [("gfx908", 64), ("gfx906:sramecc+:xnack-", 64), ("gfx1036", 32),
                                                 ("gfx1300", 32), ("sm_120", 32)])
def test_an_architecture_without_a_row_is_served_by_portable_kernels(name, wave_size, monkeypatch):
    arch = lookup(name)
    assert not known(arch)
    assert (arch.wave_size, arch.matrix, arch.fp8, arch.compute_units) == (wave_size, None, None, 0)
    assert f"{name.split(':')[0]} is not in wave64's table" in (warning(arch) or "")
    with platform.target(name):
        for op in OPS.values():
            assert backends.order(op, "cpu", {})  # none that cannot be bound


@pytest.mark.parametrize(("name", "words"), [
    ("gfx942:sramecc+:xnack-", None), ("gfx1100", None), ("gfx1151", "the wheel has no code objects"),
    ("gfx1200", "the wheel has no code objects"), ("gfx1010", "not in wave64's table")])
def test_a_card_that_is_served_otherwise_is_said_once(name, words, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(platform, "is_hip", lambda: True)
    platform._device_arch.cache_clear()
    with caplog.at_level(logging.WARNING, "wave64"):
        assert platform._device_arch(3) is platform._device_arch(3)
    platform._device_arch.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (words is not None)
    assert all(line.startswith("GPU 3: ") and words in line for line in said)
