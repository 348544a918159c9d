"""Launches at the same time: an all-reduce of two ranks, in assembly, over buffers and flags in memory that they share.

Each of two workgroups of two waves gives its part to the other rank's inbox, sets that rank's flag, waits for its own,
and adds what it finds in its inbox. Right in every order tried; and what is wrong with it is seen in some.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from assembled import assemble

from wave64.testing.emulator import Buffer, Deadlock, EmulationError, execute_together
from wave64.testing.emulator.checks import ALL  # all but that for races, which would end what is wrong before it shows

SEEDS = range(6)
LANES, BLOCKS = 128, 2
GIVE = """
global_store_dword v1, v2, s[10:11]
s_waitcnt vmcnt(0)
s_barrier
"""
SET_FLAG = """
v_mov_b32_e32 v3, 0
v_mov_b32_e32 v4, 1
buffer_wbl2 sc0 sc1
s_waitcnt vmcnt(0)
global_store_dword v3, v4, s[12:13] sc0 sc1
"""
LOAD = "global_load_dword v4, v3, s[14:15] sc0 sc1"
ATOMIC = "v_mov_b32_e32 v6, 0\nglobal_atomic_or v4, v3, v6, s[14:15] sc0 sc1"  # sc0: give the old value
#: s[8:9] the rank's own numbers, s[10:11] the other's inbox, s[12:13] the other's flags, s[14:15] its own flags,
#: s[16:17] its own inbox, s[18:19] the result; of flags, this workgroup's
ALL_REDUCE = """
s_mov_b32 s20, s2
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
s_load_dwordx8 s[8:15], s[4:5], 0x0
s_load_dwordx4 s[16:19], s[4:5], 0x20
s_lshl_b32 s21, s20, 7
v_and_b32_e32 v0, 0x3ff, v0
v_add_u32_e32 v1, s21, v0
v_lshlrev_b32_e32 v1, 2, v1
s_lshl_b32 s21, s20, 2
s_waitcnt lgkmcnt(0)
s_add_u32 s12, s12, s21
s_addc_u32 s13, s13, 0
s_add_u32 s14, s14, s21
s_addc_u32 s15, s15, 0
global_load_dword v2, v1, s[8:9]
s_waitcnt vmcnt(0)
{send}
v_mov_b32_e32 v3, 0
spin:
s_sleep 1
{look}
s_waitcnt vmcnt(0)
v_readfirstlane_b32 s22, v4
s_cmp_eq_u32 s22, 0
s_cbranch_scc1 spin
buffer_inv sc0 sc1
global_load_dword v5, v1, s[16:17]
s_waitcnt vmcnt(0)
v_add_u32_e32 v5, v2, v5
global_store_dword v1, v5, s[18:19]
"""


def on_pages(array):
    """A copy at the start of a page: which buffers lie in one cache line is the same in every run."""
    memory = np.zeros(array.nbytes + 2 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


PAGE = 4096


def ranks(send, look=LOAD):
    """The two launches, their buffers, the memory that those name, and what should result."""
    code = assemble("gfx942", (("all_reduce", ALL_REDUCE.format(send=send, look=look)),))
    numbers = on_pages(np.random.default_rng(0).integers(0, 2**31, (2, BLOCKS * LANES), dtype=np.uint32))
    inbox, result = on_pages(np.full_like(numbers, 7)), on_pages(np.zeros_like(numbers))
    flags = on_pages(np.zeros((2, BLOCKS), np.uint32))
    tables = on_pages(np.array([[x.ctypes.data for x in (numbers[rank], inbox[1 - rank], flags[1 - rank], flags[rank],
                                                         inbox[rank], result[rank])] for rank in (0, 1)], np.uint64))
    launches = [SimpleNamespace(kernel="all_reduce", code_object=code, grid=(BLOCKS, 1, 1), block=(LANES, 1, 1),
                                lds_bytes=0, args=int(table.ctypes.data).to_bytes(8, "little") + bytes(8))
                for table in tables]
    memory = {"numbers": numbers, "inbox": inbox, "flags": flags, "result": result, "tables": tables}
    buffers = [Buffer(name, x.ctypes.data, x.nbytes) for name, x in memory.items()]
    return SimpleNamespace(launches=launches, buffers=buffers, memory=memory, result=result,
                           expected=numbers.sum(0, np.uint32))


@pytest.mark.parametrize("look", [LOAD, ATOMIC])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_ranks_reduce(seed, look):
    pair = ranks(GIVE + SET_FLAG, look)
    ran = execute_together(pair.launches, pair.buffers, seed)
    assert (pair.result == pair.expected).all()
    assert (ran.launches, ran.waves) == (2, 8)
    assert ran.by_name["s_endpgm"] == 8


@pytest.mark.parametrize("look", [LOAD, ATOMIC])
def test_a_flag_that_nobody_sets_is_a_deadlock(look):
    pair = ranks(GIVE, look)
    with pytest.raises(Deadlock, match="nothing in memory has changed for 500 instructions of every wave") as raised:
        execute_together(pair.launches, pair.buffers, patience=500, seconds=20)
    for rank in (0, 1):
        assert f"launch {rank}: " in str(raised.value)
    assert "all_reduce+0x" in str(raised.value)


def test_a_rank_that_ends_too_early_is_a_deadlock_of_the_other():
    pair = ranks(GIVE + SET_FLAG)
    pair.launches[1].grid = (BLOCKS - 1, 1, 1)  # the second workgroup of rank 0 has no partner
    with pytest.raises(Deadlock, match=r"launch 0: \d of 4 waves run at all_reduce[^$]*launch 1: all_reduce has ended"):
        execute_together(pair.launches, pair.buffers, patience=500, seconds=20)


@pytest.mark.parametrize("send", [
    pytest.param(SET_FLAG + GIVE, id="data after the flag"),
    pytest.param(GIVE.replace("s_barrier", "") + SET_FLAG, id="no barrier before the flag")])
def test_a_protocol_that_is_wrong_in_some_order_is_seen(send):
    def right(seed):
        pair = ranks(send)
        execute_together(pair.launches, pair.buffers, seed, checks=ALL)
        return (pair.result == pair.expected).all()

    assert not all(right(seed) for seed in range(48))


def test_data_after_the_flag_is_a_race_in_every_order():
    pair = ranks(SET_FLAG + GIVE)
    with pytest.raises(EmulationError, match="inbox.*and no release and acquire is between"):
        execute_together(pair.launches, pair.buffers)


def test_the_seed_says_the_order():
    def found(seed):
        pair = ranks(SET_FLAG + GIVE)
        return execute_together(pair.launches, pair.buffers, seed, checks=ALL).by_name["s_sleep"], pair.result.tobytes()

    assert found(1) == found(1)
    assert len({found(seed) for seed in SEEDS}) > 1


def test_a_mistake_names_the_launch():
    pair = ranks(GIVE + SET_FLAG)
    without_result = [b for b in pair.buffers if b.name != "result"]
    with pytest.raises(EmulationError, match=r"launch [01]: all_reduce.*global_store_dword"):
        execute_together(pair.launches, without_result)


def test_a_launch_behind_another_of_its_stream_finds_what_that_stored():
    """On other devices, too, though the first waits for none of its stores."""
    code = assemble("gfx942", (("add_one", """
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
s_load_dwordx4 s[8:11], s[4:5], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_waitcnt lgkmcnt(0)
global_load_dword v2, v1, s[8:9]
s_waitcnt vmcnt(0)
v_add_u32_e32 v2, 1, v2
global_store_dword v1, v2, s[10:11]
"""),))
    for seed in SEEDS:
        x = np.zeros((3, 64), np.uint32)
        tables = np.array([[each.ctypes.data for each in x[i:i + 2]] for i in (0, 1)], np.uint64)
        launches = [SimpleNamespace(kernel="add_one", code_object=code, grid=(1, 1, 1), block=(64, 1, 1), lds_bytes=0,
                                    args=int(table.ctypes.data).to_bytes(8, "little") + bytes(8)) for table in tables]
        buffers = [Buffer("x", x.ctypes.data, x.nbytes), Buffer("tables", tables.ctypes.data, tables.nbytes)]
        execute_together(launches, buffers, seed, devices=(0, seed % 2), streams=(0, 0))
        assert x[2].tolist() == [2] * 64
