from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch, other_fp8


@bind(ops.concat_and_cache_mla, supports=lambda kv_c, k_pe, kv_cache, *args, **kwargs: other_fp8(kv_cache.dtype))
def concat_and_cache_mla(kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                         scale: Tensor | None = None) -> None:
    if kv_cache.numel() == 0:
        return  # every slot is -1
    num_tokens, kv_lora_rank = kv_c.shape
    launch("concat_and_cache_mla", kv_c=kv_c, k_pe=k_pe, kv_cache=kv_cache, slot_mapping=slot_mapping, scale=scale,
           kv_c_stride=kv_c.stride(0), k_pe_stride=k_pe.stride(0), num_tokens=num_tokens, kv_lora_rank=kv_lora_rank,
           rope_dim=k_pe.shape[-1], dtype=kv_c.dtype, cache_dtype=kv_cache.dtype)
