// The host's part of latents.h: checks, grid, launch.
#pragma once

#include "wave64/host.h"
#include "wave64/latent_args.h"

namespace wave64 {

struct LatentKernels {
    const char* decode[3][2][2];  // [of how many rows][fp16][fp8]
    const char* merge[2];
};
#define WAVE64_LATENT_DECODES(OP) {{OP "_bf16", OP "_bf16_fp8"}, {OP "_fp16", OP "_fp16_fp8"}}
#define WAVE64_LATENT_NAMES(OP)                                                                                   \
    {{WAVE64_LATENT_DECODES(#OP), WAVE64_LATENT_DECODES(#OP "_64_rows"), WAVE64_LATENT_DECODES(#OP "_128_rows")}, \
     {#OP "_merge_bf16", #OP "_merge_fp16"}}

// Rows that a block of the kernels has which serve so many: latents.h's, then wide_latents.h's.
inline int rows_of_block(int rows) { return rows <= kMaxNarrowRows ? kLatentRows : rows <= 64 ? 64 : kMaxWideRows; }

inline void check_latents(const LatentArgs& args, const Call& call, bool rope) {
    constexpr int64_t max_int = INT32_MAX;
    expect_matrix_dtype(call, args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_min("num_seqs", args.num_seqs, 0);
    call.expect_min("num_heads", args.num_heads, 0);
    call.expect_min("new_tokens", args.new_tokens, 0);
    if (args.num_seqs == 0 || args.num_heads == 0 || args.new_tokens == 0) return;
    if (rope) call.expect_range("new_tokens", args.new_tokens, 1, kMaxNewTokens);
    call.expect_min("page_size", args.page_size, 1);
    expect_capacity(call, args.max_pages, args.page_size);
    const int64_t capacity = int64_t(args.max_pages) * args.page_size, bytes = element_bytes(args.cache_dtype);
    call.expect(args.num_seqs * (capacity / kGroup + 1) <= max_int, "num_seqs",
                "a capacity of at most 2^35 keys in all", args.num_seqs);
    call.expect(int64_t(args.num_seqs) * args.new_tokens * args.num_heads <= max_int, "num_seqs",
                "at most 2^31 - 1 heads of tokens in all", args.num_seqs);
    call.expect(is_16_aligned({args.q_nope, args.q_pe, args.kv_cache, args.kv_c, args.k_pe, args.out},
                              {args.q_nope_stride * 2, args.q_nope_token_stride * 2, args.q_nope_head_stride * 2,
                               args.q_pe_stride * 2, args.q_pe_token_stride * 2, args.q_pe_head_stride * 2,
                               args.page_stride * bytes, args.row_stride * bytes, args.kv_c_stride * 2,
                               args.kv_c_token_stride * 2, args.k_pe_stride * 2, args.k_pe_token_stride * 2}),
                "q_nope, q_pe, kv_cache, kv_c, k_pe", std::string("rows that begin at multiples of 16 bytes"),
                "others");
    call.expect_tensors({{"q_nope", args.q_nope}, {"q_pe", args.q_pe}, {"seq_lens", args.seq_lens}, {"out", args.out}});
    if (capacity) call.expect_tensors({{"kv_cache", args.kv_cache}, {"page_table", args.page_table}});
    if (rope)
        call.expect_tensors({{"kv_c", args.kv_c},
                             {"k_pe", args.k_pe},
                             {"slots", args.slots},
                             {"positions", args.positions},
                             {"angles", args.angles}});
    call.expect_min("num_splits", args.num_splits, 0);
    if (args.num_splits) {
        call.expect_tensors({{"partial", args.partial}, {"stats", args.stats}, {"plan", args.plan}});
        call.expect(args.num_seqs <= call.device.wave_size * call.device.wave_size, "num_seqs",
                    "at most the square of the wave size with splits", args.num_seqs);
    }
}

inline void launch_latents(LatentArgs& args, const Call& call, const LatentKernels& kernels, bool rope) {
    constexpr int merge_blocks_per_unit = 8;
    check_latents(args, call, rope);
    if (args.num_seqs == 0 || args.num_heads == 0 || args.new_tokens == 0) return;
    args.capacity = args.max_pages * args.page_size;
    args.rows = args.new_tokens * args.num_heads;
    const int block_rows = rows_of_block(args.rows), kind = block_rows == kLatentRows ? 0 : block_rows == 64 ? 1 : 2;
    args.tiles = int32_t(ceil_div(args.rows, block_rows));
    args.num_rows = int64_t(args.num_seqs) * args.rows;
    args.by_page_size = divider(uint32_t(args.page_size)), args.by_num_heads = divider(uint32_t(args.num_heads));
    int64_t items = int64_t(args.num_seqs) + args.num_splits;
    if (args.tiles > 1) items = ceil_div(items, kDies) * kDies;
    call.expect(items * args.tiles <= INT32_MAX, "num_seqs", "fewer, or fewer heads", args.num_seqs);
    const bool fp16 = args.dtype == kFp16;
    call.launch(kernels.decode[kind][fp16][args.cache_dtype == kFp8], {items * args.tiles},
                kLatentWaves * call.device.wave_size, args);
    if (args.num_splits == 0) return;
    args.merge_grid =
        int32_t(std::min<int64_t>(args.num_rows, int64_t(call.device.compute_units) * merge_blocks_per_unit));
    call.launch(kernels.merge[fp16], {args.merge_grid}, kLatentMergeLanes, args);
}

}  // namespace wave64
