"""Memory instructions of the emulator against NumPy: every width, buffer resources, LDS and its atomics, private
memory, and how a launch's blocks and lanes are numbered."""

import numpy as np
import pytest
from assembled import assemble, run

U32 = np.uint32
BEGIN = """
s_load_dwordx4 s[4:7], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 4, v0
s_waitcnt lgkmcnt(0)
v_mov_b32_e32 v8, -1
v_mov_b32_e32 v9, -1
v_mov_b32_e32 v10, -1
v_mov_b32_e32 v11, -1
"""
END = """
s_waitcnt vmcnt(0) lgkmcnt(0)
global_store_dwordx4 v1, v[8:11], s[6:7]
"""
#: a resource of s[4:5], 1000 bytes
RESOURCE = "s_mov_b32 s8, s4\ns_and_b32 s9, s5, 0xffff\ns_movk_i32 s10, 1000\ns_mov_b32 s11, 0x00027000\n"


def records(stride, count, *, swizzle=0, together=0, more=0, low=4):
    """A resource of s[4:5], or another pair, of `count` records; swizzled, of words of 8 << together records."""
    return f"""
s_mov_b32 s8, s{low}
s_and_b32 s9, s{low + 1}, 0xffff
s_or_b32 s9, s9, {swizzle << 31 | stride << 16:#x}
s_movk_i32 s10, {count}
s_mov_b32 s11, {0x27000 | together << 21 | more:#x}
"""


#: the index and the offset of each lane
BOTH = "v_sub_u32_e32 v2, 63, v0\nv_and_b32_e32 v3, 3, v0\nv_lshlrev_b32_e32 v3, 2, v3\n"
TO_LDS = "global_load_dwordx4 v[4:7], v1, s[4:5]\ns_waitcnt vmcnt(0)\nds_write_b128 v1, v[4:7]\ns_waitcnt lgkmcnt(0)\n"


def _bytes(given, size, signed=False):
    """The first `size` bytes of each lane's 16, as one number of 32 bits."""
    kind = np.dtype(f"{'i' if signed else 'u'}{size}")
    return given.view(np.uint8).reshape(64, 16)[:, :size].copy().view(kind)[:, 0].astype(np.int64).astype(U32)


def _words(count):
    def result(given):
        want = np.full((64, 4), 0xFFFFFFFF, U32)
        want[:, :count] = given[:, :count]
        return want
    return result


def _first(column):
    """What only the first register changes."""
    def result(given):
        want = np.full((64, 4), 0xFFFFFFFF, U32)
        want[:, 0] = column(given)
        return want
    return result


def _in_range(given):
    """Loads of a row that ends within a resource of 1000 bytes: what lies behind reads as 0."""
    want = given.copy()
    want[62, 2:], want[63] = 0, 0
    return want


CASES = {
    "global_load_ubyte v8, v1, s[4:5]": _first(lambda g: _bytes(g, 1)),
    "global_load_sbyte v8, v1, s[4:5]": _first(lambda g: _bytes(g, 1, True)),
    "global_load_ushort v8, v1, s[4:5]": _first(lambda g: _bytes(g, 2)),
    "global_load_sshort v8, v1, s[4:5]": _first(lambda g: _bytes(g, 2, True)),
    "global_load_short_d16 v8, v1, s[4:5]": _first(lambda g: 0xFFFF0000 | _bytes(g, 2)),
    "global_load_short_d16_hi v8, v1, s[4:5]": _first(lambda g: 0xFFFF | _bytes(g, 2) << 16),
    "global_load_dwordx2 v[8:9], v1, s[4:5]": _words(2),
    "global_load_dwordx3 v[8:10], v1, s[4:5]": _words(3),
    "v_mov_b32_e32 v2, s4\nv_mov_b32_e32 v3, s5\nv_lshl_add_u64 v[2:3], v[2:3], 0, 4\n"
    "global_load_dword v8, v[2:3], off offset:-4": _first(lambda g: np.full(64, g[0, 0])),
    "v_mov_b32_e32 v2, s4\nv_mov_b32_e32 v3, s5\nflat_load_dword v8, v[2:3] offset:16":
        _first(lambda g: np.full(64, g[1, 0])),
    "s_load_dwordx2 s[12:13], s[4:5], 0x10\ns_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v8, s13":
        _first(lambda g: np.full(64, g[1, 1])),
    RESOURCE + "buffer_load_dwordx4 v[8:11], v1, s[8:11], 0 offen": _in_range,
    RESOURCE + "v_add_u32_e32 v2, -4, v1\nbuffer_load_dword v8, v2, s[8:11], 0 offen offset:4":
        _first(lambda g: np.where(np.arange(64) < 63, g[:, 0], 0)),
    RESOURCE + "s_movk_i32 s12, 16\nbuffer_load_ushort v8, v1, s[8:11], s12 offen":
        _first(lambda g: np.where(np.arange(64) < 62, np.roll(_bytes(g, 2), -1), 0)),
    records(16, 60) + "buffer_load_dword v8, v0, s[8:11], 0 idxen offset:4":
        _first(lambda g: np.where(np.arange(64) < 60, g[:, 1], 0)),
    records(1 << 14 | 16, 60) + "buffer_load_dwordx4 v[8:11], v0, s[8:11], 0 idxen":  # a bit that is for caches alone
        lambda g: np.where(np.arange(64)[:, None] < 60, g, 0),
    records(16, 60) + BOTH + "s_movk_i32 s12, 16\nbuffer_load_dword v8, v[2:3], s[8:11], s12 idxen offen":
        _first(lambda g: [g[64 - i, i % 4] if 63 - i < 60 else 0 for i in range(64)]),
    records(16, 1000) + "buffer_load_dwordx4 v[8:11], v1, s[8:11], 0 offen": _in_range,
    records(8, 60, swizzle=1, together=1) + "buffer_load_dword v8, v0, s[8:11], 0 idxen offset:4":
        _first(lambda g: [g.ravel()[(i // 16 * 2 + 1) * 16 + i % 16] if i < 60 else 0 for i in range(64)]),
    records(12, 64, swizzle=1, together=3) + "buffer_load_ubyte v8, v0, s[8:11], 0 idxen offset:9":
        _first(lambda g: [g.view(np.uint8).ravel()[2 * 256 + 4 * i + 1] for i in range(64)]),
    records(16, 60) + "v_mov_b32_e32 v8, 5\nbuffer_atomic_add v8, v0, s[8:11], 0 idxen offset:8 sc0":
        _first(lambda g: np.where(np.arange(64) < 60, g[:, 2], 0)),
    TO_LDS + "ds_read_b96 v[8:10], v1": _words(3),
    TO_LDS + "ds_read_u8_d16_hi v8, v1 offset:0": _first(lambda g: 0xFFFF | _bytes(g, 1) << 16),
    TO_LDS + "ds_read_i16 v8, v1": _first(lambda g: _bytes(g, 2, True)),
    TO_LDS + "ds_read2_b32 v[8:9], v1 offset0:0 offset1:1": _words(2),
    TO_LDS + "v_xor_b32_e32 v2, 0x3f0, v1\nds_read_b128 v[8:11], v2": lambda g: g[::-1],
    "v_mov_b32_e32 v2, 0\nds_write_b32 v2, v2\ns_waitcnt lgkmcnt(0)\nds_add_rtn_u32 v8, v2, v0":
        _first(lambda g: np.cumsum(np.arange(64)) - np.arange(64)),
    "v_mov_b32_e32 v2, 0\nds_write_b32 v2, v2\ns_waitcnt lgkmcnt(0)\nds_max_u32 v2, v0\nds_read_b32 v8, v2":
        _first(lambda g: np.full(64, 63)),
    "v_mov_b32_e32 v2, 0\nv_mov_b32_e32 v3, 7\nds_write_b32 v2, v3\ns_waitcnt lgkmcnt(0)\n"
    "ds_cmpst_rtn_b32 v8, v2, v3, v0": _first(lambda g: np.where(np.arange(64) == 0, 7, 0)),
    "v_mov_b32_e32 v2, 0\nv_mov_b32_e32 v3, 1\nglobal_atomic_add v8, v2, v3, s[4:5] sc0":
        _first(lambda g: g[0, 0] + np.arange(64, dtype=U32)),
    "s_mov_b32 m0, 0\ns_nop 0\nglobal_load_lds_dword v1, s[4:5]\ns_waitcnt vmcnt(0)\nv_lshlrev_b32_e32 v2, 2, v0\n"
    "ds_read_b32 v8, v2": _first(lambda g: g[:, 0]),
}


@pytest.mark.parametrize("body", CASES)
def test_loads(body):
    kernels = tuple((f"kernel{i}", BEGIN + text + END) for i, text in enumerate(CASES))
    given = np.random.default_rng(0).integers(0, 2**32, (64, 4), dtype=U32)
    result = np.zeros((64, 4), U32)
    want = CASES[body](given.copy())
    run(assemble("gfx942", kernels, lds=1024), f"kernel{list(CASES).index(body)}", given, result)
    assert (result == want).all()


STORES = {
    "global_store_byte v1, v8, s[6:7]": (1, 0, 64), "global_store_short v1, v8, s[6:7]": (2, 0, 64),
    "global_store_short_d16_hi v1, v8, s[6:7]": (2, 2, 64), "global_store_byte_d16_hi v1, v8, s[6:7]": (1, 2, 64),
    "global_store_dwordx3 v1, v[8:10], s[6:7]": (12, 0, 64),
    RESOURCE.replace("s4", "s6").replace("s5", "s7").replace("1000", "512")
    + "buffer_store_dwordx2 v[8:9], v1, s[8:11], 0 offen": (8, 0, 32),
    records(16, 20, low=6) + "buffer_store_dwordx3 v[8:10], v0, s[8:11], 0 idxen": (12, 0, 20),
}


@pytest.mark.parametrize("body", STORES)
def test_stores_write_their_bytes_and_no_others(body):
    load = "global_load_dwordx4 v[8:11], v1, s[4:5]\ns_waitcnt vmcnt(0)\n"
    kernels = tuple((f"kernel{i}", BEGIN + load + text) for i, text in enumerate(STORES))
    given = np.random.default_rng(1).integers(0, 2**32, (64, 4), dtype=U32)
    result = np.full((64, 4), 0xA5A5A5A5, U32)
    size, first, lanes = STORES[body]
    want = result.copy()
    given_bytes, want_bytes = (array.view(np.uint8).reshape(64, 16) for array in (given, want))
    want_bytes[:lanes, :size] = given_bytes[:lanes, first:first + size]
    run(assemble("gfx942", kernels), f"kernel{list(STORES).index(body)}", given, result)
    assert (result == want).all()


REFUSED = {
    records(16, 60, more=1 << 23) + "buffer_load_dword v8, v0, s[8:11], 0 idxen": "adds lane ids",
    records(0, 60) + "buffer_load_dword v8, v0, s[8:11], 0 idxen": "without a stride",
    records(16, 60, swizzle=1) + "buffer_load_dword v8, v1, s[8:11], 0 offen": "swizzled buffer resource without an",
    records(16, 60, swizzle=1) + "buffer_load_dwordx2 v[8:9], v0, s[8:11], 0 idxen": "8 bytes at once of a swizzled",
    records(16, 60) + "s_buffer_load_dword s12, s[8:11], 0x0": "s_buffer_load_dword from a buffer resource with a",
    records(16, 60) + "buffer_load_format_x v8, v0, s[8:11], 0 idxen": "does not know buffer_load_format_x",
    "ds_read_addtid_b32 v8": "does not know ds_read_addtid_b32",
}


@pytest.mark.parametrize("body", REFUSED, ids=REFUSED.values())
def test_what_is_not_known_is_refused(body):
    kernels = tuple((f"kernel{i}", BEGIN + text) for i, text in enumerate(REFUSED))
    with pytest.raises(NotImplementedError, match=REFUSED[body]):
        run(assemble("gfx942", kernels, lds=1024), f"kernel{list(REFUSED).index(body)}", np.zeros((64, 4), U32),
            np.zeros((64, 4), U32))


def test_private_memory_is_a_lanes_own():
    body = BEGIN + """
scratch_store_dword off, v0, off offset:8
s_movk_i32 s12, 4
scratch_store_dword off, v1, s12
s_waitcnt vmcnt(0)
v_mov_b32_e32 v2, 8
scratch_load_dword v8, v2, off
scratch_load_dword v9, off, off offset:4
""" + END
    result = np.zeros((64, 4), U32)
    run(assemble("gfx942", (("private", body),), scratch=16), "private", np.zeros(4, U32), result)
    assert (result[:, 0] == np.arange(64)).all()
    assert (result[:, 1] == 16 * np.arange(64)).all()


def test_blocks_and_lanes_have_their_numbers():
    body = """
s_load_dwordx4 s[4:7], s[0:1], 0x0
v_and_b32_e32 v1, 0x3ff, v0
v_bfe_u32 v2, v0, 10, 10
v_lshl_add_u32 v3, v2, 5, v1
s_mul_i32 s8, s3, 3
s_add_i32 s8, s8, s2
s_lshl_b32 s8, s8, 7
v_add_u32_e32 v3, s8, v3
v_lshlrev_b32_e32 v3, 4, v3
v_mov_b32_e32 v4, s2
v_mov_b32_e32 v5, s3
v_mov_b32_e32 v6, v1
v_mov_b32_e32 v7, v2
s_waitcnt lgkmcnt(0)
global_store_dwordx4 v3, v[4:7], s[6:7]
"""
    result = np.zeros((50, 3, 4, 32, 4), U32)  # y and x of blocks, y and x of lanes; more blocks than a batch holds
    code = assemble("gfx942", (("numbers", body),))
    ran = run(code, "numbers", np.zeros(4, U32), result, grid=(3, 50), block=(32, 4))
    y, x, lane_y, lane_x = np.indices(result.shape[:-1])
    assert (result == np.stack([x, y, lane_x, lane_y], axis=-1)).all()
    assert ran.waves == 300
