"""Triton kernels' machine code for gfx942 and gfx950, executed: the first cases of every operator keep the contract.

All cases: `python -m wave64.testing.emulator.check gfx942 --backend triton`. Each architecture has a process of its
own, without the interpreter that the other tests run Triton kernels in.
"""

import json
import os
import subprocess
import sys

import pytest

from wave64 import OPS

ARCHS = ("gfx942", "gfx950")
FIRST = {"gfx942": 3, "gfx950": 1}  # cases of each operator


@pytest.fixture(scope="module")
def results():
    """arch -> {op: what `wave64.testing.emulator.check` says of it}"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {arch: subprocess.Popen(
        [sys.executable, "-m", "wave64.testing.emulator.check", arch, "--backend", "triton", "--json", "--first",
         str(FIRST[arch])], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for arch in ARCHS}
    found = {}
    for arch, process in running.items():
        out, err = process.communicate()
        assert out, err
        found[arch] = {result["op"]: result for result in map(json.loads, out.splitlines())}
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_machine_code_keeps_the_contract(op, arch, results, record_property):
    result = results[arch][op]
    assert result["failures"] == {}
    assert result["passed"] + result["declined"] > 0
    record_property("emulated", {name: result[name] for name in ("kernels", "instructions")})
