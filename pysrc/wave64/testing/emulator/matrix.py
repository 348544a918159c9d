"""Matrix instructions, from VGPRs or AGPRs, whatever EXEC says: MFMA, which is D = A x B + C for 1 to 16 blocks of a
wave; its scaled forms; and SMFMAC, which is D += A x B with half of A left out.

Layouts, as AMD's manual and its Matrix Instruction Calculator have them. A lane holds consecutive k of one row of A
(column of B): lane = row + M * (block + blocks * (k / elements a lane holds)). Of D it holds one column: 4 x 4: block =
lane / 4, a row per register; 16 x 16: rows 4 * (lane / 16) + register, further registers further blocks; 32 x 32: rows
8 * (register / 4) + 4 * (lane / 32) + register % 4. fp64 keeps a row every 4: row = 4 * register + lane / 16, and
4 x 4: lane = 16 * row + 4 * block + column.

f8f6f4: of 6 and 4 bits a lane holds 32 consecutive k. Of 8 bits it holds 16, and 16 more half of K further on. A scale
is for 32 consecutive k in either case, in the lane of row + M * (k / 32), so with 8 bits not always in the lane that
holds the numbers (measured in composable_kernel's test/mx_mfma_op; Triton's layouts are the same).

SMFMAC: of each 4 consecutive k of A two are held, and 2 bits each of the index register say which. gfx950's wider ones
have A and B in two parts, half of K apart, which makes the same sums.
The sum is made in fp64 and rounded once, so closer than hardware's.
"""

import functools
import re
from collections.abc import Callable
from typing import cast

import numpy as np

from wave64.testing.emulator import arithmetic as ar
from wave64.testing.emulator.binding import Binding, Follow, Known
from wave64.testing.emulator.decode import VGPR0
from wave64.testing.emulator.memory import EmulationError

F32, F64, U32 = np.float32, np.float64, np.uint32
NAME = re.compile(r"v_(mfma|mfma_scale|smfmac)_(f32|i32|f64)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?"
                  r"_(f32|f64|f16|bf16|i8|f8f6f4|(?:fp8|bf8)_(?:fp8|bf8))$")
BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i8": 8, "fp8": 8, "bf8": 8, "fp6": 6, "bf6": 6, "fp4": 4}
GFX950 = re.compile(r"v_mfma_.*((16x16x32|32x32x16)_b?f16|(16x16x64|32x32x32)_i8|f8f6f4)")
MIXED = ("fp8", "bf8", "fp6", "bf6", "fp4")       # of f8f6f4: what the fields cbsz (of A) and blgp (of B) name
SCALED = 32                                       # consecutive k that share a scale
TINY = {"fp6": (2, 3), "bf6": (3, 2), "fp4": (2, 1)}  # bits of exponent and mantissa of OCP's formats without NaN
#: K of gfx942's SMFMAC, by rows and bits; gfx950 has the double, too
SPARSE = {(16, 16): 32, (32, 16): 16, (16, 8): 64, (32, 8): 32}
LANES = np.arange(64)
#: blgp -> the lane that each lane's part of B is taken from
PERMUTED = (LANES, LANES % 32, LANES % 32 + 32, (LANES + 16) % 64, *(LANES % 16 + 16 * i for i in range(4)))


@functools.cache
def _values(kind: str) -> np.ndarray:
    """Of all codes of a format of less than 8 bits."""
    exponent, mantissa = TINY[kind]
    codes = np.arange(1 << exponent + mantissa)
    power, fraction = codes >> mantissa, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    positive = np.ldexp(fraction + (power > 0), np.maximum(power, 1) - (1 << exponent - 1) + 1)
    return np.concatenate([positive, -positive])


def _widen(words: np.ndarray, kind: str, arch: str) -> np.ndarray:
    """[..., words] uint32 as [..., elements] fp64."""
    words = np.ascontiguousarray(words)
    if kind == "bf16":
        return ar.bf16_to_f32(words.view(np.uint16)).astype(F64)
    if kind in ("fp8", "bf8"):
        return ar.small(kind, arch).decode(words.view(np.uint8)).astype(F64)
    if kind in TINY:
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        codes = bits.reshape(*words.shape[:-1], -1, BITS[kind]) @ (1 << np.arange(BITS[kind]))
        return _values(kind)[codes]
    return words.view({"f32": F32, "f64": F64, "f16": np.float16, "i8": np.int8}[kind]).astype(F64)


def _rows(kind: str, size: int, registers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(block, row, column) of D, each [registers, 64]."""
    lane, register = np.arange(64)[None, :], np.arange(registers)[:, None]
    if size == 4 and kind == "f64":
        return lane // 4 % 4, lane // 16, lane % 4
    if size == 4:
        return lane // 4 + 0 * register, register + 0 * lane, lane % 4 + 0 * register
    if size == 16:
        row = 4 * register + lane // 16 if kind == "f64" else 4 * (lane // 16) + register % 4
        return (0 if kind == "f64" else register // 4) + 0 * lane, row, lane % 16 + 0 * register
    within = register % 16
    return register // 16 + 0 * lane, 8 * (within // 4) + 4 * (lane // 32) + within % 4, lane % 32 + 0 * register


def _operand(held: np.ndarray, size: int, blocks: int, halves: bool = False) -> np.ndarray:
    """What lanes hold, [waves, 64, elements], as [waves, blocks, rows, k]. halves: a lane's second half of elements is
    of the second half of K."""
    n, _, count = held.shape
    groups = 64 // (size * blocks)
    if halves:
        parts = held.reshape(n, groups, blocks, size, 2, count // 2).transpose(0, 2, 3, 4, 1, 5)
    else:
        parts = held.reshape(n, groups, blocks, size, count).transpose(0, 2, 3, 1, 4)
    return parts.reshape(n, blocks, size, groups * count)


def _scale(b: Binding, i: int, code: int, size: int) -> Callable[[], np.ndarray]:
    """What gives the E8M0 scales of A (i = 0) or B as factors, [waves, 1, rows, k], from a byte of each lane. 255 is
    NaN."""
    fields = b.fields
    if fields.neg or fields.neg_hi or code < VGPR0:  # compilers avoid constants here, for a defect of the hardware
        raise NotImplementedError(f"{b.instruction.name} with a scale that is negated, or no vector register")
    word = b.words(code - VGPR0, 1)[0]
    shift = U32(8 * ((fields.opsel >> i & 1) | (fields.opsel_hi >> i & 1) << 1))

    def factors() -> np.ndarray:
        codes = (word >> shift & U32(255)).astype(np.int64)
        each = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
        return np.repeat(_operand(each[..., None], size, 1), SCALED, axis=-1)
    return factors


def _sources(b: Binding, kinds: tuple[str, str], held: tuple[int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Views of the registers of A and B, of which a lane holds so many elements."""
    fields = b.fields
    left, right = (b.words(getattr(fields, f"src{i}").offset - VGPR0, held[i] * BITS[kinds[i]] // 32,
                           bool(fields.acc >> i & 1)) for i in (0, 1))
    return left, right


def _modifiers(b: Binding, kinds: str, blocks: int) -> tuple[int | None, np.ndarray | None, tuple[int, int, int]]:
    """(the block of A that all take, the lane of B that each takes, signs of A, B and C), from cbsz, abid and blgp.
    None: their own. Raises NotImplementedError where the instruction has no such modifier."""
    fields = b.fields
    cbsz, abid, blgp = fields.cbsz, fields.abid, fields.blgp
    if kinds == "f64":  # ignores cbsz and abid, and negates by blgp
        a, b_, c = (-1 if blgp >> i & 1 else 1 for i in range(3))
        return None, None, (a, b_, c)
    if cbsz and (blocks == 1 or 1 << cbsz != blocks) or abid >= 1 << cbsz:
        # of a broadcast to some blocks, AMD's manual and its calculator have different ones
        raise NotImplementedError(f"{b.instruction.name} with cbsz {cbsz} and abid {abid}")
    if blgp and blocks == 1 and kinds != "f32":
        raise NotImplementedError(f"{b.instruction.name} with blgp {blgp}")
    return abid if cbsz else None, PERMUTED[blgp] if blgp else None, (1, 1, 1)


def _accumulator(b: Binding, result: str, registers: int, sign: int = 1) -> Callable[[np.ndarray], None]:
    """What writes the sum of C and a product, [registers, waves, 64]. sign: of C."""
    fields, width = b.fields, 2 if result == "f64" else 1
    acc, first, constant = bool(fields.acc_cd), b.number("vdst"), None
    if b.instruction.name.startswith("v_smfmac"):
        c = b.words(first, registers, acc)
    elif fields.src2.offset >= VGPR0:
        c = b.words(fields.src2.offset - VGPR0, registers * width, acc)
    else:
        constant = sign * b.constant(fields.src2.offset, {"f32": "f", "i32": "i", "f64": "d"}[result])
        c = []
    b.note(b.writes, first, registers * width, acc)
    to = (b.party.A if acc else b.party.V)[first:first + registers * width]

    def addend() -> np.ndarray:
        if constant is not None:
            return constant
        if result == "f64":
            pairs = np.ascontiguousarray(np.stack(c, -1)).view(F64)
            return sign * np.moveaxis(pairs, -1, 0)
        return np.stack(c).view(F32 if result == "f32" else np.int32)

    def write(product: np.ndarray) -> None:
        if result == "f32":
            to[...] = (product + addend()).astype(F32).view(U32)
        elif result == "i32":
            to[...] = (product.astype(np.int64) + addend()).astype(np.int32).view(U32)
        else:
            total = product + addend()
            both = np.ascontiguousarray(total).view(U32).reshape(*total.shape, 2)
            to[...] = np.moveaxis(both, -1, 1).reshape(to.shape)
    return write


def _follow(b: Binding, size: int, blocks: int, layout: tuple, sides: tuple[tuple[int, ...], ...], width: int = 1,
            source: int | None = None, lanes: np.ndarray | None = None) -> Follow:
    """An element of D is known where a row of A, a column of B and the element of C are. sides: which of the binding's
    reads belong to A, to B and to C. A lane holds numbers of one row, or column, alone."""
    block, row, column = layout
    every = np.ones((b.party.count, 64), bool)

    def follow(known: Known) -> list:
        left, right = ([register for i in side for register in known(i)] for side in sides[:2])
        left, right = (cast(np.ndarray, functools.reduce(np.logical_and, side, every)) for side in (left, right))
        right = right if lanes is None else right[:, lanes]
        left, right = (cast(np.ndarray, _operand(side[..., None], size, blocks).all(-1)) for side in (left, right))
        left = left if source is None else left[:, source:source + 1]
        new = (left[..., :, None] & right[..., None, :])[:, block, row, column].swapaxes(0, 1)
        new = np.repeat(new, width, axis=0)
        for i in sides[2]:
            new = new & np.stack(known(i))
        return [(0, new, every)]
    return follow


def _of_each(kinds: str) -> tuple[str, str]:
    """What a name says of A and B: of both, or of each with _ between."""
    left, _, right = kinds.partition("_")
    return left, right or left


def form(name: str) -> Callable | None:
    """The form of a matrix instruction, None where the name is none that is known."""
    found = NAME.match(name)
    if found is None:
        return None
    family, result, size, _, depth, blocks, kinds = found.groups()
    size, depth, blocks = int(size), int(depth), int(blocks or 1)
    layout = _rows(result, size, size * size * blocks // 64)
    if family == "smfmac":
        named = _of_each(kinds)
        wide, rest = divmod(depth, SPARSE.get((size, BITS[named[0]]), 1))
        return _sparse(result, size, depth, named, wide == 2, layout) if wide in (1, 2) and not rest else None
    if kinds == "f8f6f4":
        return _mixed(size, depth, family == "mfma_scale", layout)
    return _dense(result, size, depth, blocks, kinds, bool(GFX950.search(name)), layout)


def _dense(result: str, size: int, depth: int, blocks: int, kinds: str, only_950: bool, layout: tuple) -> Callable:
    named = _of_each(kinds)
    held = size * blocks * depth // 64
    block, row, column = layout

    def bind(b: Binding) -> Callable:
        arch = b.machine.arch
        if only_950 and arch != "gfx950":
            raise NotImplementedError(f"{b.instruction.name} is an instruction of gfx950")
        source, lanes, signs = _modifiers(b, kinds, blocks)
        negative = signs[0] != signs[1]
        left, right = _sources(b, named, (held, held))
        write = _accumulator(b, result, len(row), signs[2])
        b.follow = _follow(b, size, blocks, layout, ((0,), (1,), tuple(range(2, len(b.reads)))),
                           2 if result == "f64" else 1, source, lanes)

        def run() -> None:
            a, bb = (_widen(np.stack(views, axis=-1), kind, arch)
                     for views, kind in zip((left, right), named, strict=True))
            a, bb = _operand(a, size, blocks), _operand(bb if lanes is None else bb[:, lanes], size, blocks)
            a = a if source is None else a[:, source:source + 1]
            if negative:
                a = -a
            write(np.matmul(a, bb.swapaxes(-1, -2))[:, block, row, column].swapaxes(0, 1))
        return run
    return bind


def _mixed(size: int, depth: int, scaled: bool, layout: tuple) -> Callable:
    held = size * depth // 64
    block, row, column = layout

    def bind(b: Binding) -> Callable:
        fields, arch = b.fields, b.machine.arch
        if arch != "gfx950":
            raise NotImplementedError(f"{b.instruction.name} is an instruction of gfx950")
        if max(fields.cbsz, fields.blgp) >= len(MIXED) or fields.abid != scaled:  # abid says that there are scales
            raise NotImplementedError(f"{b.instruction.name} with cbsz {fields.cbsz}, abid {fields.abid} and blgp "
                                      f"{fields.blgp}")
        kinds = MIXED[fields.cbsz], MIXED[fields.blgp]
        sources = _sources(b, kinds, (held, held))
        write = _accumulator(b, "f32", len(row))
        addend = tuple(range(2, len(b.reads)))
        scales = [_scale(b, i, code, size) for i, code in enumerate((fields.scale_src0, fields.scale_src1))
                  ] if scaled else []
        first = 2 + len(addend)
        sides = ((0, first), (1, first + 1), addend) if scaled else ((0,), (1,), addend)
        b.follow = _follow(b, size, 1, layout, sides)

        def run() -> None:
            operands = []
            for i, (views, kind) in enumerate(zip(sources, kinds, strict=True)):
                numbers = _operand(_widen(np.stack(views, axis=-1), kind, arch), size, 1, halves=BITS[kind] == 8)
                operands.append(numbers * scales[i]() if scaled else numbers)
            product = np.matmul(operands[0], operands[1].swapaxes(-1, -2))
            write(product[:, block, row, column].swapaxes(0, 1))
        return run
    return bind


def _sparse(result: str, size: int, depth: int, kinds: tuple[str, str], wide: bool, layout: tuple) -> Callable:
    held = size * depth // 64  # elements of B a lane holds, and of A with those left out
    block, row, column = layout
    shifts = 2 * np.arange(held // 2, dtype=U32)
    fours = 4 * (np.arange(held // 2) // 2)
    sets = 32 // held          # of index bits in a register

    def bind(b: Binding) -> Callable:
        fields, arch = b.fields, b.machine.arch
        if wide and arch != "gfx950":
            raise NotImplementedError(f"{b.instruction.name} is an instruction of gfx950")
        if fields.blgp or fields.cbsz > 3 or (sets > 1 and fields.abid >= sets):
            raise NotImplementedError(f"{b.instruction.name} with cbsz {fields.cbsz}, abid {fields.abid} and blgp "
                                      f"{fields.blgp}")
        left, right = _sources(b, kinds, (held // 2, held))
        index = b.words(fields.src2.offset - VGPR0, 1)[0]
        write = _accumulator(b, result, len(row))
        b.follow = _follow(b, size, 1, layout, ((0, 2), (1,), (3,)))
        first = U32(0 if fields.cbsz or sets == 1 else held * fields.abid)  # bit of the set

        def run() -> None:
            which = (index[..., None] >> (first + shifts) & U32(3)).astype(np.intp)
            if (which[..., ::2] >= which[..., 1::2]).any():
                raise EmulationError("a sparse matrix whose two places of four do not ascend, as AMD's manual demands")
            full = np.zeros((*index.shape, held))
            np.put_along_axis(full, fours + which, _widen(np.stack(left, axis=-1), kinds[0], arch), axis=-1)
            bb = _operand(_widen(np.stack(right, axis=-1), kinds[1], arch), size, 1)
            product = np.matmul(_operand(full, size, 1), bb.swapaxes(-1, -2))
            write(product[:, block, row, column].swapaxes(0, 1))
        return run
    return bind
