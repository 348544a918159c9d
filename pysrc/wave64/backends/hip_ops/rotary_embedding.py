import torch
from torch import Tensor

from wave64 import ops
from wave64.backends.hip import FLOATS, bind, constants, launch

CONSTANTS = constants("rotary_embedding")


def _layout(x: Tensor | None, head_size: int) -> tuple[int, int, int]:
    """Row stride, head stride and number of heads of [num_tokens, heads * head_size] or [num_tokens, heads, dim]."""
    if x is None:
        return 0, 0, 0
    if x.ndim == 2:
        return x.stride(0), head_size, x.shape[1] // head_size
    return x.stride(0), x.stride(1), x.shape[1]


def unsupported(dtype: torch.dtype, cos_sin_cache: Tensor, max_rot_dim: int) -> str | None:
    """The reason why kernels that rotate numbers of `dtype` do not serve these angles, or None."""
    if dtype not in FLOATS:
        return f"dtype {dtype}"
    if cos_sin_cache.dtype not in FLOATS:
        return f"angles of dtype {cos_sin_cache.dtype}"
    if cos_sin_cache.shape[1] > max_rot_dim:
        return f"rot_dim {cos_sin_cache.shape[1]}, more than {max_rot_dim}"
    return None


def supports(positions, query, key, head_size, cos_sin_cache, is_neox=True) -> str | None:
    return unsupported(query.dtype, cos_sin_cache, CONSTANTS.MAX_ROT_DIM)


@bind(ops.rotary_embedding, supports=supports)
def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor,
                     is_neox: bool = True) -> None:
    query_stride, query_head_stride, num_heads = _layout(query, head_size)
    key_stride, key_head_stride, num_kv_heads = _layout(key, head_size)
    launch("rotary_embedding", query, positions=positions, query=query, key=key, angles=cos_sin_cache,
           positions_stride=positions.stride(0), query_stride=query_stride, query_head_stride=query_head_stride,
           key_stride=key_stride, key_head_stride=key_head_stride, num_tokens=positions.shape[0],
           num_heads=num_heads, num_kv_heads=num_kv_heads, rot_dim=cos_sin_cache.shape[1], is_neox=is_neox,
           position_bytes=positions.element_size(), dtype=query.dtype, angles_dtype=cos_sin_cache.dtype)
