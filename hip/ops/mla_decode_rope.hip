// MLA decode of new tokens: the kernels of latents.h, which also apply RoPE to the queries' q_pe and to k_pe, and write
// [kv_c, k_pe] to the cache. The block of a sequence's last split takes the new latents from the arguments, so that no
// block waits until they are in the cache.
#include "wave64/wide_latents.h"

#ifdef WAVE64_DEVICE_CODE
WAVE64_LATENT_KERNELS(mla_decode_rope, true)
WAVE64_WIDE_LATENT_KERNELS(mla_decode_rope, true)
#else

namespace wave64 {
namespace {

void mla_decode_rope(LatentArgs args, const Call& call) {
    launch_latents(args, call, WAVE64_LATENT_NAMES(mla_decode_rope), true);
}

WAVE64_OP(mla_decode_rope, LatentArgs, q_nope, q_pe, kv_cache, page_table, seq_lens, kv_scale, out, lse, partial, stats,
          plan, q_nope_stride, q_nope_token_stride, q_nope_head_stride, q_pe_stride, q_pe_token_stride,
          q_pe_head_stride, page_stride, row_stride, table_stride, num_seqs, new_tokens, num_heads, page_size,
          max_pages, num_splits, scale, dtype, cache_dtype, angles_dtype, kv_c, k_pe, slots, positions, angles,
          kv_c_stride, kv_c_token_stride, k_pe_stride, k_pe_token_stride, is_neox, position_bytes)

}  // namespace
}  // namespace wave64
#endif
