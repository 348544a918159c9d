"""What atomics compute, for global memory and LDS: mnemonic part -> (NumPy type, function of old value and operand)."""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import arithmetic

U32 = np.uint32


def _increment(old, limit):
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


def _packed_halves(old, operand):
    pairs = [np.ascontiguousarray(x).view(np.float16).reshape(-1, 2) for x in (old, operand)]
    return (pairs[0] + pairs[1]).view(U32)[:, 0]


def _packed_bf16(old, operand):
    halves = [arithmetic.f32_to_bf16(arithmetic.bf16_to_f32(old >> U32(s) & U32(0xFFFF))
                                     + arithmetic.bf16_to_f32(operand >> U32(s) & U32(0xFFFF))) for s in (0, 16)]
    return halves[0] | halves[1] << U32(16)


def _compare_and_swap(old, new, expected):
    return np.where(old == expected, new, old)


#: with an integer type's letter; the width comes from the mnemonic
INTEGER: dict[str, tuple[str, Callable]] = {
    "swap": ("u", lambda old, x: x), "add": ("u", np.add), "sub": ("u", np.subtract),
    "rsub": ("u", lambda old, x: x - old), "min_i": ("i", np.minimum), "min_u": ("u", np.minimum),
    "max_i": ("i", np.maximum), "max_u": ("u", np.maximum), "and": ("u", np.bitwise_and), "or": ("u", np.bitwise_or),
    "xor": ("u", np.bitwise_xor), "inc": ("u", _increment), "dec": ("u", _decrement),
    "cmpswap": ("u", _compare_and_swap),
}
FLOAT: dict[str, tuple[type, Callable]] = {
    "add_f32": (np.float32, np.add), "add_f64": (np.float64, np.add),
    "min_f64": (np.float64, arithmetic.minimum), "max_f64": (np.float64, arithmetic.maximum),
    "pk_add_f16": (U32, _packed_halves), "pk_add_bf16": (U32, _packed_bf16),
}
FLOAT_LDS = FLOAT | {"min_f32": (np.float32, arithmetic.minimum), "max_f32": (np.float32, arithmetic.maximum)}


def integer(name: str, size: int) -> tuple[type, Callable]:
    """The type of `size` bytes and the function of an integer atomic."""
    letter, function = INTEGER[name]
    return np.dtype(f"{letter}{size}").type, function


def apply(space, offsets: np.ndarray, kind: type, change: Callable, operands: list[np.ndarray],
          returns: bool) -> np.ndarray | None:
    """Changes `space`; gives the old values as words [accesses, words] where wanted. operands: words as above."""
    size = np.dtype(kind).itemsize
    typed = [np.ascontiguousarray(operand).view(kind)[:, 0] for operand in operands]
    if not returns and isinstance(change, np.ufunc) and issubclass(kind, np.integer):
        space.accumulate(offsets, kind, change, typed[0])
        return None
    return space.atomic(offsets, kind, change, *typed).view(U32).reshape(-1, size // 4)
