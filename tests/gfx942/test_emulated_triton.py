"""Triton kernels' machine code for gfx942 and gfx950, executed: every case that is not large keeps the contract."""

import pytest
from launched import ARCHS, execute_small, small_cases


@pytest.mark.parametrize(("op", "case", "arch"), [
    pytest.param(op.name, case.id, arch, id=f"{op.name}-{case.id}-{arch}")
    for arch in ARCHS for op, case in small_cases("triton")])
def test_machine_code_keeps_the_contract(op, case, arch, compiling, record_property):
    result, told = compiling.submit(execute_small, op, case, arch).result()
    assert result.failures == {}
    if result.declined:
        pytest.skip("the kernel declines the arguments")
    assert result.passed == 1
    record_property("emulated", told)
