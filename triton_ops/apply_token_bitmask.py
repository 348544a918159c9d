"""Token bitmasks: a block per piece of a row writes -inf where a bit is 0, and reads logits only where it has to.

The trick: decide by groups of 16 bytes. A group with all tokens allowed is not touched, one with none is only written,
and only a mixed one is also read. Masks that are equal for a whole group keep accesses 16 bytes wide.
Bound by memory: a bit per token in, the forbidden logits out.
"""

import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import apply_token_bitmask
from wave64.triton_ops.geometry import num_warps

GROUPS = 1024
LANES = 256


@triton.jit
def _apply_token_bitmask_kernel(logits_ptr, bitmask_ptr, logits_stride, bitmask_stride, vocab_size,
                                GROUPS: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_g = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) * N
    offs_n = tl.arange(0, N)
    word = tl.load(bitmask_ptr + row * bitmask_stride + offs_g // 32, mask=offs_g < vocab_size, other=-1)
    bits = (word >> offs_g % 32) & ((1 << N) - 1)
    write = bits != (1 << N) - 1
    offs = offs_g[:, None] + offs_n[None, :]
    mask = offs < vocab_size
    ptrs = logits_ptr + row * logits_stride + offs
    logits = tl.load(ptrs, mask=(write & (bits != 0))[:, None] & mask, other=float("-inf"))
    allowed = ((bits[:, None] >> offs_n[None, :]) & 1) == 1
    tl.store(ptrs, tl.where(allowed, logits, float("-inf")), mask=write[:, None] & mask)


@apply_token_bitmask.backend("triton")
def launch(logits: Tensor, bitmask: Tensor) -> None:
    rows, vocab_size = logits.shape
    if logits.numel() == 0:
        return
    n = 16 // logits.element_size()
    _apply_token_bitmask_kernel[(rows, triton.cdiv(vocab_size, GROUPS * n))](
        logits, bitmask, logits.stride(0), bitmask.stride(0), vocab_size, GROUPS=GROUPS, N=n,
        num_warps=num_warps(LANES))
