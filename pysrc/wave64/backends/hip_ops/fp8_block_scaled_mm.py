import torch
from torch import Tensor

from wave64 import ops, platform
from wave64.arch import Arch
from wave64.backends.hip import bind, constants, launch, other_fp8

CONSTANTS = constants("fp8_block_scaled_mm")
#: Architectures with the matrix instructions that it is written for.
ARCHS = ("gfx942", "gfx950")
#: Steps of 128 columns that a split of K has at least, since its sums pass through memory.
MIN_SPLIT_STEPS = 4


def absent(arch: Arch) -> str | None:
    return None if arch.name in ARCHS else f"written for the FP8 matrix instructions of {' and '.join(ARCHS)}"


def supports(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
             out_dtype: torch.dtype) -> str | None:
    if why := other_fp8(a.dtype):
        return why
    if any(size % 128 for size in block_shape):
        return f"multiplies by blocks of 128 rows and columns, these have {block_shape[0]} and {block_shape[1]}"
    if a.shape[1] % 16 or any(at % 16 for x in (a, b) for at in (x.data_ptr(), x.stride(0) if len(x) > 1 else 0)):
        return "reads 16 bytes at a time, and rows do not begin and end at multiples of 16 bytes"
    if any(x.stride(0) > CONSTANTS.MAX_STRIDE for x in (a, b)) or a_scale.stride(0) > CONSTANTS.MAX_SCALE_STRIDE:
        return "reads rows of a tile by offsets of 32 bits, and these are too far from each other"
    if any(scale.stride(1) * scale.shape[1] > CONSTANTS.MAX_SPAN for scale in (a_scale, b_scale)):
        return "reads scales of a row by offsets of 32 bits, and these are too far from each other"
    return None


def num_splits(m: int, n: int, k: int) -> int:
    """Into how many splits K is cut: as many as compute units have tiles for, none for few tokens, whose waves split K
    among themselves."""
    if m <= CONSTANTS.FEW_TOKENS or (m <= CONSTANTS.FEW_TOKENS_NARROW and n <= CONSTANTS.NARROW):
        return 1
    columns = CONSTANTS.WIDE_COLUMNS if m >= CONSTANTS.WIDE_TOKENS else CONSTANTS.TILE_COLUMNS
    tiles, steps = -(-m // CONSTANTS.TILE_TOKENS) * -(-n // columns), -(-k // 128)
    splits = max(1, min(platform.compute_units() // tiles, steps // MIN_SPLIT_STEPS))
    return -(-steps // -(-steps // splits))  # none without a step


@bind(ops.fp8_block_scaled_mm, supports=supports, absent=absent)
def fp8_block_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
                        out_dtype: torch.dtype) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if y.numel() == 0:
        return y
    splits = num_splits(m, n, k)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, -(-m * n // 4) * 4), dtype=torch.float32, device=a.device)
    a_scale_stride, a_scale_column_stride = a_scale.stride()
    b_scale_stride, b_scale_column_stride = b_scale.stride()
    launch("fp8_block_scaled_mm", a=a, b=b, a_scale=a_scale, b_scale=b_scale, y=y, partial=partial,
           a_stride=a.stride(0), b_stride=b.stride(0), a_scale_stride=a_scale_stride,
           a_scale_column_stride=a_scale_column_stride, b_scale_stride=b_scale_stride,
           b_scale_column_stride=b_scale_column_stride, m=m, n=n, k=k, block_n=block_shape[0], block_k=block_shape[1],
           num_splits=splits, dtype=out_dtype)
    return y
