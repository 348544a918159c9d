"""Scalar instructions: SOP1, SOP2, SOPC, SOPK, SOPP.

A row of a table is a specification and a function on arrays [waves]. "u=uU" reads: 32-bit result of a 32-bit and a
64-bit source (kinds as in binding.py; k: the signed 16-bit immediate; D: the destination's old value; c: SCC as bool).
After it, "!" sets SCC where the result is not zero, and "," says that the function gives SCC besides the result; with
nothing before "=" the result is SCC.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import bits
from wave64.testing.emulator.binding import BARRIER, END, Binding
from wave64.testing.emulator.decode import EXEC, SCC, VCC
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.operations import Row

I32, I64, U32, U64 = np.int32, np.int64, np.uint32, np.uint64


def _add_u(a, b):
    total = a + b
    return total, total < a


def _sub_u(a, b):
    return a - b, b > a


def _add_i(a, b):
    total = a + b
    return total, ((a ^ total) & (b ^ total)) < 0


def _sub_i(a, b):
    total = a - b
    return total, ((a ^ b) & (a ^ total)) < 0


def _addc(a, b, carry):
    total = a.astype(U64) + b + carry
    return total.astype(U32), total >> U64(32) != 0


def _subb(a, b, borrow):
    return a - b - borrow.astype(U32), b.astype(U64) + borrow > a


def _absdiff(a, b):
    return np.abs(a.astype(I64) - b).astype(I32)


def _pick(compare: Callable) -> Callable:
    """Minimum and maximum: SCC where the first is picked."""
    return lambda a, b: (np.where(compare(a, b), a, b), compare(a, b))


def _shift_add(count: int) -> Callable:
    def run(a, b):
        total = (a.astype(U64) << U64(count)) + b
        return total.astype(U32), total >> U64(32) != 0
    return run


def _bfe(offset_bits: int) -> Callable:
    return lambda a, b: bits.field(a, b & U32(offset_bits), b >> U32(16) & U32(0x7F))


def _select(a, b, scc):
    return np.where(scc, a, b)


SOP2: dict[str, Row] = {
    "s_add_u32": ("u=uu,", _add_u), "s_sub_u32": ("u=uu,", _sub_u), "s_add_i32": ("i=ii,", _add_i),
    "s_sub_i32": ("i=ii,", _sub_i), "s_addc_u32": ("u=uuc,", _addc), "s_subb_u32": ("u=uuc,", _subb),
    "s_min_i32": ("i=ii,", _pick(np.less)), "s_min_u32": ("u=uu,", _pick(np.less)),
    "s_max_i32": ("i=ii,", _pick(np.greater_equal)), "s_max_u32": ("u=uu,", _pick(np.greater_equal)),
    "s_cselect_b32": ("u=uuc", _select), "s_cselect_b64": ("U=UUc", _select),
    "s_lshl_b32": ("u=uu!", bits.shift_left), "s_lshl_b64": ("U=Uu!", bits.shift_left),
    "s_lshr_b32": ("u=uu!", bits.shift_right), "s_lshr_b64": ("U=Uu!", bits.shift_right),
    "s_ashr_i32": ("i=iu!", bits.shift_right), "s_ashr_i64": ("I=Iu!", bits.shift_right),
    "s_bfm_b32": ("u=uu", lambda a, b: bits.mask(a & U32(31), U32) << (b & U32(31))),
    "s_bfm_b64": ("U=uu", lambda a, b: bits.mask(a & U32(63), U64) << (b & U32(63)).astype(U64)),
    "s_mul_i32": ("u=uu", lambda a, b: a * b),
    "s_mul_hi_u32": ("u=uu", lambda a, b: (a.astype(U64) * b >> U64(32)).astype(U32)),
    "s_mul_hi_i32": ("i=ii", lambda a, b: (a.astype(I64) * b >> I64(32)).astype(I32)),
    "s_bfe_u32": ("u=uu!", _bfe(31)), "s_bfe_i32": ("i=iu!", _bfe(31)),
    "s_bfe_u64": ("U=Uu!", _bfe(63)), "s_bfe_i64": ("I=Iu!", _bfe(63)),
    "s_absdiff_i32": ("i=ii!", _absdiff),
    **{f"s_lshl{n}_add_u32": ("u=uu,", _shift_add(n)) for n in (1, 2, 3, 4)},
    "s_pack_ll_b32_b16": ("u=uu", lambda a, b: a & U32(0xFFFF) | b << U32(16)),
    "s_pack_lh_b32_b16": ("u=uu", lambda a, b: a & U32(0xFFFF) | b & U32(0xFFFF0000)),
    "s_pack_hh_b32_b16": ("u=uu", lambda a, b: a >> U32(16) | b & U32(0xFFFF0000)),
}
LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "andn2": lambda a, b: a & ~b,
         "orn2": lambda a, b: a | ~b, "nand": lambda a, b: ~(a & b), "nor": lambda a, b: ~(a | b),
         "xnor": lambda a, b: ~(a ^ b)}
for _name, _function in LOGIC.items():
    SOP2 |= {f"s_{_name}_b32": ("u=uu!", _function), f"s_{_name}_b64": ("U=UU!", _function)}

SOP1: dict[str, Row] = {
    "s_mov_b32": ("u=u", lambda a: a), "s_mov_b64": ("U=U", lambda a: a),
    "s_cmov_b32": ("u=uDc", _select), "s_cmov_b64": ("U=UDc", _select),
    "s_not_b32": ("u=u!", np.invert), "s_not_b64": ("U=U!", np.invert),
    "s_brev_b32": ("u=u", bits.reverse), "s_brev_b64": ("U=U", bits.reverse),
    "s_ff1_i32_b32": ("u=u", bits.first_one), "s_ff1_i32_b64": ("u=U", bits.first_one),
    "s_ff0_i32_b32": ("u=u", lambda a: bits.first_one(~a)), "s_ff0_i32_b64": ("u=U", lambda a: bits.first_one(~a)),
    "s_flbit_i32_b32": ("u=u", bits.leading_zeros), "s_flbit_i32_b64": ("u=U", bits.leading_zeros),
    "s_flbit_i32": ("u=i", bits.sign_bits),
    "s_bcnt1_i32_b32": ("u=u!", lambda a: np.bitwise_count(a).astype(U32)),
    "s_bcnt1_i32_b64": ("u=U!", lambda a: np.bitwise_count(a).astype(U32)),
    "s_bcnt0_i32_b32": ("u=u!", lambda a: np.bitwise_count(~a).astype(U32)),
    "s_bcnt0_i32_b64": ("u=U!", lambda a: np.bitwise_count(~a).astype(U32)),
    "s_sext_i32_i8": ("i=u", lambda a: a.astype(np.int8).astype(I32)),
    "s_sext_i32_i16": ("i=u", lambda a: a.astype(np.int16).astype(I32)),
    "s_bitset0_b32": ("u=uD", lambda a, d: d & ~(U32(1) << (a & U32(31)))),
    "s_bitset1_b32": ("u=uD", lambda a, d: d | U32(1) << (a & U32(31))),
    "s_bitset0_b64": ("U=uD", lambda a, d: d & ~(U64(1) << (a & U32(63)).astype(U64))),
    "s_bitset1_b64": ("U=uD", lambda a, d: d | U64(1) << (a & U32(63)).astype(U64)),
    "s_abs_i32": ("i=i!", np.abs),
}

_COMPARE = {"eq": np.equal, "lg": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less,
            "le": np.less_equal}
SOPC: dict[str, Row] = {
    f"s_cmp_{name}_{kind}32": (f"={kind}{kind}", f) for name, f in _COMPARE.items() for kind in "iu"}
SOPC |= {f"s_cmp_{name}_u64": ("=UU", _COMPARE[name]) for name in ("eq", "lg")}
SOPC |= {
    "s_bitcmp0_b32": ("=uu", lambda a, b: a >> (b & U32(31)) & U32(1) == 0),
    "s_bitcmp1_b32": ("=uu", lambda a, b: a >> (b & U32(31)) & U32(1) == 1),
    "s_bitcmp0_b64": ("=Uu", lambda a, b: bits.shift_right(a, b) & U64(1) == 0),
    "s_bitcmp1_b64": ("=Uu", lambda a, b: bits.shift_right(a, b) & U64(1) == 1),
}

SOPK: dict[str, Row] = {
    "s_movk_i32": ("i=k", lambda k: k),
    "s_cmovk_i32": ("i=kDc", _select),
    "s_addk_i32": ("i=Dk,", _add_i),
    "s_mulk_i32": ("i=Dk", lambda d, k: d * k),
}
SOPK |= {f"s_cmpk_{name}_i32": ("=ik", f) for name, f in _COMPARE.items()}
SOPK |= {f"s_cmpk_{name}_u32": ("=uK", f) for name, f in _COMPARE.items()}


def _alu(specification: str, function: Callable) -> Callable:
    result, sources = specification.rstrip("!,").split("=")

    def bind(b: Binding) -> Callable:
        fields, party = b.fields, b.party
        operands = iter([getattr(fields, name).offset for name in ("ssrc0", "ssrc1") if hasattr(fields, name)])
        immediate = (fields.simm16 ^ 0x8000) - 0x8000 if hasattr(fields, "simm16") else 0
        gets: list[Callable] = []
        for kind in sources:
            if kind == "c":
                gets.append(lambda: party.scc)
            elif kind in "kK":
                constant = np.array([immediate if kind == "k" else immediate & 0xFFFF], I32 if kind == "k" else U32)
                gets.append(lambda constant=constant: constant)
            elif kind == "D":
                gets.append(b.scalar(fields.sdst.offset, result))
            elif "k" in sources.lower():
                gets.append(b.scalar(fields.sdst.offset, kind))
            else:
                gets.append(b.scalar(next(operands), kind))
        if "c" in sources:
            b.reads.append(("s", SCC, 1))
        write = b.scalar_sink(fields.sdst.offset, result) if result else None
        if specification[-1] in "!," or not result:
            b.writes.append(("s", SCC, 1))
        scc = party.scc
        first, *rest = gets
        second = rest[0] if rest else None

        def value():
            if second is None:
                return function(first())
            if len(rest) == 1:
                return function(first(), second())
            return function(*[get() for get in gets])

        def only_flag() -> None:
            scc[...] = value()

        if write is None:
            return only_flag

        def plain() -> None:
            write(value())

        def with_test() -> None:
            got = value()
            write(got)
            scc[...] = got != 0

        def with_flag() -> None:
            got, flag = value()
            write(got)
            scc[...] = flag

        return {"!": with_test, ",": with_flag}.get(specification[-1], plain)
    return bind


def _save_exec(change: Callable, give_new: bool = False) -> Callable:
    """The destination gets the old EXEC (or the new one), EXEC becomes change(source, EXEC)."""
    def bind(b: Binding) -> Callable:
        get = b.scalar(b.fields.ssrc0.offset, "U")
        write, party = b.scalar_sink(b.fields.sdst.offset, "U"), b.party
        b.writes += [("s", SCC, 1), ("s", EXEC, 2)]

        def run() -> None:
            new, old = change(get(), party.exec), party.exec.copy()
            party.exec[...] = new
            write(new if give_new else old)
            party.scc[...] = new != 0
            party.exec_changed()
        return run
    return bind


def _branch(b: Binding) -> Callable:
    target = _target(b)
    return lambda: target


def _target(b: Binding) -> int:
    return b.pc + 1 + (b.fields.simm16 ^ 0x8000) - 0x8000


def _branch_if(register: int, zero: bool) -> Callable:
    """Taken where SCC, VCC or EXEC is zero, or where it is not."""
    def bind(b: Binding) -> Callable:
        target, ahead, party = _target(b), b.pc + 1, b.party
        state = party.scc if register == SCC else party.S64[:, register // 2]
        b.reads.append(("s", register, 1 if register == SCC else 2))

        def run():
            taken = int(np.count_nonzero(state))
            if zero:
                taken = party.count - taken
            if taken == 0:
                return None
            if taken == party.count:
                return target
            return np.where((state == 0) == zero, target, ahead)
        return run
    return bind


def _next_pc(b: Binding, addresses: np.ndarray):
    pcs = ((addresses - U64(b.machine.program.address)) >> U64(2)).astype(I64)
    return int(pcs[0]) if (pcs == pcs[0]).all() else pcs


def _get_pc(b: Binding) -> Callable:
    write = b.scalar_sink(b.fields.sdst.offset, "U")
    here = np.array([b.machine.program.address + 4 * (b.pc + 1)], U64)
    return lambda: write(here)


def _set_pc(b: Binding) -> Callable:
    get = b.scalar(b.fields.ssrc0.offset, "U")
    return lambda: _next_pc(b, get())


def _swap_pc(b: Binding) -> Callable:
    get, write = b.scalar(b.fields.ssrc0.offset, "U"), b.scalar_sink(b.fields.sdst.offset, "U")
    here = np.array([b.machine.program.address + 4 * (b.pc + 1)], U64)

    def run():
        outcome = _next_pc(b, get())
        write(here)
        return outcome
    return run


def _set_mode(b: Binding) -> Callable:
    """s_setreg_imm32_b32, for the bit of MODE that clamps what is too large for small floating-point formats, and for
    the rounding of fp16 and fp64 to nearest, which is the only one here."""
    register, first, bits_set = b.fields.simm16 & 63, b.fields.simm16 >> 6 & 31, (b.fields.simm16 >> 11) + 1
    if (register, first, bits_set) == (1, 2, 2) and b.literal() & 3 == 0:
        return lambda: None
    if (register, first, bits_set) != (1, 23, 1):
        raise NotImplementedError(f"setting {bits_set} bits from {first} on of hardware register {register} to "
                                  f"{b.literal()}")
    to, value = b.machine.fp16_overflow[b.party.waves], bool(b.literal() & 1)

    def run() -> None:
        to[...] = value
    return run


def _trap(b: Binding) -> Callable:
    def run() -> None:
        raise EmulationError("a trap: the kernel itself found something wrong")
    return run


def _nothing(b: Binding) -> Callable:
    return lambda: None


FORMS: dict[str, Callable] = {name: _alu(*row) for table in (SOP1, SOP2, SOPC, SOPK) for name, row in table.items()}
FORMS |= {f"s_{name}_saveexec_b64": _save_exec(function) for name, function in LOGIC.items()}
FORMS |= {"s_andn1_saveexec_b64": _save_exec(lambda a, e: ~a & e),
          "s_orn1_saveexec_b64": _save_exec(lambda a, e: ~a | e),
          "s_andn1_wrexec_b64": _save_exec(lambda a, e: ~a & e, True),
          "s_andn2_wrexec_b64": _save_exec(lambda a, e: a & ~e, True)}
FORMS |= {
    "s_branch": _branch, "s_cbranch_scc0": _branch_if(SCC, True), "s_cbranch_scc1": _branch_if(SCC, False),
    "s_cbranch_vccz": _branch_if(VCC, True), "s_cbranch_vccnz": _branch_if(VCC, False),
    "s_cbranch_execz": _branch_if(EXEC, True), "s_cbranch_execnz": _branch_if(EXEC, False),
    "s_getpc_b64": _get_pc, "s_setreg_imm32_b32": _set_mode, "s_setpc_b64": _set_pc, "s_swappc_b64": _swap_pc,
    "s_endpgm": lambda b: lambda: END, "s_barrier": lambda b: lambda: BARRIER, "s_trap": _trap,
}
#: what changes no result; the checks look at the waits
FORMS |= dict.fromkeys(("s_nop", "s_waitcnt", "s_sleep", "s_setprio", "s_wakeup", "s_icache_inv", "s_dcache_inv",
                        "s_dcache_wb", "s_sethalt", "s_ttracedata", "s_incperflevel", "s_decperflevel"), _nothing)
