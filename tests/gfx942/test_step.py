"""The stepper shows what one wave of one workgroup executes, and what its lane's registers then hold."""

import re
import subprocess
import sys

import numpy as np
import pytest
from assembled import assemble, run

from wave64.testing.emulator.step import Stop, View, stepping

BODY = """
v_add_u32_e32 v2, 10, v0
s_add_i32 s4, s2, 7
v_cvt_f32_u32_e32 v3, v2
"""


def lines(**of) -> list[str]:
    shown, nothing = [], np.zeros(1, np.uint32)
    code = assemble("gfx942", (("counted", BODY),))
    try:
        run(code, "counted", nothing, nothing, grid=(3, 1), block=128,
            checks=(stepping(View(show=shown.append, **of)),))
    except Stop:
        shown.append("stopped")
    return shown


def test_a_line_has_the_instruction_and_what_it_wrote():
    shown = lines(workgroup=2, wave=1, lane=5)
    assert len(shown) == 4  # with s_endpgm
    assert shown[0].startswith("counted+0x0: v_add_u32")
    assert shown[0].endswith(f"v2 = 0x{64 + 5 + 10:08x} (1.10703e-43)")
    assert shown[1].split("    ")[1].startswith("s4 = 0x00000009, scc = 0")  # workgroup 2 + 7
    assert shown[2].endswith("v3 = 0x429e0000 (79)")
    assert shown[3] == "counted+0xc: s_endpgm"


@pytest.mark.parametrize(("of", "expected"), [
    (dict(begin=8), ["v_cvt_f32_u32", "s_endpgm"]),
    (dict(count=2), ["v_add_u32", "s_add_i32", "stopped"]),
    (dict(kernel="another"), []),
    (dict(workgroup=3), []),
])
def test_what_is_shown_is_what_was_asked_for(of, expected):
    shown = lines(**of)
    assert len(shown) == len(expected)
    for line, name in zip(shown, expected, strict=True):
        assert name in line


def test_the_command_goes_through_an_operator():
    done = subprocess.run([sys.executable, "-m", "wave64.testing.emulator.step", "gfx942", "rms_norm", "--count", "3"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert re.match(r"rms_norm_bf16\+0x0 \(ops/rms_norm.hip:\d+\): s_load", first)
    assert len(others) == 2
