"""FP8: which of its two types an architecture has, conversion between them, scales, and the layout of weights.

Both have 4 bits of exponent and 3 of fraction. e4m3fn (OCP's) ends at 448 and has two NaN, 0x7F and 0xFF. e4m3fnuz,
which the MI300 series multiplies, has a bias that is larger by one: the same bits mean half the number. It ends at 240;
its one NaN is 0x80, e4m3fn's -0.

A number is stored as x / scale, rounded to nearest even; scale = amax / limit of the row, group or block that x is in,
limit the largest number of the flavor. What is computed is x * inverse, inverse = below / amax in fp32, below the next
number to limit towards 0. A product is one instruction and rounds alike on every machine; a quotient is ten or is not
rounded right. No product exceeds limit, amax * inverse <= below (1 + 2^-24) < limit, so none is saturated. Amax counts
as at least MIN_AMAX, so that zeros and subnormal numbers have a scale; NaN does not count.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import platform

FP8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}
#: The minimum that amax counts as.
MIN_AMAX = 1e-10
#: The smallest scale that has a finite reciprocal in fp32: given ones below count as it, so that 0 / scale is 0.
MIN_SCALE = 2.0**-126


def fp8_dtype() -> torch.dtype:
    """The FP8 type of the architecture's matrix cores; OCP's where there is no such architecture."""
    arch = platform.arch()
    return FP8[arch.fp8 if arch and arch.fp8 else "e4m3fn"]


def limit(dtype: torch.dtype) -> float:
    """The largest number of an FP8 type: 448 or 240."""
    return torch.finfo(dtype).max


def below(dtype: torch.dtype) -> float:
    """The fp32 number next to the largest of an FP8 type, towards 0."""
    return limit(dtype) - 2.0 ** (math.frexp(limit(dtype))[1] - 24)


def largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Amax over `dim`, which stays as 1; NaN do not count."""
    return x.abs().nan_to_num_(0.0, posinf=float("inf")).amax(dim, keepdim=True).clamp_min_(MIN_AMAX)


def scales(amax: Tensor, dtype: torch.dtype, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(scale, what numbers are multiplied by instead of divided by it), of amax, which becomes scale. ue8m0: the scale
    is the next power of two from there on, as a number of 8 bits of exponent holds it, and its inverse is exact."""
    if ue8m0:
        fraction, exponent = torch.frexp(amax.div_(amax.new_full((), limit(dtype))))
        power = torch.ldexp(torch.ones_like(amax), exponent - (fraction == 0.5).to(exponent.dtype))
        amax.copy_(torch.where(amax.isinf(), amax, power))
        return amax, amax.reciprocal()
    # where one of both is no tensor, torch multiplies with a reciprocal, which rounds twice
    inverse = amax.new_full((), below(dtype)) / amax
    return amax.div_(amax.new_full((), limit(dtype))), inverse


def quantize(x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype | None = None,
             ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(q, scale) of x, computed in at least fp32, with one scale for all of `dim`, which stays as 1 in scale; ue8m0: a
    power of two."""
    dtype = dtype or fp8_dtype()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale, inverse = scales(largest(wide, dim), dtype, ue8m0)
    return (wide * inverse).to(dtype), scale


#: What a sum over ranks may send in place of 16-bit numbers -> its largest code; None: the FP8 type's.
CODES: dict[str, float | None] = {"fp8": None, "int8": 127.0, "int4": 7.0}
CODED = 32  # elements with one scale


def coded(x: Tensor, codes: str) -> Tensor:
    """x [...] as it is behind `codes` (a key of CODES) and back, in fp32: each 32 consecutive elements are rounded to
    multiples of a scale, amax / the largest code, rounded up to 8 bits of fraction, so that a code times its scale is
    exact; FP8 codes are the architecture's. Elements with a NaN or an infinity among their 32 become NaN."""
    dtype, largest_code = fp8_dtype(), CODES[codes]
    if largest_code is None:
        largest_code = limit(dtype)
    blocks = F.pad(x.flatten().float(), (0, -x.numel() % CODED)).view(-1, CODED)
    amax = blocks.abs().amax(1, keepdim=True)
    quotient = amax * amax.new_full((), 1 / largest_code)
    rounded_up = ((quotient.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).clamp_min(MIN_SCALE)
    scale = torch.where(amax.isfinite(), rounded_up, torch.nan)
    inverse = scale.new_full((), 1 - 2.0**-21) / scale  # a little less, so that no product exceeds the largest code
    if codes == "fp8":
        rounded = (blocks * inverse).to(dtype).float()
    else:
        rounded = (blocks.double() * inverse.double()).round().float()  # a product in fp64 is exact
    numbers = (rounded * scale).add_(0.0)  # which makes 0 of -0: integers have one zero
    return numbers.flatten()[: x.numel()].view(x.shape)


def quantize_weight_blocks(weight: Tensor, block_shape: list[int],
                           dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> q [..., N, K] and scale [..., ceil(N / bn), ceil(K / bk)], block_shape = [bn, bk]."""
    (rows, columns), (bn, bk) = weight.shape[-2:], block_shape
    padded = F.pad(weight, (0, -columns % bk, 0, -rows % bn))
    q, scale = quantize(padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bn)), (-3, -1), dtype)
    return q.flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous(), scale[..., 0, :, 0]


def quantize_weight_channels(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> q and scale [..., N], a number per output channel."""
    q, scale = quantize(weight, -1, dtype)
    return q, scale.squeeze(-1)


def quantize_weight_tensors(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q and scale [1]; experts' weights [E, N, K] -> q and scale [E]."""
    q, scale = quantize(weight, (-2, -1), dtype)
    return q, scale.flatten()


def dequantize(q: Tensor, scale: Tensor, block_shape: list[int] | None = None,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """q [..., N, K] times scale in `dtype`: with block_shape [bn, bk] a number per block, [..., ceil(N / bn),
    ceil(K / bk)] (a group of a row is a block of [1, group_size]); else anything that broadcasts with q."""
    scale = scale.to(dtype)
    if block_shape is not None:
        (rows, columns), (bn, bk) = q.shape[-2:], block_shape
        if bn > 1:
            scale = scale.repeat_interleave(bn, -2)[..., :rows, :]
        scale = scale.repeat_interleave(bk, -1)[..., :columns]
    return q.to(dtype) * scale


def fn_to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """An e4m3fn weight and its scales as e4m3fnuz: the same bits, -0 as 0, and scales twice as large, so that no number
    changes. Once, at load: it looks at the weight. Raises ValueError if there are NaN in it."""
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"fn_to_fnuz: weight: expected torch.float8_e4m3fn, got {weight.dtype}")
    bits = weight.view(torch.uint8)
    if not weight.is_meta and (wrong := int((bits & 0x7F == 0x7F).sum())):
        raise ValueError(f"fn_to_fnuz: weight: expected numbers, got {wrong} NaN (0x7F or 0xFF) among {bits.numel()}")
    return torch.where(bits == 0x80, 0, bits).view(torch.float8_e4m3fnuz), fn_to_fnuz_kv_scale(scale)


def fn_to_fnuz_kv_scale(scale: Tensor) -> Tensor:
    """A scale of an e4m3fn KV cache for one of e4m3fnuz: what 448 was is 224 there."""
    return scale * 2


def kv_scales_of(k_scale: Tensor | None, v_scale: Tensor | None,
                 heads: int) -> tuple[Tensor | None, Tensor | None, int]:
    """(k_scale, v_scale, stride) of a cache of keys and values, as kernels read them: the scale of head h is at
    h * stride, stride 0 for scalars. Where only one of both is per head, the other is repeated."""
    if all(scale is None or scale.numel() == 1 for scale in (k_scale, v_scale)):
        return k_scale, v_scale, 0
    k_scale, v_scale = (scale if scale is None or scale.numel() == heads else scale.reshape(1).repeat(heads)
                        for scale in (k_scale, v_scale))
    return k_scale, v_scale, 1


def pad_rows(weight: Tensor) -> Tensor:
    """The weight [..., N, K] in the layout that kernels read fastest; called once, at load. On gfx942 a row stride that
    is a multiple of 512 bytes maps to few of an MI300X's memory channels: 256 bytes are added to it, and a view of the
    same shape is returned. For other architectures and row strides, the weight itself."""
    arch = platform.arch()
    if arch is None or arch.name != "gfx942" or weight.ndim < 2 or weight.stride(-2) * weight.element_size() % 512:
        return weight
    columns = weight.shape[-1]
    padded = weight.new_empty((*weight.shape[:-1], columns + 256 // weight.element_size()))[..., :columns]
    return padded.copy_(weight)
