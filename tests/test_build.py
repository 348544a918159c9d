"""What the build makes: an extension without GPU libraries, and per operator and architecture a code object whose bytes
do not depend on where or when it was compiled."""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ninja
import pybind11
import pytest
from once import once

from wave64.__main__ import main
from wave64.arch import ARCHS, HIP_TARGETS
from wave64.backends import hip
from wave64.testing import isa
from wave64.tools.doctor.software import build_notes

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "hip" / "ops").glob("*.hip"))
EM_AMDGPU = 224
CODE_OBJECT_V5 = 3  # ELFABIVERSION_AMDGPU_HSA_V5; ROCm before 6.3 does not load version 6
MACHINES = {"gfx90a": 0x3F, "gfx942": 0x4C, "gfx950": 0x4F, "gfx1100": 0x41, "gfx1201": 0x4E,
            "gfx1250": 0x49}  # EF_AMDGPU_MACH


def configure(source: Path, build: Path, *settings: str, targets: Sequence[str] = ("code_objects",),
              env: dict | None = None) -> None:
    subprocess.run([sys.executable, "-m", "cmake", "-S", source, "-B", build, "-G", "Ninja",
                    f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja", f"-DPython_EXECUTABLE={sys.executable}",
                    f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *settings],
                   check=True, capture_output=True, env={**os.environ, **(env or {})})
    subprocess.run([sys.executable, "-m", "cmake", "--build", build, "--target", *targets], check=True,
                   capture_output=True)


#: Code objects of at most as many bytes, a collective's among them, are compiled again in the suite; the larger ones
#: take most of the time.
QUICKLY_COMPILED = 48 * 1024


def compiled_again() -> list:
    """(operator, architecture): the suite has, of operators that compile quickly, one of the two architectures, and
    both of what test_rms_norm_moves... reads."""
    def marks(op: str, arch: str, i: int) -> list:
        is_quick = op in hip.code_objects().get(arch, ()) and len(hip.code_object(arch, op)) <= QUICKLY_COMPILED
        return [] if op == "rms_norm" or is_quick and i % 2 == (arch == "gfx950") else [pytest.mark.long]

    return [pytest.param(op, arch, marks=marks(op, arch, i)) for i, op in enumerate(OPS)
            for arch in ("gfx942", "gfx950")]


@pytest.fixture(scope="module")
def elsewhere(request, tmp_path_factory) -> Path:
    """The code objects that `compiled_again` names, made from a copy of the sources at another place."""
    everything = request.config.getoption("tier") == "long"
    targets = [f"code_objects/{each.values[1]}/{each.values[0]}.co" for each in compiled_again()
               if everything or not each.marks]

    def compile_again() -> Path:
        folder = tmp_path_factory.mktemp("elsewhere")
        source = folder / "sources"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "__pycache__", "code_objects", "*.so", "tests", "serve", "triton_ops"))
        configure(source, folder / "build", "-DWAVE64_ARCHS=gfx942;gfx950", targets=targets)
        return folder / "build" / "code_objects"

    return once(request, tmp_path_factory, "elsewhere", compile_again)


@pytest.mark.parametrize("library", [hip._hip.__file__, hip.standin()], ids=["extension", "standin"])
def test_what_is_built_links_no_gpu_library_and_no_torch(library):
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked
    assert not re.search(r"torch|c10|hip|hsa|cuda|rocm", linked.replace(library, ""))


@pytest.mark.parametrize("arch", HIP_TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_a_code_object_of_its_architecture(op, arch):
    header = hip.code_object(arch, op)[:64]
    assert header[:4] == b"\x7fELF"
    machine, = struct.unpack_from("<H", header, 18)
    flags, = struct.unpack_from("<I", header, 48)
    assert machine == EM_AMDGPU
    assert header[8] == CODE_OBJECT_V5
    assert flags & 0xFF == MACHINES[arch]


def test_the_report_lists_what_was_built():
    assert {arch: ops for arch, ops in hip.code_objects().items() if arch.startswith("gfx")} == dict.fromkeys(
        sorted(HIP_TARGETS), OPS)


@pytest.mark.parametrize(("op", "arch"), compiled_again())
def test_compiling_again_elsewhere_gives_the_same_bytes(elsewhere, op, arch):
    assert (elsewhere / arch / f"{op}.co").read_bytes() == hip.code_object(arch, op)


def test_the_hashes_are_of_the_files(capsys):
    assert main(["--hashes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{hashlib.sha256(hip.code_object('gfx942', 'rms_norm')).hexdigest()}  gfx942/rms_norm.co" in lines
    assert len([line for line in lines if "  gfx" in line]) == len(OPS) * len(HIP_TARGETS)


#: Written for CDNA's matrix instructions.
MATRIX = ("mla_decode", "mla_decode_rope", "prefill_attention", "varlen_attention")
#: Written for the FP8 instructions of gfx942 and gfx950: other code objects have nothing of them.
CDNA_ALONE = ("fp8_block_scaled_mm", "fused_moe", "fused_all_reduce_rms_norm_quant_fp8")


@pytest.mark.parametrize("arch", HIP_TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills(op, arch):
    if op.endswith("quant_fp8") and ARCHS[arch].fp8 is None:
        pytest.skip(f"{arch} has no FP8, so nothing of {op}")
    kernels = isa.read_elf(hip.code_object(arch, op))
    if op in CDNA_ALONE and arch not in ("gfx942", "gfx950") or op in MATRIX and ARCHS[arch].matrix != "mfma":
        assert kernels == []
        return
    assert kernels
    assert [k.name for k in kernels if k.spills or k.scratch_bytes] == []


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_rms_norm_moves_16_bytes_per_lane_and_reads_x_once(elsewhere, arch):
    found = subprocess.run([sys.executable, "-m", "ziglang", "clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}",
                            "-nogpulib", "-O3", "-S", "-o", "-", elsewhere / arch / "rms_norm.bc"],
                           check=True, capture_output=True, text=True)
    for dtype in ("bf16", "fp16", "fp32"):
        code = found.stdout.split(f"\nrms_norm_{dtype}:", 1)[1].split("s_endpgm", 1)[0]
        loads, stores = (re.findall(rf"\b(?:buffer|global|flat|scratch)_{way}_\w+", code) for way in ("load", "store"))
        # Held: 4 packs of the weights, 4 of the row. Longer rows: one loop that sums, one that scales by the weights.
        assert set(loads) == {"buffer_load_dwordx4"}
        assert len(loads) == 4 + 4 + 1 + 2
        assert set(stores) == {"buffer_store_dwordx4"}
        assert len(stores) == 4 + 1


def test_without_a_device_compiler_the_build_succeeds_and_says_why(tmp_path):
    shadow = tmp_path / "ziglang"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise ImportError('not here')\n")
    build = tmp_path / "build"
    nowhere = dict.fromkeys(("HIP_CLANG_PATH", "HIP_PATH", "ROCM_PATH"), str(tmp_path / "nowhere"))
    configure(ROOT, build, f"-DWAVE64_ROCM_ROOT={tmp_path}", "-DWAVE64_ARCHS=gfx942",
              env={"PYTHONPATH": str(tmp_path), **nowhere})
    assert list(build.glob("code_objects/*/*.co")) == []
    assert (build / "code_objects" / "missing.txt").read_text() == (
        "gfx942: no ROCm clang and no ziglang package when wave64 was built\n")
    assert (build / "code_objects" / "compilers.txt").read_text() == ""


def test_the_report_says_what_compiled_for_every_architecture():
    rows = dict(line.split(": ", 1) for line in hip.compilers().splitlines())
    assert list(rows) == list(HIP_TARGETS)
    assert all("clang version" in words for words in rows.values())
    assert build_notes()[: len(rows)] == [f"{arch}: {words}" for arch, words in rows.items()]
