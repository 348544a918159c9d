// The C ABI of the HIP operators: per op one plain struct, which is the kernel's only argument, and one launcher.
//
// Read by three compilers: the host's, clang for AMD and, for development, nvcc. So: fixed-width fields, no pointers to
// anything but device memory, no torch, no HIP, no standard library on the device side.
// Strides are in elements. Fields after "set by the launcher" are not the caller's.
#pragma once

#if defined(__HIP__) || defined(__CUDACC__) || defined(WAVE64_CPU)
#define WAVE64_DEVICE_CODE 1
using int32_t = __INT32_TYPE__;
using int64_t = __INT64_TYPE__;
using uint32_t = __UINT32_TYPE__;
using uint64_t = __UINT64_TYPE__;
#else
#include <cstdint>
#endif

namespace wave64 {

// kFp8 is the architecture's own flavour: e4m3fnuz on gfx942, e4m3fn elsewhere (fp8.h).
enum Dtype : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2, kFp8 = 3 };

// What a launcher returns; the words are in wave64_error().
enum Status : int32_t {
    kOk = 0,
    kBadArgument = 1,  // the caller's mistake; nothing was launched
    kUnavailable = 2,  // no runtime, no GPU, or no code object for it
    kRuntimeError = 3  // HIP refused
};

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, in fp32, rounded once. out may be x.
struct RmsNormArgs {
    const void* x;       // [num_tokens, hidden], rows x_stride apart
    const void* weight;  // [hidden]
    void* out;           // [num_tokens, hidden], rows out_stride apart
    int64_t x_stride;
    int64_t out_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    int32_t dtype;  // of x, weight and out
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
};

// q = x / scale in FP8 with a scale for each group of columns, which is written.
struct PerTokenGroupQuantFp8Args {
    const void* x;  // [num_tokens, columns], rows x_stride apart
    void* q;        // [num_tokens, columns]
    float* scale;   // [num_tokens, ceil(columns / group_size)]
    int64_t x_stride;
    int64_t num_tokens;
    int64_t columns;
    int32_t group_size;  // a power of two, at most 1024
    int32_t dtype;       // of x
    // set by the launcher
    int32_t chunk;       // columns of a block
    int32_t row_groups;  // groups of a row
    uint32_t short_row;  // the row with fewer columns than the others, if there is one
    int32_t short_columns;
    int32_t group_bits;  // 2^group_bits is group_size
    int32_t lane_bits;   // 2^lane_bits lanes share a group
    int32_t packs;       // of a group that each of them has
    int32_t spans;       // groups of a lane
};

// q = x / scale in FP8 with a scale for each row, which is written.
struct PerTokenQuantFp8Args {
    const void* x;  // [num_tokens, columns], rows x_stride apart
    void* q;        // [num_tokens, columns]
    float* scale;   // [num_tokens]
    int64_t x_stride;
    int64_t num_tokens;
    int32_t columns;
    int32_t dtype;  // of x
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
};

// q = x / scale in FP8; the scale is given, or found from all numbers. Either way it is written to found.
struct PerTensorQuantFp8Args {
    const void* x;       // [num_tokens, columns], rows x_stride apart
    const float* scale;  // one number, or null
    void* q;             // [num_tokens, columns]
    float* found;        // one number
    float* amax;         // [num_parts] to work in, without a scale
    int64_t x_stride;
    int64_t num_tokens;
    int64_t columns;
    int32_t num_parts;  // at least 1
    int32_t dtype;      // of x
    // set by the launcher
    int32_t block;       // lanes of a block
    int32_t grid;        // blocks, at most num_parts
    int32_t chunks;      // of a row
    int32_t all_chunks;  // of all rows
};

// residual += x, rounded to its dtype; then x = rms_norm(residual), as above.
struct FusedAddRmsNormArgs {
    void* x;             // [num_tokens, hidden], rows x_stride apart
    void* residual;      // [num_tokens, hidden], rows residual_stride apart
    const void* weight;  // [hidden]
    int64_t x_stride;
    int64_t residual_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    int32_t dtype;  // of x, residual and weight
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
};

// A divisor of numbers below 2^31: n / d is n * factor >> shift, since a GPU has no division of integers (Granlund and
// Montgomery 1994).
struct IntDivider {
    uint32_t factor;
    int32_t shift;
};

// How a launch covers rows of packs that need nothing of each other (rows.h). Set by the launcher.
struct RowShares {
    int32_t packs;       // of a row
    int32_t row_lanes;   // lanes side by side on a row
    IntDivider by_row_lanes;
    int32_t block_rows;  // rows side by side in a block
    int32_t grid;        // blocks from row to row; the grid's other dimension goes along a row
};

// out[t] = f(x[t, :d]) * x[t, d:], in fp32, rounded once; f is the operator's.
struct GatedArgs {
    const void* x;  // [num_tokens, 2 * d], rows x_stride apart
    void* out;      // [num_tokens, d]
    int64_t x_stride;
    int64_t num_tokens;
    int32_t d;
    int32_t dtype;  // of x and out
    // set by the launcher
    RowShares shares;
};

// Turns the first rot_dim columns of every head by its token's angles, in place.
struct RotaryEmbeddingArgs {
    const void* positions;  // [num_tokens] int64 or int32, positions_stride apart
    void* query;            // [num_tokens, num_heads, ...], its rows and heads query_*stride apart
    void* key;              // [num_tokens, num_kv_heads, ...], likewise; unused where there are no heads
    const void* angles;     // [max_pos, rot_dim], cosines then sines
    int64_t positions_stride;
    int64_t query_stride;
    int64_t query_head_stride;
    int64_t key_stride;
    int64_t key_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t rot_dim;
    int32_t is_neox;         // 1: pairs are half a rotation's width apart; 0: they are neighbours
    int32_t position_bytes;  // 8 or 4
    int32_t dtype;           // of query and key
    int32_t angles_dtype;
    // set by the launcher
    int32_t packs;        // of half a rotation's width: the lanes of a head
    IntDivider by_packs;
    int32_t block_heads;  // heads side by side in a block
    int32_t held_heads;   // heads of a lane, block_heads apart
    int32_t grid;         // blocks from token to token
};

// cache[slot] = new, for a token's keys and values, each in a cache of its own. In FP8 caches, new / scale.
struct ReshapeAndCacheArgs {
    const void* key;    // [num_tokens, num_heads, head_dim], rows and heads key_*stride apart
    const void* value;  // likewise
    void* key_cache;    // [slots, num_heads, head_dim]
    void* value_cache;
    const int64_t* slot_mapping;  // [num_tokens]; -1: not written
    const float* k_scale;         // one number, or null: 1
    const float* v_scale;
    int64_t key_stride;
    int64_t key_head_stride;
    int64_t value_stride;
    int64_t value_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t dtype;        // of key and value
    int32_t cache_dtype;  // dtype, or FP8
    // set by the launcher
    RowShares shares;
};

// kv_cache[slot] = [kv_c, k_pe]. In FP8 caches, the same / scale.
struct ConcatAndCacheMlaArgs {
    const void* kv_c;             // [num_tokens, kv_lora_rank], rows kv_c_stride apart
    const void* k_pe;             // [num_tokens, rope_dim], rows k_pe_stride apart
    void* kv_cache;               // [slots, kv_lora_rank + rope_dim]
    const int64_t* slot_mapping;  // [num_tokens]; -1: not written
    const float* scale;           // one number, or null: 1
    int64_t kv_c_stride;
    int64_t k_pe_stride;
    int64_t num_tokens;
    int32_t kv_lora_rank;
    int32_t rope_dim;
    int32_t dtype;        // of kv_c and k_pe
    int32_t cache_dtype;  // dtype, or FP8
    // set by the launcher
    RowShares shares;
};

// dst[dst_slots[i]] = src[src_slots[i]], byte by byte; strides are in bytes, too. A pair of which a slot lies outside
// its pool is skipped.
struct TransferKvArgs {
    const void* src;           // [num_src_slots, row_bytes]
    void* dst;                 // [num_dst_slots, row_bytes]
    const int64_t* src_slots;  // [num_pairs]
    const int64_t* dst_slots;  // [num_pairs]
    int64_t src_stride;
    int64_t dst_stride;
    int64_t num_src_slots;
    int64_t num_dst_slots;
    int64_t num_pairs;
    int64_t row_bytes;
    // set by the launcher
    RowShares shares;
};

// Lowers the logits of tokens that occur among the ids, in place; ids outside of the vocabulary are skipped.
struct ApplyPenaltiesArgs {
    void* logits;               // [num_seqs, vocab_size], rows logits_stride apart
    const int64_t* prompt_ids;  // [num_seqs, prompt_width]
    const int64_t* output_ids;  // [num_seqs, output_width]
    const float* presence_penalty;  // [num_seqs], as the next two
    const float* frequency_penalty;
    const float* repetition_penalty;
    int64_t logits_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    int32_t prompt_width;
    int32_t output_width;
    int32_t dtype;  // of logits
    // set by the launcher
    int32_t slice;  // tokens of a block, where there are many ids
    int32_t grid;   // blocks from sequence to sequence; the grid's other dimension, if any, goes along the vocabulary
};

// Logits of tokens whose bit is 0 become -inf: bit i % 32 of word i / 32 is that of token i.
struct ApplyTokenBitmaskArgs {
    void* logits;             // [num_seqs, vocab_size], rows logits_stride apart
    const uint32_t* bitmask;  // [num_seqs, ceil(vocab_size / 32)], rows bitmask_stride apart
    int64_t logits_stride;
    int64_t bitmask_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    int32_t dtype;  // of logits
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks from sequence to sequence; the grid's other dimension goes along the vocabulary
};

// The top_k largest of softmax(gating[t]), largest first, and whose they are.
struct TopkSoftmaxArgs {
    const void* gating;  // [num_tokens, num_experts], rows gating_stride apart
    float* weights;      // [num_tokens, top_k]
    int32_t* ids;        // [num_tokens, top_k]
    int64_t gating_stride;
    int64_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t renormalize;  // weights are divided by their sum
    int32_t dtype;        // of gating
    // set by the launcher
    int32_t grid;  // waves
};

// As TopkSoftmaxArgs, of the topk_group best of num_groups groups of experts; then num_shared experts of weight 1.
struct GroupedTopkArgs {
    const void* gating;  // [num_tokens, num_experts], rows gating_stride apart
    const float* bias;   // [num_experts], or null
    float* weights;      // [num_tokens, top_k + num_shared]
    int32_t* ids;        // [num_tokens, top_k + num_shared]
    int64_t gating_stride;
    int64_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t num_groups;
    int32_t topk_group;
    int32_t num_shared;
    int32_t renormalize;  // weights are divided by their sum
    int32_t sigmoid;      // scores are sigmoid(gating), not softmax
    float factor;         // what weights are multiplied by
    int32_t dtype;        // of gating
    // set by the launcher
    int32_t grid;       // waves
    int32_t in_group;   // experts of a group
    int32_t lane_bits;  // 2^lane_bits lanes hold a group
};

// A token per row: the first at which the running sum of what the settings keep exceeds uniform times all of it.
struct SampleArgs {
    const void* logits;        // [num_seqs, vocab_size], rows logits_stride apart
    const float* temperature;  // [num_seqs], as all below; at most 0: the largest logit
    const int32_t* top_k;      // at most 0: all
    const float* top_p;        // at least 1: all
    const float* min_p;        // at most 0: all
    const float* uniform;      // in [0, 1)
    int64_t* out;
    float* work;  // [num_seqs, work_stride] to work in; vocab_size / 8 + 512 of each row are enough
    int64_t logits_stride;
    int64_t work_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    int32_t dtype;  // of logits
    // set by the launcher
    int32_t chunks;  // of a row: what a wave of the first launch reads
    int32_t groups;  // of a row: what has a peak
    int32_t grid;    // blocks of the first launch from sequence to sequence; its other dimension goes along a row
};

// out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), lse = log(e^lse_a + e^lse_b). A side of lse -inf or +inf is
// absent: what it holds does not matter.
struct MergeAttnStatesArgs {
    const void* a;       // [num_tokens, num_heads, head_dim], its rows and heads a_*stride apart
    const float* lse_a;  // [num_tokens, num_heads], likewise
    const void* b;       // as a
    const float* lse_b;
    void* out;   // [num_tokens, num_heads, head_dim]
    float* lse;  // [num_tokens, num_heads]
    int64_t a_stride;
    int64_t a_head_stride;
    int64_t lse_a_stride;
    int64_t lse_a_head_stride;
    int64_t b_stride;
    int64_t b_head_stride;
    int64_t lse_b_stride;
    int64_t lse_b_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t dtype;  // of a, b and out
    // set by the launcher
    IntDivider by_heads;
    RowShares shares;
    int64_t num_rows;  // num_tokens * num_heads
};

// Indices into ids, sorted by expert, each expert's run padded with num_ids to whole blocks; so is what is behind.
struct MoeAlignBlockSizeArgs {
    const int32_t* ids;   // [num_ids], those outside [0, num_experts) are left out
    int32_t* sorted_ids;  // [num_blocks * block_size]
    int32_t* expert_ids;  // [num_blocks], -1 behind the last run
    int32_t* num_padded;  // one number: places of all runs
    int32_t* counts;      // [64, num_experts] to work in; null: each block counts all ids, in one launch
    int32_t num_ids;
    int32_t num_experts;
    int32_t block_size;
    int32_t num_blocks;  // ceil((num_ids + min(num_ids, num_experts) * (block_size - 1)) / block_size)
    // set by the launcher
    int32_t part;  // ids that a block places
    int32_t grid;  // blocks
};

// out[b] = softmax(cap(scale query[b] K[b]^T)) V[b] over the keys of sequence b, of which key p is row p % page_size of
// page page_table[b, p / page_size].
struct PagedAttentionArgs {
    const void* query;  // [num_seqs, num_heads, head_dim], rows and heads query_*stride apart
    const void* key_cache;      // [pages, page_size, num_kv_heads, head_dim], each key_*_stride apart
    const void* value_cache;    // likewise
    const int32_t* page_table;  // [num_seqs, max_pages], rows table_stride apart
    const int32_t* seq_lens;    // [num_seqs]
    const float* sinks;         // [num_heads], or null
    const float* k_scale;       // one number, or null: 1
    const float* v_scale;
    void* out;       // [num_seqs, num_heads, head_dim]
    float* partial;  // [num_seqs + shares, num_heads, head_dim] to work in, as the next two, where there are shares
    float* stats;    // [num_seqs + shares, num_heads, 2]
    int32_t* plan;   // [num_seqs, 2]
    int64_t query_stride;
    int64_t query_head_stride;
    int64_t key_page_stride;
    int64_t key_row_stride;
    int64_t key_head_stride;
    int64_t value_page_stride;
    int64_t value_row_stride;
    int64_t value_head_stride;
    int64_t table_stride;
    int32_t num_seqs;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;   // 64 or 128
    int32_t page_size;  // a multiple of 16
    int32_t max_pages;
    int32_t window;  // above 0: only so many last keys are seen
    int32_t shares;  // that the batch's keys are dealt in; 0: no sequence is split
    float scale;
    float logit_cap;      // above 0: cap(x) = logit_cap tanh(x / logit_cap)
    int32_t dtype;        // of query and out
    int32_t cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t room;          // keys that a row of page_table has room for
    int32_t group;         // heads of a key head
    int32_t tiles;         // blocks of a part
    int32_t step_entries;  // what a wave goes on by in the page table, and in a page
    int32_t step_rows;
    int32_t merge_grid;  // blocks of the merge
    int64_t num_rows;    // num_seqs * num_heads
};

// Turns the heads of query and key by their token's angles, in place, and cache[slot] = [kv_c, the turned key].
struct ConcatAndCacheMlaRopeFusedArgs {
    const void* positions;        // [num_tokens] int64 or int32, positions_stride apart
    void* q_pe;                   // [num_tokens, num_heads, rope_dim], rows and heads q_pe_*stride apart
    void* k_pe;                   // [num_tokens, rope_dim], rows k_pe_stride apart
    const void* kv_c;             // [num_tokens, kv_lora_rank], likewise
    const void* angles;           // [max_pos, rope_dim], cosines then sines
    const int64_t* slot_mapping;  // [num_tokens], below 0: not kept
    void* kv_cache;               // [slots, kv_lora_rank + rope_dim]; null where there are no slots
    const float* scale;           // one number, or null: 1
    int64_t positions_stride;
    int64_t q_pe_stride;
    int64_t q_pe_head_stride;
    int64_t k_pe_stride;
    int64_t kv_c_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t kv_lora_rank;
    int32_t rope_dim;
    int32_t is_neox;         // 1: pairs are half of rope_dim apart; 0: they are neighbours
    int32_t position_bytes;  // 8 or 4
    int32_t dtype;           // of q_pe, k_pe and kv_c
    int32_t angles_dtype;
    int32_t cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t head_packs;  // of half a head
    int32_t head_lanes;  // heads that a token's lanes begin with; they go on to as many more, while there are
    // the packs of a token's latents, key and query heads, and what blocks take them: the first, the next, the others
    IntDivider by_latent_packs;
    IntDivider by_head_packs;
    IntDivider by_query_packs;
    int32_t latent_blocks;
    int32_t key_blocks;
};

}  // namespace wave64

#ifndef WAVE64_DEVICE_CODE
extern "C" {

// The words for this thread's last status that was not kOk.
const char* wave64_error();

int32_t wave64_rms_norm(const wave64::RmsNormArgs* args, void* stream);
int32_t wave64_per_token_group_quant_fp8(const wave64::PerTokenGroupQuantFp8Args* args, void* stream);
int32_t wave64_per_token_quant_fp8(const wave64::PerTokenQuantFp8Args* args, void* stream);
int32_t wave64_per_tensor_quant_fp8(const wave64::PerTensorQuantFp8Args* args, void* stream);
int32_t wave64_fused_add_rms_norm(const wave64::FusedAddRmsNormArgs* args, void* stream);
int32_t wave64_silu_and_mul(const wave64::GatedArgs* args, void* stream);
int32_t wave64_gelu_and_mul(const wave64::GatedArgs* args, void* stream);
int32_t wave64_gelu_tanh_and_mul(const wave64::GatedArgs* args, void* stream);
int32_t wave64_rotary_embedding(const wave64::RotaryEmbeddingArgs* args, void* stream);
int32_t wave64_reshape_and_cache(const wave64::ReshapeAndCacheArgs* args, void* stream);
int32_t wave64_concat_and_cache_mla(const wave64::ConcatAndCacheMlaArgs* args, void* stream);
int32_t wave64_transfer_kv(const wave64::TransferKvArgs* args, void* stream);
int32_t wave64_apply_penalties(const wave64::ApplyPenaltiesArgs* args, void* stream);
int32_t wave64_apply_token_bitmask(const wave64::ApplyTokenBitmaskArgs* args, void* stream);
int32_t wave64_topk_softmax(const wave64::TopkSoftmaxArgs* args, void* stream);
int32_t wave64_grouped_topk(const wave64::GroupedTopkArgs* args, void* stream);
int32_t wave64_sample(const wave64::SampleArgs* args, void* stream);
int32_t wave64_merge_attn_states(const wave64::MergeAttnStatesArgs* args, void* stream);
int32_t wave64_moe_align_block_size(const wave64::MoeAlignBlockSizeArgs* args, void* stream);
int32_t wave64_paged_attention(const wave64::PagedAttentionArgs* args, void* stream);
int32_t wave64_concat_and_cache_mla_rope_fused(const wave64::ConcatAndCacheMlaRopeFusedArgs* args, void* stream);
}
#endif
