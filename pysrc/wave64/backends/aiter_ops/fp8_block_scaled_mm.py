import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import layouts, ops, platform
from wave64.backends.aiter import HALVES, bind, call

BLOCK = 128
MIN_ROWS, MIN_K, COLUMNS = 16, 512, 256  # of the assembly for gfx950; half a workgroup's columns come out wrong


def in_assembly(b: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether gfx950's assembly takes the product, which wants the weight in tiles; else AITER's templates do."""
    arch = platform.arch()
    return (arch is not None and arch.name == "gfx950" and out_dtype == torch.bfloat16 and b.shape[1] >= MIN_K
            and b.shape[0] % COLUMNS == 0)


def supports(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
             out_dtype: torch.dtype) -> str | None:
    if list(block_shape) != [BLOCK, BLOCK]:
        return f"takes blocks of {BLOCK} x {BLOCK}, these are {block_shape}"
    if out_dtype not in HALVES:
        return f"gives bf16 and fp16, not {out_dtype}"
    if b.shape[0] % 16 or b.shape[1] % BLOCK:
        return f"takes weights of a multiple of 16 rows and {BLOCK} columns, these have {list(b.shape)}"
    if b.numel() == 0:
        return "takes no empty weights"
    if in_assembly(b, out_dtype) and a.is_cuda and torch.cuda.is_current_stream_capturing() and not layouts.is_kept(b):
        return "lays a weight out at its first call, which may not be a graph's: call once before the capture"
    return None


CALLS = {"gemm_a8w8_blockscale": ("XQ", "WQ", "x_scale", "w_scale", "dtype", "isBpreshuffled")}


@bind(ops.fp8_block_scaled_mm, CALLS, supports=supports)
def fp8_block_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_shape: list[int],
                        out_dtype: torch.dtype) -> Tensor:
    assembly, rows = in_assembly(b, out_dtype), a.shape[0]
    if not assembly:
        return call("gemm_a8w8_blockscale", XQ=a.contiguous(), WQ=b.contiguous(), x_scale=a_scale.contiguous(),
                    w_scale=b_scale.contiguous(), dtype=out_dtype, isBpreshuffled=False)
    if rows < MIN_ROWS:
        a, a_scale = padded(a, MIN_ROWS), padded(a_scale, MIN_ROWS)
    y = call("gemm_a8w8_blockscale", XQ=a.contiguous(), WQ=layouts.in_tiles(b), x_scale=a_scale.t().contiguous(),
             w_scale=b_scale.contiguous(), dtype=out_dtype, isBpreshuffled=True)
    return y[:rows]


def padded(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros behind, so many in all."""
    bits = x.view(torch.uint8) if x.element_size() == 1 else x
    return F.pad(bits, (0, 0, 0, rows - x.shape[0])).view(x.dtype)
