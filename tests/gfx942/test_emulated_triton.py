"""Triton kernels' machine code for gfx942 and gfx950, executed: every case that is not large keeps the contract."""

import pytest
from launched import ARCHS, execute_small, mark_small, small_cases


@pytest.mark.parametrize(("op", "case", "arch"), [
    pytest.param(op.name, case.id, arch, id=f"{op.name}-{case.id}-{arch}")
    for arch in ARCHS for op, case in small_cases("triton")])
def test_machine_code_keeps_the_contract(op, case, arch, compiling, record, record_property):
    mark = compiling.submit(mark_small, op, case, arch).result()
    with record.result(f"{op} {case} {arch}", mark, record_property) as entry:
        if entry.told is None:
            result, entry.told = compiling.submit(execute_small, op, case, arch).result()
            assert result.failures == {}
            assert result.passed + result.declined == 1
    if not entry.told["binaries"]:
        pytest.skip("the kernel declines the arguments")
    record_property("emulated", entry.told | {"anew": entry.anew})
