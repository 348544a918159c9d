"""Bit operations that scalar and vector instructions share, on arrays of unsigned integers."""

import numpy as np

U32, U64 = np.uint32, np.uint64
_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


def shift_left(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The count is taken modulo the width; so in the other shifts."""
    return a << _count(a, b)


def shift_right(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Arithmetic where `a` is signed."""
    return a >> _count(a, b)


def _count(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (b & b.dtype.type(8 * a.dtype.itemsize - 1)).astype(a.dtype)


def mask(width: np.ndarray, dtype: type) -> np.ndarray:
    """The lowest `width` bits set; all of them from the dtype's own width on."""
    bits = 8 * np.dtype(dtype).itemsize
    ones = dtype(2**bits - 1)
    return np.where(width >= bits, ones, (dtype(1) << np.minimum(width, bits - 1).astype(dtype)) - dtype(1))


def field(a: np.ndarray, first: np.ndarray, width: np.ndarray) -> np.ndarray:
    """`width` bits of `a` from bit `first` on; signed `a` extends the sign."""
    unsigned = a.view(f"u{a.dtype.itemsize}")
    kind = unsigned.dtype.type
    got = (unsigned >> first.astype(kind)) & mask(width, kind)
    if a.dtype == unsigned.dtype:
        return got
    bits = 8 * a.dtype.itemsize
    up = np.where(width == 0, bits - 1, bits - np.minimum(width, bits)).astype(kind)
    return np.where(width == 0, a.dtype.type(0), (got << up).view(a.dtype) >> up.astype(a.dtype))


def reverse(a: np.ndarray) -> np.ndarray:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, -1)
    return np.ascontiguousarray(_REVERSED[octets][..., ::-1]).view(a.dtype)[..., 0]


def first_one(a: np.ndarray) -> np.ndarray:
    """The lowest set bit's number, as uint32; -1 without one."""
    below = np.bitwise_count((a & (~a + a.dtype.type(1))) - a.dtype.type(1)).astype(U32)
    return np.where(a == 0, U32(0xFFFFFFFF), below)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """Zeros above the highest set bit, as uint32; -1 without one."""
    return first_one(reverse(a))


def sign_bits(a: np.ndarray) -> np.ndarray:
    """How many bits from the top on equal the sign bit, of int32; -1 where all do."""
    return leading_zeros(np.where(a < 0, ~a, a).view(U32))


def permute(data: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """v_perm_b32: each byte of `selector` picks a byte of `data` (uint64), a sign, 0 or 255."""
    if selector.shape[-1] == 1 and (selector == selector.flat[0]).all():
        return _permute_alike(data, int(selector.flat[0]))
    data, selector = np.broadcast_arrays(data, selector)
    octets = np.ascontiguousarray(data).view(np.uint8).reshape(*data.shape, 8)
    signs = (octets[..., 1::2] >> 7) * np.uint8(255)
    choices = np.concatenate([octets, signs, np.zeros_like(octets[..., :1]), np.full_like(octets[..., :1], 255)], -1)
    picks = np.minimum(np.ascontiguousarray(selector).view(np.uint8).reshape(*selector.shape, 4), 13)
    return np.ascontiguousarray(np.take_along_axis(choices, picks.astype(np.intp), -1)).view(U32)[..., 0]


def _permute_alike(data: np.ndarray, selector: int) -> np.ndarray:
    """The same selector in all lanes, as compilers mostly have it: ten times as fast."""
    octets = np.ascontiguousarray(data).view(np.uint8).reshape(*data.shape, 8)
    got = np.empty((*data.shape, 4), np.uint8)
    for i, pick in enumerate(selector.to_bytes(4, "little")):
        if pick < 8:
            got[..., i] = octets[..., pick]
        elif pick < 12:
            got[..., i] = (octets[..., 2 * (pick - 8) + 1] >> 7) * np.uint8(255)
        else:
            got[..., i] = 0 if pick == 12 else 255
    return got.view(U32)[..., 0]
