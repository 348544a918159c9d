"""The native runtime without a GPU: launches are recorded, planned by the real host code, and read byte by byte."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from wave64 import OPS, platform
from wave64.arch import ARCHS, HIP_TARGETS, lookup
from wave64.backends import hip
from wave64.testing import contract

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


X, OTHER = torch.zeros(5, 64), torch.zeros(5, 64)
GOOD = {"x": X, "weight": torch.zeros(64), "out": OTHER, "x_stride": 64, "out_stride": 64, "num_tokens": 5,
        "hidden": 64, "eps": 1e-6, "dtype": torch.float32}


def launched(**fields):
    """The launches of rms_norm with these fields."""
    with hip.record("gfx942") as launches:
        hip.launch("rms_norm", **fields)
    return launches


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"dtype": torch.float8_e4m3fn}, ValueError, "rms_norm: dtype: expected bf16, fp16 or fp32, got fp8$"),
    ({"num_tokens": -1}, ValueError, "rms_norm: num_tokens: expected at least 0, got -1$"),
    ({"hidden": -7}, ValueError, r"rms_norm: hidden: expected 0 to 2\^28, got -7$"),
    ({"weight": None}, ValueError, "rms_norm: weight: expected a tensor, got None$"),
    ({"hidden": 2**31}, TypeError, "rms_norm: hidden: expected a 32-bit integer, got 2147483648$"),
    ({"hidden": torch.tensor(64)}, TypeError, "rms_norm: hidden: expected a 32-bit integer, got a tensor$"),
    ({"x_stride": 2**63}, TypeError, "rms_norm: x_stride: expected a 64-bit integer, got 9223372036854775808$"),
    ({"x": 16}, TypeError, "rms_norm: x: expected a tensor or None, got 16$"),
    ({"eps": "small"}, TypeError, "rms_norm: eps: expected a number, got 'small'$"),
    ({"eps": torch.tensor(1.0)}, TypeError, "rms_norm: eps: expected a number, got a tensor$"),
    ({"dtype": 0}, TypeError, "rms_norm: dtype: expected one of torch.bfloat16, .*, got 0$"),
    ({"dtype": torch.int32}, TypeError, "rms_norm: dtype: expected one of torch.bfloat16, .*, got torch.int32$"),
])
def test_bad_arguments_are_refused_in_words(change, error, words):
    with pytest.raises(error, match=words):
        launched(**{**GOOD, **change})


def test_fields_go_by_name_in_any_order():
    (first,), (other,) = launched(**GOOD), launched(**dict(reversed(GOOD.items())))
    assert first.args == other.args
    assert launched(**GOOD)[0].args == first.args  # the names of the last call in another order again
    with hip.record("gfx942") as launches:
        for x, eps in ((X, 0.5), (OTHER, 0.25)):  # the same names twice, and other values
            hip.launch("rms_norm", x=x, weight=X, out=X, x_stride=1, out_stride=2, num_tokens=3, hidden=64, eps=eps,
                       dtype=torch.bfloat16)
    assert [(hip.arguments(launch)["x"], hip.arguments(launch)["eps"]) for launch in launches] == [
        (X.data_ptr(), 0.5), (OTHER.data_ptr(), 0.25)]


def test_fields_that_are_unknown_missing_or_doubled_are_named():
    with pytest.raises(TypeError, match="rms_norm: there is no field weights; its fields are x, weight, out, x_stride"):
        launched(**GOOD, weights=X)
    with pytest.raises(TypeError, match="rms_norm: the field eps is missing$"):
        launched(**{name: value for name, value in GOOD.items() if name != "eps"})
    with pytest.raises(TypeError, match="rms_norm: the field x is missing$"):
        launched()
    with pytest.raises(TypeError, match="multiple values for keyword argument 'x'"):
        hip.launch("rms_norm", x=X, **GOOD)
    with pytest.raises(TypeError, match="launch: there is no operator 'rms'$"):
        hip.launch("rms", **GOOD)
    with pytest.raises(TypeError, match=r"launch\(op, tensor=None, /, \*\*fields\)"):
        hip.launch("rms_norm", X, X, X)
    with pytest.raises(TypeError, match="rms_norm: expected a tensor of the device to run on, got 7$"):
        hip.launch("rms_norm", 7, **GOOD)


def test_a_recorded_launch_keeps_the_tensors_that_it_may_touch():
    launch, = launched(**GOOD)
    assert list(launch.tensors) == ["x", "weight", "out"]
    assert all(launch.tensors[name] is GOOD[name] for name in launch.tensors)
    q, scale = torch.zeros(5, 64), torch.zeros(1)
    with hip.record("gfx942") as launches:
        OPS["reshape_and_cache"].backends["hip"].run(q[:, None], q[:, None], q[:, None], q[:, None],
                                                     torch.arange(5), None, scale)
    assert [name for name in launches[0].tensors if name.endswith("scale")] == ["v_scale"]


@pytest.fixture
def other_devices():
    """Stands for torch with two GPUs: CPU tensors lie on GPU 1, GPU 0 is current. Gives the calls that were made."""
    calls, current = [], [0]

    def exchange(index):
        calls.append(f"exchange {index}")
        current[0], before = index, current[0]
        return before

    hip.connect(get_device=lambda tensor: 1, current_device=lambda: current[0], exchange_device=exchange,
                current_stream=lambda index: calls.append(f"stream of {index}") or 2**63 + 16)
    yield calls
    hip.connect()
    assert current == [0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_is_on_the_device_and_stream_of_its_first_tensor(other_devices):
    with pytest.raises(_hip.Unavailable):
        hip.launch("rms_norm", **GOOD)
    assert other_devices == ["exchange 1", "stream of 1", "exchange 0"]  # whatever comes of the launch


def test_recordings_do_not_nest_and_belong_to_a_thread():
    elsewhere = []
    with hip.record("gfx942"):
        with pytest.raises(ValueError, match="already records"):
            _hip.record_begin(DEVICE, [])
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


def test_constants_come_from_the_sources():
    source = (Path(__file__).parents[1] / "hip" / "ops" / "moe_align_block_size.hip").read_text()
    assert f"kMaxExperts = {hip.constants('moe_align_block_size').MAX_EXPERTS};" in source
    assert (_hip.BF16, _hip.FP16, _hip.FP32, _hip.FP8) == (0, 1, 2, 3)  # what is stored in args; names are shared
    assert hip.constants("no_such_op") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_is_told():
    with pytest.raises(_hip.Unavailable) as refused:
        _hip.device_count()
    assert hip.reason("cuda") == str(refused.value)
    assert "libamdhip64.so" in str(refused.value) or "GPU" in str(refused.value)


@pytest.mark.parametrize("arch", ["sm_90", "gfx1100"])
def test_what_an_adapter_serves_is_launched_where_no_test_runs_it(arch):
    """Contract tests do so on the machine's own architecture, on gfx942, gfx950 and gfx1201."""
    planned, refused = set(), {}
    with platform.target(arch), hip.record(arch):
        for op in OPS.values():
            kernel = op.backends.get("hip")
            if kernel is None or (kernel.absent and kernel.absent(lookup(arch))):
                continue
            for case in (case for case in op.cases() if not case.large):
                args = contract.draw(case, "cpu", 0)
                if kernel.supports is None or kernel.supports(**args) is None:
                    planned.add(op.name)
                    try:
                        kernel.run(**args)
                    except Exception as error:
                        refused[f"{op.name} {case.id}"] = str(error)
    assert not refused
    assert {"linear", "paged_attention", "fused_add_rms_norm"} <= planned
