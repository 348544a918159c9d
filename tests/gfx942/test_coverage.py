"""What ships is what was executed: no kernel of a code object, no tuned row and no binary that a large case launches is
left out of what the emulator's tests hold to the contract.

HIP kernels, and many of Triton's, are those of small cases; of kernels for many queries test_prefill_kernels.py has the
cases, of those for many heads test_latents.py. Where only large cases launch a binary, or none has a row's
configuration, a problem of the same shape with few tiles is executed (shrunken.py); launched.py finds which ones.
"""

import launched
import pytest
import test_collectives
import test_latents
import test_prefill_kernels
from launched import ARCHS, hip_launched, hip_symbols, small_cases
from once import once

from wave64 import OPS

#: Operators with tables have most problems: they are several tests, which run side by side.
PARTS = 3
TESTS = [(op.name, part) for op in OPS.values() if "triton" in op.backends
         for part in range(PARTS if op.name in launched.tables("gfx942") else 1)]


@pytest.fixture(scope="session")
def plans(request, compiling, tmp_path_factory) -> dict[str, launched.Plan]:
    """By architecture. Found once, for all workers of a run."""
    def find() -> dict[str, launched.Plan]:
        return {arch: compiling.submit(launched.plan, arch).result() for arch in ARCHS}

    return once(request, tmp_path_factory, "plans", find)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_hip_kernel_is_executed_by_a_small_case(arch):
    symbols = hip_symbols(arch)
    if not symbols:
        pytest.skip(f"the package was built without {arch} code objects")
    own = [(op, case) for op, case in test_latents.CASES if case.id in test_latents.ON_BOTH]
    cases = [*small_cases("hip"), *((OPS[op], case) for op, case in [*test_prefill_kernels.CASES, *own])]
    alone = {op.name for op, _ in cases}
    left_out = sorted({(op, kernel) for op, kernel in symbols if op in alone} - hip_launched(arch, cases))
    assert left_out == [], "give ops/<op>.py a case that launches it, or delete the kernel"
    left_out = sorted({(op, kernel) for op, kernel in symbols if op not in alone} - test_collectives.launched(arch))
    assert left_out == [], "have test_collectives.py launch it"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_binary_of_large_cases_and_every_tuned_row_is_executed(arch, plans, record_property):
    tested = {op for op, _ in TESTS}
    assert {problem.op for problem in plans[arch].problems} <= tested
    assert plans[arch].left_out == [], "give ops/<op>.py a small case that launches it, or shrunken.py its shape"
    record_property("planned", {"arch": arch, "binaries": sorted(plans[arch].binaries)})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "part"), TESTS)
def test_shrunken_problems_keep_the_contract(op, part, arch, plans, compiling, record, record_property):
    parts = PARTS if (op, 1) in TESTS else 1
    problems = [problem for problem in plans[arch].problems if problem.op == op][part::parts]
    if not problems:
        pytest.skip("its small cases launch all")
    for problem in problems:
        mark = compiling.submit(launched.mark_problem, arch, problem).result()
        with record.result(f"{op} {problem.name} {arch}", mark, record_property) as entry:
            if entry.told is None:
                result, entry.told = compiling.submit(launched.execute, arch, problem).result()
                assert result.failures == {}
                assert result.passed == 1
        record_property("emulated", entry.told | {"anew": entry.anew})
