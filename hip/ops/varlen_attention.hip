// Attention over packed sequences: the kernels of prefill.h, without pages.
#include "wave64/prefill.h"

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)
#define VARLEN_ATTENTION(NAME, T, QK, V) WAVE64_PREFILL_KERNEL(varlen_attention_##NAME, T, T, QK, V, false)
VARLEN_ATTENTION(bf16_64, wave64::bf16, 64, 64)
#if !defined(WAVE64_CPU)  // which compiles what the operator's small cases need
VARLEN_ATTENTION(bf16_128, wave64::bf16, 128, 128)
VARLEN_ATTENTION(bf16_192_128, wave64::bf16, 192, 128)
VARLEN_ATTENTION(fp16_64, wave64::fp16, 64, 64)
VARLEN_ATTENTION(fp16_128, wave64::fp16, 128, 128)
VARLEN_ATTENTION(fp16_192_128, wave64::fp16, 192, 128)
#endif
#elif !defined(WAVE64_DEVICE_CODE)

namespace wave64 {
namespace {

// [fp16], for heads of 64, 128, and of 192 with values of 128
constexpr const char* kKernels[2][3] = {
    {"varlen_attention_bf16_64", "varlen_attention_bf16_128", "varlen_attention_bf16_192_128"},
    {"varlen_attention_fp16_64", "varlen_attention_fp16_128", "varlen_attention_fp16_192_128"}};

void varlen_attention(PrefillArgs args, const Call& call) {
    const int dims = args.qk_dim == 64 ? 0 : args.qk_dim == 128 ? 1 : 2;
    call.expect(args.qk_dim == 64 || args.qk_dim == 128 || args.qk_dim == 192, "qk_dim", "64, 128 or 192", args.qk_dim);
    call.expect(args.v_dim == (dims == 0 ? 64 : 128), "v_dim", dims == 0 ? "64" : "128", args.v_dim);
    launch_prefill(args, call, kKernels[args.dtype == kFp16][dims], false);
}

WAVE64_OP(varlen_attention, PrefillArgs, query, key, value, page_table, cu_seqlens_q, seq_lens, sinks, k_scale, v_scale,
          out, lse, query_stride, query_head_stride, key_page_stride, key_row_stride, key_head_stride,
          value_page_stride, value_row_stride, value_head_stride, table_stride, scale_stride, num_seqs, num_heads,
          num_kv_heads, qk_dim, v_dim, page_size, max_pages, max_seqlen_q, causal, window, scale, dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
