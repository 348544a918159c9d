"""What AMD machine code costs, read from the code itself: registers, spills, LDS, waves per SIMD, instructions.

Two sources. The code object (an ELF file) tells what a launch reserves: `read_elf` decodes its AMDGPU metadata note and
its kernel descriptors, with no tool besides it. The assembly text, where the compiler gives one, tells what runs:
`read_asm` counts instructions by class, using LLVM's own comments to know which of them are inside a loop.
`figures` puts both together for one kernel; these are the rows of tests/gfx942/golden.json.

Formats: LLVM's "User Guide for AMDGPU Backend" (code object metadata V5, kernel descriptor); MessagePack.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wave64 import arch as archs

# ---- the code object

NT_AMDGPU_METADATA = 32
MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950"}  # of e_flags, for notes that name no target
SHT_SYMTAB_KINDS = (2, 11)   # .symtab, .dynsym
SHT_NOTE = 7


@dataclass(frozen=True)
class Resources:
    """What one kernel of a code object reserves, per lane (vgpr, agpr), per wave (sgpr) or per block (lds)."""

    name: str
    arch: str
    vgpr: int              # 32-bit vector registers in use, accumulation registers included where they share one file
    agpr: int              # those of them that are accumulation registers
    vgpr_allocated: int    # what the descriptor reserves: granularity, and padding by an occupancy limit, included
    sgpr: int
    spills: int            # vector registers spilled, to memory
    sgpr_spills: int       # scalar registers spilled, to lanes of a vector register
    scratch_bytes: int     # private memory per lane
    lds_bytes: int         # declared statically
    max_block: int         # lanes
    argument_bytes: int = 0  # that the caller gives

    @classmethod
    def of(cls, kernel: dict[str, Any], target: str, descriptor: bytes) -> "Resources":
        granules = struct.unpack_from("<I", descriptor, 48)[0] & 0x3F
        return cls(
            name=kernel[".name"], arch=target, vgpr=kernel[".vgpr_count"], agpr=kernel.get(".agpr_count", 0),
            vgpr_allocated=(granules + 1) * 8, sgpr=kernel[".sgpr_count"],
            spills=kernel.get(".vgpr_spill_count", 0), sgpr_spills=kernel.get(".sgpr_spill_count", 0),
            scratch_bytes=kernel[".private_segment_fixed_size"], lds_bytes=kernel[".group_segment_fixed_size"],
            max_block=kernel[".max_flat_workgroup_size"],
            argument_bytes=sum(argument[".size"] for argument in kernel.get(".args", ())
                               if not argument[".value_kind"].startswith("hidden_")))


def arch_of(described: dict[str, Any]) -> str:
    """What a code object's metadata says it is for. Raises ValueError where that is no gfx."""
    found = re.search(r"gfx[0-9a-f]+", described["amdhsa.target"])
    if found is None:
        raise ValueError(f"amdhsa.target: expected gfx and a number in it, got {described['amdhsa.target']}")
    return found[0]


def read_elf(code: bytes) -> list[Resources]:
    """The kernels of a code object. Raises ValueError where `code` is none."""
    described, addresses, sections_of = metadata(code), symbols(code), list(sections(code))
    target = arch_of(described)
    kernels = []
    for kernel in described["amdhsa.kernels"]:
        at = _file_offset(sections_of, addresses[kernel[".symbol"]])
        kernels.append(Resources.of(kernel, target, code[at:at + 64]))
    return kernels


def metadata(code: bytes) -> dict[str, Any]:
    """The AMDGPU metadata note of a code object. Raises ValueError where `code` is none. Notes of version 3 name no
    target; then the ELF header's flags do."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"expected a little-endian 64-bit ELF code object, got {code[:8]!r}")
    for kind, offset, _, size, _ in sections(code):
        if kind == SHT_NOTE:
            for note_type, payload in _notes(code[offset:offset + size]):
                if note_type == NT_AMDGPU_METADATA:
                    machine = MACHINES.get(struct.unpack_from("<I", code, 48)[0] & 0xFF, "unknown")
                    return {"amdhsa.target": f"amdgcn-amd-amdhsa--{machine}", **unpack(payload)}
    raise ValueError("expected an AMDGPU code object, got an ELF file without AMDGPU kernel metadata")


def symbols(code: bytes) -> dict[str, int]:
    """Symbol -> address."""
    table = list(sections(code))
    return dict(symbol for kind, offset, _, size, link in table if kind in SHT_SYMTAB_KINDS
                for symbol in _symbols(code, offset, size, table[link][1]))


def compiler(code: bytes) -> str:
    """What made a code object, as its .comment section has it: "clang version 22.1.8"."""
    found = re.search(rb"(AMD )?clang version [\w.]+", code)
    return found[0].decode() if found else "unknown"


def sections(code: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(type, file offset, address, size, linked section) of every section."""
    table, = struct.unpack_from("<Q", code, 40)
    entry_size, count = struct.unpack_from("<HH", code, 58)
    for i in range(count):
        _, kind, _, address, offset, size, link = struct.unpack_from("<IIQQQQI", code, table + i * entry_size)
        yield kind, offset, address, size, link


def _symbols(code: bytes, offset: int, size: int, strings: int) -> Iterator[tuple[str, int]]:
    """(name, address) of every symbol of a table."""
    for at in range(offset, offset + size, 24):
        name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", code, at)
        start = strings + name
        yield code[start:code.index(b"\0", start)].decode(), value


def _file_offset(sections: list[tuple[int, int, int, int, int]], address: int) -> int:
    return next(offset + address - start for _, offset, start, size, _ in sections
                if start and start <= address < start + size)


def _notes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        start = at + 12 + (name_size + 3) // 4 * 4
        yield kind, data[start:start + size]
        at = start + (size + 3) // 4 * 4


def unpack(data: bytes) -> Any:
    """Decodes one MessagePack value; of the extension types only what LLVM writes is known."""
    return _unpack(data, 0)[0]


_SIZED = {0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xD9: ("str", ">B"), 0xDA: ("str", ">H"),
          0xDB: ("str", ">I"), 0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
            0xD2: ">i", 0xD3: ">q"}


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    code, at = data[at], at + 1
    if code < 0x80:
        return code, at
    if code >= 0xE0:
        return code - 0x100, at
    if code in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[code], at
    if code in _NUMBERS:
        form = _NUMBERS[code]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if code < 0xC0:
        kind, size = ("map", code & 15) if code < 0x90 else ("array", code & 15) if code < 0xA0 else ("str", code & 31)
    elif code in _SIZED:
        kind, form = _SIZED[code]
        size, at = struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    else:
        raise ValueError(f"MessagePack: byte 0x{code:02x} at {at - 1} starts no type that code objects use")
    if kind in ("str", "bin"):
        text = data[at:at + size]
        return text.decode() if kind == "str" else text, at + size
    items = []
    for _ in range(size * (2 if kind == "map" else 1)):
        item, at = _unpack(data, at)
        items.append(item)
    return dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items, at


# ---- the instructions

#: The first pattern that fits an instruction is its class; `matrix` includes sparse products and RDNA's.
_CLASSES = tuple((name, re.compile(pattern)) for name, pattern in (
    ("matrix", r"v_(mfma|smfmac|wmma|swmmac)_"),
    ("acc", r"v_accvgpr"),
    ("xlane", r"ds_b?permute|ds_swizzle|v_(readfirstlane|readlane|writelane|permlane)|\S+ .*\b(row_|quad_perm|wave_)"),
    ("lds", r"ds_"),
    ("scratch", r"scratch_"),
    ("global", r"(global|buffer|flat)_"),
    ("smem", r"s_(buffer_)?(load|store)|s_dcache"),
    ("wait", r"s_wait"),
    ("barrier", r"s_barrier"),
    ("branch", r"s_(c?branch|setpc|swappc|endpgm)"),
    ("nop", r"s_(nop|sleep|setprio|sched|clause|delay|set_vgpr)"),
    ("salu", r"s_"),
    ("trans", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("valu", r"v_"),
))
_INSTRUCTION = re.compile(r"\s+([a-z][a-z0-9_]+)\b([^;]*)")
_BLOCK = re.compile(r"\.LBB\d+_\d+:|; %bb\.\d+:")
_WIDTHS = ((re.compile(r"x4|b128"), 16), (re.compile(r"x3|b96"), 12), (re.compile(r"x2|b64"), 8),
           (re.compile(r"byte|[iub]8"), 1), (re.compile(r"short|16"), 2), (re.compile(r"dword|[bfiu]32"), 4))


def classify(text: str) -> str:
    """The class of one instruction, name and operands: "matrix", "valu", "trans", "lds", "global", ..."""
    return next((name for name, pattern in _CLASSES if pattern.match(text)), "other")


def lane_bytes(opcode: str) -> int:
    """Bytes one lane moves in a global memory instruction; 0 where it moves none."""
    return next((size for pattern, size in _WIDTHS if pattern.search(opcode)), 0)


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel. `loop` counts those inside any loop, each once; without one, all of them."""

    instructions: int
    loops: int
    loop: dict[str, int]      # class -> instructions
    matrix: dict[str, int]    # matrix instruction -> how many in the loop
    loads: dict[int, int]     # bytes per lane -> global loads, whole kernel
    stores: dict[int, int]

    def figures(self) -> dict[str, Any]:
        """Its part of a row of the golden file, JSON-ready."""
        return {"instructions": self.instructions, "loops": self.loops, "loop": self.loop, "matrix": self.matrix,
                "loads": {str(k): v for k, v in sorted(self.loads.items())},
                "stores": {str(k): v for k, v in sorted(self.stores.items())}}


def read_asm(text: str, name: str) -> Code:
    """Counts the instructions of kernel `name` in LLVM's assembly text, as printed with its comments."""
    start = re.search(rf"^{re.escape(name)}:", text, re.M)
    if start is None:
        raise ValueError(f"expected the assembly of kernel {name}, got a text without that label")
    whole, loop, loops, inside = [], [], 0, False
    for line in text[start.end():].splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if _BLOCK.match(line):
            inside = False
        if ";" in line:   # a block's loops are named next to its label and on the comment lines that follow
            loops += "Loop Header: Depth=" in line
            inside |= "Loop Header: Depth=" in line or "in Loop: Header=" in line
        if found := _INSTRUCTION.match(line):
            whole.append(found[1] + found[2])
            if inside:
                loop.append(whole[-1])
    loop = loop or whole
    opcodes = [i.split(None, 1)[0] for i in loop if classify(i) == "matrix"]
    moves = [i.split(None, 1)[0] for i in whole if classify(i) == "global"]
    return Code(
        len(whole), loops, dict(Counter(map(classify, loop)).most_common()), dict(Counter(opcodes)),
        loads=dict(Counter(lane_bytes(m) for m in moves if "_load" in m)),
        stores=dict(Counter(lane_bytes(m) for m in moves if "_store" in m)))


# ---- the compute unit

@dataclass(frozen=True)
class _Unit:
    """What shares one LDS: 4 SIMDs of a CDNA compute unit, or of an RDNA workgroup processor."""

    vgprs: int          # per lane and SIMD
    granule: int        # they are handed out in these
    waves: int          # at most, per SIMD
    sgpr_limited: bool  # more than 100 scalar registers cost the eighth wave
    lds_bytes: int
    lds_granule: int

    SIMDS = 4


def _unit(arch: str) -> _Unit:
    lds = archs.lookup(arch).lds_bytes
    if arch.startswith("gfx9"):
        return _Unit(512, 8, 8, True, lds, 1280 if lds > 64 * 1024 else 512)
    return _Unit(1536, 24, 16, False, 2 * lds, 1024)


def waves_per_simd(kernel: Resources, lds_bytes: int, block_waves: int) -> float:
    """Waves that one SIMD can hold at once, for blocks of `block_waves` waves that use `lds_bytes` of LDS."""
    unit = _unit(kernel.arch)
    by_registers = min(unit.waves, unit.vgprs // _round_up(kernel.vgpr_allocated, unit.granule))
    if unit.sgpr_limited and kernel.sgpr > 100:
        by_registers = min(by_registers, 7)
    blocks = by_registers * unit.SIMDS // block_waves
    if lds_bytes:
        blocks = min(blocks, unit.lds_bytes // _round_up(lds_bytes, unit.lds_granule))
    return blocks * block_waves / unit.SIMDS


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def figures(kernel: Resources, lds_bytes: int, block_waves: int) -> dict[str, Any]:
    """A row of the golden file, JSON-ready; lds_bytes: declared and requested at launch together."""
    return {"vgpr": kernel.vgpr, "agpr": kernel.agpr, "sgpr": kernel.sgpr, "spills": kernel.spills,
            "sgpr_spills": kernel.sgpr_spills, "scratch_bytes": kernel.scratch_bytes, "lds_bytes": lds_bytes,
            "block_waves": block_waves, "waves_per_simd": waves_per_simd(kernel, lds_bytes, block_waves)}
