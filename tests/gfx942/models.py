"""What one instruction does to a `World`, by AMD's manual: the published pseudo-code, evaluated lane by lane, between
operands and results as the manual's chapters on encodings, DPP, SDWA, buffers and LDS describe them.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property

import formats
import numpy as np
from amended import AMENDED, PLAIN
from bitvectors import Value
from operands import Bytes, Registers, dpp_source, placed, selected
from pseudocode import Array, Attributes, Cell, published, run
from world import AGPRS, LANES, MIDDLE, RECORDS, START, WAVES, Trial, World

from wave64.testing.emulator.decode import EXEC, M0, VCC

U32, U64 = np.uint32, np.uint64
#: transcendental functions of fp32: units in the last place that the manual allows, denormals taken and given as zeros
ULPS = {"v_exp_f32": 1, "v_log_f32": 1, "v_rcp_f32": 1, "v_rcp_iflag_f32": 1, "v_rsq_f32": 1, "v_sqrt_f32": 1}
#: 16-bit results that leave the rest of their register alone; others make it zero (LLVM: zeroesHigh16BitsOfDest)
KEEPS = ("v_mad_mixlo", "v_mad_mixhi", "v_cvt_pk_fp8", "v_cvt_pk_bf8", "v_bitop3_b16", "v_mad_u16", "v_mad_i16",
         "v_fma_f16", "v_med3_", "v_min3_", "v_max3_", "v_add_i16", "v_sub_i16")
SOURCES = (("src0", "vsrc0"), ("src1", "vsrc1"), ("src2",))


#: what changes nothing that a World shows
NOTHING = ("s_barrier", "s_endpgm", "s_nop", "s_setprio", "s_waitcnt", "s_setreg_imm32_b32", "s_sleep")
INLINE = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0}
INV_2PI = {16: 0x3118, 32: 0x3E22F983, 64: 0x3FC45F306DC9C882}


class Model:
    """The world after the instruction of a trial."""

    def __init__(self, trial: Trial):
        self.trial, self.before, self.after = trial, trial.before, trial.before.copy()
        self.instruction, self.fields, self.arch = trial.instruction, trial.instruction.fields, trial.arch
        self.name, self.family = self.instruction.name, self.instruction.family
        self.after.pc = [START + self.instruction.words] * WAVES
        self.text = AMENDED.get(self.name) or PLAIN.get(self.name) or published().get(self.name, "")

    def world(self) -> World:
        """Raises NotImplementedError where there is no model."""
        if self.name in NOTHING:
            return self.after
        apply: dict[str, Callable] = {"SMEM": self._scalar_memory, "DS": self._lds, "GLOBAL": self._global,
                                      "FLAT": self._global, "MUBUF": self._buffer}
        if not self.text and not any(kind in self.name for kind in ("_tr_b", "_lds_")):  # models of our own, below
            raise NotImplementedError(f"no model of {self.name}")
        for wave in range(WAVES):
            if self.family.startswith("SOP"):
                self._scalar(wave)
            elif self.family.startswith("VOP"):
                self._vector(wave)
            else:
                apply[self.family](wave)
        return self.after

    def size(self, name: str) -> int:
        from tinygrad.runtime.autogen.amd.cdna.operands import OPERANDS

        operands = OPERANDS.get(self.fields.op, {})
        found = operands.get(name) or operands.get("v" + name) or operands.get(name.removeprefix("v"))
        return found[1] if found else 32

    @cached_property
    def constants(self) -> dict:
        """What the text may call besides registers."""
        fields = self.fields
        values = {"BYTE1": 1, "BYTE2": 2, "BYTE3": 3, "WORD1": 5, "SDWA_SRC0_SEL": getattr(fields, "src0_sel", 0),
                  "OPSEL": getattr(fields, "opsel", 0), "SIMM16": getattr(fields, "simm16", 0),
                  "OPSEL_HI": getattr(fields, "opsel_hi", 0) | getattr(fields, "opsel_hi2", 0) << 2,
                  "SIMM32": self.instruction.literal or 0}
        parts = {name: Cell(getattr(fields, name.lower(), 0), width)
                 for name, width in (("OMOD", 2), ("ABS", 3), ("NEG", 3))}
        mode = Attributes(IEEE=Cell(int(self.trial.kernel.ieee), 1))
        return {name: Cell(value, 32, "u") for name, value in values.items()} | {
            "ARCH": self.arch, "INST": Attributes(**parts), "WAVE_MODE": mode}

    def scope(self, wave: int) -> dict:
        exec_mask, vcc = (int(self.before.s.view(U64)[wave, code // 2]) for code in (EXEC, VCC))
        return self.constants | {
            "EXEC": Cell(exec_mask), "VCC": Cell(vcc), "SCC": Cell(int(self.before.scc[wave]), 1, "u"),
            "EXECZ": Cell(int(exec_mask == 0), 1, "u"), "VCCZ": Cell(int(vcc == 0), 1, "u"), "D1": Cell(),
            "PC": Cell(4 * START)}

    # ---- operands

    def operand(self, code: int, size: int, kind: str, wave: int, lane: int, agpr: bool = False) -> int:
        """Its bits: of 64, or the 32 of a register."""
        if code >= 256:
            register = code - 256 + AGPRS * agpr
            low = int(self.before.v[register, wave, lane])
            return low | int(self.before.v[register + 1, wave, lane]) << 32 if size == 64 else low
        if code == 255:
            literal = self.instruction.literal or 0
            return literal << 32 if kind == "d" else literal
        if code == 253:
            return int(self.before.scc[wave])
        if 128 <= code <= 208:
            return (code - 128 if code <= 192 else 192 - code) & (1 << size) - 1
        if code in INLINE:
            return formats.BY_WIDTH[size].bits(Fraction(INLINE[code]))
        if code == 248:
            return INV_2PI[size]
        if code >= 108 and code not in (M0, EXEC, EXEC + 1):
            raise NotImplementedError(f"a source operand {code}")
        low = int(self.before.s[wave, code])
        return low | int(self.before.s[wave, code + 1]) << 32 if size == 64 else low

    def write_scalar(self, wave: int, register: int, bits: int, width: int) -> None:
        self.after.s[wave, register] = bits & 0xFFFFFFFF
        if width == 64:
            self.after.s[wave, register + 1] = bits >> 32

    # ---- scalar

    def _scalar(self, wave: int) -> None:
        scope = self.scope(wave)
        values = [Cell(self.operand(getattr(self.fields, name).offset, self.size(name), "", wave, 0))
                  for name in ("ssrc0", "ssrc1") if hasattr(self.fields, name)]
        register = self.fields.sdst.offset if hasattr(self.fields, "sdst") else None
        if register is not None:
            scope["D0"] = Cell(int(self.before.s[wave, register]) | int(self.before.s[wave, register + 1]) << 32)
        if self.family == "SOPK":
            immediate = Cell(self.fields.simm16, 16)
            values = [Cell(int(self.before.s[wave, register])), immediate] if "cmpk" in self.name else [immediate]
        scope |= {f"S{i}": value for i, value in enumerate(values)}
        run(self.text, scope)
        if register is not None and scope["D0"].written:
            wide = self.size("sdst") == 64
            self.write_scalar(wave, register, scope["D0"].bits & (1 << (64 if wide else 32)) - 1, 64 if wide else 32)
        self.after.scc[wave] = bool(scope["SCC"].bits)
        if scope["EXEC"].written:
            self.write_scalar(wave, EXEC, scope["EXEC"].bits, 64)
        if scope["PC"].written:
            self.after.pc[wave] = scope["PC"].bits // 4

    # ---- vector

    def _vector(self, wave: int) -> None:
        if "VGPR[" in self.text and "laneId" not in self.text:
            self._whole_wave(wave)
            return
        active = int(self.before.exec[wave])
        mask, writes_mask = 0, False
        for lane in range(LANES):
            if not active >> lane & 1:
                continue
            scope = self.scope(wave)
            scope |= {"laneId": Cell(lane, 32, "i"), "VGPR": Registers(self.after.v[:, wave])}
            scope |= {name: Cell(self.fields.__getattr__(field).offset - 256, 32, "u")
                      for name, field in (("VDST", "vdst"), ("SRC0", "src0")) if hasattr(self.fields, field)}
            register = self._register()
            if register is not None:
                pair = self.before.v[register:register + 2, wave, lane]
                scope["D0"] = scope["D"] = Cell(int(pair[0]) | int(pair[-1]) << 32)
            else:
                scope["D0"] = Cell()
            if (carries := self._carry()) is not None:
                scope["VCC"] = Cell(self.operand(carries, 64, "", wave, lane))
            written = self._lane_written(wave, lane)
            if not self._set_sources(scope, wave, lane):
                continue
            run(self.text, scope)
            if register is None:
                mask, writes_mask = mask | (scope["D0"].bits >> lane & 1) << lane, True
                continue
            if scope["D1"].written or scope["VCC"].written:
                bit = scope["D1"].bits & 1 if scope["D1"].written else scope["VCC"].bits >> lane & 1
                mask, writes_mask = mask | bit << lane, True
            if scope["D0"].written and written:
                self._write_lane(scope, register, wave, lane)
        if writes_mask or register_is_mask(self.family) or re.search(r"VCC\.u64\[laneId\] =|\bD1\.", self.text):
            self.write_scalar(wave, self._mask_register(), mask, 64)

    def _whole_wave(self, wave: int) -> None:
        scope = self.scope(wave)
        scope["VGPR"] = Registers(self.after.v[:, wave])
        to_scalar = self.name.startswith("v_read")
        scope["D0"] = Cell()
        for name, field in (("VDST", "vdst"), ("SRC0", "src0"), ("ADDR", "addr"), ("DATA0", "data0")):
            if hasattr(self.fields, field):
                number = getattr(self.fields, field).offset
                scope[name] = Cell(number - 256 if number >= 256 else number, 32, "u")
        scope["OFFSET"] = Cell(getattr(self.fields, "offset0", 0) | getattr(self.fields, "offset1", 0) << 8, 16, "u")
        for i, field in enumerate(("src0", "src1")):
            if hasattr(self.fields, field):
                code = getattr(self.fields, field).offset
                scope[f"S{i}"] = Cell(self.operand(code, 32, "", wave, 0))
        run(self.text, scope)
        if to_scalar:
            self.write_scalar(wave, self.instruction.number("vdst"), scope["D0"].bits, 32)

    def _register(self) -> int | None:
        if self.family.startswith("VOPC") or self.family == "VOP3_SDST":
            return None
        return self.fields.vdst.offset - 256 + AGPRS * (self.name in ("v_accvgpr_write", "v_accvgpr_mov_b32"))

    def _mask_register(self) -> int:
        if self.family.startswith("VOPC_SDWA"):
            return self.fields.sdst.offset if self.fields.sd else VCC
        if self.family == "VOP3SD":
            return self.fields.sdst.offset
        return self.fields.vdst.offset if self.family == "VOP3_SDST" else VCC

    def _carry(self) -> int | None:
        """Where lanes find the bit that the text calls VCC."""
        if (self.family, self.name) == ("VOP3", "v_cndmask_b32") or (
                self.family == "VOP3SD" and self.name.startswith(("v_addc", "v_subb"))):
            return self.fields.src2.offset
        return None

    def _lane_written(self, wave: int, lane: int) -> bool:
        if not self.family.endswith("DPP16"):
            return True
        return bool(self.fields.row_mask >> lane // 16 & 1 and self.fields.bank_mask >> lane // 4 % 4 & 1)

    def _set_sources(self, scope: dict, wave: int, lane: int) -> bool:
        """False where DPP leaves the lane alone, since there is nothing to read."""
        raw = []
        for position, names in enumerate(SOURCES):
            moved = self.family.endswith(("DPP16", "SDST", "SDWA"))  # their src0 says so, vsrc0 is the register
            name = next((n for n in (reversed(names) if moved else names) if hasattr(self.fields, n)), None)
            if name is None or (position == 2 and f"S{position}" not in self.text and "S[" not in self.text):
                continue
            size, kind = self.size(names[0]), self.trial.kind(name)
            from_lane = lane
            if self.family.endswith("DPP16") and position == 0:
                from_lane = dpp_source(self.fields.dpp, lane)
                if from_lane is None or not int(self.before.exec[wave]) >> from_lane & 1:
                    if not self.fields.bc:
                        return False
                    raw.append((0, size, kind))
                    continue
            code = getattr(self.fields, name).offset
            if "SDWA" in self.family and getattr(self.fields, f"s{position}"):
                code -= 256
            size = max(16, size)
            if self.family == "VOP3P" and 128 <= code <= 248 and (bits := self._of_pair(code, size, kind)) is not None:
                raw.append((bits, size, kind))
                continue
            from_agpr = self.name in ("v_accvgpr_read", "v_accvgpr_mov_b32")
            bits = self.operand(code, size, kind, wave, from_lane, from_agpr)
            raw.append((bits, size, kind))
        if self.family == "VOP3P":
            self._packed_sources(scope, raw)
            return True
        for position, (bits, size, kind) in enumerate(raw):
            bits = self._modified(bits, size, kind, position)
            scope[f"S{position}"] = Cell(bits)
        return True

    def _of_pair(self, code: int, size: int, kind: str) -> int | None:
        """An inline constant of packed operations, 32 bits. Of 16-bit ones LLVM says, besides that the manual is
        misleading, "integer encodings (-16 .. 64) are always produced as sign-extended 32-bit values", float encodings
        "for F16 instructions: corresponding half-precision float values in the LSBs, 0 in the MSBs; for UI16
        instructions: corresponding single-precision float value"."""
        if self.name.startswith("v_pk_") and size == 64:
            return self.operand(code, 32, kind, 0, 0)
        if self.name.startswith("v_dot2_f32_bf16"):
            return self.operand(code, 32, "f", 0, 0) >> (16 if code > 208 else 0)
        if self.name.startswith("v_dot2") or self.name.startswith("v_pk_") and kind in ("h", "p"):
            return self.operand(code, 32 if code <= 208 else 16, kind, 0, 0)
        return self.operand(code, 32, "f", 0, 0) if self.name.startswith("v_pk_") else None

    def _modified(self, bits: int, size: int, kind: str, position: int) -> int:
        """Of the modifiers of VOP3, DPP and SDWA: which part, and the sign."""
        fields = self.fields
        if "SDWA" in self.family:
            bits = bits if "SDWA_SRC0_SEL" in self.text else selected(
                bits, getattr(fields, f"src{position}_sel"), getattr(fields, f"src{position}_sext"))
            negative, absolute = getattr(fields, f"src{position}_neg"), getattr(fields, f"src{position}_abs")
        elif self.family.endswith("DPP16"):
            negative, absolute = getattr(fields, f"src{position}_neg"), getattr(fields, f"src{position}_abs")
        elif self.family.startswith("VOP3") and "bitop3" not in self.name:
            negative, absolute = fields.neg >> position & 1, getattr(fields, "abs", 0) >> position & 1
            if size == 16 and getattr(fields, "opsel", 0) >> position & 1 and "OPSEL" not in self.text:
                bits >>= 16
        elif "bitop3_b16" in self.name:
            return bits >> 16 if fields.opsel >> position & 1 else bits
        else:
            negative = absolute = 0
        if self.name in ULPS or kind == "f" and "class" not in self.name:
            bits = self._flushed(bits, self.name in ULPS)
        top = 1 << (16 if kind == "h" else 64 if kind == "d" else 32) - 1
        bits = bits & ~top if absolute else bits
        return bits ^ top if negative else bits

    def _flushed(self, bits: int, always: bool = False) -> int:
        """An fp32 number, where MODE flushes denormals."""
        return bits & 0x80000000 if (always or self.trial.kernel.flushes) and bits & 0x7F800000 == 0 else bits

    def _packed_sources(self, scope: dict, raw: list) -> None:
        fields = self.fields
        high_select = fields.opsel_hi | fields.opsel_hi2 << 2
        if "S[" in self.text:  # mixed precision: neg_hi means the absolute value
            cells = []
            for i, (bits, _, _) in enumerate(raw):
                top = 1 << (31 if not high_select >> i & 1 or fields.opsel >> i & 1 else 15)
                bits = bits if high_select >> i & 1 else self._flushed(bits)
                bits = bits & ~top if fields.neg_hi >> i & 1 else bits
                cells.append(Cell(bits ^ top if fields.neg >> i & 1 else bits, 32))
            scope["S"] = Array(cells)
            return
        width = 32 if self.name.endswith("f32") and self.name.startswith("v_pk") else 16
        for i, (bits, _, _) in enumerate(raw):
            if self.name in ("v_pk_mov_b32", "v_accvgpr_read", "v_accvgpr_write"):
                scope[f"S{i}"] = Cell(bits)
                continue
            parts = []
            for select, negate in ((fields.opsel, fields.neg), (high_select, fields.neg_hi)):
                part = bits >> (width if select >> i & 1 else 0) & (1 << width) - 1
                part = self._flushed(part) if width == 32 else part
                parts.append(part ^ 1 << width - 1 if negate >> i & 1 else part)
            scope[f"S{i}"] = Cell(parts[0] | parts[1] << width)

    def _write_lane(self, scope: dict, register: int, wave: int, lane: int) -> None:
        fields, bits, written = self.fields, scope["D0"].bits, scope["D0"].written
        kind = self.trial.kind("vdst")
        bits = self._clamped(bits, kind, scope)
        if kind == "f" and written != 16:
            bits = self._flushed(bits & 0xFFFFFFFF) | self._flushed(bits >> 32) << 32
        to = self.after.v[:, wave, lane]
        if "SDWA" in self.family:
            to[register:register + max(1, written // 32)] = placed(
                bits, written, int(to[register]), fields.dst_sel, fields.dst_unused)
        elif written == 16:
            keeps = self.name.startswith(KEEPS)
            if self.family == "VOP3" and fields.opsel & 8 and "OPSEL" not in self.text:
                to[register] = int(to[register]) & 0xFFFF | (bits & 0xFFFF) << 16
            else:
                to[register] = bits & 0xFFFF | (int(to[register]) & 0xFFFF0000 if keeps else 0)
        else:
            to[register] = bits & 0xFFFFFFFF
            if written == 64:
                to[register + 1] = bits >> 32

    def _clamped(self, bits: int, kind: str, scope: dict) -> int:
        if getattr(self.fields, "omod", 0) and "bitop3" not in self.name:
            raise NotImplementedError("output modifiers")
        if not getattr(self.fields, "clmp", 0):
            return bits
        if self.family == "VOP3P" or kind not in ("f", "h") and self.name != "v_sub_u32":
            raise NotImplementedError(f"clamping of {self.name}")
        if kind == "i":
            one, other = (scope[s].bits & 0xFFFFFFFF for s in ("S0", "S1"))
            return max(0, one - other)
        form = formats.F32 if kind == "f" else formats.F16
        number = form.number(bits & (1 << form.width) - 1)
        if number != number:
            return 0
        return form.bits(min(max(number, Fraction(0)), Fraction(1)) if number not in (0, 1) else number)

    # ---- memory

    def _accesses(self, wave: int) -> list[int]:
        return [lane for lane in range(LANES) if int(self.before.exec[wave]) >> lane & 1]

    def _data(self, scope: dict, wave: int, lane: int, names: dict[str, str]) -> None:
        agpr = AGPRS * bool(self.fields.acc)
        for name, field in names.items():
            first = getattr(self.fields, field).offset - 256 + agpr
            words = self.before.v[first:first + 4, wave, lane].tolist()
            scope[name] = Cell(sum(word << 32 * i for i, word in enumerate(words)), 128)

    def _result(self, cell: Cell, field: str, wave: int, lane: int) -> None:
        first = getattr(self.fields, field).offset - 256 + AGPRS * bool(self.fields.acc)
        for i in range(-(-cell.written // 32)):
            self.after.v[first + i, wave, lane] = cell.bits >> 32 * i & 0xFFFFFFFF

    def _lds(self, wave: int) -> None:
        if self.name == "ds_bpermute_b32":
            self._whole_wave(wave)
            return
        if "_tr_b" in self.name:
            self._transposed(wave)
            return
        fields = self.fields
        offset = fields.offset0 | fields.offset1 << 8
        for lane in self._accesses(wave):
            scope = self.scope(wave)
            address = int(self.before.v[fields.addr.offset - 256, wave, lane])
            scope |= {"MEM": Bytes(self.after.lds, 0, len(self.after.lds)), "OFFSET": Cell(offset, 16, "u"),
                      "OFFSET0": Cell(fields.offset0, 8, "u"), "OFFSET1": Cell(fields.offset1, 8, "u"),
                      # where the text does not say how the address is made, the offset is in it
                      "ADDR": Cell(address + offset, 32, "u"), "RETURN_DATA": Cell()}
            scope["CalcDsAddr"] = lambda inner, values, a=address: Value(
                a + values[1].bits + (values[2].bits << 8), 32, "u")
            self._data(scope, wave, lane, {"DATA": "data0", "DATA2": "data1"})
            run(self.text, scope)
            if scope["RETURN_DATA"].written and ("rtn" in self.name or "read" in self.name):
                self._result(scope["RETURN_DATA"], "vdst", wave, lane)

    def _transposed(self, wave: int) -> None:
        """Of 16 lanes, each gives the address of its part of a row of 16 numbers, rows in order, and gets a column."""
        loaded, width = (int(number) for number in re.findall(r"b(\d+)", self.name))
        offset, count = self.fields.offset0 | self.fields.offset1 << 8, loaded // width
        addresses = self.before.v[self.fields.addr.offset - 256, wave].astype(int) + offset
        first = self.fields.vdst.offset - 256 + AGPRS * bool(self.fields.acc)
        for lane in self._accesses(wave):
            got = 0
            for row in range(count):
                part, position = divmod(16 * row + lane % 16, count)
                at = int(addresses[lane // 16 * 16 + part])
                bits = int.from_bytes(self.before.lds[at:at + loaded // 8].tobytes(), "little")
                got |= (bits >> width * position & (1 << width) - 1) << width * row
            self.after.v[first:first + loaded // 32, wave, lane] = [got >> i & 0xFFFFFFFF for i in range(0, loaded, 32)]

    def _global(self, wave: int) -> None:
        fields = self.fields
        offset = fields.offset if self.family == "FLAT" else (fields.offset ^ 0x1000) - 0x1000
        for lane in self._accesses(wave):
            address = int(self.before.v[fields.addr.offset - 256, wave, lane])
            if self.family == "GLOBAL" and fields.saddr.offset != 127:
                base = self.before.s[wave, fields.saddr.offset:fields.saddr.offset + 2].tolist()
                address += base[0] | base[1] << 32
            else:
                address |= int(self.before.v[fields.addr.offset - 255, wave, lane]) << 32
            if "_lds_" in self.name:
                self._to_lds(wave, lane, address + offset - self.trial.middle)
                continue
            self._at(wave, lane, address + offset, len(self.after.memory), "data", "vdst")

    def _at(self, wave: int, lane: int, address: int, limit: int, data: str, result: str) -> None:
        base = self.trial.middle - MIDDLE
        scope = self.scope(wave) | {"MEM": Bytes(self.after.memory, base, limit), "RETURN_DATA": Cell()}
        for call in ("CalcGlobalAddr", "CalcFlatAddr", "CalcBufferAddr"):
            scope[call] = lambda inner, values: Value(address, 64, "u")
        scope |= dict.fromkeys(("ADDR", "SADDR", "OFFSET", "VADDR", "SRSRC", "SOFFSET"), Cell())
        self._data(scope, wave, lane, {"DATA": data, "VDATA": data})
        scope["VDATA"].written = 0
        run(self.text, scope)
        if scope["VDATA"].written:
            self._result(scope["VDATA"], result, wave, lane)
        elif scope["RETURN_DATA"].written and self.fields.sc0:
            self._result(scope["RETURN_DATA"], result, wave, lane)

    def _buffer(self, wave: int) -> None:
        """Raw buffers: an access is in range where all of it lies before num_records, each dword by itself."""
        fields = self.fields
        soffset = self.operand(fields.soffset.offset, 32, "", wave, 0)
        for lane in self._accesses(wave):
            within = fields.offset
            if fields.offen:
                within = within + int(self.before.v[fields.vaddr.offset - 256, wave, lane]) & 0xFFFFFFFF
            if fields.lds:
                self._to_lds(wave, lane, within + soffset)
            else:
                self._at(wave, lane, self.trial.middle + within + soffset, MIDDLE + RECORDS, "vdata", "vdata")

    def _to_lds(self, wave: int, lane: int, offset: int) -> None:
        """LDS at M0 + offset + the lane's place gets a dword, or more."""
        size = {"dword": 4, "dwordx3": 12, "dwordx4": 16}[self.name.rsplit("_", 1)[1]]
        at = int(self.before.s[wave, M0]) + self.fields.offset + size * lane
        for word in range(0, size, 4):
            inside, first = offset + word + 4 <= RECORDS or self.family == "GLOBAL", MIDDLE + offset + word
            self.after.lds[at + word:at + word + 4] = self.before.memory[first:first + 4] if inside else 0

    def _scalar_memory(self, wave: int) -> None:
        fields = self.fields
        base = self.before.s[wave, fields.sbase.offset:fields.sbase.offset + 2].tolist()
        address = (base[0] | base[1] << 32) + (fields.offset if fields.imm else 0)
        if fields.soffset_en or not fields.imm:
            address += int(self.before.s[wave, fields.soffset.offset if fields.soffset_en else fields.offset & 0x7F])
        given = [int(word) << 32 * i for i, word in enumerate(self.before.s[wave, fields.sdata.offset:][:4])]
        data = Cell(sum(given), 128)
        memory = Bytes(self.after.memory, self.trial.middle - MIDDLE, len(self.after.memory))
        scope = self.scope(wave) | {"SDATA": Cell(0, 512) if "_load_" in self.name else data, "DATA": data,
                                    "MEM": memory, "RETURN_DATA": Cell()}
        scope |= dict.fromkeys(("SBASE", "SOFFSET", "OFFSET"), Cell())
        scope["CalcScalarGlobalAddr"] = lambda inner, values: Value(address, 64, "u")
        run(self.text, scope)
        result = scope["RETURN_DATA"] if fields.glc and "_atomic_" in self.name else scope["SDATA"]
        for i in range(result.written // 32):
            self.after.s[wave, fields.sdata.offset + i] = result.bits >> 32 * i & 0xFFFFFFFF


def register_is_mask(family: str) -> bool:
    return family.startswith("VOPC") or family == "VOP3_SDST"
