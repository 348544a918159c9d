"""HIP's driver path, whole, on a stand-in for libamdhip64.so with HIP's layouts and refusals (tests/standin_hip)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_standin import SOURCES, STANDIN, compile_cpp, link_standin, opened, run_without_packages, runtime, standin

sys.path.insert(0, str(SOURCES))
from scenarios import SCENARIOS  # noqa: E402

ENTRY_POINTS = ("hipInit", "hipGetDeviceCount", "hipGetDevice", "hipModuleLoadData", "hipModuleGetFunction",
                "hipThreadExchangeStreamCaptureMode", "hipModuleLaunchKernel", "hipGetDevicePropertiesR0600",
                "hipGetErrorString", "hipGetLastError")


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_runtime(name):
    done = run_without_packages(SOURCES / "scenarios.py", name, standin(), runtime())
    assert done.returncode == 0, done.stderr


def test_the_properties_have_the_layout_of_hips_header(tmp_path):
    import triton

    headers = Path(triton.__file__).parent / "backends" / "amd" / "include"
    if not (headers / "hip" / "hip_runtime_api.h").exists():
        pytest.skip("this Triton ships no header of HIP's")
    fields = ("sharedMemPerBlock", "regsPerBlock", "warpSize", "multiProcessorCount", "integrated", "pciBusID",
              "gcnArchName", "maxSharedMemoryPerMultiProcessor", "asicRevision")
    checks = [f"static_assert(offsetof(hipDeviceProp_tR0600, {field}) == offsetof(standin::Properties, {field}));"
              for field in fields]
    (tmp_path / "check.cpp").write_text(
        "#include <hip/hip_runtime_api.h>\n#include \"properties.h\"\n" + "\n".join(checks)
        + "\nstatic_assert(sizeof(hipDeviceProp_tR0600) == sizeof(standin::Properties));\n")
    compile_cpp("-fsyntax-only", "-w", "-D__HIP_PLATFORM_AMD__", "-I", headers, "-I", STANDIN, tmp_path / "check.cpp")


@pytest.mark.parametrize("symbol", ENTRY_POINTS)
def test_a_library_that_lacks_an_entry_point_is_refused_by_its_name(symbol, tmp_path):
    library = link_standin(tmp_path / "libamdhip64.so.9", without=(symbol,))
    assert opened(library) == f"{library} lacks {symbol}; ROCm 6.0 or later is needed"


def test_the_first_candidate_that_opens_is_the_runtime(tmp_path):
    broken = tmp_path / "libamdhip64.so"
    broken.write_text("no library")
    assert opened(tmp_path / "absent" / "libamdhip64.so", broken, standin()) == str(standin())
    words = opened(broken)
    assert words.startswith("no libamdhip64.so (ROCm's runtime) can be opened on this machine (")
    assert str(broken) in words


@pytest.fixture(scope="module")
def package() -> dict:
    """What tests/standin_hip/package.py saw: the package on two devices, one without code objects."""
    done = subprocess.run([sys.executable, SOURCES / "package.py", standin()], capture_output=True, text=True,
                          timeout=600, env={**os.environ, "LD_LIBRARY_PATH": str(standin().parent),
                                            "STANDIN_HIP": "gfx942,gfx1036", "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.version.hip is not None or torch.version.cuda is not None, reason="needs torch for CPU")
def test_importing_wave64_opens_no_gpu_runtime_so_that_a_forked_child_can(package):
    assert package["mapped after import"] is False
    assert package["child before any use"] == "None"  # it can serve there
    assert package["mapped after a call and a report"] is False
    assert package["reason for cpu"] == (
        f"serves GPU tensors only, and torch {torch.__version__} is built without GPU support")
    assert package["runtime"] == str(standin())
    assert package["child after use"] == "HIP: counting devices: initialization error"  # the stand-in notices


def test_hip_is_in_use_only_where_the_runtime_takes_its_code_objects(package):
    load = r"HIP: loading the code object of \w+ for gfx942: "
    assert re.fullmatch(load + "no kernel image is available for execution on the device", package["an older runtime"])
    assert re.fullmatch(load + "device kernel image is invalid", package["a bad code object"])
    assert package["serves"] is None
    assert re.fullmatch(r"\w+: no code object for gfx1036: .*\.co cannot be read",
                        package["a current device without code objects"])


def test_a_process_that_computes_on_a_gpu_emulates_none(package):
    assert package["emulate"] == (f"emulate: this process computes on {standin()}, and a process has one runtime: "
                                  "emulate in one that has not called an operator on a GPU")


@pytest.mark.slow
def test_a_device_is_emulated_next_to_the_runtime_that_torch_has_loaded():
    """As with a ROCm torch on a machine without a GPU: its libamdhip64.so is in the process, and stays untouched."""
    code = ("import ctypes, sys\ntorchs = ctypes.CDLL(sys.argv[1])\ntorchs.standin_calls.restype = ctypes.c_char_p\n"
            "import torch, wave64\nx = torch.ones(2, 64)\n"
            "with wave64.emulate('gfx942') as device:\n    y = wave64.ops.rms_norm(x, x[0], 0.0)\n"
            "assert torch.equal(y, x), y\nprint(device.counts.kernels, torchs.standin_calls().decode())")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, standin()], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{('gfx942/rms_norm.co', 'rms_norm_fp32')}"


@pytest.mark.parametrize(("op", "bound"), [("rms_norm", 2**-8), ("paged_attention", 2**-7)])
def test_an_operator_runs_through_the_driver(op, bound, package):
    saw = package[op]
    assert saw["errors"] == []
    assert saw["launches"] >= 1
    assert saw["same"]  # kernel, grid, block, LDS and bytes of arguments are those of the recorded launches
    assert 0 < saw["error"] < bound
