"""Conversions and comparisons of the vector unit: tables as in operations.py.

A row whose function needs the architecture or FP16_OVFL is in FOR_ARCH: its function takes them first.
"""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator import arithmetic as ar
from wave64.testing.emulator.operations import F16, F32, F64, I32, U16, U32, Row, normalized, pk_f16

CONVERSIONS: dict[str, Row] = {
    "v_cvt_f32_f16": ("f=h", lambda x: x.astype(F32)), "v_cvt_f16_f32": ("h=f", lambda x: x.astype(F16)),
    "v_cvt_f64_f32": ("d=f", lambda x: x.astype(F64)), "v_cvt_f32_f64": ("f=d", lambda x: x.astype(F32)),
    "v_cvt_f32_i32": ("f=i", lambda x: x.astype(F32)), "v_cvt_f32_u32": ("f=u", lambda x: x.astype(F32)),
    "v_cvt_f64_i32": ("d=i", lambda x: x.astype(F64)), "v_cvt_f64_u32": ("d=u", lambda x: x.astype(F64)),
    "v_cvt_f16_i16": ("h=s", lambda x: x.astype(F16)), "v_cvt_f16_u16": ("h=w", lambda x: x.astype(F16)),
    "v_cvt_i32_f32": ("i=f", lambda x: ar.integer(x, I32)), "v_cvt_u32_f32": ("u=f", lambda x: ar.integer(x, U32)),
    "v_cvt_i32_f64": ("i=d", lambda x: ar.integer(x, I32)), "v_cvt_u32_f64": ("u=d", lambda x: ar.integer(x, U32)),
    "v_cvt_i16_f16": ("s=h", lambda x: ar.integer(x, np.int16)), "v_cvt_u16_f16": ("w=h", lambda x: ar.integer(x, U16)),
    "v_cvt_rpi_i32_f32": ("i=f", lambda x: ar.integer(np.floor(x.astype(F64) + 0.5), I32)),
    "v_cvt_flr_i32_f32": ("i=f", lambda x: ar.integer(np.floor(x), I32)),
    **{f"v_cvt_f32_ubyte{i}": ("f=u", lambda x, i=i: (x >> U32(8 * i) & U32(255)).astype(F32)) for i in range(4)},
    "v_cvt_off_f32_i4": ("f=u", lambda x: (x << U32(28)).view(I32).astype(F32) * F32(2.0**-32)),
    "v_cvt_pk_u8_f32": ("u=fuu", lambda x, i, rest: rest & ~(U32(255) << (i & U32(3)) * U32(8))
                        | ar.integer(x, np.uint8).astype(U32) << (i & U32(3)) * U32(8)),
    "v_cvt_pkrtz_f16_f32": ("u=ff", pk_f16),
    "v_cvt_pknorm_i16_f32": ("u=ff", normalized(np.int16, 32767)),
    "v_cvt_pknorm_u16_f32": ("u=ff", normalized(U16, 65535)),
}


def _bytes(name: str) -> Callable:
    return lambda arch, saturate, x: ar.small(name, arch).decode(x & U32(255))


def _pair_of_bytes(name: str) -> Callable:
    """Two floats as a 64-bit pair, from the low 16 bits."""
    def run(arch, saturate, x):
        table = ar.small(name, arch)
        both = np.stack(np.broadcast_arrays(table.decode(x & U16(255)), table.decode(x >> U16(8))), -1)
        return np.ascontiguousarray(both).view(np.uint64)[..., 0]
    return run


def _unscaled(scale: np.ndarray) -> None:
    if (ar.exponents(scale) != 127).any():
        raise NotImplementedError("a conversion with a scale other than 1")


def _scaled_bf16(arch, saturate, x, scale):
    _unscaled(scale)
    table = ar.small("fp8", arch)
    low, high = (ar.f32_to_bf16(table.decode(x >> U16(shift) & U16(255))) for shift in (0, 8))
    return low | high << U32(16)


def _scaled_f16(arch, saturate, x, scale):
    _unscaled(scale)
    table = ar.small("fp8", arch)
    low, high = (table.decode(x >> U16(shift) & U16(255)).astype(F16).view(U16).astype(U32) for shift in (0, 8))
    return low | high << U32(16)


def _scaled_to_fp8(arch, saturate, a, b, scale):
    _unscaled(scale)
    return _to_bytes("fp8")(arch, saturate, a, b)


def _to_bytes(name: str) -> Callable:
    def run(arch, saturate, a, b):
        table = ar.small(name, arch)
        return (table.encode(a, saturate) | table.encode(b, saturate) << U32(8)).astype(U16)
    return run


FOR_ARCH: dict[str, Row] = {
    "v_cvt_f32_fp8": ("f=u", _bytes("fp8")), "v_cvt_f32_bf8": ("f=u", _bytes("bf8")),
    "v_cvt_pk_f32_fp8": ("U=w", _pair_of_bytes("fp8")), "v_cvt_pk_f32_bf8": ("U=w", _pair_of_bytes("bf8")),
    "v_cvt_pk_fp8_f32": ("w=ff+", _to_bytes("fp8")), "v_cvt_pk_bf8_f32": ("w=ff+", _to_bytes("bf8")),
}
FOR_GFX950: dict[str, Row] = {
    "v_cvt_scalef32_pk_bf16_fp8": ("u=wf", _scaled_bf16), "v_cvt_scalef32_pk_f16_fp8": ("u=wf", _scaled_f16),
    "v_cvt_scalef32_pk_fp8_f32": ("w=fff+", _scaled_to_fp8),
}
GFX950: dict[str, Row] = {
    "v_cvt_pk_bf16_f32": ("u=ff", lambda a, b: ar.f32_to_bf16(a) | ar.f32_to_bf16(b) << U32(16)),
    "v_cvt_pk_f16_f32": ("u=ff", lambda a, b: a.astype(F16).view(U16).astype(U32)
                         | b.astype(F16).view(U16).astype(U32) << U32(16)),
    "v_cvt_f32_bf16": ("f=w", lambda x: ar.bf16_to_f32(x)),
}


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: ~compare(a, b)


def _comparisons() -> dict[str, Row]:
    ordered = {"lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    floats = ordered | {
        "lg": lambda a, b: (a < b) | (a > b), "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
        "u": lambda a, b: np.isnan(a) | np.isnan(b), "neq": np.not_equal,
        "nge": _unordered(np.greater_equal), "ngt": _unordered(np.greater), "nle": _unordered(np.less_equal),
        "nlt": _unordered(np.less), "nlg": lambda a, b: ~((a < b) | (a > b))}
    constant = {"f": lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape), bool)}
    rows = {}
    for prefix in ("v_cmp", "v_cmpx"):
        for suffix, kind in (("f32", "f"), ("f64", "d"), ("f16", "h")):
            always = {"tru": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), bool)}
            for name, function in (floats | constant | always).items():
                rows[f"{prefix}_{name}_{suffix}"] = (f"m={kind}{kind}", function)
            rows[f"{prefix}_class_{suffix}"] = (f"m={kind}u", lambda a, b: ar.classes(a) & b != 0)
        for suffix, kind in (("i32", "i"), ("u32", "u"), ("i64", "I"), ("u64", "U"), ("i16", "s"), ("u16", "w")):
            always = {"t": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), bool)}
            for name, function in (ordered | {"ne": np.not_equal} | constant | always).items():
                rows[f"{prefix}_{name}_{suffix}"] = (f"m={kind}{kind}", function)
    return rows


COMPARISONS = _comparisons()
