"""What this package changes of Triton's interpreter, under the interpreter only.

Rounding: kernels must give the same results on a CPU as on a GPU, which rounds to nearest even; the interpreter
truncates fp32 to bf16 and drops carries when it converts to FP8. So torch converts between floating-point types.

Time: a launch patches triton.language, and so does each call of a device function in it anew, which takes longer than
most device functions. So a call patches what is not patched yet.
"""

from typing import Any

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


def is_patched(fn: Any) -> bool:
    """Whether what the function sees of triton.language is the interpreter's, as inside a launch."""
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    return not any(tl.core.is_builtin(each) for lang in seen for each in (lang.load, lang.tensor.__add__))


def install() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: None if is_patched(fn) else patch(fn)
    original = interpreter._convert_float

    def nearest_even(data, source, target, rounding_mode):
        if source in TYPES and target in TYPES and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source, target)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = nearest_even


if knobs.runtime.interpret:
    install()
