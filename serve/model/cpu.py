"""Matrix products on a CPU, which take most of a decode step: each by the function that reads its weight fastest.

16-bit weights are reordered once into the blocks that oneDNN reads, which replace the plain layout, so memory stays the
same; otherwise every product would reorder them. A weight that is tied to an embedding must stay plain; in bf16 oneDNN
reads it without reordering if it is the left factor. fp32 weights stay plain: one to three tokens are fastest as BLAS's
matrix-vector products, more as oneDNN's matrix product. On one thread of an AVX-512 Xeon, a step of a Llama with 110 M
parameters spends 24 ms instead of 40 on products in bf16, and with 8 tokens in fp32 65 instead of 105; the shared head
of 49152 x 768 takes 8 ms instead of 12.
AMD's CPUs differ in two: torch's BLAS is MKL, which keeps its best code for Intel's, so that oneDNN takes half the time
even for one token in fp32; and a plain bf16 weight is faster as the right factor, 4 ms where the left takes 6.6.
The operators are those torch's own compiler calls on a CPU.

oneDNN compiles a product anew for every number of tokens and keeps about 0.6 MB of each, half of it even where its
cache of primitives is switched off (ONEDNN_PRIMITIVE_CACHE_CAPACITY=0): prompts of all lengths would fill hundreds of
megabytes. So it is called with few different numbers of tokens; rows of zeros are added to reach the next.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wave64 import ops, platform

DECODE_TOKENS = 16  # that the kernels of ops.linear serve on every GPU; more are not bound by reading weights alone
FEW_TOKENS = 4  # from here on oneDNN's fp32 product is faster than BLAS's
MANY_TOKENS = 64  # beyond it a plain bf16 weight is better laid out anew than multiplied from the left
COLUMNS = 16  # of a product with a plain bf16 weight on the left: a vector register's, fewer take as long
TYPICAL_TOKENS = 8  # oneDNN chooses the blocks for this number, and reads them well for any


def choose_product(weight: nn.Parameter, plain: bool) -> tuple[Callable[..., Tensor], nn.Parameter]:
    """(function of x, weight and bias that computes a Linear, the weight in the layout that it reads fastest). plain:
    the layout must stay. On other devices than a CPU, emulated ones among them, `by_tokens`, and where oneDNN cannot
    serve, F.linear, both with the weight itself."""
    dtype = weight.dtype
    if weight.device.type != "cpu" or platform.emulated() is not None:
        return by_tokens, weight
    if _why_not(dtype):
        return F.linear, weight
    if dtype == torch.float32:
        return (_onednn if _is_amd() else _plain_fp32), weight
    if plain:
        return (_plain_bf16 if dtype == torch.bfloat16 and not _is_amd() else _onednn), weight
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.data, TYPICAL_TOKENS)
    return _onednn, nn.Parameter(blocks, requires_grad=False)


def by_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """On a GPU: the operator for the few tokens of a small decode step, torch's product for more."""
    return ops.linear(x, weight, bias) if x.shape[0] <= DECODE_TOKENS else F.linear(x, weight, bias)


def products_by(dtype: torch.dtype) -> str:
    """What computes products with weights of `dtype` on this CPU, in words."""
    reason = _why_not(dtype)
    return f"products by torch, not oneDNN: {reason}" if reason else "products by oneDNN"


def slow_dtype(dtype: torch.dtype) -> str | None:
    """A warning if this CPU has no instructions for `dtype`, else None."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in supported or getattr(torch.ops.mkldnn, supported[dtype], lambda: False)():
        return None
    name = str(dtype).removeprefix("torch.")
    return (f"this CPU has no {name} instructions: prompts and batches are faster with --dtype float32, which takes "
            "twice the memory")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = x.shape[0]
    surplus = _filled(tokens) - tokens
    if surplus:
        x = F.pad(x, (0, 0, 0, surplus))
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:tokens] if surplus else y


def _filled(tokens: int) -> int:
    """The next of 16 numbers per power of two: a sixteenth more at most, and the same number where it is below 32."""
    step = 1 << max(0, tokens.bit_length() - 5)
    return -(-tokens // step) * step


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _plain_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if x.shape[0] < FEW_TOKENS else _onednn(x, weight, bias)


def _plain_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = x.shape[0]
    if not 0 < tokens <= MANY_TOKENS:
        return _onednn(x, weight, bias)
    columns = F.pad(x, (0, 0, 0, -tokens % COLUMNS)).T
    y = (weight @ columns)[:, :tokens].T.contiguous()
    return y if bias is None else y + bias


def _why_not(dtype: torch.dtype) -> str | None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch was built without it"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions it could use"
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU has no float16 instructions it could use"
    return None
