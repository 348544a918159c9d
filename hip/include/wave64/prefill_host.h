// The host's part of prefill.h: checks, grid, launch.
#pragma once

#include "wave64/host.h"
#include "wave64/prefill.h"

namespace wave64 {

inline void check_prefill(const PrefillArgs& args, const Call& call, bool paged) {
    constexpr int64_t max_int = INT32_MAX;
    const char* key = paged ? "key_cache" : "k";
    const char* value = paged ? "value_cache" : "v";
    expect_matrix_dtype(call, args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_min("num_seqs", args.num_seqs, 0);
    call.expect_min("num_heads", args.num_heads, 0);
    call.expect_min("max_seqlen_q", args.max_seqlen_q, 0);
    if (args.num_seqs == 0 || args.num_heads == 0 || args.max_seqlen_q == 0) return;
    call.expect(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, "num_kv_heads",
                "a divisor of num_heads", args.num_kv_heads);
    if (paged) {
        call.expect(args.page_size > 0 && args.page_size % kWaveKeys == 0, "page_size", "a multiple of 16",
                    args.page_size);
        expect_capacity(call, args.max_pages, args.page_size);
    }
    const int64_t bytes = element_bytes(args.cache_dtype);
    call.expect(
        is_16_aligned({args.query, args.key, args.value, args.out},
                      {args.query_stride * 2, args.query_head_stride * 2, args.key_page_stride * bytes,
                       args.key_row_stride * bytes, args.key_head_stride * bytes, args.value_page_stride * bytes,
                       args.value_row_stride * bytes, args.value_head_stride * bytes}),
        "query, keys, values", std::string("rows that begin at multiples of 16 bytes"), "others");
    expect_row_stride(call, "key_row_stride", args.key_row_stride);
    expect_row_stride(call, "value_row_stride", args.value_row_stride);
    call.expect_range("scale_stride", args.scale_stride, 0, 1);
    call.expect_tensors({{"query", args.query},
                         {"cu_seqlens_q", args.cu_seqlens_q},
                         {"seq_lens", args.seq_lens},
                         {"out", args.out},
                         {"lse", args.lse}});
    if (!paged || args.max_pages) call.expect_tensors({{key, args.key}, {value, args.value}});
    if (paged && args.max_pages) call.expect_tensors({{"page_table", args.page_table}});
    const int64_t blocks = int64_t(args.num_seqs) * args.num_heads * ceil_div(args.max_seqlen_q, kBlockQueries);
    call.expect(blocks <= max_int, "max_seqlen_q", "fewer, or fewer sequences or heads", args.max_seqlen_q);
}

inline void launch_prefill(PrefillArgs& args, const Call& call, const char* kernel, bool paged) {
    check_prefill(args, call, paged);
    if (args.num_seqs == 0 || args.num_heads == 0 || args.max_seqlen_q == 0) return;
    args.capacity = args.max_pages * args.page_size;
    args.tiles = int32_t(ceil_div(args.max_seqlen_q, kBlockQueries));
    args.by_heads = divider(uint32_t(args.num_heads)), args.by_kv_heads = divider(uint32_t(args.num_kv_heads));
    args.by_tiles = divider(uint32_t(args.tiles)), args.by_page_size = divider(uint32_t(paged ? args.page_size : 1));
    call.launch(kernel, {int64_t(args.num_seqs) * args.num_heads * args.tiles}, kPrefillWaves * call.device.wave_size,
                args);
}

}  // namespace wave64
