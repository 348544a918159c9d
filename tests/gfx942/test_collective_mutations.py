"""Deliberate bugs in the collectives: in their sources, compiled for gfx942, in their launches, in their memory. Each
is seen in one of a few schedules under the memory model, for the reason that it is a bug."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from collectives import LL, LL128, ONE_SHOT, TWO_SHOT, AllReduce, Arenas, planned, run

from wave64 import quant
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
    waves: int = 1             # of the one block
    races: bool = False        # whether to look for them
    uncached: bool = True
    whole_lines: bool = True
    skips: int | None = None   # the call that rank 1 does not make


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
        LL, f"{WRONG}|{DEADLOCK}", ((EXCHANGE, "(a.at[1] ^ tag) | (a.at[3] ^ tag) | (b.at[1] ^ tag) | (b.at[3] ^ tag)",
                     "(a.at[3] ^ tag) | (b.at[3] ^ tag)"),), counts=(256, 256, 256), whole_lines=False),
    "a tag of two lines": Bug(
        LL128, WRONG, ((EXCHANGE, "has_tag = lane_in_block() % 8 == 7", "has_tag = lane_in_block() % 16 == 15"),),
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


def sources(bug: Bug, folder: Path) -> Path:
    """With the bug, and without the kernels of other protocols and of more ranks than two."""
    made = folder / "hip"
    for part in ("include", "ops/all_reduce.hip"):
        (shutil.copytree if part == "include" else shutil.copy)(HIP / part, _parent(made / part))
    others = [f"WAVE64_RANK_KERNELS(all_reduce_{name}, AllReduceArgs)\n" for protocol, name in NAMES.items()
              if protocol != bug.protocol]
    others += [f"WAVE64_RANK_KERNELS_OF(all_reduce_two_shot_{codes}, AllReduceArgs, wave64::kCodedLanes)\n"
               for codes in quant.CODES]
    others += [f"    WAVE64_RANK_KERNEL(OP, ARGS, MAX_LANES, {world})" for world in (4, 8)]
    for file, stands, becomes in (*bug.edits, *(((OP if "KERNELS" in each else RANKS), each, "") for each in others)):
        text = (made / file).read_text()
        assert stands in text, (file, stands)
        (made / file).write_text(text.replace(stands, becomes, 1))
    return made


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def complaint(bug: Bug, code: str | None, seed: int, skips: int | None) -> str:
    """What a schedule brings; "" where every rank has the sums."""
    def change(launches: list, number: int, rank: int) -> list[SimpleNamespace]:
        made = [planned(each, block=64 * bug.waves, grid=1, lines=1) for each in launches]
        for each in made:
            each.code_object = code or each.code_object
        return [] if skips == number and rank == 1 else made

    calls = [AllReduce.drawn(2, count, torch.float32, bug.protocol, seed + i) for i, count in enumerate(bug.counts)]
    checks = (*ALL, Unordered) if bug.races else ALL
    try:
        run(calls, "gfx942", seed, Arenas(2, bug.uncached), change, checks=checks, patience=3000,
            whole_lines=bug.whole_lines)
        for call in calls:
            call.verify()
    except (AssertionError, EmulationError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_is_seen(bug, tmp_path):
    code = str(built.code_object(sources(bug, tmp_path), "all_reduce", "gfx942")) if bug.edits else None
    seen = next(((seed, why) for seed in SEEDS if (why := complaint(bug, code, seed, bug.skips))), None)
    assert seen, f"in none of {len(SEEDS)} schedules"
    assert re.match(bug.shows, seen[1], re.DOTALL), seen
    if bug.edits or bug.skips:
        assert complaint(bug, None, seen[0], None) == ""  # as shipped
