"""AITER's assembly next to our kernels: three families in short where its wheel is installed, and everywhere that wrong
results and findings of the checks are reported, for kernels assembled here."""

import sys
from pathlib import Path

import aiter
import aiter_reports
import numpy as np
import pytest
import torch
from aiter_objects import NEWER, Coverage, Objects, Scan, family_of, table
from aiter_reports import Reported, row
from aiter_work import COLUMNS, Arrays, Launch, Ours, Work, compare, distance, in_processes, slots, theirs

sys.path.append(str(Path(__file__).parents[1] / "gfx942"))
from assembled import assemble  # noqa: E402

#: y = 2 x, of two addresses in slots of 16 bytes
DOUBLED = """
v_lshlrev_b32_e32 v1, 2, v0
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_load_dwordx2 s[6:7], s[0:1], 0x10
s_waitcnt lgkmcnt(0)
global_load_dword v2, v1, s[4:5]
{wait}
v_add_f32_e32 v2, v2, v2
global_store_dword v1, v2, s[6:7]
"""


def doubled(wanted: float) -> Work:
    def make() -> Launch:
        mem = Arrays()
        x = mem.put("x", np.arange(1, 257, dtype=np.float32))
        y = mem.new("y", (256,), np.float32, np.nan)
        return Launch((4, 1, 1), 64, slots(x, y), mem, lambda: distance(y[:64], wanted * x[:64].astype(float)))

    def ours() -> dict:
        return dict(x=torch.randn(4, 64), weight=torch.randn(64))
    return Work("twice", "256 numbers", "gfx942/twice.co", make, 1e-6, Ours("rms_norm", ours))


def code(wait: str) -> bytes:
    return assemble("gfx942", (("doubled", DOUBLED.format(wait=wait)),)).read_bytes()


def test_a_kernel_is_compared_counted_and_held_to_the_checks():
    rows, found = compare(doubled(2.0), code("s_waitcnt vmcnt(0)"), "gfx942")
    assert found.findings == []
    assert found.error == 0
    assert rows[0][2] == f"{4 * 9:,}"  # of four waves
    assert [row[1] for row in rows] == ["AITER", "rms_norm (hip)"]


def test_rows_are_renewed_where_the_document_has_their_work():
    made = [[f"{i} of {who}" for i in range(len(COLUMNS))] for who in ("ours", "theirs")]
    made[0][:2], made[1][:2] = ["twice", "rms_norm (hip)"], ["thrice", "AITER"]
    before = ("a\n\n**MI300X**\n\n| work | kernel | n |\n|---|---|---|\n"
              "| twice | AITER | 1 |\n| twice | rms_norm (triton) | 2 |")
    text = aiter.renewed(f"{before}\n\n**MI355X**\n", "gfx942", made)
    assert text.splitlines()[6] == "| twice | AITER | 1 |"
    assert text.splitlines()[7].startswith("| twice | rms_norm (hip) | 2 of ours | 3 of ours |")
    assert text.splitlines()[8].startswith("| thrice | AITER | 2 of theirs")
    assert "10 of ours" not in text  # what is predicted stands elsewhere
    assert text.endswith(" |\n\n**MI355X**\n")


def test_processes_give_results_in_order():
    assert list(in_processes(abs, [-3, 2, -1], 2)) == list(in_processes(abs, [-3, 2, -1], 1)) == [3, 2, 1]


def test_what_the_checks_find_is_told():
    _, found = compare(doubled(2.0), code("s_nop 0"), "gfx942")
    assert len(found.findings) == 1
    assert "v2 is used, but no s_waitcnt has waited (vmcnt)" in found.findings[0]


@pytest.mark.parametrize(("wait", "right", "missing"), [
    ("s_waitcnt vmcnt(0)", True, "none"), ("s_nop 0", False, "v2 is used, but no s_waitcnt has waited (vmcnt)")])
def test_what_loads_bring_comes_late_where_nothing_waits(wait, right, missing):
    *_, at_once, late, beyond, waits = row(Reported(0, "256 numbers", "twice", doubled(2.0).make), code(wait))
    assert (at_once, late == "0.000", beyond) == ("0.000", right, "nothing")
    assert missing in waits


def test_a_report_whose_object_is_missing_says_so(tmp_path):
    (tmp_path / "gfx942").mkdir()
    told = list(aiter_reports.rows(Objects(tmp_path)))
    assert len(told) == len(aiter_reports.REPORTS)
    assert all("not in the wheel" in cells[3] for cells in told)


def test_a_wrong_result_is_no_row():
    with pytest.raises(AssertionError, match=r"gfx942/twice.co on 256 numbers: 3.33e-01 from fp64, 1e-06 allowed"):
        compare(doubled(3.0), code("s_waitcnt vmcnt(0)"), "gfx942")


MET = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_mov_b32 s8, -1
s_waitcnt lgkmcnt(0)
s_atomic_inc s8, s[4:5], 0x0
others:
s_load_dword s9, s[4:5], 0x0
s_waitcnt lgkmcnt(0)
s_cmp_lg_u32 s9, 3
s_cbranch_scc1 others
"""


def test_ranks_run_side_by_side():
    """Each waits for the others."""
    def make() -> Launch:
        mem = Arrays()
        met = mem.new("met", (16,), np.uint32, 0)
        return Launch((1, 1, 1), 64, [slots(met, None)] * 3, mem, lambda: distance(met[:1], np.array([3.0])))

    met = assemble("gfx942", (("met", MET),)).read_bytes()
    found = theirs(Work("met", "three ranks", "gfx942/met.co", make, 0, Ours("all_reduce")), met)
    assert found.error == 0
    assert found.findings == []
    assert found.instructions >= 3 * 9


def test_objects_are_those_that_are_pinned(tmp_path):
    folder = tmp_path / "gfx942" / "twice"
    folder.mkdir(parents=True)
    (folder / "twice.co").write_bytes(code("s_waitcnt vmcnt(0)"))
    objects = Objects(tmp_path)
    assert objects.of("gfx942") == ["gfx942/twice/twice.co"]
    with pytest.raises(ValueError, match=r"hsa: expected the \S+ objects \(SHA-256 \w+\), got \w+"):
        objects.verify()
    with pytest.raises(FileNotFoundError, match="expected AITER's code objects, got"):
        Objects(tmp_path / "absent")


def test_newer_objects_come_from_the_repository_and_are_pinned(tmp_path):
    """The wheel's lacks an object until the repository's folder is given, which must hold the one of the commit."""
    name = next(iter(NEWER))
    assert "--repository" in str(Objects(tmp_path).lacks(name))
    objects = Objects(tmp_path, tmp_path)
    assert objects.lacks(name) is None
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(code("s_nop 0"))
    with pytest.raises(ValueError, match=r"repository: expected the gfx942/\S+ of \w+, got another one"):
        objects.read(name)


def test_coverage_says_what_is_missing():
    assert Scan().missing(code("s_waitcnt vmcnt(0)")) == set()
    assert Scan().missing(code("s_getreg_b32 s4, hwreg(HW_REG_MODE)")) == {
        "s_getreg_b32: the emulator does not know s_getreg_b32"}
    assert [family_of(name) for name in ("gfx942/mla/x.co", "gfx942/fmoe/silu/x.co", "gfx942/pa_a16w8.co")] == [
        "mla", "fmoe", "pa"]
    found = {"mla": Coverage(3, 2)}
    found["mla"].missing.update(["s_x", "s_x"])
    assert table(found).splitlines()[2:] == ["| mla | 2 | 3 | s_x (2) |", "| all | 2 | 3 | 66.7 % |"]


@pytest.fixture(scope="module")
def wheel() -> Objects:
    try:
        objects = Objects()
        objects.verify()
    except (FileNotFoundError, ValueError) as e:
        pytest.skip(str(e))
    return objects


@pytest.mark.parametrize("family", ["mla", "pa", "topk"])
def test_three_families_are_right(family, wheel):
    for work in aiter.FAMILIES[family]("gfx942", True):
        found = theirs(work, wheel.read(work.object), strict=False)
        assert found.error is not None
        assert found.error <= work.allowed
        assert 0 < found.instructions < 1e5


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_objects_decode_and_bind(arch, wheel):
    """Every 25th; `python tests/bench/aiter.py --coverage` has all."""
    scan = Scan()
    assert {name: missing for name in wheel.of(arch)[::25] if (missing := scan.missing(wheel.read(name)))} == {}
