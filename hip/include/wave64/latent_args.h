// The argument of latents.h's and wide_latents.h's kernels, and what their launcher and they agree on.
#pragma once

#include "wave64/attention.h"

namespace wave64 {

constexpr int kRank = 512, kRope = 64, kWidth = kRank + kRope;
constexpr int kLatentWaves = 4;      // of a block, which take the groups of its split in turn
constexpr int kMinLatentGroups = 8;  // of a split
constexpr int kLatentRows = 16;      // of a block: heads of new tokens
constexpr int kMaxNarrowRows = 32;   // of a sequence: more are wide_latents.h's
constexpr int kMaxWideRows = 128;    // of a block there
constexpr int kMinWideGroups = 4;    // of a split there
constexpr int kLatentMergeLanes = 256;
constexpr int kMaxNewTokens = 16;
constexpr int kDies = 8;  // that blocks are assigned to round robin, each with an L2

// out[b] = softmax(scale q[b] K[b]^T) K[b][:, :kRank]; key p is row p % page_size of page page_table[b, p / page_size].
struct LatentArgs {
    const void* q_nope;         // [num_seqs, new_tokens, num_heads, kRank]
    const void* q_pe;           // [num_seqs, new_tokens, num_heads, kRope]
    void* kv_cache;             // [pages, page_size, kWidth]
    const int32_t* page_table;  // [num_seqs, max_pages]
    const int32_t* seq_lens;    // [num_seqs]
    const float* kv_scale;      // one number, or null: 1
    void* out;                  // [num_seqs, new_tokens, num_heads, kRank], contiguous
    float* lse;                 // [num_seqs, new_tokens, num_heads], or null
    float* partial;             // [num_seqs + num_splits, rows, kRank] to work in, as the next two; null without splits
    float* stats;               // [num_seqs + num_splits, rows, 2]
    int32_t* plan;              // [num_seqs, 2]
    int64_t q_nope_stride;      // of sequences, then of tokens and heads
    int64_t q_nope_token_stride;
    int64_t q_nope_head_stride;
    int64_t q_pe_stride;
    int64_t q_pe_token_stride;
    int64_t q_pe_head_stride;
    int64_t page_stride;
    int64_t row_stride;
    int64_t table_stride;
    int32_t num_seqs;
    int32_t new_tokens;
    int32_t num_heads;
    int32_t page_size;
    int32_t max_pages;
    int32_t num_splits;  // of the batch's keys; 0: no sequence is split
    float scale;
    Dtype dtype;        // of queries, new latents and out
    Dtype cache_dtype;  // dtype, or FP8
    // of mla_decode_rope alone
    Dtype angles_dtype;
    const void* kv_c;       // [num_seqs, new_tokens, kRank]
    const void* k_pe;       // [num_seqs, new_tokens, kRope]
    const int64_t* slots;   // [num_seqs, new_tokens]; below 0: not written
    const void* positions;  // [num_seqs, new_tokens] int64 or int32
    const void* angles;     // [max_pos, kRope], cosines then sines
    int64_t kv_c_stride;    // of sequences, then of tokens
    int64_t kv_c_token_stride;
    int64_t k_pe_stride;
    int64_t k_pe_token_stride;
    int32_t is_neox;         // 1: the numbers of a pair are kRope / 2 columns apart; 0: they are neighbors
    int32_t position_bytes;  // 8 or 4
    // set by the launcher
    int32_t capacity;    // keys of a row of page_table
    int32_t rows;        // new_tokens * num_heads
    int32_t tiles;       // blocks of a split
    int32_t merge_grid;  // blocks of the merge
    int64_t num_rows;    // num_seqs * rows
    IntDivider by_page_size;
    IntDivider by_num_heads;
};

}  // namespace wave64
