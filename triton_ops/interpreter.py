"""Conversions under Triton's interpreter, which truncates fp32 to bf16 and loses carries on the way to FP8.

Kernels are to mean on a CPU what they mean on a GPU: round to nearest even. Where kernels are interpreted (and only
there) the interpreter's conversion between floating-point types is therefore torch's.
"""

import numpy as np
import torch
import triton.language as tl
from triton import knobs

TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
         tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5: torch.float8_e5m2}


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """`data`, numbers of type `source` in any numpy dtype of their size, as the bits of type `target`."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"uint{source.primitive_bitwidth}"))
    return bits.view(TYPES[source]).to(TYPES[target]).view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()


def install() -> None:
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def nearest_even(data, source, target, rounding_mode):
        if source in TYPES and target in TYPES and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source, target)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = nearest_even


if knobs.runtime.interpret:
    install()
