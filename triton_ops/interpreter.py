"""Rounding under Triton's interpreter, which truncates fp32 to bf16 and drops carries when it converts to FP8.

Kernels must give the same results on a CPU as on a GPU, which rounds to nearest even. Under the interpreter, and only
there, this module replaces its conversion between floating-point types with torch's.
"""

import numpy as np
import torch
import triton.language as tl
from triton import knobs

TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
         tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5: torch.float8_e5m2}


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Convert `data`, values of type `source` in any numpy dtype of that size, to the bits of type `target`."""
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
