"""Reports name the line of source where the code object knows it."""

import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assembled import assemble, run

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.testing import built, lanes
from wave64.testing.emulator import code_object, emulate
from wave64.testing.emulator import run as run_module
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


def test_a_report_names_the_line_of_a_hip_source_and_the_argument(monkeypatch):
    """A row more than there is, told to the kernel alone: it reads past x."""
    op, x, weight = OPS["rms_norm"], torch.ones(4, 768), torch.ones(768)
    right = run_module.execute
    kind, offset = next((kind, offset) for name, kind, offset in hip._hip.fields()["rms_norm"] if name == "num_tokens")

    def wrong(launch, *rest):
        args = bytearray(launch.args)
        struct.pack_into(kind, args, offset, 5)
        fields = {name: getattr(launch, name) for name in ("op", "kernel", "code_object", "block", "lds_bytes")}
        return right(SimpleNamespace(**fields, grid=(5, 1, 1), args=bytes(args)), *rest)

    monkeypatch.setattr(run_module, "execute", wrong)
    says = r"rms_norm_fp32\+0x\w+ \(\w+\.h:\d+\): .* reads \d+ bytes at 0x\w+, 12288 bytes into x, which has 12288"
    with pytest.raises(EmulationError, match=says), platform.target("gfx942"), emulate("gfx942"):
        op.backends["hip"].run(x, weight, 1e-6)


@pytest.mark.parametrize("op", ["rms_norm", "moe_align_block_size"])
def test_line_information_leaves_the_machine_code_as_it_is(op):
    plain, lined = (code_object.load(built.code_object(lanes.sources(), op, "gfx942", *flags).read_bytes())
                    for flags in ((), ("-gline-tables-only",)))
    assert plain.text == lined.text
    assert np.array_equal(plain.image[slice(*plain.text)], lined.image[slice(*lined.text)])
    assert re.match(r"[\w/]+\.(h|hip):\d+", lined.line(next(iter(lined.kernels.values())).entry))


def test_lines_of_other_machine_code_are_not_taken():
    code = code_object.CodeObject(built.code_object(lanes.sources(), "rms_norm", "gfx942").read_bytes())
    other = built.code_object(lanes.sources(), "moe_align_block_size", "gfx942", "-gline-tables-only")
    code.with_lines = other.read_bytes
    assert code.line(next(iter(code.kernels.values())).entry) == ""
