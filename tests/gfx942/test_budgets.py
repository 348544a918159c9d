"""Every kernel compiles for gfx942 and gfx950, within the hardware's limits, and no worse than golden.json says."""

import importlib.util

import budgets
import compiled
import pytest
from budgets import ARCHS, KINDS, watched

import wave64

KERNELS = [(kind, op.name) for op in wave64.OPS.values() for kind in KINDS if kind in op.backends]


@pytest.fixture(scope="session")
def golden(reports, request):
    if request.config.getoption("renew_golden", default=False):
        before, now = budgets.read_golden(), budgets.as_golden(reports)
        budgets.GOLDEN.write_text(budgets.dump(now))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{budgets.table(now, before)}")
    return budgets.read_golden()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "op"), KERNELS)
def test_kernels_compile_within_limits(kind, op, arch, reports, record, record_property):
    if reports[arch]["compilers"][kind] is None:
        pytest.skip(f"the package was built without {arch} code objects")
    rows = reports[arch][kind][op]
    assert not isinstance(rows, str), rows
    assert watched(rows), f"{op}: no large case reaches its {kind} kernel; give ops/{op}.py one: Case(..., large=True)"
    found = [f"{name}: {text}" for name, row in rows.items() for text in budgets.over_limits(row, arch, kind, op)]
    assert not found, "\n".join(found)
    if op in reports[arch]["marks"][kind]:
        with record.result(compiled.key(op, arch, kind), reports[arch]["marks"][kind][op], record_property) as entry:
            entry.told = reports[arch]["told"][kind][op]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_triton_kernel_is_reached(arch, reports):
    names = [name for rows in reports[arch]["triton"].values() for name in watched(rows)]
    unreached = set(reports[arch]["kernels"]) - {name.split()[-1].partition("#")[0] for name in names}
    assert not unreached, "no operator's large case launches these; give one of them such a case"


def test_a_kernel_that_does_half_of_its_work_is_found():
    """Every figure of it looks better."""
    golden = dict(vgpr=64, waves_per_simd=4.0, instructions=400, loop={"valu": 200, "matrix": 16}, loads={"16": 16},
                  stores={"8": 4}, matrix={"v_mfma_f32_16x16x16_bf16": 16})
    half = golden | dict(instructions=300, loop={"valu": 150, "matrix": 8}, loads={"16": 8}, stores={"8": 2},
                         matrix={"v_mfma_f32_16x16x16_bf16": 8})
    assert budgets.worse(half, golden) == []
    found = budgets.compare({"k": half}, {"k": golden})
    assert [text.split(",")[0] for text in found] == [
        "k: bytes that a lane loads 128", "k: bytes that a lane stores 16", "k: loop instructions 158",
        "k: matrix instructions 8"]
    assert all("if meant, renew with" in text for text in found)
    assert budgets.compare({"k": golden | dict(loop={"valu": 192, "matrix": 16})}, {"k": golden}) == []


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_no_worse_than_golden(kind, reports, golden):
    measured, used = golden["compilers"][kind], reports[ARCHS[0]]["compilers"][kind]
    if used != measured:
        pytest.skip(f"golden figures are of {kind} {measured}, these kernels of {used}: compiled, not compared")
    found = []
    for arch in ARCHS:
        now, then = reports[arch][kind], golden[kind][arch]
        for op in {**now, **then}:
            if not isinstance(rows := now.get(op, {}), str):   # what does not compile fails above
                found += [f"{arch} {op} {text}" for text in budgets.compare(watched(rows), then.get(op, {}))]
    assert not found, "\n".join([*found, f"where this is meant: {budgets.RENEW}, and commit golden.json"])
    if kind == "hip" and not importlib.util.find_spec("ziglang"):
        pytest.skip("no ziglang package: registers, LDS and waves were compared, instructions were not")
