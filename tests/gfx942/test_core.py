"""The emulator's core in C against its NumPy path: the same bits, counts and reports of whole kernels, and which path
executes what. Single forms are compared in test_forms.py."""

import logging

import numpy as np
import pytest
import torch
from assembled import assemble, run
from test_emulator import LOAD, STORE, WAIT, WRONG, _numbered

from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator import core, emulate
from wave64.testing.emulator.checks import ALL, Check
from wave64.testing.emulator.memory import EmulationError

pytestmark = pytest.mark.skipif(core.unfit() is not None, reason=f"no core: {core.unfit()}")


def test_it_compiles():
    """Where it can be."""
    assert not isinstance(core.library(), str), core.library()


def of_each(op: str, case: str, arch: str = "gfx942"):
    """(outputs, what was counted) of a small case by NumPy and by the core."""
    declared = OPS[op]
    chosen = next(c for c in declared.cases() if case in c.id and not c.large)
    found = []
    for which in ("numpy", "c"):
        with platform.target(arch):
            args = contract.draw(chosen, "cpu", seed=0)
            with emulate(arch, core=which) as ran:
                out = declared.backends["hip"].run(**args)
        outs = [out] if isinstance(out, torch.Tensor) else list(out or ())
        tensors = [*outs, *(x for x in args.values() if isinstance(x, torch.Tensor))]
        found.append(([x.contiguous().view(torch.uint8) for x in tensors], ran))
    return found


@pytest.mark.parametrize(("op", "case"), [("rms_norm", ""), ("paged_attention", "batch"), ("concat_and_cache_mla", ""),
                                          ("sample", ""), ("moe_align_block_size", "")])
def test_kernels_give_the_same_bits_and_counts(op, case):
    (by_numpy, one), (by_core, other) = of_each(op, case)
    assert all(torch.equal(a, b) for a, b in zip(by_numpy, by_core, strict=True))
    assert one.by_name == other.by_name
    assert not one.by_numpy
    left = {name: count for name, count in other.by_numpy.items() if "branch" not in name}  # steps that are new
    assert sum(left.values()) < 0.02 * other.instructions, left


@pytest.mark.parametrize("wrong", WRONG)
def test_reports_are_the_same(wrong):
    kernels = tuple((f"kernel{i}", _numbered(body, i)) for i, (body, _) in enumerate(WRONG.values()))
    block = 128 if "barrier" in wrong or wrong.startswith("LDS ") else 64
    given, result = np.arange(block, dtype=np.uint32), np.zeros(block, np.uint32)
    code, said = assemble("gfx942", kernels, lds=1024), []
    for which in ("numpy", "c"):
        with pytest.raises((EmulationError, NotImplementedError)) as raised:
            run(code, f"kernel{list(WRONG).index(wrong)}", given, result, block=block, seconds=0.2, core=which)
        said.append(str(raised.value))
    assert said[0] == said[1]


PAST = LOAD + WAIT + "s_mov_b32 m0, 0\nv_lshlrev_b32_e32 v3, 2, v0\n"
DIRECT = "s_nop 0\nglobal_load_lds_dword v1, s[0:1]\n"
READ = "ds_read_b32 v2, v3\ns_waitcnt lgkmcnt(0)\n"
AGAIN = "s_movk_i32 m0, 256\nv_add_u32_e32 v3, 256, v3\n" + DIRECT  # which the core executes: NumPy makes the table
#: body -> what both paths say
LOADS_TO_LDS = {
    PAST + DIRECT + WAIT + READ + AGAIN + WAIT + READ + STORE: None,
    PAST + DIRECT + WAIT + READ + AGAIN + READ + STORE: "LDS is accessed, but no s_waitcnt has waited",
    PAST + DIRECT + WAIT + "s_movk_i32 m0, 960\n" + DIRECT: "a load to LDS ends",
}


@pytest.mark.parametrize("body", LOADS_TO_LDS)
def test_loads_past_the_registers(body):
    code = assemble("gfx942", tuple((f"kernel{i}", each) for i, each in enumerate(LOADS_TO_LDS)), lds=1024)
    said, left = [], {}
    for which in ("numpy", "c"):
        given, result = np.arange(7, 71, dtype=np.uint32), np.zeros(64, np.uint32)
        try:
            left = run(code, f"kernel{list(LOADS_TO_LDS).index(body)}", given, result, core=which).by_numpy
            said.append((result == given).all())
        except EmulationError as e:
            said.append(str(e))
    assert said[0] == said[1]
    assert (LOADS_TO_LDS[body] in said[0]) if LOADS_TO_LDS[body] else said[0]
    if not LOADS_TO_LDS[body]:
        assert left == {"global_load_lds_dword": 1}


def test_what_was_reported_is_reported_again():
    """Machines of a kernel share which steps the checks have seen; those that were wrong are not among them."""
    body = "v_cmp_eq_u32_e32 vcc, v0, v0\ns_nop 2\nv_div_fmas_f32 v2, v0, v0, v0\n"
    code, said = assemble("gfx942", (("early", body),)), []
    for grid in ((1, 1), (1, 1), (2, 1)):
        with pytest.raises(EmulationError, match="too early") as raised:
            run(code, "early", np.zeros(64, np.uint32), np.zeros(64, np.uint32), grid=grid)
        said.append(str(raised.value))
    assert len(set(said)) == 1


def test_a_check_of_ones_own_has_numpy_execute(monkeypatch):
    """It sees every instruction, which the core would not show it."""
    seen = []

    class Seeing(Check):
        def wrap(self, b, execute):
            seen.append(b.instruction.name)
            return execute

    given, result = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    code = assemble("gfx942", (("nothing", "v_mov_b32_e32 v1, 0\n"),))
    run(code, "nothing", given, result, checks=(*ALL, Seeing))
    assert seen == ["v_mov_b32", "s_endpgm"]
    with pytest.raises(RuntimeError, match="it has not all of the checks"):
        run(code, "nothing", given, result, checks=(*ALL, Seeing), core="c")
    with pytest.raises(ValueError, match="expected auto, c or numpy, got 'C'"):
        run(code, "nothing", given, result, core="C")


def test_without_a_compiler_numpy_serves_and_the_log_says_so(monkeypatch, caplog):
    core.available.cache_clear()
    monkeypatch.setattr(core, "library", lambda: "no compiler")
    given, result = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    try:
        with caplog.at_level(logging.INFO, "wave64"):
            for _ in range(2):
                ran = run(assemble("gfx942", (("nothing", "v_mov_b32_e32 v1, 0\n"),)), "nothing", given, result)
    finally:
        core.available.cache_clear()
    assert ran.instructions == 2
    assert [r.message for r in caplog.records] == [
        "the emulator executes with NumPy alone, which takes many times as long: no compiler"]
