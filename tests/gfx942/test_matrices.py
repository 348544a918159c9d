"""Matrix instructions on the emulator against products in fp64, with the register maps of AMD's manual written out
element by element. Factors are small enough that every order of summing gives the same."""

import functools
import re

import numpy as np
import pytest
import torch
from assembled import assemble, run
from formats import BF6, BF8, FP4, FP6, FP8, Format

from wave64.testing.emulator import core
from wave64.testing.emulator.memory import EmulationError

F32, U32 = np.float32, np.uint32
#: all but those of test_mixed_matrices and test_sparse_matrices
MATRICES = [
    *((name, "gfx942") for name in (
        "v_mfma_f32_32x32x1_2b_f32", "v_mfma_f32_16x16x1_4b_f32", "v_mfma_f32_4x4x1_16b_f32",
        "v_mfma_f32_32x32x2_f32", "v_mfma_f32_16x16x4_f32",
        "v_mfma_f32_32x32x4_2b_f16", "v_mfma_f32_16x16x4_4b_f16", "v_mfma_f32_4x4x4_16b_f16",
        "v_mfma_f32_32x32x8_f16", "v_mfma_f32_16x16x16_f16",
        "v_mfma_f32_32x32x4_2b_bf16", "v_mfma_f32_16x16x4_4b_bf16", "v_mfma_f32_4x4x4_16b_bf16",
        "v_mfma_f32_32x32x8_bf16", "v_mfma_f32_16x16x16_bf16",
        "v_mfma_i32_32x32x4_2b_i8", "v_mfma_i32_16x16x4_4b_i8", "v_mfma_i32_4x4x4_16b_i8",
        "v_mfma_i32_32x32x16_i8", "v_mfma_i32_16x16x32_i8",
        "v_mfma_f32_16x16x32_fp8_fp8", "v_mfma_f32_16x16x32_fp8_bf8", "v_mfma_f32_16x16x32_bf8_fp8",
        "v_mfma_f32_16x16x32_bf8_bf8", "v_mfma_f32_32x32x16_fp8_fp8", "v_mfma_f32_32x32x16_fp8_bf8",
        "v_mfma_f32_32x32x16_bf8_fp8", "v_mfma_f32_32x32x16_bf8_bf8",
        "v_mfma_f64_16x16x4_f64", "v_mfma_f64_4x4x4_4b_f64")),
    *((name, "gfx950") for name in (
        "v_mfma_f32_16x16x32_f16", "v_mfma_f32_32x32x16_f16", "v_mfma_f32_16x16x32_bf16", "v_mfma_f32_32x32x16_bf16",
        "v_mfma_i32_16x16x64_i8", "v_mfma_i32_32x32x32_i8", "v_mfma_f32_16x16x32_fp8_fp8")),
]
MIXED = {(scaled, size): f"v_mfma_{'scale_' if scaled else ''}f32_{size}x{size}x{2048 // size}_f8f6f4"
         for scaled in (False, True) for size in (16, 32)}
SHAPE = re.compile(r"v_\w*?mfma\w*?_\w\d\d_(\d+)x\d+x(\d+)(?:_(\d+)b)?_(\w+)")
SMALL = {"gfx942": (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), "gfx950": (torch.float8_e4m3fn, torch.float8_e5m2)}
TORCH = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}
BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i8": 8}
#: registers of each lane that `_body` loads: A, B, C and what scales or indices there are
A, B, C, MORE, COLUMNS = 0, 8, 16, 48, 52


def _shape(name):
    size, depth, blocks, kinds = SHAPE.match(name).groups()
    return int(size), int(depth), int(blocks or 1), kinds


def _span(register, count):
    file, first = register[0], int(register[1:])
    return register if count == 1 else f"{file}[{first}:{first + count - 1}]"


def _body(name, words, results, files="vvv", last=None, more=""):
    """A kernel that loads its operands, of which A and B have so many `words`, and stores D. files: of A, B, and C with
    D, v or a. last: what stands in C's place. more: operands and modifiers behind it."""
    first = {"v": (8, 16, 24), "a": (32, 40, 0)}
    where = [f"{file}{first[file][i]}" for i, file in enumerate(files)]
    lines = ["s_load_dwordx4 s[0:3], s[0:1], 0x0", f"v_mul_u32_u24_e32 v1, {4 * COLUMNS}, v0",
             "v_lshlrev_b32_e32 v2, 7, v0", "s_waitcnt lgkmcnt(0)"]
    for to, column, count in (*zip(where, (A, B, C), (8, 8, 32), strict=True), ("v4", MORE, 4)):
        lines += [f"global_load_dwordx4 {_span(f'{to[0]}{int(to[1:]) + i}', 4)}, v1, s[0:1] offset:{4 * (column + i)}"
                  for i in range(0, count, 4)]
    d = _span(where[2], results)
    lines += ["s_waitcnt vmcnt(0)", f"{name} {d}, {_span(where[0], words[0])}, {_span(where[1], words[1])}, "
              f"{d if last is None else last}{more}", "s_nop 15", "s_nop 15"]
    lines += [f"global_store_dwordx4 v2, {_span(f'{where[2][0]}{int(where[2][1:]) + i}', 4)}, s[2:3] offset:{4 * i}"
              for i in range(0, 32, 4)]
    return "\n".join(lines)


@functools.cache
def _assembled(arch, bodies):
    return assemble(arch, tuple((f"kernel{i}", body) for i, body in enumerate(bodies)))


def executed(arch, bodies, index, given, by="auto"):
    """[64, 32] uint32: D after body `index`, from operands `given`, [64, COLUMNS] uint32. by: the machine's `core`."""
    out = np.zeros((64, 32), U32)
    ran = run(_assembled(arch, tuple(bodies)), f"kernel{index}", np.ascontiguousarray(given), out, core=by)
    assert by != "c" or not ran.by_numpy
    return out


def _index_of(size, block, row, column, kind):
    """(lane, register) of an element of D, by the manual's maps."""
    if size == 4:
        return (16 * row + 4 * block + column, 0) if kind == "f64" else (4 * block + column, row)
    if size == 16 and kind == "f64":
        return 16 * (row % 4) + column, row // 4
    if size == 16:
        return 16 * (row // 4) + column, 4 * block + row % 4
    return 32 * (row // 4 % 2) + column, 16 * block + 4 * (row // 8) + row % 4


def _result(words, size, blocks=1, kind="f32", dtype=F32):
    """[blocks, size, size] of D's registers."""
    numbers = words.view(dtype)
    return np.array([[[numbers[_index_of(size, block, row, column, kind)] for column in range(size)]
                      for row in range(size)] for block in range(blocks)])


def _set(words, values, kind, dtype):
    """Puts C, [blocks, size, size], where the manual has it."""
    numbers = words.view(dtype)
    for at in np.ndindex(values.shape):
        numbers[_index_of(values.shape[1], *at, kind=kind)] = values[at]


def _counts(name):
    """(words of A and of B, registers of D)."""
    size, depth, blocks, kinds = _shape(name)
    bits = BITS.get(kinds, 8)
    words = size * blocks * depth * bits // 64 // 32
    return (words, words), size * size * blocks // 64 * (2 if bits == 64 else 1)


REGISTERS = {"vgpr": ("vvv", None), "agpr": ("aaa", None), "mixed": ("avv", None), "zero": ("vaa", 0)}


@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize(("name", "arch"), MATRICES, ids=lambda value: value)
def test_matrix_instructions(name, arch, registers):
    size, depth, blocks, kinds = _shape(name)
    left, right = kinds.split("_") if "_" in kinds else (kinds, kinds)
    types = TORCH | dict(zip(("fp8", "bf8"), SMALL[arch], strict=True))
    torch.manual_seed(0)
    a, b = (torch.randint(-6, 7, (blocks, size, depth)) / (1 if kinds == "i8" else 4) for _ in range(2))
    c = torch.randint(-50, 50, (blocks, size, size)).double()
    want = a.double() @ b.double().transpose(1, 2) + (0 if registers == "zero" else c)
    dtype = {"f64": np.float64, "i8": np.int32}.get(kinds, F32)
    held = size * blocks * depth // 64
    given = np.zeros((64, COLUMNS), U32)
    for at, matrix, kind in ((A, a, left), (B, b, right)):
        lanes = torch.zeros(64, held, dtype=types[kind])
        for block in range(blocks):
            for row in range(size):
                for k in range(depth):
                    lanes[row + size * (block + blocks * (k // held)), k % held] = matrix[block, row, k]
        words = lanes.view(torch.uint8).numpy().view(U32)
        given[:, at:at + words.shape[1]] = words
    _set(given[:, C:MORE], c.numpy(), kinds, dtype)
    files, last = REGISTERS[registers]
    names = [text for text, needs in MATRICES if needs == arch]
    got = executed(arch, [_body(text, *_counts(text), files, last) for text in names], names.index(name), given)
    np.testing.assert_array_equal(_result(got, size, blocks, kinds, dtype), want.numpy())


@pytest.mark.skipif(core.unfit() is not None, reason="no compiler for the core")
@pytest.mark.parametrize("last", ["vgpr", "zero"])
@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, arch in MATRICES if "f64" not in name] + [
    (name, "gfx950") for name in MIXED.values()], ids=lambda value: value)
def test_the_core_gives_the_bits_of_numpy(name, arch, last):
    """Of sums that fp64 holds exactly, so that their order, which a BLAS chooses, does not matter."""
    random, mixed = np.random.default_rng(0), "f8f6f4" in name
    kinds = _shape(name)[3]
    given = random.integers(0, 2**32, (64, COLUMNS), dtype=U32)
    near = random.uniform(1, 2, (64, 32)) * random.choice([-1, 1], (64, 32)) * 2.0 ** random.integers(-6, 6, (64, 32))
    if kinds in ("f32", "f16", "bf16"):
        numbers = torch.from_numpy(near[:, :B * 16 // BITS[kinds]].repeat(4, 1)[:, :C * 32 // BITS[kinds]].copy())
        given[:, :C] = numbers.to(TORCH[kinds]).contiguous().view(torch.uint8).numpy().view(U32)
    if kinds != "i8":
        given[:, C:MORE] = near.astype(F32).view(U32)
    given[:, MORE:] = 0x7C7D7E7F  # scales near 1
    files, addend = REGISTERS[last]
    more = ", v4, v5 op_sel:[1,0,0] op_sel_hi:[0,1,0]" if "scale" in name else ""
    counts = ((8, 8), _counts(name)[1]) if mixed else _counts(name)
    bodies = (_body(name, *counts, files, addend, more),)
    by_numpy, by_core = (executed(arch, bodies, 0, given, by) for by in ("numpy", "c"))
    if kinds != "i8":
        for found in (by_numpy, by_core):
            found[np.isnan(found.view(F32))] = 0x7FC00000
    assert (by_numpy == by_core).all()
    assert len(np.unique(by_core)) > 16


# ---- modifiers: what the plain instruction gives of lanes moved by the manual's expressions

FROM = {1: lambda i: i % 32, 2: lambda i: i % 32 + 32, 3: lambda i: (i + 16) % 64, 4: lambda i: i % 16,
        5: lambda i: i % 16 + 16, 6: lambda i: i % 16 + 32, 7: lambda i: i % 16 + 48}
MOVED = [*((name, "blgp", value) for name in ("v_mfma_f32_4x4x4_16b_f16", "v_mfma_f32_16x16x1_4b_f32",
                                              "v_mfma_i32_32x32x4_2b_i8", "v_mfma_f32_32x32x2_f32") for value in FROM),
         ("v_mfma_f32_32x32x1_2b_f32", "cbsz:1 abid", 1), ("v_mfma_f32_16x16x4_4b_bf16", "cbsz:2 abid", 3),
         ("v_mfma_f32_4x4x4_16b_f16", "cbsz:4 abid", 0), ("v_mfma_f32_4x4x4_16b_f16", "cbsz:4 abid", 13)]


@pytest.mark.parametrize(("name", "modifier", "value"), MOVED)
def test_modifiers_move_lanes(name, modifier, value):
    _, _, blocks, kinds = _shape(name)
    random = np.random.default_rng(0)
    given = np.zeros((64, COLUMNS), U32)
    if kinds == "i8":
        given[:, :C] = random.integers(0, 2**32, (64, C), dtype=U32)
    else:
        numbers = torch.from_numpy(random.integers(-9, 9, (64, C * 32 // BITS[kinds]))).to(TORCH[kinds])
        given[:, :C] = numbers.view(torch.uint8).numpy().view(U32)
    moved = given.copy()
    if modifier == "blgp":
        moved[:, B:C] = [given[FROM[value](lane), B:C] for lane in range(64)]
    else:
        moved[:, A:B] = [given[lane % (64 // blocks) + 64 // blocks * value, A:B] for lane in range(64)]
    bodies = [_body(text, *_counts(text), more=f" {with_}:{number}")
              for text, with_, number in MOVED] + [_body(text, *_counts(text)) for text, _, _ in MOVED]
    index = MOVED.index((name, modifier, value))
    got, want = executed("gfx942", bodies, index, given), executed("gfx942", bodies, len(MOVED) + index, moved)
    assert (got == want).all()
    assert (got != executed("gfx942", bodies, len(MOVED) + index, given)).any()


NEGATED = [(name, signs) for name in ("v_mfma_f64_16x16x4_f64", "v_mfma_f64_4x4x4_4b_f64")
           for signs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))]


@pytest.mark.parametrize(("name", "signs"), NEGATED)
def test_blgp_negates_fp64(name, signs):
    numbers = np.random.default_rng(0).integers(-9, 9, (64, COLUMNS // 2)).astype(np.float64)
    negated = numbers.copy()
    for sign, columns in zip(signs, (slice(A, B // 2), slice(B // 2, C // 2), slice(C // 2, MORE // 2)), strict=True):
        negated[:, columns] *= -1 if sign else 1
    bodies = [_body(text, *_counts(text), more=f" neg:[{','.join(map(str, bits))}]") for text, bits in NEGATED]
    bodies += [_body(text, *_counts(text)) for text, _ in NEGATED]
    index = NEGATED.index((name, signs))
    count = _counts(name)[1]
    got = executed("gfx942", bodies, index, numbers.view(U32))[:, :count].view(np.float64)
    want = executed("gfx942", bodies, len(NEGATED) + index, negated.view(U32))[:, :count].view(np.float64)
    np.testing.assert_array_equal(got, want)


# ---- 8, 6 and 4 bits, with scales and without

KINDS: dict[int, Format] = {0: FP8["gfx950"], 1: BF8["gfx950"], 2: FP6, 3: BF6, 4: FP4}
PAIRS = [(left, right) for left in KINDS for right in KINDS]


def _codes(random, kind, shape):
    """Codes of numbers of at most 28, at least 1 / 16: all of 6 and 4 bits, some of 8."""
    form = KINDS[kind]
    numbers = [form.number(code) for code in range(1 << form.width)]
    usual = [code for code, number in enumerate(numbers) if number == 0 or 0.0625 <= abs(number) <= 28]
    codes = random.choice(usual, shape)
    return codes, np.array([float(number) for number in numbers])[codes]


def _held(kind, size, row, k):
    """(lane, element) of a factor: 32 consecutive k a lane, but of 8 bits 16, and 16 half of K further on."""
    if KINDS[kind].width < 8:
        return row + size * (k // 32), k % 32
    half = 1024 // size
    return row + size * (k % half // 16), k // half * 16 + k % 16


def _packed(codes, kind):
    """[64, 8] words of the registers that hold factors, [rows, k] codes."""
    bits, lanes = KINDS[kind].width, [0] * 64
    for (row, k), code in np.ndenumerate(codes):
        lane, element = _held(kind, len(codes), row, k)
        lanes[lane] |= int(code) << bits * element
    return np.array([[lane >> 32 * i & 0xFFFFFFFF for i in range(8)] for lane in lanes], U32)


def _mixed_bodies(scaled):
    """For both sizes, of all pairs of kinds; the bytes that scales are in differ from pair to pair."""
    for size in (16, 32):
        for left, right in PAIRS:
            words = tuple(KINDS[kind].width for kind in (left, right))  # 32 elements a lane
            one, other = left % 4, (left + right + 1) % 4
            more = f" cbsz:{left} blgp:{right}"
            if scaled:
                more = (f", v4, v5 op_sel:[{one & 1},{other & 1},0] op_sel_hi:[{one >> 1},{other >> 1},0]" + more)
            yield _body(MIXED[scaled, size], words, size * size // 64, "ava" if left % 2 else "vvv", more=more)


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_mixed_matrices(left, right, size, scaled):
    random, depth = np.random.default_rng([left, right, size]), 2048 // size
    given = random.integers(0, 2**32, (64, COLUMNS), dtype=U32)
    factors = []
    for i, kind in enumerate((left, right)):
        codes, numbers = _codes(random, kind, (size, depth))
        given[:, 8 * i:8 * i + 8] = _packed(codes, kind)
        if scaled:
            scales = random.integers(122, 133, (size, depth // 32))
            scales[3, 1] = 255  # NaN
            byte = 8 * ((left, left + right + 1)[i] % 4)
            for (row, group), scale in np.ndenumerate(scales):
                word = int(given[row + size * group, MORE + i])
                given[row + size * group, MORE + i] = word & ~(255 << byte) | int(scale) << byte
            numbers = numbers * np.repeat(np.where(scales == 255, np.nan, 2.0 ** (scales - 127)), 32, axis=1)
        factors.append(numbers)
    c = random.integers(-50, 50, (1, size, size)).astype(F32)
    _set(given[:, C:MORE], c, "", F32)
    want = (factors[0] @ factors[1].T + c).astype(F32)
    index = (size // 32 * len(PAIRS)) + PAIRS.index((left, right))
    got = _result(executed("gfx950", _mixed_bodies(scaled), index, given), size)
    np.testing.assert_array_equal(got, want)
    assert np.isnan(got).sum() == (2 * size - 1 if scaled else 0)


# ---- sparse matrices

SPARSE = [(f"v_smfmac_{result}_{shape}_{kinds}", arch)
          for arch, shapes in (("gfx942", (("16x16x32", "32x32x16"), ("16x16x64", "32x32x32"))),
                               ("gfx950", (("16x16x64", "32x32x32"), ("16x16x128", "32x32x64"))))
          for result, names, of in (("f32", ("f16", "bf16"), shapes[0]), ("i32", ("i8",), shapes[1]),
                                    ("f32", ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"), shapes[1]))
          for shape in of for kinds in names]


def _sparse_body(name, abid=0, cbsz=0):
    size, depth, _, kinds = _shape(name)
    words = size * depth * BITS.get(kinds, 8) // 64 // 32
    return _body(name, (words // 2, words), size * size // 64, last="v4", more=f" cbsz:{cbsz} abid:{abid}")


def _sets(name):
    """How many sets of index bits a register has."""
    size, depth, _, _ = _shape(name)
    return 2048 // (size * depth)


def _sparse_operands(name, arch, abid):
    """(operands, A with its zeros, B)."""
    size, depth, _, kinds = _shape(name)
    left, right = kinds.split("_") if "_" in kinds else (kinds, kinds)
    types = TORCH | dict(zip(("fp8", "bf8"), SMALL[arch], strict=True))
    random = np.random.default_rng(abid)
    consecutive = 8 if BITS.get(kinds, 8) == 16 else 16  # k of B, in a lane
    groups = 64 // size
    held = size * depth // 64

    def where(row, k):
        part, rest = divmod(k, consecutive * groups)  # a second part in gfx950's wide ones
        return row + size * (rest // consecutive), part * consecutive + rest % consecutive

    given = random.integers(0, 2**32, (64, COLUMNS), dtype=U32)
    a, b = np.zeros((size, depth)), random.integers(-6, 7, (size, depth)).astype(float)
    stored, dense = torch.zeros(64, held // 2, dtype=types[left]), torch.zeros(64, held, dtype=types[right])
    for row in range(size):
        for k in range(depth):
            dense[where(row, k)] = b[row, k]
        for four in range(0, depth, 4):
            lane, element = where(row, four)
            for i, index in enumerate(np.sort(random.choice(4, 2, replace=False))):
                a[row, four + index] = stored[lane, element // 2 + i] = int(random.integers(1, 7))
                bit = abid * held + 2 * (element // 2 + i)
                given[lane, MORE] = int(given[lane, MORE]) & ~(3 << bit) | int(index) << bit
    for at, lanes in ((A, stored), (B, dense)):
        words = lanes.view(torch.uint8).numpy().view(U32)
        given[:, at:at + words.shape[1]] = words
    return given, a, b


@pytest.mark.parametrize(("name", "arch"), SPARSE)
def test_sparse_matrices(name, arch):
    size, _, _, kinds = _shape(name)
    dtype = np.int32 if kinds == "i8" else F32
    names = [text for text, needs in SPARSE if needs == arch]
    for abid in range(_sets(name)):
        given, a, b = _sparse_operands(name, arch, abid)
        c = np.random.default_rng(9).integers(-50, 50, (1, size, size))
        _set(given[:, C:MORE], c, "", dtype)
        bodies = [_sparse_body(text, min(abid, _sets(text) - 1)) for text in names]
        got = _result(executed(arch, bodies, names.index(name), given), size, dtype=dtype)
        np.testing.assert_array_equal(got, a @ b.T + c)


def test_cbsz_takes_the_first_set_of_indices():
    name = "v_smfmac_f32_16x16x32_f16"
    given, a, b = _sparse_operands(name, "gfx942", 0)
    given[:, C:MORE] = 0
    got = _result(executed("gfx942", [_sparse_body(name, abid=2, cbsz=1)], 0, given), 16)
    np.testing.assert_array_equal(got[0], a @ b.T)


def test_indices_that_do_not_ascend_are_refused():
    name = "v_smfmac_f32_16x16x32_f16"
    given, _, _ = _sparse_operands(name, "gfx942", 0)
    given[5, MORE] &= ~U32(0xF)
    with pytest.raises(EmulationError, match="do not ascend"):
        executed("gfx942", [_sparse_body(name)], 0, given)


# ---- refusals

REFUSED = {
    _body("v_mfma_f32_4x4x4_16b_f16", (2, 2), 4, more=" cbsz:2 abid:1"): "_4x4x4_16b_f16 with cbsz 2 and abid 1",
    _body("v_mfma_f32_16x16x16_f16", (2, 2), 4, more=" blgp:1"): "v_mfma_f32_16x16x16_f16 with blgp 1",
    _body("v_mfma_f32_16x16x8_xf32", (2, 2), 4): "does not know v_mfma_f32_16x16x8_xf32",
}


@pytest.mark.parametrize("body", REFUSED, ids=REFUSED.values())
def test_what_is_not_known_is_refused(body):
    with pytest.raises(NotImplementedError, match=REFUSED[body]):
        executed("gfx942", list(REFUSED), list(REFUSED).index(body), np.zeros((64, COLUMNS), U32))


@pytest.mark.parametrize(("name", "body"), [
    ("v_mfma_f32_16x16x32_f16", _body("v_mfma_f32_16x16x32_f16", (4, 4), 4)),
    (MIXED[False, 16], _body(MIXED[False, 16], (8, 8), 4)),
    ("v_smfmac_f32_16x16x64_f16", _sparse_body("v_smfmac_f32_16x16x64_f16"))])
def test_instructions_of_gfx950_are_refused_on_gfx942(name, body):
    assembled = _assembled("gfx950", (body,))
    changed = assembled.with_name(f"{name}-as-gfx942.co")
    changed.write_bytes(assembled.read_bytes().replace(b"--gfx950", b"--gfx942"))
    with pytest.raises(NotImplementedError, match=f"{name} is an instruction of gfx950"):
        run(changed, "kernel0", np.zeros((64, COLUMNS), U32), np.zeros((64, 32), U32))
