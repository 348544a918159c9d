"""Triton kernels' machine code for gfx942 and gfx950, executed: every case that is not large keeps the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launched import ARCHS, execute_small, mark_small, small_cases

from wave64 import OPS
from wave64.testing.compile import compile_case
from wave64.tools.doctor.software import TRITON_TESTED


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


def kpacks(version: tuple[int, int]) -> set[int]:
    """The `kpack` that mla_decode's kernel for gfx942 is compiled with, where Triton is of this version."""
    from wave64.triton_ops import mla_decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_decode, "TRITON", version)
        op = OPS["mla_decode"]
        launches = [launch for case in op.cases() if not case.large
                    for launch in compile_case(op, case, "gfx942", compiled=False) if "_cdna_" in launch.key]
    return {int(found[1]) for launch in launches if (found := re.search(r"'kpack', (\d)", launch.key))}


@pytest.mark.parametrize(("version", "kpack"), [((3, 7), 1), ((3, 8), 2)])
def test_batched_products_are_compiled_as_a_version_of_triton_gets_them_right(version, kpack, compiling):
    """Triton 3.5 to 3.7 give wrong numbers with the other one: run below, in the tier `long`."""
    assert compiling.submit(kpacks, version).result() == {kpack}


@pytest.mark.long
def test_machine_code_of_older_triton_keeps_the_contract(tmp_path):
    """Of the oldest version that the doctor says is tested: other compilers emit other code. Wants a package index."""
    folder = tmp_path / "triton"
    got = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder,
                          f"triton=={TRITON_TESTED[0]}.0"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"triton {TRITON_TESTED[0]}.0 cannot be installed: {got.stderr[-300:]}")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k",
                           "keeps_the_contract and not older and gfx942]"], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout[-5000:]
