// Attention of new tokens over a paged cache: the kernels of prefill.h, with pages.
#include "wave64/prefill.h"

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)
#define PREFILL_ATTENTION(NAME, T, STORED, D) WAVE64_PREFILL_KERNEL(prefill_attention_##NAME, T, STORED, D, D, true)
PREFILL_ATTENTION(bf16_64, wave64::bf16, wave64::bf16, 64)
#if !defined(WAVE64_CPU)  // which compiles what the operator's small cases need
PREFILL_ATTENTION(bf16_128, wave64::bf16, wave64::bf16, 128)
PREFILL_ATTENTION(fp16_64, wave64::fp16, wave64::fp16, 64)
PREFILL_ATTENTION(fp16_128, wave64::fp16, wave64::fp16, 128)
#if WAVE64_HAS_FP8
PREFILL_ATTENTION(bf16_fp8_64, wave64::bf16, wave64::Bits8, 64)
PREFILL_ATTENTION(bf16_fp8_128, wave64::bf16, wave64::Bits8, 128)
PREFILL_ATTENTION(fp16_fp8_64, wave64::fp16, wave64::Bits8, 64)
PREFILL_ATTENTION(fp16_fp8_128, wave64::fp16, wave64::Bits8, 128)
#endif
#endif
#elif !defined(WAVE64_DEVICE_CODE)

namespace wave64 {
namespace {

// [fp16][fp8][head_dim == 128]
constexpr const char* kKernels[2][2][2] = {{{"prefill_attention_bf16_64", "prefill_attention_bf16_128"},
                                            {"prefill_attention_bf16_fp8_64", "prefill_attention_bf16_fp8_128"}},
                                           {{"prefill_attention_fp16_64", "prefill_attention_fp16_128"},
                                            {"prefill_attention_fp16_fp8_64", "prefill_attention_fp16_fp8_128"}}};

void prefill_attention(PrefillArgs args, const Call& call) {
    call.expect(args.qk_dim == 64 || args.qk_dim == 128, "head_dim", "64 or 128", args.qk_dim);
    call.expect(args.v_dim == args.qk_dim, "v_dim", "head_dim", args.v_dim);
    launch_prefill(args, call, kKernels[args.dtype == kFp16][args.cache_dtype == kFp8][args.qk_dim == 128], true);
}

WAVE64_OP(prefill_attention, PrefillArgs, query, key, value, page_table, cu_seqlens_q, seq_lens, sinks, k_scale,
          v_scale, out, lse, query_stride, query_head_stride, key_page_stride, key_row_stride, key_head_stride,
          value_page_stride, value_row_stride, value_head_stride, table_stride, scale_stride, num_seqs, num_heads,
          num_kv_heads, qk_dim, v_dim, page_size, max_pages, max_seqlen_q, causal, window, scale, dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
