from torch import Tensor

from wave64 import ops
from wave64.backends.hip import DTYPES, bind, launch, other_fp8


@bind(ops.concat_and_cache_mla, supports=lambda kv_c, k_pe, kv_cache, *args, **kwargs: other_fp8(kv_cache.dtype))
def concat_and_cache_mla(kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                         scale: Tensor | None = None) -> None:
    if kv_cache.numel() == 0:
        return  # no slot but -1
    launch("concat_and_cache_mla", kv_c, kv_c.data_ptr(), k_pe.data_ptr(), kv_cache.data_ptr(),
           slot_mapping.data_ptr(), 0 if scale is None else scale.data_ptr(), kv_c.stride(0), k_pe.stride(0),
           *kv_c.shape, k_pe.shape[-1], DTYPES[kv_c.dtype], DTYPES[kv_cache.dtype])
