"""Deliberate bugs in the machine code that ships, and in how it is launched: every one is caught, by the contract or by
what the emulator checks besides it, in a case that stays without complaint where nothing is changed."""

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.op import Case
from wave64.testing import contract
from wave64.testing.emulator import EmulationError, code_object, emulate, run
from wave64.testing.emulator.decode import Instruction
from wave64.testing.emulator.machine import Program

ARCH = "gfx942"
NOP = 0xBF800000
OPERATORS = ("rms_norm", "silu_and_mul", "topk_softmax", "moe_align_block_size", "paged_attention")
#: which of the waits that a case executes is dropped, as a fraction of their number
WHICH = (0.0, 0.5)
#: those of them whose waves exchange lanes
EXCHANGING = ("rms_norm", "topk_softmax", "moe_align_block_size", "paged_attention")


def cases(op) -> list[Case]:
    with platform.target(ARCH):
        backend = op.backends["hip"]
        return [case for case in op.cases() if not case.large and (
            backend.supports is None or backend.supports(**contract.draw(case, "cpu", 0)) is None)]


def complaint(op, case: Case) -> str:
    """What running the case brings; "" where it keeps the contract."""
    def call(**args):
        with emulate(ARCH):
            return op.backends["hip"].run(**args)

    with platform.target(ARCH):
        try:
            contract.verify(op, "hip", case, "cpu", run=call)
        except (AssertionError, EmulationError) as e:
            return f"{type(e).__name__}: {e}"
    return ""


class Shipped:
    """An operator's code object, as it is and changed."""

    def __init__(self, name: str, monkeypatch):
        self.op, self.code, self.monkeypatch = OPS[name], hip.code_object(ARCH, name), monkeypatch
        self.cases, self.right = cases(self.op), self.load()
        self.kept: set[str] = set()  # cases without complaint where nothing is changed
        self.keeps(self.cases[0])

    def load(self) -> Program:
        return Program(code_object.CodeObject(self.code))

    def complaint(self, program: Program, case: Case) -> str:
        self.monkeypatch.setattr(run, "_program", lambda code: program)
        return complaint(self.op, case)

    def keeps(self, case: Case) -> None:
        if case.id not in self.kept:
            assert self.complaint(self.right, case) == ""
            self.kept.add(case.id)

    def executed(self) -> Iterator[tuple[int, Instruction]]:
        """Instructions of the first case, with their places."""
        yield from [(pc, each) for pc, each in enumerate(self.right.instructions) if each]

    def changed(self, change: Callable[[np.ndarray], None], cases: list[Case]) -> str:
        """The first complaint about code that `change`, given its dwords, has been at; "" without one."""
        wrong = self.load()
        change(wrong.text.view(np.uint32))
        for case in cases:
            if why := self.complaint(wrong, case):
                self.keeps(case)
                return why
        return ""


ACCESSES = ("s_load", "buffer_", "global_", "ds_")


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_dropped_wait_is_caught(name, which, monkeypatch):
    """Of those behind an access, which the wait before cannot have covered."""
    shipped = Shipped(name, monkeypatch)
    waits, accessed = [], False
    for pc, each in shipped.executed():
        if each.name == "s_waitcnt" and accessed:
            waits.append(pc)
        accessed = accessed and each.name != "s_waitcnt" or each.name.startswith(ACCESSES)
    pc = waits[int(which * len(waits))]

    def drop(code: np.ndarray) -> None:
        code[pc] = NOP

    assert "s_waitcnt" in shipped.changed(drop, shipped.cases[:1])


def lanes_kept(pc: int) -> Callable[[np.ndarray], None]:
    """A DPP instruction that reads its own lane: quad_perm:[0,1,2,3]."""
    def change(code: np.ndarray) -> None:
        code[pc + 1] = code[pc + 1] & np.uint32(~(0x1FF << 8) & 0xFFFFFFFF) | np.uint32(0xE4 << 8)
    return change


def lanes_next_to(pc: int) -> Callable[[np.ndarray], None]:
    """A ds_bpermute_b32 whose lanes read the one after: 4 bytes further."""
    def change(code: np.ndarray) -> None:
        code[pc] += np.uint32(4)
    return change


@pytest.mark.parametrize("name", EXCHANGING)
def test_swapped_lanes_are_caught(name, monkeypatch):
    """Every exchange of lanes that the first case executes; some matter in other cases only."""
    shipped = Shipped(name, monkeypatch)
    changes = {pc: lanes_kept(pc) if each.family.endswith("_DPP16") else lanes_next_to(pc)
               for pc, each in shipped.executed()
               if each.family.endswith("_DPP16") or each.name == "ds_bpermute_b32"}
    assert len(changes) >= 4
    assert [pc for pc, change in changes.items() if not shipped.changed(change, shipped.cases)] == []


def needed(each: Instruction, following: Instruction) -> bool:
    """Whether the manual is sure to ask for this s_nop: it stands before an instruction that reads other lanes, or
    takes more than 2 wait states, which only results of matrix instructions do. (LLVM also puts some where it is
    more careful than the manual: before masks, after packed arithmetic.)"""
    return each.name == "s_nop" and (following.family.endswith("_DPP16") or following.name == "v_readlane_b32"
                                     or each.fields.simm16 >= 2)


@pytest.mark.parametrize("name", EXCHANGING)
def test_a_removed_nop_is_caught(name, monkeypatch):
    """It goes behind the instruction that it should keep apart from an earlier one."""
    shipped = Shipped(name, monkeypatch)
    program, survivors, count = shipped.right, [], 0
    for pc, each in shipped.executed():
        if needed(each, program.at(pc + each.words)):
            words = program.at(pc + 1).words

            def swap(code: np.ndarray, pc=pc, words=words) -> None:
                code[pc:pc + words + 1] = np.roll(code[pc:pc + words + 1], -1)

            count += 1
            if " too early: " not in shipped.changed(swap, shipped.cases):
                survivors.append(pc)
    assert count
    assert survivors == []


@pytest.mark.parametrize(("name", "fraction"),
                         [("rms_norm", 0.0), ("moe_align_block_size", 0.5), ("paged_attention", 0.5)])
def test_too_little_lds_is_caught(name, fraction, monkeypatch):
    """A descriptor that reserves a fraction of what the kernel uses."""
    shipped = Shipped(name, monkeypatch)

    def less(kernel: code_object.Kernel) -> code_object.Kernel:
        return dataclasses.replace(kernel, lds_bytes=int(fraction * kernel.lds_bytes))

    wrong = shipped.load()
    wrong.code.kernels = {each: less(kernel) for each, kernel in wrong.code.kernels.items()}
    assert re.search(r"EmulationError: .*: LDS bytes \d+ to \d+, of \d+ allocated",
                     shipped.complaint(wrong, shipped.cases[0]))


def grid(x: int) -> Callable:
    return lambda launch: {"grid": (launch.grid[0] + x, *launch.grid[1:])}


def block(change: Callable[[int], int]) -> Callable:
    return lambda launch: {"block": (change(launch.block[0]), *launch.block[1:])}


def argument(name: str, change: Callable[[SimpleNamespace], int]) -> Callable:
    """A field of the operator's struct becomes what `change` makes of all of them."""
    def of(launch) -> dict[str, bytes]:
        args = bytearray(launch.args)
        kind, offset = next((kind, offset) for each, kind, offset in hip._hip.fields()[launch.op] if each == name)
        struct.pack_into(kind, args, offset, change(SimpleNamespace(**hip.arguments(launch))))
        return {"args": bytes(args)}
    return of


FAR = r"ContractError: \w+: result \d: error \S+ against fp64"
DIFFER = r"ContractError: \w+: result \d: \d+ of \d+ integers differ"
UNWRITTEN = r"EmulationError: .* comes from a register that was never written"
OUTSIDE = r"EmulationError: .* (reads|writes) \d+ bytes at 0x\w+, \d+ bytes (into|before) \w+"
#: what is wrong with a launch -> (operator, what becomes of it, how it shows)
LAUNCHES = {
    "a workgroup too few": ("rms_norm", grid(-1), FAR),
    "a workgroup too few, of a sort": ("moe_align_block_size", grid(-1), DIFFER),
    "axes of the grid swapped": (
        "silu_and_mul", lambda launch: {"grid": (launch.grid[1], launch.grid[0], launch.grid[2])}, FAR),
    "half the waves": ("rms_norm", block(lambda x: max(64, x // 2)), UNWRITTEN),
    "half the waves, of a sort": ("moe_align_block_size", block(lambda x: x // 2), UNWRITTEN),
    "arguments in another order": (
        "silu_and_mul", lambda launch: {"args": launch.args[8:16] + launch.args[:8] + launch.args[16:]}, OUTSIDE),
    "stride of a dense row": ("rms_norm", argument("x_stride", lambda args: args.hidden), FAR),
    "stride of the output for the input's": ("silu_and_mul", argument("x_stride", lambda args: args.d), FAR),
    "a stride one too long": ("reshape_and_cache", argument("value_stride", lambda args: args.key_stride + 1), OUTSIDE),
    "stride of tokens for that of heads": (
        "rotary_embedding", argument("query_head_stride", lambda args: args.query_stride), OUTSIDE),
    "stride in bytes": ("paged_attention", argument("key_row_stride", lambda args: 2 * args.key_row_stride), FAR),
    "a column too many": ("per_token_quant_fp8", argument("columns", lambda args: args.columns + 1), OUTSIDE),
}
FIELDS = ("kernel", "code_object", "grid", "block", "lds_bytes", "args")


@pytest.mark.parametrize("bug", LAUNCHES)
def test_a_wrong_launch_is_caught(bug, monkeypatch):
    name, change, shows = LAUNCHES[bug]
    right = run.execute

    def wrong(launch, *rest):
        fields = {field: getattr(launch, field) for field in FIELDS} | change(launch)
        return right(SimpleNamespace(**fields), *rest) if all(fields["grid"]) else None

    op, why = OPS[name], ""
    for case in cases(op):
        with monkeypatch.context() as patch:
            patch.setattr(run, "execute", wrong)
            why = complaint(op, case)
        if why:
            break
    assert re.match(shows, why, re.DOTALL), why
    assert complaint(op, case) == ""
