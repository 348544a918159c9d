// RoPE and the cache write of latent attention in one launch: rotates the query's heads and the key, in place, and
// writes kv_cache[slot_mapping[t]] = [kv_c[t], the rotated key], converted where it is FP8.
//
// The trick: latents, keys and queries have blocks of their own in one grid, so that no wave takes two branches. Lanes
// exchange nothing, the key goes to the cache from the registers that it was rotated in, and a lane rotates two heads
// by one set of angles. Bound by memory: the query in and out, the new rows in and out, 16 bytes per lane and access.
// With few tokens, by latency: the position, then the angles, while the numbers to rotate are in flight.
#include "wave64/cache_write.h"
#include "wave64/rope.h"

namespace wave64 {

// Applies RoPE to the heads of q_pe and to k_pe, in place, then writes kv_cache[slot] = [kv_c, k_pe].
struct ConcatAndCacheMlaRopeFusedArgs {
    const void* positions;        // [num_tokens] int64 or int32
    void* q_pe;                   // [num_tokens, num_heads, rope_dim]
    void* k_pe;                   // [num_tokens, rope_dim]
    const void* kv_c;             // [num_tokens, kv_lora_rank]
    const void* angles;           // [max_pos, rope_dim], cosines then sines
    const int64_t* slot_mapping;  // [num_tokens]; below 0: not written
    void* kv_cache;               // [slots, kv_lora_rank + rope_dim], contiguous; null if there are no slots
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
    int32_t is_neox;         // 1: the numbers of a pair are rope_dim / 2 columns apart; 0: they are neighbors
    int32_t position_bytes;  // 8 or 4
    Dtype dtype;             // of q_pe, k_pe and kv_c
    Dtype angles_dtype;
    Dtype cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t head_packs;  // of half a head
    int32_t head_lanes;  // heads that a token's lanes begin with; each lane also rotates the head so much further
    // packs of a token's latents, of its key, of its query heads; first the latents' blocks, then the key's, then the
    // query's
    IntDivider by_latent_packs;
    IntDivider by_head_packs;
    IntDivider by_query_packs;
    int32_t latent_blocks;
    int32_t key_blocks;
};

constexpr int kFusedLanes = 256;  // of a block
constexpr int kMaxRopeDim = 1024;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, typename Out, int N>
WAVE64_DEVICE void write_latents(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int64_t row) {
    const int64_t slot = args.slot_mapping[token];
    const auto x = load_pack<T, N>(static_cast<const T*>(args.kv_c) + token * args.kv_c_stride + pack * N);
    const Divisor scale = divisor_of(args.scale);
    Out* const to = static_cast<Out*>(args.kv_cache) + slot * row + pack * N;
    if (slot >= 0) store_pack(to, stored(x, scale, to));
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void rotate_key(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int64_t row) {
    const int half = args.rope_dim / 2;
    const int64_t slot = args.slot_mapping[token];
    const int64_t position = position_of(args.positions, token, args.positions_stride, args.position_bytes);
    T* const x = static_cast<T*>(args.k_pe) + token * args.k_pe_stride;
    const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
    const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
    const Divisor scale = divisor_of(args.scale);
    const auto rotated = pairs.rotated(args.is_neox, angles);
    rotated.store(x, args.is_neox, half, pack);
    if (slot < 0) return;
    Out* const to = static_cast<Out*>(args.kv_cache) + slot * row + args.kv_lora_rank;
    store_pack(to + rotated.low_at(args.is_neox, pack), stored(rotated.low, scale, to));
    store_pack(to + rotated.high_at(args.is_neox, half, pack), stored(rotated.high, scale, to));
}

// Two heads by the same angles, if there are two.
template <typename T, int N>
WAVE64_DEVICE void rotate_queries(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int head) {
    const int half = args.rope_dim / 2;
    const bool two = head + args.head_lanes < args.num_heads;
    const int64_t position = position_of(args.positions, token, args.positions_stride, args.position_bytes);
    T* const x = static_cast<T*>(args.q_pe) + token * args.q_pe_stride + head * args.q_pe_head_stride;
    T* const y = x + args.head_lanes * args.q_pe_head_stride;
    const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
    Pairs<T, N> others = pairs;
    if (two) others = Pairs<T, N>::load(y, args.is_neox, half, pack);
    const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
    pairs.rotated(args.is_neox, angles).store(x, args.is_neox, half, pack);
    if (two) others.rotated(args.is_neox, angles).store(y, args.is_neox, half, pack);
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void concat_and_cache_mla_rope_fused(const ConcatAndCacheMlaRopeFusedArgs& args) {
    const int64_t row = args.kv_lora_rank + args.rope_dim;
    int block = block_id();
    if (block < args.latent_blocks) {
        const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_latent_packs;
        if (token < args.num_tokens)
            write_latents<T, Out, N>(args, token, item - token * unsigned(args.kv_lora_rank / N), row);
        return;
    }
    block -= args.latent_blocks;
    if (block < args.key_blocks) {
        const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_head_packs;
        if (token < args.num_tokens) rotate_key<T, Out, N>(args, token, item - token * unsigned(args.head_packs), row);
        return;
    }
    block -= args.key_blocks;
    const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_query_packs;
    if (token >= args.num_tokens) return;
    const unsigned in_token = item - token * unsigned(args.head_lanes * args.head_packs);
    const unsigned head = in_token / args.by_head_packs;
    rotate_queries<T, N>(args, token, in_token - head * unsigned(args.head_packs), head);
}

}  // namespace wave64

WAVE64_CACHE_KERNEL(concat_and_cache_mla_rope_fused, bf16, ConcatAndCacheMlaRopeFusedArgs, wave64::bf16, wave64::bf16,
                    8)
WAVE64_CACHE_KERNEL(concat_and_cache_mla_rope_fused, fp16, ConcatAndCacheMlaRopeFusedArgs, wave64::fp16, wave64::fp16,
                    8)
WAVE64_CACHE_KERNEL(concat_and_cache_mla_rope_fused, fp32, ConcatAndCacheMlaRopeFusedArgs, float, float, 4)
#if WAVE64_HAS_FP8
WAVE64_CACHE_FP8(concat_and_cache_mla_rope_fused, ConcatAndCacheMlaRopeFusedArgs)
#endif

#else
namespace wave64 {
namespace {

#define NAMES(DTYPE) WAVE64_CACHE_NAMES("concat_and_cache_mla_rope_fused", "_" DTYPE, "_fp8_from_" DTYPE)
constexpr CacheKernels kKernels[] = {NAMES("bf16"), NAMES("fp16"), NAMES("fp32")};  // by dtype

void concat_and_cache_mla_rope_fused(ConcatAndCacheMlaRopeFusedArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_float("angles_dtype", args.angles_dtype);
    call.expect(args.position_bytes == 4 || args.position_bytes == 8, "position_bytes", "4 or 8", args.position_bytes);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("num_heads", args.num_heads, 0, 1 << 20);
    call.expect_range("kv_lora_rank", args.kv_lora_rank, 1, 1 << 27);
    call.expect(args.rope_dim % 2 == 0, "rope_dim", "an even number", args.rope_dim);
    call.expect_range("rope_dim", args.rope_dim, 2, kMaxRopeDim);
    if (args.num_tokens == 0) return;
    call.expect_tensors({{"positions", args.positions},
                         {"q_pe", args.num_heads ? args.q_pe : args.k_pe},
                         {"k_pe", args.k_pe},
                         {"kv_c", args.kv_c},
                         {"angles", args.angles},
                         {"slot_mapping", args.slot_mapping}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned =
        is_16_aligned({args.q_pe, args.k_pe, args.kv_c, args.angles, args.kv_cache},
                      {args.q_pe_stride * bytes, args.q_pe_head_stride * bytes, args.k_pe_stride * bytes,
                       args.kv_c_stride * bytes, args.kv_lora_rank * bytes, args.rope_dim / 2 * bytes});
    const auto numbers = int32_t(aligned ? 16 / bytes : 1);
    args.head_packs = args.rope_dim / 2 / numbers;
    // Few heads: a lane for each, on many compute units.
    const bool few = args.num_tokens * args.num_heads * args.head_packs <= int64_t(call.device.compute_units) * 512;
    args.head_lanes = few ? args.num_heads : int32_t(ceil_div(args.num_heads, 2));
    const int64_t latent_packs = args.kv_lora_rank / numbers, query_packs = int64_t(args.head_lanes) * args.head_packs;
    const int64_t max_packs = std::max({latent_packs, query_packs, int64_t(args.head_packs)});
    call.expect(args.num_tokens <= ((int64_t(1) << 31) - kFusedLanes) / max_packs, "num_tokens",
                "fewer than 2^31 lanes for latents, and for heads", args.num_tokens);
    args.by_latent_packs = divider(latent_packs), args.by_head_packs = divider(args.head_packs);
    args.by_query_packs = divider(std::max<int64_t>(query_packs, 1));
    args.latent_blocks = int32_t(ceil_div(args.num_tokens * latent_packs, kFusedLanes));
    args.key_blocks = int32_t(ceil_div(args.num_tokens * args.head_packs, kFusedLanes));
    const int64_t query_blocks = ceil_div(args.num_tokens * query_packs, kFusedLanes);
    const CacheKernels& kernels = kKernels[args.dtype];
    call.launch((args.cache_dtype == kFp8 ? kernels.to_fp8 : kernels.copy)[!aligned],
                {args.latent_blocks + args.key_blocks + query_blocks}, kFusedLanes, args);
}

WAVE64_OP_AND_CONSTANTS(concat_and_cache_mla_rope_fused, ConcatAndCacheMlaRopeFusedArgs,
                        ({{"MAX_ROPE_DIM", kMaxRopeDim}}), positions, q_pe, k_pe, kv_c, angles, slot_mapping, kv_cache,
                        scale, positions_stride, q_pe_stride, q_pe_head_stride, k_pe_stride, kv_c_stride, num_tokens,
                        num_heads, kv_lora_rank, rope_dim, is_neox, position_bytes, dtype, angles_dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
