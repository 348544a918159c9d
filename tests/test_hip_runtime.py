"""The native runtime without a GPU: launches are recorded, planned by the real host code, and read byte by byte."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from wave64 import OPS
from wave64.arch import ARCHS, HIP_TARGETS
from wave64.backends import hip

_hip = hip._hip
DEVICE = _hip.Device("gfx942", 304, 64, 65536)


def run(x, weight, eps=1e-6):
    return OPS["rms_norm"].backends["hip"].run(x, weight, eps)


def record(arch, x, weight, eps=1e-6):
    with hip.record(arch) as launches:
        out = run(x, weight, eps)
    return out, launches


def test_the_extension_imports_without_torch():
    code = ("import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('_hip', {_hip.__file__!r})\n"
            "m = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(m)\n"
            "print(sorted(m.fields()), 'torch' in sys.modules)\n")
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    ops = sorted(path.stem for path in (Path(__file__).parents[1] / "hip" / "ops").glob("*.hip"))
    assert found.stdout.strip() == f"{ops} False"


def test_a_recorded_launch_holds_the_arguments():
    storage = torch.zeros(6, 3 * 256, dtype=torch.bfloat16)
    x, weight = storage[:, 256:512], torch.zeros(256, dtype=torch.bfloat16)
    out, (launch,) = record("gfx942", x, weight, eps=2.0**-20)
    assert (launch.op, launch.kernel) == ("rms_norm", "rms_norm_bf16")
    assert launch.code_object.endswith("code_objects/gfx942/rms_norm.co")
    assert hip.arguments(launch) == {
        "x": x.data_ptr(), "weight": weight.data_ptr(), "out": out.data_ptr(), "x_stride": 768, "out_stride": 256,
        "num_tokens": 6, "hidden": 256, "eps": 2.0**-20, "dtype": 0}
    # What the launcher adds lies behind the caller's fields: lanes and blocks, which the kernel reads from here.
    assert len(launch.args) == 72
    assert int.from_bytes(launch.args[60:64], "little") == launch.block[0]
    assert int.from_bytes(launch.args[64:68], "little") == launch.grid[0]


@pytest.mark.parametrize("arch", HIP_TARGETS)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 97), (1, 4096), (7, 8192), (400, 8192), (20000, 64)])
def test_launches_fit_the_architecture(arch, tokens, hidden):
    row = ARCHS[arch]
    _, (launch,) = record(arch, torch.empty(tokens, hidden), torch.empty(hidden))
    assert launch.grid == (min(tokens, 32 * (row.compute_units or 1)), 1, 1)
    assert launch.block[1:] == (1, 1)
    lanes = launch.block[0]
    assert lanes % row.wave_size == 0
    assert row.wave_size <= lanes <= 1024
    packs = hidden // 4 if hidden % 4 == 0 else hidden
    needed = -(-packs // 4)  # four packs of a row each, no wave without work
    assert lanes == min(-(-needed // row.wave_size) * row.wave_size, 1024)


@pytest.mark.parametrize(("dtype", "name", "elements"), [
    (torch.bfloat16, "bf16", 8), (torch.float16, "fp16", 8), (torch.float32, "fp32", 4)])
def test_16_byte_accesses_only_where_everything_is_aligned(dtype, name, elements):
    def kernel(x, weight):
        return record("gfx942", x, weight)[1][0].kernel

    hidden = 8 * elements
    x, weight = torch.empty(4, 2 * hidden, dtype=dtype), torch.empty(2 * hidden, dtype=dtype)
    assert kernel(x[:, :hidden], weight[:hidden]) == f"rms_norm_{name}"
    assert kernel(x[:, elements : elements + hidden], weight[:hidden]) == f"rms_norm_{name}"
    unaligned = f"rms_norm_{name}_unaligned"
    assert kernel(x[:, 1 : 1 + hidden], weight[:hidden]) == unaligned
    assert kernel(x[:, :hidden], weight[1 : 1 + hidden]) == unaligned
    assert kernel(x[:, : hidden - 1], weight[: hidden - 1]) == unaligned
    odd_rows = torch.empty(4, hidden + 1, dtype=dtype)
    assert kernel(odd_rows[:, :hidden], weight[:hidden]) == unaligned


@pytest.mark.parametrize("shape", [(0, 128), (5, 0)])
def test_nothing_to_do_launches_nothing(shape):
    out, launches = record("gfx942", torch.empty(shape), torch.empty(shape[1]))
    assert out.shape == shape
    assert launches == []


GOOD = {"x": 16, "weight": 16, "out": 16, "x_stride": 64, "out_stride": 64, "num_tokens": 5, "hidden": 64, "eps": 1e-6,
        "dtype": 0, "stream": 0}


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"dtype": 3}, ValueError, r"rms_norm: dtype: expected 0 \(bf16\), 1 \(fp16\) or 2 \(fp32\), got 3"),
    ({"num_tokens": -1}, ValueError, "rms_norm: num_tokens: expected at least 0, got -1"),
    ({"hidden": -7}, ValueError, r"rms_norm: hidden: expected 0 to 2\^28, got -7"),
    ({"weight": 0}, ValueError, "rms_norm: weight: expected an address, got 0"),
    ({"hidden": 2**31}, TypeError, "rms_norm: hidden: expected a 32-bit integer, got 2147483648"),
    ({"x": -1}, TypeError, "rms_norm: x: expected an address, got -1"),
    ({"eps": "small"}, TypeError, "rms_norm: eps: expected a number, got 'small'"),
    ({"stream": None}, TypeError, "rms_norm: stream: expected an address, got None"),
])
def test_bad_arguments_are_refused_in_words(change, error, words):
    with pytest.raises(error, match=words):
        _hip.rms_norm(*{**GOOD, **change}.values())


def test_a_wrong_number_of_arguments_names_them():
    with pytest.raises(TypeError, match=r"rms_norm\(x, weight, .*, stream\): expected 10 arguments, got 2"):
        _hip.rms_norm(1, 2)


def test_recordings_do_not_nest_and_belong_to_a_thread():
    elsewhere = []
    with hip.record("gfx942"):
        with pytest.raises(ValueError, match="already records"):
            _hip.record_begin(DEVICE)
        assert _hip.recording()
        thread = threading.Thread(target=lambda: elsewhere.append(_hip.recording()))
        thread.start()
        thread.join()
    assert elsewhere == [False]
    assert not _hip.recording()


def test_a_recording_ends_when_its_block_fails():
    with pytest.raises(ZeroDivisionError), hip.record("gfx942"):
        raise ZeroDivisionError
    assert not _hip.recording()


def test_cpu_tensors_are_never_launched_on():
    with pytest.raises(ValueError, match="expected GPU tensors outside of record"):
        run(torch.empty(2, 64), torch.empty(64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_is_told():
    with pytest.raises(_hip.Unavailable) as refused:
        _hip.rms_norm(*GOOD.values())
    assert hip.reason("cuda") == str(refused.value)
    assert "libamdhip64.so" in str(refused.value) or "GPU" in str(refused.value)
