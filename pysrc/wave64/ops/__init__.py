"""Every operator: contract, reference and cases, one file each."""

from wave64.ops.all_gather import all_gather
from wave64.ops.all_reduce import all_reduce
from wave64.ops.apply_penalties import apply_penalties
from wave64.ops.apply_token_bitmask import apply_token_bitmask
from wave64.ops.concat_and_cache_mla import concat_and_cache_mla
from wave64.ops.concat_and_cache_mla_rope_fused import concat_and_cache_mla_rope_fused
from wave64.ops.fp8_block_scaled_mm import fp8_block_scaled_mm
from wave64.ops.fp8_scaled_mm import fp8_scaled_mm
from wave64.ops.fused_add_rms_norm import fused_add_rms_norm
from wave64.ops.fused_add_rms_norm_quant_fp8 import fused_add_rms_norm_quant_fp8
from wave64.ops.fused_all_reduce_rms_norm import fused_all_reduce_rms_norm
from wave64.ops.fused_all_reduce_rms_norm_quant_fp8 import fused_all_reduce_rms_norm_quant_fp8
from wave64.ops.fused_moe import fused_moe
from wave64.ops.gelu_and_mul import gelu_and_mul
from wave64.ops.gelu_tanh_and_mul import gelu_tanh_and_mul
from wave64.ops.grouped_topk import grouped_topk
from wave64.ops.linear import linear
from wave64.ops.merge_attn_states import merge_attn_states
from wave64.ops.mla_decode import mla_decode
from wave64.ops.mla_decode_rope import mla_decode_rope
from wave64.ops.moe_align_block_size import moe_align_block_size
from wave64.ops.paged_attention import paged_attention
from wave64.ops.per_tensor_quant_fp8 import per_tensor_quant_fp8
from wave64.ops.per_token_group_quant_fp8 import per_token_group_quant_fp8
from wave64.ops.per_token_quant_fp8 import per_token_quant_fp8
from wave64.ops.prefill_attention import prefill_attention
from wave64.ops.reduce_scatter import reduce_scatter
from wave64.ops.reshape_and_cache import reshape_and_cache
from wave64.ops.rms_norm import rms_norm
from wave64.ops.rotary_embedding import rotary_embedding
from wave64.ops.rotary_embedding_and_cache import rotary_embedding_and_cache
from wave64.ops.sample import sample
from wave64.ops.silu_and_mul import silu_and_mul
from wave64.ops.silu_and_mul_per_token_group_quant_fp8 import silu_and_mul_per_token_group_quant_fp8
from wave64.ops.topk_softmax import topk_softmax
from wave64.ops.transfer_kv import transfer_kv
from wave64.ops.varlen_attention import varlen_attention

__all__ = ["all_gather", "all_reduce", "apply_penalties", "apply_token_bitmask", "concat_and_cache_mla",
           "concat_and_cache_mla_rope_fused", "fp8_block_scaled_mm", "fp8_scaled_mm", "fused_add_rms_norm",
           "fused_add_rms_norm_quant_fp8", "fused_all_reduce_rms_norm", "fused_all_reduce_rms_norm_quant_fp8",
           "fused_moe", "gelu_and_mul", "gelu_tanh_and_mul", "grouped_topk", "linear", "merge_attn_states",
           "mla_decode", "mla_decode_rope", "moe_align_block_size", "paged_attention", "per_tensor_quant_fp8",
           "per_token_group_quant_fp8", "per_token_quant_fp8", "prefill_attention", "reduce_scatter",
           "reshape_and_cache", "rms_norm", "rotary_embedding", "rotary_embedding_and_cache", "sample", "silu_and_mul",
           "silu_and_mul_per_token_group_quant_fp8", "topk_softmax", "transfer_kv", "varlen_attention"]
