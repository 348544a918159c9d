"""Copy rows between KV pools as words, for any dtype; a block copies a piece of a row, or several short rows.

Bound by memory, or by PCIe if one of the pools is in host memory: the rows in, the same out.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import transfer_kv
from wave64.triton_ops.geometry import num_warps

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

#: Words per program.
BLOCK = 512


@triton.jit
def _transfer_kv_kernel(src_ptr, dst_ptr, src_slots_ptr, dst_slots_ptr, pairs, num_src_slots, num_dst_slots, src_stride,
                        dst_stride, width, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    source = tl.load(src_slots_ptr + offs_n, mask=offs_n < pairs, other=-1)
    target = tl.load(dst_slots_ptr + offs_n, mask=offs_n < pairs, other=-1)
    is_valid = (source >= 0) & (source < num_src_slots) & (target >= 0) & (target < num_dst_slots)
    source = tl.where(is_valid, source, 0)[:, None]
    target = tl.where(is_valid, target, 0)[:, None]
    mask = is_valid[:, None] & (offs_w < width)
    row = tl.load(src_ptr + source * src_stride + offs_w, mask=mask)
    tl.store(dst_ptr + target * dst_stride + offs_w, row, mask=mask)


def _as_words(pool: Tensor, size: int) -> Tensor:
    """The pool as [num_slots, row] of words of `size` bytes."""
    return pool.as_strided((pool.shape[0], pool[0].numel()), (pool.stride(0), 1)).view(WORDS[size])


@transfer_kv.backend("triton")
def launch(src: Tensor, dst: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    pairs = src_slots.numel()
    if pairs == 0 or src.numel() == 0 or dst.numel() == 0:
        return
    row_bytes = [n * src.element_size() for n in (src[0].numel(), src.stride(0), dst.stride(0))]
    size = math.gcd(8, src.data_ptr(), dst.data_ptr(), *row_bytes)
    src, dst = _as_words(src, size), _as_words(dst, size)
    width = src.shape[1]
    block_w = min(triton.next_power_of_2(width), BLOCK)
    block_n = min(BLOCK // block_w, triton.next_power_of_2(pairs))
    _transfer_kv_kernel[(triton.cdiv(pairs, block_n), triton.cdiv(width, block_w))](
        src, dst, src_slots, dst_slots, pairs, src.shape[0], dst.shape[0], src.stride(0), dst.stride(0), width,
        BLOCK_N=block_n, BLOCK_W=block_w, num_warps=num_warps(block_n * block_w * size // 16))
