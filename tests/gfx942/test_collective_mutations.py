"""Deliberate bugs in the collectives: in their sources, compiled for gfx942, in their launches, in their memory. Each
is seen in one of a few schedules under the memory model, for the reason that it is a bug."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from collectives import (
    LL,
    LL128,
    ONE_SHOT,
    TWO_SHOT,
    AllReduce,
    Arenas,
    Call,
    ReduceScatter,
    one_by_one,
    planned,
    run,
)

from wave64.testing import built
from wave64.testing.emulator import EmulationError
from wave64.testing.emulator.checks import (
    ALL,  # all but that for races, where it would end what is wrong before it shows
)
from wave64.testing.emulator.unordered import Unordered

HIP = Path(__file__).parents[2] / "hip"
NAMES = {LL: "ll", LL128: "ll128", ONE_SHOT: "one_shot", TWO_SHOT: "two_shot"}
RANKS, EXCHANGE, OP = "include/wave64/ranks.h", "include/wave64/exchange.h", "ops/all_reduce.hip"
SEEDS = range(24)
WRONG = r"AssertionError: rank \d: wrong from byte"
DEADLOCK = r"Deadlock: "
RACE = r"EmulationError: .* (reads|writes) a byte .* and no release and acquire is between"


@dataclass
class Bug:
    protocol: int
    shows: str
    edits: tuple = ()          # (file, what stands there, what becomes of it)
    counts: tuple = (70, 300)  # elements of the calls, of fp32: 4 to a pack
    op: type[Call] = AllReduce
    world: int = 2
    dtype: torch.dtype = torch.float32
    waves: int = 1             # of a block
    blocks: int = 1
    lines: int = 1             # of a lane
    races: bool = False        # whether to look for them
    uncached: bool = True
    whole_lines: bool = True
    skips: int | None = None   # the call that rank 1 does not make
    alone: bool = False        # seen where each rank's launch runs by itself


BARRIER = "    finish_stores();\n    block_barrier();\n"
SEND = "int use, int first, int count, const Sent& sent) {\n    for_peers"
WAIT = "        Patience patience;\n        for (;;) {\n            look_again();\n            bool"
RESET = """        if (source < block.world && source != block.rank)
            block.own.store(Bits32(0), block.flag(use), source * kLine);
"""
BUGS = {
    "flag before the data": Bug(ONE_SHOT, WRONG, (
        (EXCHANGE, SEND, SEND.replace("for_peers", "set_flags<WORLD>(block, use), finish_stores();\n    for_peers")),
        (EXCHANGE, "    });\n    set_flags<WORLD>(block, use);\n", "    });\n"))),
    "no release: a wave's stores not waited for": Bug(
        ONE_SHOT, WRONG, ((EXCHANGE, BARRIER, "    block_barrier();\n"),)),
    "no release of the other wave's stores": Bug(
        ONE_SHOT, WRONG, ((EXCHANGE, BARRIER, "    finish_stores();\n"),), counts=(2000, 2000), waves=2),
    "no acquire: data loaded from the caches": Bug(
        ONE_SHOT, RACE, ((RANKS, "raw_buffer_load_b128(resource, lane_at, at, kSystem)",
                          "raw_buffer_load_b128(resource, lane_at, at, 0)"),), races=True),
    "no acquire of the other wave": Bug(
        TWO_SHOT, WRONG, ((EXCHANGE, "        }\n    }\n    block_barrier();\n", "        }\n    }\n"),),
        counts=(500, 500), waves=2),
    "a spin of the device's scope": Bug(
        ONE_SHOT, RACE, ((RANKS, "raw_buffer_load_b32(resource, lane_at, at, kSystem)",
                          "raw_buffer_load_b32(resource, lane_at, at, 16)"),), races=True),
    "stores without sc1": Bug(
        LL, RACE, ((RANKS, "raw_buffer_store_b128(bits, resource, lane_at, at, kSystem)",
                    "raw_buffer_store_b128(bits, resource, lane_at, at, 1)"),), races=True),
    "the wrong kind of memory, which stores that stay in a cache do not leave": Bug(
        LL, DEADLOCK, ((RANKS, "raw_buffer_store_b128(bits, resource, lane_at, at, kSystem)",
                        "raw_buffer_store_b128(bits, resource, lane_at, at, 1)"),), uncached=False),
    "flags reset": Bug(ONE_SHOT, DEADLOCK, ((EXCHANGE, WAIT, RESET + WAIT),), counts=(600, 600)),
    "a round used again": Bug(
        LL, WRONG, ((RANKS, "if (is_first && lane_in_block() == 0) *counter() = round + rounds();", ""),)),
    "one rank skips a call": Bug(LL, DEADLOCK, skips=1),
    "slots reused a call too early": Bug(ONE_SHOT, WRONG, ((RANKS, "int(round & 1)", "0"),), counts=(700, 700)),
    "tags overwritten a call too early": Bug(LL, DEADLOCK, ((RANKS, "int(round & 1)", "0"),), counts=(1500, 1500)),
    "a tag torn from its data": Bug(  # who takes old data goes on too early, too
        LL, f"{WRONG}|{DEADLOCK}", ((EXCHANGE, "{a.at[1], a.at[3], b.at[1], b.at[3]}", "{a.at[3], b.at[3]}"),),
        counts=(256, 256, 256), whole_lines=False),
    "a tag of two lines": Bug(
        LL128, WRONG, ((EXCHANGE, "has_tag = is_before_tag();", "has_tag = lane_in_block() % 16 == 15;"),),
        counts=(480, 480, 480)),
    "a line torn where hardware does not": Bug(LL128, WRONG, counts=(480, 480, 480), whole_lines=False),
    "the wrong slot": Bug(
        ONE_SHOT, WRONG, ((EXCHANGE, "peer.store(sent(i, line), line_at<WORLD>(block, kDataAt, block.rank,",
                           "peer.store(sent(i, line), line_at<WORLD>(block, kDataAt, 1 - block.rank,"),)),
    "another rank's flag": Bug(
        ONE_SHOT, DEADLOCK, ((EXCHANGE, "block.flag(use) + block.rank * kLine",
                              "block.flag(use) + (1 - block.rank) * kLine"),)),
    "rounds of a call not kept apart": Bug(
        ONE_SHOT, WRONG, ((RANKS, "        block_barrier();\n        if (is_first", "        if (is_first"),
                          (EXCHANGE, BARRIER, "    finish_stores();\n    if (use) block_barrier();\n")),
        counts=(3000, 3000), waves=2),
}
BF16, SENT = torch.bfloat16, "kDataAt, block.rank, first + line)"
#: what a change by somebody who does not know the code may do; those of QUICK are made in every run
MORE = {
    "the flag of the other use set": Bug(
        TWO_SHOT, DEADLOCK, ((EXCHANGE, "block.flag(use) + block.rank", "block.flag(0) + block.rank"),)),
    "the flag of the other use waited for": Bug(
        TWO_SHOT, WRONG, ((EXCHANGE, "load_flag(block.flag(use)", "load_flag(block.flag(0)"),)),
    "a peer that is a round ahead taken for late": Bug(
        ONE_SHOT, r"AssertionError: rank \d waited in vain", ((EXCHANGE, "- block.round) < 0", "- block.round) != 0"),),
        counts=(70,), alone=True),
    "flags waited for next to each other": Bug(
        ONE_SHOT, "EmulationError: .* reads 4 bytes at", ((EXCHANGE, "source * kLine) - ", "source * 4) - "),)),
    "halves of two blocks that overlap": Bug(
        LL, f"{WRONG}|{DEADLOCK}", ((RANKS, "(block_id() * 2 + int(round & 1))", "(block_id() + int(round & 1))"),),
        counts=(1500, 1500), blocks=2),
    "one round of a call counted": Bug(
        LL, f"{WRONG}|{DEADLOCK}", ((RANKS, "round + rounds()", "round + 1"),), counts=(700, 700)),
    "lines of a lane that overlap": Bug(
        ONE_SHOT, WRONG, ((EXCHANGE, "kSlotHalf / WORLD) + line * 16 * kRankLanes", "kSlotHalf / WORLD)"),),
        counts=(500,), lines=2),
    "sums sent over parts that a peer still reads": Bug(
        TWO_SHOT, WRONG, ((EXCHANGE, SENT, SENT.replace("first + ", "")),
                          (EXCHANGE, "receive_flagged(block, first + line,", "receive_flagged(block, line,"))),
    "both halves of a pack in one line": Bug(
        LL, DEADLOCK, ((EXCHANGE, "bits(), to + kLineOfAll, lane_at)", "bits(), to, lane_at)"),)),
    "the half of a pack before a tag lost": Bug(
        LL128, WRONG, ((EXCHANGE, "Words{{words.at[2], words.at[3], 0, 0}}", "Words{{0, 0, 0, 0}}"),)),
    "a pack in a tag's stead": Bug(LL128, WRONG, ((RANKS, "kLow128Packs = 15", "kLow128Packs = 16"),)),
    "parts in the order of this rank": Bug(
        TWO_SHOT, WRONG, ((OP, "pack + (args.rank + i) % args.world * part, args)", "pack + i * part, args)"),)),
    "another order of addition": Bug(LL, WRONG, ((EXCHANGE, "all[source] = Words", "all[source ^ 1] = Words"),),
                                     counts=(60,), world=4),
    "rounded at every addition": Bug(
        LL, WRONG, ((RANKS, "add_pair(sum[i], sum[i + 1], a, b);",
                     "sum[i] = float(T(sum[i] + a)), sum[i + 1] = float(T(sum[i + 1] + b));"),),
        counts=(60,), world=4, dtype=BF16),
    "an odd end taken for a whole pack": Bug(
        LL, WRONG, ((RANKS, "aligned && (at + 16 <= bytes || at >= bytes)", "aligned"),), counts=(71,), dtype=BF16),
    "slots of ranks that there are not without tags": Bug(
        LL, DEADLOCK, ((EXCHANGE, "source = block.world; source < WORLD", "source = block.world; source < 0"),),
        counts=(20,), world=3),
    "a part behind the last rank's": Bug(
        LL, f"{WRONG}|EmulationError: ", (("ops/reduce_scatter.hip", "owner < args.world ? 0 : args.world", "0"),),
        counts=(20,), op=ReduceScatter),
}
QUICK = {"the flag of the other use set", "slots of ranks that there are not without tags"}


def sources(bug: Bug, op: str, folder: Path) -> Path:
    """With the bug, and without the kernels of other protocols and other numbers of ranks."""
    made = folder / "hip"
    shutil.copytree(HIP / "include", made / "include")
    shutil.copy(HIP / "ops" / f"{op}.hip", _parent(made / "ops" / f"{op}.hip"))
    for file, stands, becomes in bug.edits:
        text = (made / file).read_text()
        assert stands in text, (file, stands)
        (made / file).write_text(text.replace(stands, becomes, 1))
    kernel, kernels_of = f"{op}_{NAMES[bug.protocol]}", bug.world if bug.world in (2, 4) else 8
    _without(made / "ops" / f"{op}.hip", rf"WAVE64_RANK_KERNELS(_OF)?\((?!{kernel},).*\)\n")
    _without(made / RANKS, rf"    WAVE64_RANK_KERNEL\(OP, ARGS, MAX_LANES, (?!{kernels_of}\))\d\)")
    return made


def _without(file: Path, pattern: str) -> None:
    text, number = re.subn(pattern, "", file.read_text())
    assert number >= 1, (file, pattern)
    file.write_text(text)


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def drawn(bug: Bug, seed: int) -> list[Call]:
    return [bug.op.drawn(bug.world, count, bug.dtype, bug.protocol, seed + i) for i, count in enumerate(bug.counts)]


def complaint(bug: Bug, code: str | None, seed: int, skips: int | None) -> str:
    """What a schedule brings; "" where every rank has the sums."""
    def change(launches: list, number: int, rank: int) -> list[SimpleNamespace]:
        made = [planned(each, block=64 * bug.waves, grid=bug.blocks, lines=bug.lines) for each in launches]
        for each in made:
            each.code_object = code or each.code_object
        return [] if skips == number and rank == 1 else made

    calls = drawn(bug, seed)
    checks = (*ALL, Unordered) if bug.races else ALL
    try:
        if bug.alone:
            one_by_one(calls[0], "gfx942", shots=1, code=code)
            return ""
        run(calls, "gfx942", seed, Arenas(bug.world, bug.uncached), change, checks=checks, patience=3000,
            whole_lines=bug.whole_lines)
        for call in calls:
            call.verify()
    except (AssertionError, EmulationError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


@pytest.mark.parametrize("bug", [*BUGS.values(), *(pytest.param(bug, marks=() if name in QUICK else pytest.mark.long)
                                                   for name, bug in MORE.items())], ids=[*BUGS, *MORE])
def test_a_bug_is_seen(bug, tmp_path):
    op = drawn(bug, 0)[0].op
    code = str(built.code_object(sources(bug, op, tmp_path), op, "gfx942")) if bug.edits else None
    seen = next(((seed, why) for seed in SEEDS if (why := complaint(bug, code, seed, bug.skips))), None)
    assert seen, f"in none of {len(SEEDS)} schedules"
    assert re.match(bug.shows, seen[1], re.DOTALL), seen
    if bug.edits or bug.skips:
        assert complaint(bug, None, seen[0], None) == ""  # as shipped
