"""What ships is what was executed: no kernel of a code object, no tuned row and no binary that a large case launches is
left out of the cases that the emulator's tests hold to the contract."""

import pytest
from launched import ARCHS, hip_launched, hip_symbols, small_cases


@pytest.mark.parametrize("arch", ARCHS)
def test_every_hip_kernel_is_executed_by_a_small_case(arch):
    symbols = hip_symbols(arch)
    if not symbols:
        pytest.skip(f"the package was built without {arch} code objects")
    left_out = sorted(symbols - hip_launched(arch, small_cases("hip")))
    assert left_out == [], "give ops/<op>.py a case that launches it, or delete the kernel"
