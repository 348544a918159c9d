"""wave64.emulate: everything inside is the card's, executed; whole models are in tests/serve/test_emulated.py."""

import device_cases
import pytest

import wave64
from wave64.arch import EMULATED, lookup


@pytest.fixture
def ask(compiling):
    return lambda case, *args: compiling.submit(getattr(device_cases, case), *args).result()


@pytest.mark.parametrize("arch", EMULATED)
def test_inside_the_block_everything_is_the_cards_and_behind_it_nothing_is(arch, ask):
    saw = ask("dispatch", arch)
    assert saw["name"] == saw["called"] == f"{arch} (emulated)"
    assert (saw["type"], saw["units"]) == ("cpu", lookup(arch).compute_units)
    assert saw["quantized"] == ("torch.float8_e4m3fnuz" if arch == "gfx942" else "torch.float8_e4m3fn")
    assert saw["row stride"] == (768 if arch == "gfx942" else 512)
    assert 0 < saw["error"] < 2**-3
    assert saw["kernels"] == [(f"{arch}/per_token_group_quant_fp8.co", "per_token_group_quant_fp8_bf16")]
    assert saw["by triton"] == ["_rms_norm_kernel"]
    assert saw["in use"]["rms_norm"] == "hip"
    assert (saw["in use"]["fp8_scaled_mm"], saw["in use"]["prefill_attention"]) == ("triton", "hip")
    assert saw["cpu"] == {f"serves a CPU, not {arch} (emulated)"}
    assert f"the FP8 type of {arch}" in saw["other flavor"]
    assert saw["asked for cpu"].endswith(f"backend cpu was asked for: serves a CPU, not {arch} (emulated)")
    assert saw["inside"] == f"NotSupported: emulate: {arch} (emulated) is in use; leave its block first"
    assert saw["same behind"]
    assert saw["nothing executed behind"]


@pytest.mark.parametrize("arch", EMULATED)
def test_mla_with_several_new_tokens(arch, ask):
    saw = ask("several_queries", arch)
    assert any(kernel.startswith("_mla_decode") for kernel in saw["kernels"])
    assert 0 < saw["error"] < 2**-6
    assert saw["cache"] < 2**-7


def test_a_fault_is_reported_by_kernel_and_argument_and_the_next_call_is_served(ask):
    saw = ask("a_fault", "gfx942")
    assert saw["hip"].startswith("RuntimeError: HIP: paged_attention_")
    assert "unspecified launch failure: EmulationError: paged_attention_" in saw["hip"]
    assert saw["triton"].startswith("EmulationError: _paged_attention_kernel+0x")
    assert "bytes into key_cache and value_cache, which has" in saw["hip"]
    assert "bytes into k_ptr and v_ptr, which has" in saw["triton"]
    assert saw["again"] < 2**-6


def test_another_thread_launches_on_the_device(ask):
    saw = ask("other_thread", "gfx950")  # not the device that a thread begins with
    assert saw["kernels"] == [("gfx950/rms_norm.co", "rms_norm_fp32")]
    assert saw["error"] < 1e-6


def test_compiled_code_and_torchs_operator_execute_there(ask):
    saw = ask("compiled", "gfx942")
    assert saw["launches"] == 2
    assert saw["error"] < 1e-6


def test_a_graph_is_recorded_launches_and_operations_replayed_on_new_inputs(ask):
    saw = ask("graphs", "gfx942")
    assert saw["executed while capturing"] == 0
    assert saw["launches"] == 3 * 2 * 3  # three of each replay, and of each eager run that it is compared with
    assert saw["replayed"] == 0.0
    assert saw["sum"] < 1e-5
    for refused in ("item", "mask"):
        assert "operation not permitted when stream is capturing" in saw[refused]
    assert saw["synchronize"] == "HipError: hipDeviceSynchronize: operation not permitted when stream is capturing"
    assert "an event last recorded in a capturing stream" in saw["event"]
    assert saw["unknown stream"] == "HipError: hipStreamSynchronize: invalid resource handle"
    assert saw["without a capture"].startswith("RuntimeError: replay: expected a graph whose capture has ended")


def test_devices_of_two_architectures_in_one_process(ask):
    kernel = "rms_norm_fp32"
    assert [found[0] for found in ask("two_devices")["kernels"]] == [
        ("gfx942/rms_norm.co", kernel), ("gfx950/rms_norm.co", kernel), ("gfx942/rms_norm.co", kernel)]


def test_what_cannot_be_emulated_is_refused_in_words(monkeypatch):
    def refused(arch: str) -> str:
        with pytest.raises(wave64.NotSupported) as e, wave64.emulate(arch):
            pass
        return str(e.value)

    assert refused("gfx1100") == "emulate: arch: expected one of gfx942, gfx950, got 'gfx1100'"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused("gfx942").startswith("emulate: TRITON_INTERPRET: expected unset")


def test_the_report_of_a_device_names_it_and_what_serves_there(ask):
    lines = ask("reported", "gfx950").splitlines()
    assert lines[0] == "wave64 on gfx950 (emulated)"
    assert next(line for line in lines if line.startswith("rms_norm ")).split()[1] == "hip"


def test_a_step_costs_the_bounds_of_its_launches_one_after_another(ask):
    saw = ask("costs", "gfx942")
    row = saw["once"].rows["rms_norm"]
    assert row.launches == 1
    assert row.bound_us == saw["once"].bound_us == pytest.approx(saw["bound"])
    thrice = saw["thrice"].rows["rms_norm"]
    assert (thrice.launches, thrice.instructions) == (3, 3 * row.instructions)
    assert thrice.bound_us == pytest.approx(3 * row.bound_us)
    replayed = saw["replayed"].rows
    assert replayed["rms_norm"].bound_us == pytest.approx(row.bound_us)
    product = replayed["products by torch"]
    assert product.launches == 1
    assert product.bound_us == pytest.approx(4 * (64 * 128 + 128 * 32 + 64 * 32) / 5.3e6)  # bytes at 5.3 TB/s
    assert saw["table"].splitlines()[-1].split()[-2:] == [f"{thrice.instructions:,}", f"{thrice.bound_us:.2f}"]
