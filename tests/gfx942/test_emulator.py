"""The machine code that ships, executed: every HIP operator's code objects keep the contract on the emulator, on CPU
tensors, under the real launchers; and what a kernel must not do is reported in words."""

import numpy as np
import pytest
import torch
from assembled import assemble, run
from launched import ARCHS, small_cases

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.testing import contract
from wave64.testing.emulator import run as run_module
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.run import emulate


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "case"), [
    pytest.param(op, case, id=f"{op.name}-{case.id}") for op, case in small_cases("hip")])
def test_machine_code_keeps_the_contract(op, case, arch, record_property):
    kernels, instructions = set(), 0

    def call(**args):
        nonlocal instructions
        with emulate(arch) as ran:
            result = op.backends["hip"].run(**args)
        kernels.update(ran.kernels)
        instructions += ran.instructions
        return result

    with platform.target(arch):
        args = contract.draw(case, "cpu", seed=0)
        supports = op.backends["hip"].supports
        if supports is not None and (why := supports(**args)):
            pytest.skip(why)
        contract.verify(op, "hip", case, "cpu", run=call)
    record_property("emulated", {"arch": arch, "kernels": sorted(kernels), "instructions": instructions})


@pytest.mark.parametrize("arch", ARCHS)
def test_sums_in_bf16_are_rounded_to_nearest_even(arch):
    """Of bf16 many sums are halfway, and the contract's tolerance would let them be cut off. NaN stays NaN."""
    x, residual = (torch.randn(3, 512).bfloat16() for _ in range(2))
    x[2, :4] = torch.tensor([0x7FFF, -1, 0x7F80, -0x80], dtype=torch.int16).view(torch.bfloat16)  # NaN, infinities
    residual[2, 2] = -torch.inf
    summed = x + residual
    with platform.target(arch), emulate(arch):
        OPS["fused_add_rms_norm"].backends["hip"].run(x, residual, torch.ones(512).bfloat16())
    torch.testing.assert_close(residual, summed, rtol=0, atol=0, equal_nan=True)


def test_emulation_counts_instructions_by_name():
    op = OPS["rms_norm"]
    args = contract.draw(next(iter(op.cases())), "cpu", seed=0)
    with platform.target("gfx942"), emulate("gfx942") as ran:
        op.backends["hip"].run(**args)
    assert ran.launches == 1
    assert ran.by_name["s_endpgm"] == ran.waves
    assert sum(ran.by_name.values()) == ran.instructions
    assert hip.code_objects()["gfx942"]


LOAD = """
s_load_dwordx4 s[0:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_waitcnt lgkmcnt(0)
global_load_dword v2, v1, s[0:1]
"""
STORE = """
global_store_dword v1, v2, s[2:3]
"""
WAIT = """
s_waitcnt vmcnt(0)
"""
#: what is wrong -> (body, what the report says)
WRONG = {
    "load out of bounds": (LOAD + "global_load_dword v3, v1, s[0:1] offset:64\n" + WAIT + STORE,
                           r"global_load_dword .*wave 0, lane 48 reads 4 bytes at 0x\w+, 256 bytes into given"),
    "store out of bounds": (LOAD + WAIT + "global_store_dword v1, v2, s[2:3] offset:-4\n",
                            r"global_store_dword .*lane 0 writes 4 bytes at 0x\w+, 4 bytes before result"),
    "unknown instruction": (LOAD + WAIT + "s_getreg_b32 s4, hwreg(HW_REG_MODE)\n" + STORE,
                            r"\+0x[0-9a-f]+: s_getreg_b32 .*the emulator does not know s_getreg_b32"),
    "barrier that is not met": ("v_cmp_gt_u32_e32 vcc, 64, v0\ns_cbranch_vccz over\ns_barrier\nover:\n",
                                r"1 waves of a workgroup wait at a barrier that 1 of its waves never come to"),
    "no end": ("again:\ns_branch again\n", r"still running after"),
    "missing wait for a load": (LOAD + STORE, r"v2 is used, but no s_waitcnt has waited \(vmcnt\)"),
    "missing wait for scalars": (LOAD.replace("s_waitcnt lgkmcnt(0)\n", ""), r"s0 is used, but no s_waitcnt .*lgkmcnt"),
    "wait for too few": (LOAD + "global_load_dword v3, v1, s[0:1]\ns_waitcnt vmcnt(1)\nv_add_u32_e32 v2, v2, v3\n",
                         r"v3 is used, but no s_waitcnt"),
    "missing wait for LDS": ("v_mov_b32_e32 v2, 0\nds_read_b32 v3, v2\nv_add_u32_e32 v3, 1, v3\n",
                             r"v3 is used, but no s_waitcnt .*lgkmcnt"),
    "unwaited store before a barrier": ("v_lshlrev_b32_e32 v1, 2, v0\nds_write_b32 v1, v0\ns_barrier\n"
                                        "v_xor_b32_e32 v1, 256, v1\nds_read_b32 v2, v1\n",
                                        r"ds_read_b32 .*byte \d+ of LDS is accessed, but no s_waitcnt had waited "
                                        r"\(lgkmcnt\) for the store of wave \d there"),
    "missing wait for a load to LDS": (LOAD + "s_mov_b32 m0, 0\ns_nop 0\nglobal_load_lds_dword v1, s[0:1]\n"
                                       "ds_read_b32 v3, v1\n",
                                       r"LDS is accessed, but no s_waitcnt has waited \(vmcnt\)"),
    "LDS race": ("v_lshlrev_b32_e32 v1, 2, v0\nds_write_b32 v1, v0\ns_waitcnt lgkmcnt(0)\nv_xor_b32_e32 v1, 256, v1\n"
                 "ds_read_b32 v2, v1\n",
                 r"wave 0 reads byte 256 of LDS, which wave 1 writes, with no barrier between"),
    "LDS conflict": ("v_mov_b32_e32 v1, 0\nds_write_b32 v1, v0\n",
                     r"wave \d writes byte \d of LDS, which wave \d writes"),
    "LDS out of bounds": ("v_mov_b32_e32 v1, 0\nds_write_b32 v1, v0 offset:1024\n", r"LDS bytes 1024 to 1028, of 1024"),
    "unwritten address": (LOAD + WAIT + "global_store_dword v5, v2, s[2:3]\n",
                          r"v5 comes from a register that was never written"),
    "unwritten condition": ("s_add_i32 s4, s5, 1\ns_cmp_eq_u32 s4, 0\ns_cbranch_scc1 over\nover:\n",
                            r"scc comes from a register that was never written"),
    "unwritten LDS": (LOAD + WAIT + "ds_read_b32 v2, v1\ns_waitcnt lgkmcnt(0)\n" + STORE,
                      r"v2 comes from a register that was never written"),
}


def _numbered(body: str, i: int) -> str:
    """Labels are global in a file: each kernel gets its own."""
    return body.replace("over", f"over{i}").replace("again", f"again{i}")


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_kernel_must_not_do_is_reported(wrong):
    kernels = tuple((f"kernel{i}", _numbered(body, i)) for i, (body, _) in enumerate(WRONG.values()))
    block = 128 if "barrier" in wrong or wrong.startswith("LDS ") else 64
    given, result = np.arange(block, dtype=np.uint32), np.zeros(block, np.uint32)
    expected = (EmulationError, NotImplementedError)
    code, kernel = assemble("gfx942", kernels, lds=1024), f"kernel{list(WRONG).index(wrong)}"
    with pytest.raises(expected, match=WRONG[wrong][1]) as raised:
        run(code, kernel, given, result, block=block, seconds=0.2)
    assert "kernel" in str(raised.value)


def test_waves_that_part_meet_again_at_the_barrier():
    body = LOAD + WAIT + """
v_cmp_gt_u32_e32 vcc, 64, v0
s_cbranch_vccz second
v_add_u32_e32 v2, 100, v2
second:
v_lshlrev_b32_e32 v3, 2, v0
ds_write_b32 v3, v2
s_waitcnt lgkmcnt(0)
s_barrier
v_xor_b32_e32 v3, 256, v3
ds_read_b32 v2, v3
s_waitcnt lgkmcnt(0)
""" + STORE
    given, result = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    ran = run(assemble("gfx942", (("exchange", body),), lds=1024), "exchange", given, result, block=128)
    assert (result == np.concatenate([given[64:], given[:64] + 100])).all()
    assert ran.waves == 2


def test_two_loads_outstanding_come_back_in_order():
    body = LOAD + "global_load_dword v3, v1, s[0:1]\ns_waitcnt vmcnt(1)\nv_add_u32_e32 v2, 1, v2\n" + STORE
    given, result = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    run(assemble("gfx942", (("ordered", body),)), "ordered", given, result)
    assert (result == given + 1).all()


def test_a_store_on_its_way_at_a_barrier_harms_only_who_meets_it():
    """A load that another wave uses after the next barrier may be in flight at this one."""
    body = LOAD + WAIT + """
v_lshlrev_b32_e32 v3, 2, v0
ds_write_b32 v3, v2
s_barrier
ds_read_b32 v4, v3
s_waitcnt lgkmcnt(0)
s_barrier
v_xor_b32_e32 v3, 256, v3
ds_read_b32 v2, v3
s_waitcnt lgkmcnt(0)
""" + STORE
    given, result = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    run(assemble("gfx942", (("exchange", body),), lds=1024), "exchange", given, result, block=128)
    assert (result == np.concatenate([given[64:], given[:64]])).all()


def test_a_launch_may_touch_its_own_tensors_and_no_other(monkeypatch):
    """Not those of the launches around it, and none whose address was only looked at."""
    seen = []
    monkeypatch.setattr(run_module, "execute",
                        lambda launch, buffers, *rest: seen.append({(b.name, b.start) for b in buffers}))
    op, xs, weight, other = OPS["rms_norm"], torch.ones(2, 4, 64), torch.ones(64), torch.ones(64)
    with emulate("gfx942"):
        outs = [op.backends["hip"].run(x.clone(), weight) for x in xs]
        other.data_ptr()
    (first, second), weights = seen, ("weight", weight.data_ptr())
    assert {name for name, _ in first} == {name for name, _ in second} == {"x", "weight", "out"}
    assert first & second == {weights}
    assert [("out", out.data_ptr()) in buffers for out in outs for buffers in seen] == [True, False, False, True]
