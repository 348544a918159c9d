"""Litmus tests of the memory model: what two waves may see of each other's stores, by the bits of their instructions,
by where they run, and by the kind of memory. What the model forbids never happens, and what it allows is seen."""

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from assembled import assemble, run

from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator import Buffer, DeviceBuffer, EmulationError, execute_together
from wave64.testing.emulator.checks import ALL
from wave64.testing.emulator.run import emulate
from wave64.testing.emulator.unordered import Unordered

SEEDS = range(24)
#: s[8:9] x, s[10:11] y, s[12:13] results; one lane of v0 = 0 and v1 = 1; `second` is where the second wave begins
PROLOGUE = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
s_load_dwordx4 s[8:11], s[4:5], 0x0
s_load_dwordx4 s[12:15], s[4:5], 0x10
s_mov_b64 exec, 1
v_mov_b32_e32 v0, 0
v_mov_b32_e32 v1, 1
s_waitcnt lgkmcnt(0)
s_add_u32 s2, s2, s14
s_cmp_eq_u32 s2, {second}
s_cbranch_scc1 second
s_cmp_lg_u32 s2, 0
s_cbranch_scc1 end
"""
#: where the two waves run: (launches, their workgroups, the workgroup of the second wave)
SAME_DIE, TWO_DIES, TWO_DEVICES = (1, 9, 8), (1, 2, 1), (2, 1, 1)
WAIT = "s_waitcnt vmcnt(0)"
RELEASE = {scope: f"buffer_wbl2 {bits}\n{WAIT}" for scope, bits in (("device", "sc1"), ("system", "sc0 sc1"))}
ACQUIRE = {"group": "buffer_inv sc0", "device": "buffer_inv sc1", "system": "buffer_inv sc0 sc1"}
BITS = {"die": "", "device": "sc1", "system": "sc0 sc1"}


@functools.cache
def code(first: str, second: str, at: int):
    body = PROLOGUE.format(second=at) + first + "\ns_branch end\nsecond:\n" + second + "\nend:"
    return assemble("gfx942", (("litmus", body),))


def outcome(first: str, second: str, where=TWO_DEVICES, seed: int = 0, homes=(0, 0), uncached=False,
            checks=ALL, show=None) -> tuple[int, int]:
    """What the two waves leave in the results. homes: the devices of x and y. Without the check for races, which would
    end what is wrong before it shows."""
    launches, groups, at = where
    x, y, results = (np.zeros(32, np.uint32) for _ in range(3))
    tables = np.array([[x.ctypes.data, y.ctypes.data, results.ctypes.data, number] for number in (0, 1)], np.uint64)
    made = [SimpleNamespace(kernel="litmus", code_object=code(first, second, at), grid=(groups, 1, 1), block=(64, 1, 1),
                            lds_bytes=0, args=int(tables[i].ctypes.data).to_bytes(8, "little") + bytes(8))
            for i in range(launches)]
    buffers = [DeviceBuffer(name, array.ctypes.data, array.nbytes, device, uncached)
              for name, array, device in (("x", x, homes[0]), ("y", y, homes[1]))]
    execute_together(made, [*buffers, Buffer("results", results.ctypes.data, 8),
                            Buffer("tables", tables.ctypes.data, tables.nbytes)], seed, patience=4000, seconds=60,
                     checks=checks, show=show)
    return int(results[0]), int(results[1])


def outcomes(first: str, second: str, **options) -> list[tuple[int, int]]:
    return [outcome(first, second, seed=seed, **options) for seed in SEEDS]


# ---- message passing: x is the data, y the flag

def passing(store="", release=RELEASE["system"], flag="sc0 sc1", look="sc0 sc1", acquire=ACQUIRE["system"], load="",
            cached=True):
    """(writer, reader): the reader has the old data in its caches, waits for the flag, and gives what it then reads."""
    writer = (f"global_store_dword v0, v1, s[8:9] {store}\n{release}\n"
              f"global_store_dword v0, v1, s[10:11] {flag}")
    before = f"global_load_dword v2, v0, s[8:9]\n{WAIT}\n" if cached else ""
    reader = (f"{before}spin:\nglobal_load_dword v2, v0, s[10:11] {look}\n{WAIT}\n"
              f"v_readfirstlane_b32 s20, v2\ns_cmp_eq_u32 s20, 0\ns_cbranch_scc1 spin\n{acquire}\n"
              f"global_load_dword v3, v0, s[8:9] {load}\n{WAIT}\nglobal_store_dword v0, v3, s[12:13]")
    return writer, reader


DEVICE = dict(release=RELEASE["device"], flag="sc1", look="sc1", acquire=ACQUIRE["device"])
GROUP = dict(release=WAIT, flag="", look="sc0", acquire=ACQUIRE["group"])
PUSHED, PULLED = (1, 1), (0, 1)  # the data in the reader's memory, in the writer's
PASSING = {
    # what the manual's table asks for
    "within a die": (GROUP, dict(where=SAME_DIE), True),
    "within a device": (DEVICE, dict(where=TWO_DIES), True),
    "pushed to another device": ({}, dict(homes=PUSHED), True),
    "pulled from another device": ({}, dict(homes=PULLED), True),
    "uncached, pulled": ({}, dict(homes=PULLED, uncached=True), True),
    # without caches to write back or to drop
    "stored through": (dict(store="sc0 sc1", release=WAIT), dict(homes=PUSHED), True),
    "stored through, within a device": (DEVICE | dict(store="sc1", release=WAIT), dict(where=TWO_DIES), True),
    "loaded past the caches": (dict(acquire="", load="sc0 sc1"), dict(homes=PULLED), True),
    "uncached, written through": (dict(release=WAIT), dict(homes=PUSHED, uncached=True), True),
    # each thing left out
    "no write-back": (dict(release=WAIT), dict(homes=PUSHED), False),
    "no write-back, within a device": (DEVICE | dict(release=WAIT), dict(where=TWO_DIES), False),
    "no wait behind the write-back": (dict(release="buffer_wbl2 sc0 sc1"), dict(homes=PUSHED), False),
    "no wait behind stores that go through": (dict(store="sc0 sc1", release=""), dict(homes=PUSHED), False),
    "written back to the device only": (dict(release=RELEASE["device"]), dict(homes=PUSHED), False),
    "stored to the device only": (dict(store="sc1", release=WAIT), dict(homes=PUSHED), False),
    "no invalidate": (dict(acquire=""), dict(homes=PULLED), False),
    "no invalidate of pushed data": (dict(acquire=""), dict(homes=PUSHED), False),
    "no invalidate, within a device": (DEVICE | dict(acquire=""), dict(where=TWO_DIES), False),
    "no invalidate, within a die": (GROUP | dict(acquire=""), dict(where=SAME_DIE), False),
    "a group's acquire of another device's data": (dict(acquire=ACQUIRE["group"]), dict(homes=PULLED), False),
    "a device's acquire of another device's data": (dict(acquire=ACQUIRE["device"]), dict(homes=PULLED), False),
    # what the kind of memory spares
    "a device's acquire of pushed data": (dict(acquire=ACQUIRE["device"]), dict(homes=PUSHED), True),
    "a device's acquire of uncached data": (dict(acquire=ACQUIRE["device"]), dict(homes=PULLED, uncached=True), True),
}


@pytest.mark.parametrize("case", PASSING)
def test_message_passing(case):
    bits, options, always = PASSING[case]
    seen = [first for first, _ in outcomes(*passing(**bits), **options)]
    assert set(seen) <= {0, 1}
    assert (min(seen) == 1) == always, f"the new data was seen in {sum(seen)} of {len(seen)} schedules"


@pytest.mark.parametrize("bits", [
    pytest.param(dict(release=WAIT), id="no write-back"), pytest.param(dict(acquire=""), id="no invalidate"),
    pytest.param(dict(store="sc0 sc1", release=""), id="no wait"), pytest.param("order", id="flag first")])
def test_a_mistake_is_seen_in_nearly_all_schedules(bits):
    writer, reader = passing(**({} if bits == "order" else bits))
    if bits == "order":
        store = "global_store_dword v0, v1, s[{}] sc0 sc1\n"
        writer = store.format("10:11") + WAIT + "\n" + store.format("8:9")
    wrong = sum(outcome(writer, reader, seed=seed, homes=PULLED)[0] == 0 for seed in range(100))
    assert wrong >= 95


def test_a_schedule_can_be_read():
    """Of a seed that went wrong: the flag is seen before the data."""
    lines: list[str] = []
    assert outcome(*passing(store="sc0 sc1", release=""), homes=PULLED, seed=0, show=lines.append)[0] == 0
    where = [next((i for i, line in enumerate(lines) if re.fullmatch(text, line)), None) for text in (
        r"launch 0, wave 0 stores x\+0: 01000000", r"launch 0, wave 0 has its store seen by the system: y\+0",
        r"launch 1, wave 0 finds( later)? y\+0: 01000000", "launch 1, wave 0 drops what its device may have stale",
        r"launch 0, wave 0 has its store seen by the system: x\+0")]
    assert None not in where, lines
    assert where == sorted(where)


# ---- store buffering: each stores its own and loads the other's; both find nothing new only if stores are late

def buffering(wait: str, store="sc0 sc1", load="sc0 sc1") -> tuple[str, str]:
    def wave(own: str, other: str, result: int) -> str:
        return (f"global_store_dword v0, v1, s[{own}] {store}\n{wait}\nglobal_load_dword v3, v0, s[{other}] {load}\n"
                f"{WAIT}\nglobal_store_dword v0, v3, s[12:13] offset:{4 * result}")
    return wave("8:9", "10:11", 0), wave("10:11", "8:9", 1)


@pytest.mark.parametrize(("bits", "both_old"), [
    (dict(wait=WAIT), False), (dict(wait=""), True), (dict(wait=RELEASE["system"], store=""), False),
    (dict(wait=WAIT, store=""), True), (dict(wait=RELEASE["device"], store=""), True)])
@pytest.mark.parametrize("homes", [(0, 1), (1, 0)])
def test_store_buffering(bits, both_old, homes):
    seen = set(outcomes(*buffering(**bits), homes=homes))
    assert ((0, 0) in seen) == both_old
    assert len(seen) > 1 or both_old


# ---- load buffering: each loads the other's and then stores its own; both find it only if loads are late

def late_loads(wait: str) -> tuple[str, str]:
    def wave(own: str, other: str, result: int) -> str:
        return (f"global_load_dword v3, v0, s[{other}] sc0 sc1\n{wait}\nglobal_store_dword v0, v1, s[{own}] sc0 sc1\n"
                f"{WAIT}\nglobal_store_dword v0, v3, s[12:13] offset:{4 * result}")
    return wave("8:9", "10:11", 0), wave("10:11", "8:9", 1)


@pytest.mark.parametrize(("wait", "both_new"), [(WAIT, False), ("", True)])
def test_load_buffering(wait, both_new):
    seen = {outcome(*late_loads(wait), seed=seed, homes=(0, 1)) for seed in range(100)}
    assert ((1, 1) in seen) == both_new
    assert (0, 0) in seen


# ---- one address

def test_a_wave_sees_its_own_stores_in_order():
    body = ("global_store_dword v0, v1, s[8:9]\nv_mov_b32_e32 v2, 2\nglobal_store_dword v0, v2, s[8:9]\n"
            f"global_load_dword v3, v0, s[8:9]\n{WAIT}\nglobal_store_dword v0, v3, s[12:13]")
    assert {outcome(body, "", seed=seed) for seed in SEEDS} == {(2, 0)}


@pytest.mark.parametrize("where", [SAME_DIE, TWO_DIES, TWO_DEVICES])
def test_atomics_lose_nothing(where):
    """Of two waves that add 1 to x eight times each."""
    bits = "sc1" if where is TWO_DEVICES else ""
    body = f"global_atomic_add v0, v1, s[8:9] {bits}\n" * 8 + WAIT
    last = f"\nglobal_atomic_add v3, v0, v1, s[10:11] sc0 {bits}\n{WAIT}\nglobal_store_dword v3, v3, s[12:13]"
    reader = "\nv_mov_b32_e32 v4, 0\n" + f"global_atomic_add v3, v0, v4, s[8:9] sc0 {bits}\n{WAIT}\n"
    check = last.replace("global_store_dword v3, v3", f"{reader}v_mov_b32_e32 v0, 0\nglobal_store_dword v0, v3")
    found = {max(outcome(body + check, body + check, where=where, seed=seed)) for seed in SEEDS}
    assert found <= set(range(8, 17))
    assert 16 in found


# ---- races: the same programs, held to an order of their accesses

SPARED = ("uncached, written through", "within a die", "no invalidate, within a die",
          "a device's acquire of pushed data", "a device's acquire of uncached data")


@pytest.mark.parametrize("case", [case for case in PASSING if case not in SPARED])
def test_what_is_wrong_is_a_race(case):
    """But for what the kind of memory spares, or one die: that is no order of accesses. Here the reader has nothing in
    its caches, for to look before the flag is set is a race, too."""
    bits, options, right = PASSING[case]

    def held(seed: int) -> None:
        outcome(*passing(**bits, cached=False), seed=seed, checks=(Unordered,), **options)

    if right:
        for seed in SEEDS:
            held(seed)
    else:
        with pytest.raises(EmulationError, match=r"reads a byte 0 bytes into x.* (writes|changes), and no release and"):
            held(0)


NEIGHBORS = """
v_lshlrev_b32_e32 v1, 2, v0
s_lshl_b32 s6, s2, {shift}
s_load_dwordx4 s[8:11], s[0:1], 0x0
v_add_u32_e32 v1, s6, v1
v_mov_b32_e32 v2, s2
s_waitcnt lgkmcnt(0)
{access} s[10:11]
"""
STORE = "global_store_dword v1, v2,"


@pytest.mark.parametrize(("access", "shift", "words"), [
    (STORE, 8, None), ("global_atomic_add v1, v2,", 2, None),
    (STORE, 2, r"workgroup 0 writes a byte 4 bytes into given.*which workgroup 1 writes"),
    ("global_load_dword v3, v1, s[10:11]\n" + STORE, 2, r"workgroup 0 writes a byte 4 bytes into .*workgroup 1 reads"),
    ("global_atomic_add v1, v2, s[10:11]\n" + STORE, 2, r"workgroup 0 writes a byte 4 .*workgroup 1 changes")])
def test_workgroups_of_a_launch_keep_apart(access, shift, words):
    """Each of two has 64 words from its own on: 256 bytes apart, or 4."""
    code = assemble("gfx942", (("neighbors", NEIGHBORS.format(access=access, shift=shift)),))
    result = np.zeros(256, np.uint32)

    def launched() -> None:
        run(code, "neighbors", result, result, grid=(2, 1), checks=(Unordered,))

    if words:
        with pytest.raises(EmulationError, match=words):
            launched()
    else:
        launched()
        launched()  # behind the first


@pytest.mark.parametrize("op", [op.name for op in OPS.values()
                                if "hip" in op.backends and "group" not in op.signature.parameters])
def test_operators_have_no_races(op):
    """A small case of each, of several workgroups. Of collectives test_collectives.py looks for races."""
    declared = OPS[op]
    with platform.target("gfx942"):
        for case in (case for case in declared.cases() if not case.large):
            args = contract.draw(case, "cpu", seed=0)
            supports = declared.backends["hip"].supports
            if supports is None or supports(**args) is None:
                with emulate("gfx942", checks=(Unordered,)):
                    declared.backends["hip"].run(**args)
                return
    pytest.fail("it has no small case")
