"""Which backend serves: the order of choice, what the environment asks for, and when it is decided."""

import os
import socket
import subprocess
import sys

import pytest
import torch

import wave64
from wave64 import OPS, NotSupported, backends, ops, platform
from wave64.arch import known, lookup


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **env})


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an MI300X that hip and triton can serve, as far as choosing goes."""
    monkeypatch.setattr(platform, "device_type", lambda: "cuda")
    monkeypatch.setattr(backends, "probe", lambda backend, device: "no adapter" if backend == "aiter" else None)
    with platform.target("gfx942"):
        yield


def test_on_a_gpu_hip_comes_first_then_triton_then_the_reference(gpu):
    assert [b.name for b in backends.order(ops.rms_norm, "cuda", {})] == ["hip", "triton", "reference"]
    assert [b.name for b in backends.order(ops.rms_norm, "cpu", {})] == ["reference"]
    assert [b.name for b in backends.order(ops.sample, "cpu", {})] == ["cpu", "reference"]
    assert [b.name for b in backends.order(ops.sample, "cuda", {})] == ["hip", "triton", "reference"]
    without_hip = next(op for op in OPS.values() if not {"hip", "hopper"} & op.backends.keys())
    assert [b.name for b in backends.order(without_hip, "cuda", {})] == ["triton", "reference"]
    assert [b.name for b in backends.order(ops.rms_norm, "cuda", {"*": "triton"})] == ["triton", "hip", "reference"]
    assert [b.name for b in backends.order(ops.rms_norm, "cuda", {"*": "triton", "rms_norm": "hip"})] == ["hip"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine choices are for the GPU")
def test_on_a_cpu_the_cpu_backend_comes_first_and_can_be_chosen():
    assert [b.name for b in ops.sample.bound["cpu"]] == ["cpu", "reference"]
    with wave64.use("reference"):
        assert ops.sample.bound["cpu"][0].name == "reference"
    with wave64.use(sample="cpu"):
        assert [b.name for b in ops.sample.bound["cpu"]] == ["cpu"]
    with pytest.raises(NotSupported, match="rms_norm: backend cpu was asked for: no cpu kernel"), wave64.use(
            rms_norm="cpu"):
        pass
    assert backends.probe("cpu", "cuda") == "serves CPU tensors only"


HOPPER = ("fp8_block_scaled_mm", "fused_moe", "mla_decode", "mla_decode_rope", "prefill_attention")


def test_hopper_is_a_backend_of_its_own(gpu):
    """Before triton where it is registered; no choice of a configuration swaps kernels."""
    if why := backends.import_hopper_kernels():
        pytest.skip(why)
    assert sorted(op.name for op in OPS.values() if "hopper" in op.backends) == sorted(HOPPER)
    for name in HOPPER:
        with platform.target("sm_90"):  # where hip has none of them, for every call, and is not asked
            assert [b.name for b in backends.order(OPS[name], "cuda", {})] == ["hopper", "triton", "reference"]
        assert OPS[name].backends["triton"].tuning.config is not None
        assert not hasattr(OPS[name].backends["triton"].tuning.config, "hopper")


@pytest.mark.parametrize(("name", "arch", "words"), [
    ("fp8_block_scaled_mm", "sm_90", "instructions of gfx942 and gfx950"),
    ("fused_moe", "gfx1201", "instructions of gfx942 and gfx950"), ("linear", "gfx908", "no matrix instructions of"),
    ("paged_attention", "gfx908", "no matrix instructions of"), ("per_token_quant_fp8", "gfx90a", "no FP8 conversion"),
    ("per_token_group_quant_fp8", "gfx1100", "no FP8 conversion")])
def test_what_hip_lacks_on_an_architecture_is_off_there(name, arch, words, gpu):
    """Off in the table, with the reason, and not asked at each call; a demand for it is refused in the same words."""
    op = OPS[name]
    if "hip" not in op.backends:
        pytest.skip("the extension is not built")
    with platform.target("gfx942"):
        assert backends.order(op, "cuda", {})[0].name == "hip"
    with platform.target(arch):
        assert words in backends.reason(op, "hip", "cuda")
        assert "hip" not in [b.name for b in backends.order(op, "cuda", {})]
        with pytest.raises(NotSupported, match=f"{name}: backend hip was asked for: .*{words}"):
            backends.order(op, "cuda", {name: "hip"})
        assert words in op.backends["hip"].supports(*[None] * len(op.signature.parameters))


def test_what_was_measured_comes_first(gpu, monkeypatch):
    """On the card that it was measured on; where a backend is asked for, that one."""
    for arch, rows in backends.evidence().items():
        assert known(lookup(arch))
        for name, row in rows.items():
            assert set(row) == {"first", "why", "command", "device"}
            with platform.target(arch):
                assert backends.order(OPS[name], "cuda", {})[0].name == row["first"]
                assert row["first"] != "hip"  # which comes first anyway
            with platform.target("gfx1201"):
                assert backends.order(OPS[name], "cuda", {})[0].name != row["first"] or "hip" not in OPS[name].backends
    with platform.target("sm_90"):
        if "hip" in ops.linear.backends:
            assert [b.name for b in backends.order(ops.linear, "cuda", {})] == ["reference", "hip"]
            assert [b.name for b in backends.order(ops.linear, "cuda", {"*": "hip"})] == ["hip", "reference"]
            assert [b.name for b in backends.order(ops.linear, "cuda", {"linear": "hip"})] == ["hip"]
            monkeypatch.setattr(backends, "device_types", lambda: ("cuda",))
            with wave64.use():  # binds anew
                row, = [r for r in wave64.report("cuda") if (r["op"], r["backend"]) == ("linear", "hip")]
            assert row["status"] == "available"
            assert "torch's product" in row["reason"]


@pytest.mark.parametrize("arch", ["gfx942", "sm_80"])
def test_hopper_is_off_elsewhere_with_the_reason(arch, monkeypatch):
    with pytest.raises(NotSupported, match="mla_decode: backend hopper was asked for: needs an NVIDIA GPU of sm_90"):
        backends.demand("mla_decode", "hopper", "cpu")
    monkeypatch.setattr(platform, "device_type", lambda: "cuda")
    with platform.target(arch):
        assert backends.reason(ops.mla_decode, "hopper", "cuda") == f"needs an NVIDIA GPU of sm_90, this is {arch}"


@pytest.mark.parametrize(("op", "small", "words"), [
    ("mla_decode", "batch", "takes latents of 512 + 64 columns"), ("mla_decode_rope", "fp8", "same dtype"),
    ("fused_moe", "", "slower than triton below 17 tokens an expert"),
    ("fp8_block_scaled_mm", "", "slower than triton below 257 rows"),
    ("prefill_attention", "", "slower than triton below 128 new tokens")])
def test_hopper_says_what_it_declines_and_serves_what_it_was_measured_for(op, small, words):
    if why := backends.import_hopper_kernels():
        pytest.skip(why)
    from wave64.testing.compile import arguments

    supports = OPS[op].backends["hopper"].supports
    with platform.target("sm_90"):
        cases = list(OPS[op].cases())
        declined = [supports(**arguments(case)) or "" for case in cases if not case.large and small in case.id]
        assert any(words in why for why in declined), declined
        assert any(supports(**arguments(case)) is None for case in cases if case.large and not case.sparse)


def test_strict_leaves_the_first_choice_alone(gpu, monkeypatch):
    monkeypatch.setenv("WAVE64_STRICT", "1")
    assert [b.name for b in backends.order(ops.rms_norm, "cuda", {})] == ["hip"]
    monkeypatch.setenv("WAVE64_STRICT", "0")
    assert len(backends.order(ops.rms_norm, "cuda", {})) == 3


def test_strict_turns_arguments_that_are_declined_into_an_error(monkeypatch, device):
    declines = backends.Backend("triton", lambda x, *args: x, lambda *args, **kwargs: "not today")
    monkeypatch.setitem(ops.silu_and_mul.backends, "triton", declines)
    x = torch.randn(2, 32, device=device)
    with wave64.use("triton"):
        ops.silu_and_mul(x)  # the next one serves
    monkeypatch.setenv("WAVE64_STRICT", "1")
    with wave64.use("triton"), pytest.raises(NotSupported, match="silu_and_mul: backend triton: not today"):
        ops.silu_and_mul(x)


def test_nothing_is_probed_before_the_first_operator_is_asked():
    code = ("import wave64\nfrom wave64 import backends, platform\n"
            "probed = []\nreal = backends.probe\n"
            "backends.probe = lambda *args: probed.append(args) or real(*args)\n"
            "assert platform._visible_type.cache_info().currsize == 0\n"
            "import torch\nwave64.ops.rms_norm(torch.ones(1, 4), torch.ones(4))\n"
            "print(bool(probed), sorted({op._bound is None for op in wave64.OPS.values()}))")
    done = python("-c", code, WAVE64_BACKEND="", TRITON_INTERPRET="0")
    assert done.stdout.strip() == "True [False]", done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="hip may serve where there is a GPU")
def test_a_backend_asked_for_in_vain_is_one_line_of_the_server_and_a_short_error_of_an_import():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = python("-m", "wave64.launch_server", "--port", str(port), WAVE64_BACKEND="hip")
    assert served.returncode == 1
    line, = served.stderr.splitlines()
    assert line.startswith("wave64.launch_server: error: backend hip was asked for: serves GPU tensors only")
    assert served.stdout == ""
    imported = python("-c", "import wave64", WAVE64_BACKEND="rms_norm=hip")
    assert imported.returncode == 1
    *frames, last = imported.stderr.splitlines()
    assert last.startswith("wave64.op.NotSupported: rms_norm: backend hip was asked for: serves GPU tensors only")
    assert len(frames) <= 5


def test_an_operator_declared_later_is_bound_when_it_is_asked(device):
    def later(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    from wave64.op import Case, Cost, op

    declared = op(cases=lambda: [Case("one", dict)], cost=lambda x: Cost(0))(later)
    try:
        assert [b.name for b in declared.bound[device]] == ["reference"]
        assert declared(torch.zeros(1, device=device)).item() == 1
    finally:
        del OPS["later"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_report_for_a_device_that_is_not_here_says_so():
    with pytest.raises(NotSupported, match="device cuda: no GPU is visible"):
        wave64.report("cuda")
