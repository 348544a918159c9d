// MLA decode over a paged cache of latents: the kernels of latents.h, for queries that are rotated already.
#include "wave64/wide_latents.h"

#ifdef WAVE64_DEVICE_CODE
WAVE64_LATENT_KERNELS(mla_decode, false)
WAVE64_WIDE_LATENT_KERNELS(mla_decode, false)
#else

namespace wave64 {
namespace {

void mla_decode(LatentArgs args, const Call& call) {
    launch_latents(args, call, WAVE64_LATENT_NAMES(mla_decode), false);
}

WAVE64_OP_AND_CONSTANTS(mla_decode, LatentArgs,
                        ({{"MIN_SPLIT_KEYS", kMinLatentGroups * kGroup},
                          {"MIN_WIDE_SPLIT_KEYS", kMinWideGroups * kGroup},
                          {"TILE_ROWS", kLatentRows},
                          {"MAX_WIDE_ROWS", kMaxWideRows},
                          {"MAX_NARROW_ROWS", kMaxNarrowRows},
                          {"RANK", kRank},
                          {"ROPE", kRope},
                          {"MAX_NEW_TOKENS", kMaxNewTokens}}),
                        q_nope, q_pe, kv_cache, page_table, seq_lens, kv_scale, out, lse, partial, stats, plan,
                        q_nope_stride, q_nope_token_stride, q_nope_head_stride, q_pe_stride, q_pe_token_stride,
                        q_pe_head_stride, page_stride, row_stride, table_stride, num_seqs, new_tokens, num_heads,
                        page_size, max_pages, num_splits, scale, dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
