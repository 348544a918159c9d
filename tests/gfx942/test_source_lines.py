"""Reports name the line of source where the code object knows it."""

import numpy as np
import pytest
from assembled import assemble, run

from wave64.testing.emulator import code_object
from wave64.testing.emulator.memory import EmulationError

LINES = """
.file 1 "kernels" "copy.hip"
.loc 1 7 3
s_load_dwordx4 s[0:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
.loc 1 8 0
s_waitcnt lgkmcnt(0)
global_load_dword v2, v1, s[0:1]
.loc 1 9 5
global_store_dword v1, v2, s[2:3]
.loc 1 0 0
s_nop 0
.section .debug_abbrev,"",@progbits
.byte 1, 17, 0, 16, 23, 0, 0, 0  // a compilation unit with nothing but the place of its line table
.section .debug_info,"",@progbits
.long 12
.short 4
.long 0
.byte 8, 1
.long 0
.text
"""


def test_a_report_names_the_line():
    given, result = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(EmulationError, match=r"copy\+0x18 \(copy\.hip:9\): global_store_dword .*: v2 is used, but no"):
        run(assemble("gfx942", (("copy", LINES),)), "copy", given, result)


def test_lines_by_address():
    code = code_object.load(assemble("gfx942", (("copy", LINES),)).read_bytes())
    entry = code.kernels["copy"].entry
    known = [code.line(entry + offset) for offset in (-4, 0, 8, 0xC, 0x10, 0x18, 0x20)]
    assert known == ["", "copy.hip:7", "copy.hip:7", "copy.hip:8", "copy.hip:8", "copy.hip:9", ""]


def test_without_a_table_no_line_is_named():
    code = code_object.load(assemble("gfx942", (("bare", "s_nop 0\n"),)).read_bytes())
    assert code.line(code.kernels["bare"].entry) == ""
