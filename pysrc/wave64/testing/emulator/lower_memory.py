"""Memory instructions for the core: SMEM, GLOBAL, FLAT, SCRATCH, MUBUF and DS."""

import numpy as np

from wave64.testing.emulator import lds, vmem
from wave64.testing.emulator.decode import M0, VGPR0
from wave64.testing.emulator.lanes import HALF_LOADS, LOADS, STORES
from wave64.testing.emulator.lowered import BY_ALL, FROM_MEMORY, HIGH_HALF, LOW_HALF, ONE, SIGNED, Lowered, Unknown

# ---- memory

def scalar_load(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name
    buffer, size = "buffer" in name, name.rpartition("dword")[2]
    low.more, low.rule = int(size[1:] or 1), FROM_MEMORY
    low.imm = (fields.offset ^ 0x100000) - 0x100000 if fields.imm else 0
    low.src.append((ONE, 0, fields.sbase.offset, 0, 0, 0, 0, 0, 0))
    if fields.soffset_en:
        low.source(fields.soffset.offset, "u")
    elif not fields.imm:
        low.source(fields.offset & 0x7F, "u")
    low.reads.append(("s", fields.sbase.offset, 4 if buffer else 2))
    low.writes.append(("s", fields.sdata.offset, low.more))
    low.dst = fields.sdata.offset
    return "scalar_buffer_load" if buffer else "scalar_load"


def _access(name: str) -> tuple[bool, int] | None:
    """(whether it stores, `more`) of load_<type> and store_<type>."""
    action, _, what = name.partition("_")
    high = HIGH_HALF if what.endswith("_hi") else 0
    what = what.removesuffix("_hi")
    if action == "load" and what in LOADS and not high:
        width, signed = LOADS[what]
        return False, width | SIGNED * bool(signed)
    if action == "load" and what in HALF_LOADS:
        width, signed = HALF_LOADS[what]
        return False, width | SIGNED * bool(signed) | (high or LOW_HALF)
    if action == "store" and what.removesuffix("_d16") in STORES:
        return True, STORES[what.removesuffix("_d16")] | high
    return None


def lanes_access(low: Lowered) -> str:
    fields, family = low.fields, low.instruction.family
    space, _, rest = low.instruction.name.partition("_")
    past = "load_lds_" in rest or family == "MUBUF" and bool(fields.lds)  # the registers, to LDS
    access = _access(rest.replace("load_lds_", "load_"))
    if access is None or past and (access[0] or space == "scratch" or access[1] & ~31):
        raise Unknown
    stores, low.more = access
    low.rule = FROM_MEMORY
    if family == "MUBUF":
        register = low.number("vaddr")
        low.source(register + VGPR0, "u") if fields.idxen else low.nothing()
        low.source(register + fields.idxen + VGPR0, "u") if fields.offen else low.nothing()
        low.source(fields.soffset.offset, "u")
        low.reads.append(("s", fields.srsrc.offset, 4))
        low.src.append((ONE, 0, fields.srsrc.offset, 0, 0, 0, 0, 0, 0))
        low.imm = fields.offset
    elif space == "scratch":
        low.imm = (fields.offset ^ 0x1000) - 0x1000
        low.source(low.number("addr") + VGPR0, "u") if fields.sve else low.nothing()
        low.source(fields.saddr.offset, "u") if fields.saddr.offset != vmem.NO_SADDR else low.nothing()
    else:
        flat = family == "FLAT"
        alone = flat or fields.saddr.offset == vmem.NO_SADDR
        low.imm = fields.offset if flat else (fields.offset ^ 0x1000) - 0x1000
        low.source(low.number("addr") + VGPR0, "U" if alone else "u")
        low.nothing() if alone else low.source(fields.saddr.offset, "U")
        space = "global"
    if past:
        low.dst = fields.offset
        low.reads.append(("s", M0, 1))
        return f"{space}_load_lds"
    words, data = max(1, (low.more & 31) // 4), "vdata" if family == "MUBUF" else "data" if stores else "vdst"
    low.dst = low.note(low.reads if stores else low.writes, low.number(data), words, bool(fields.acc))
    low.unheeded = int(stores and space == "buffer")
    return f"{space}_{'store' if stores else 'load'}"


def lds_access(low: Lowered) -> str:
    fields, name = low.fields, low.instruction.name.removeprefix("ds_")
    if fields.gds:
        raise Unknown
    low.rule, acc = FROM_MEMORY, bool(fields.acc)
    if name in ("read_b64_tr_b16", "read_b64_tr_b8", "read_b64_tr_b4"):
        if low.arch != "gfx950":
            raise Unknown
        low.source(low.number("addr") + VGPR0, "u")
        low.imm, low.more = fields.offset0 | fields.offset1 << 8, int(name.rpartition("b")[2])
        low.vector_result(low.number("vdst"), 2, acc)
        return "lds_read_transposed"
    twice = "2_" in name or "2st64_" in name
    kind = name.partition("_")[2]
    for _ in range(1 + twice):
        low.source(low.number("addr") + VGPR0, "u")
    del low.src[1:]
    low.imm = fields.offset0 | fields.offset1 << 8
    if twice:
        size = int(kind[1:]) // 8
        unit = size * (64 if "st64" in name else 1)
        low.imm, low.more = fields.offset0 * unit | fields.offset1 * unit << 16, size
        if max(fields.offset0, fields.offset1) * unit > 0xFFFF:
            raise Unknown
        if low.imm >= 1 << 31:
            low.imm -= 1 << 32
    if name.startswith("read"):
        half, plain = 0, kind
        if "_d16" in kind:
            half, plain = HIGH_HALF if kind.endswith("_hi") else LOW_HALF, kind.partition("_")[0]
        width, signed = (2 * low.more, None) if twice else lds.READS.get(plain, (0, None))
        if not width:
            raise Unknown
        if not twice:
            low.more = width | SIGNED * bool(signed) | half
        low.vector_result(low.number("vdst"), max(1, width // 4), acc)
        return "lds_read2" if twice else "lds_read"
    if name.startswith("write"):
        if not twice:
            plain = kind.removesuffix("_d16_hi")
            if plain not in lds.WRITES:
                raise Unknown
            low.more = lds.WRITES[plain] | (HIGH_HALF if kind != plain else 0)
        words = max(1, (low.more & 31) // 4)
        low.dst = low.note(low.reads, low.number("data0"), words, acc)
        if twice:
            low.mask = low.note(low.reads, low.number("data1"), words, acc)
        return "lds_write2" if twice else "lds_write"
    raise Unknown


def exchange(low: Lowered) -> str:
    low.rule, low.imm = BY_ALL, low.fields.offset0 | low.fields.offset1 << 8
    low.source(low.number("addr") + VGPR0, "u")
    if low.instruction.name == "ds_swizzle_b32":
        everywhere = np.ones(64, bool)
        low.exchange = lds.swizzle(low.imm), everywhere, everywhere, False
    else:
        low.source(low.number("data0") + VGPR0, "u")
    low.vector_result(low.number("vdst"))
    return low.instruction.name
