from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, FLOATS, bind, launch


def _layout(x: Tensor | None, head_size: int) -> tuple[int, int, int, int]:
    """Address, strides of a token and of a head, and number of heads, of a flat or a three-dimensional view."""
    if x is None:
        return 0, 0, 0, 0
    if x.ndim == 2:
        return x.data_ptr(), x.stride(0), head_size, x.shape[1] // head_size
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]


def supports(positions, query, key, head_size, cos_sin_cache, is_neox=True) -> str | None:
    if query.dtype not in FLOATS:
        return f"dtype {query.dtype}"
    if cos_sin_cache.dtype not in FLOATS:
        return f"angles of dtype {cos_sin_cache.dtype}"
    return None if cos_sin_cache.shape[1] <= 1024 else f"rot_dim {cos_sin_cache.shape[1]}, more than 1024"


@bind(ops.rotary_embedding, supports=supports)
def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor,
                     is_neox: bool = True) -> None:
    q, query_stride, query_head_stride, heads = _layout(query, head_size)
    k, key_stride, key_head_stride, kv_heads = _layout(key, head_size)
    launch("rotary_embedding", query, positions.data_ptr(), q, k, cos_sin_cache.data_ptr(), positions.stride(0),
           query_stride, query_head_stride, key_stride, key_head_stride, positions.shape[0], heads, kv_heads,
           cos_sin_cache.shape[1], is_neox, positions.element_size(), DTYPES[query.dtype],
           DTYPES[cos_sin_cache.dtype])
