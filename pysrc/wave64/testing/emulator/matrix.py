"""Matrix instructions (MFMA): D = A x B + C for 1 to 16 blocks of a wave, from VGPRs or AGPRs, whatever EXEC says.

Layouts, as AMD's manual has them. A lane holds consecutive k of one row of A (column of B): lane = row + M * (block +
blocks * (k / elements a lane holds)). Of D it holds one column: 4 x 4: block = lane / 4, a row per register; 16 x 16:
rows 4 * (lane / 16) + register, further registers further blocks; 32 x 32: rows 8 * (register / 4) + 4 * (lane / 32) +
register % 4. fp64 keeps a row every 4: row = 4 * register + lane / 16.
The sum is made in fp64 and rounded once, so closer than hardware's.
"""

import re
from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import arithmetic as ar
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import VGPR0

F32, F64, U32 = np.float32, np.float64, np.uint32
NAME = re.compile(r"v_mfma_(f32|i32|f64)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?"
                  r"_(f32|f64|f16|bf16|i8|f8f6f4|(?:fp8|bf8)_(?:fp8|bf8))$")
BYTES = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2, "i8": 1, "fp8": 1, "bf8": 1}
GFX950 = re.compile(r"(16x16x32|32x32x16)_b?f16|(16x16x64|32x32x32)_i8|f8f6f4")
MIXED = {0: "fp8", 1: "bf8"}  # of f8f6f4: what the fields cbsz (of A) and blgp (of B) name


def _widen(words: np.ndarray, kind: str, arch: str) -> np.ndarray:
    """[..., words] uint32 as [..., elements] fp64."""
    words = np.ascontiguousarray(words)
    if kind == "bf16":
        return ar.bf16_to_f32(words.view(np.uint16)).astype(F64)
    if kind in ("fp8", "bf8"):
        return ar.small(kind, arch).decode(words.view(np.uint8)).astype(F64)
    return words.view({"f32": F32, "f64": F64, "f16": np.float16, "i8": np.int8}[kind]).astype(F64)


def _rows(kind: str, size: int, registers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(block, row, column) of D, each [registers, 64]."""
    lane, register = np.arange(64)[None, :], np.arange(registers)[:, None]
    if size == 4:
        return lane // 4 + 0 * register, register + 0 * lane, lane % 4 + 0 * register
    if size == 16:
        row = 4 * register + lane // 16 if kind == "f64" else 4 * (lane // 16) + register % 4
        return (0 if kind == "f64" else register // 4) + 0 * lane, row, lane % 16 + 0 * register
    within = register % 16
    return register // 16 + 0 * lane, 8 * (within // 4) + 4 * (lane // 32) + within % 4, lane % 32 + 0 * register


def form(name: str) -> Callable | None:
    """The form of a matrix instruction, None where the name is none that is known."""
    found = NAME.match(name)
    if found is None:
        return None
    result, size, _, depth, blocks, kinds = found.groups()
    size, depth, blocks = int(size), int(depth), int(blocks or 1)
    mixed = kinds == "f8f6f4"
    kinds = "fp8_fp8" if mixed else kinds  # until the fields are known; all kinds of it have as many elements
    if result == "f64" and size == 4:
        return None
    named = kinds.split("_") if "_" in kinds else (kinds, kinds)
    held = size * blocks * depth // 64          # elements of A a lane holds
    words = held * BYTES[named[0]] // 4
    width = 2 if result == "f64" else 1         # registers of a result
    registers = size * size * blocks // 64
    block, row, column = _rows(result, size, registers)
    only_950 = bool(GFX950.search(name))

    def bind(b: Binding) -> Callable:
        fields, party, arch = b.fields, b.party, b.machine.arch
        if only_950 and arch != "gfx950":
            raise NotImplementedError(f"{name} is an instruction of gfx950")
        left, right = named
        if mixed:
            if fields.cbsz not in MIXED or fields.blgp not in MIXED:
                raise NotImplementedError("a matrix of 4-bit or 6-bit numbers")
            left, right = MIXED[fields.cbsz], MIXED[fields.blgp]
        elif fields.cbsz or fields.abid or fields.blgp:
            raise NotImplementedError("a matrix instruction that broadcasts or permutes blocks")
        a, bb = (b.words(getattr(fields, f"src{i}").offset - VGPR0, words, bool(fields.acc >> i & 1)) for i in (0, 1))
        acc = bool(fields.acc_cd)
        if fields.src2.offset >= VGPR0:
            c = b.words(fields.src2.offset - VGPR0, registers * width, acc)
        else:
            constant = b.constant(fields.src2.offset, {"f32": "f", "i32": "i", "f64": "d"}[result])
            c = None
        first = b.number("vdst")
        b.note(b.writes, first, registers * width, acc)
        file = party.A if acc else party.V
        to = file[first:first + registers * width]
        n = party.count

        def operand(views: list[np.ndarray], kind: str) -> np.ndarray:
            """[waves, blocks, rows, k]"""
            got = _widen(np.stack(views, axis=-1), kind, arch)
            got = got.reshape(n, depth // held, blocks, size, held).transpose(0, 2, 3, 1, 4)
            return got.reshape(n, blocks, size, depth)

        def run() -> None:
            product = np.matmul(operand(a, left), operand(bb, right).swapaxes(-1, -2))
            got = product[:, block, row, column].swapaxes(0, 1)  # [registers, waves, 64]
            if result == "f32":
                addend = constant if c is None else np.stack(c).view(F32)
                to[...] = (got + addend).astype(F32).view(U32)
            elif result == "i32":
                addend = constant if c is None else np.stack(c).view(np.int32)
                to[...] = (got.astype(np.int64) + addend).astype(np.int32).view(U32)
            else:
                pairs = None if c is None else np.ascontiguousarray(np.stack(c, -1)).view(F64)
                total = got + (constant if pairs is None else np.moveaxis(pairs, -1, 0))
                both = np.ascontiguousarray(total).view(U32).reshape(*total.shape, 2)
                to[...] = np.moveaxis(both, -1, 1).reshape(to.shape)
        return run
    return bind
