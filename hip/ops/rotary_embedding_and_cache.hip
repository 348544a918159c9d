// RoPE and the cache write in one launch: rotates the heads of query and key, in place, and writes
// key_cache[slot_mapping[t]] = the rotated key[t], value_cache[slot_mapping[t]] = value[t], converted where it is FP8.
//
// The trick: queries, keys and what is only copied have blocks of their own in one grid, so that no wave takes two
// branches. Lanes exchange nothing, and a key goes to the cache from the registers that it was rotated in.
// Bound by memory: queries and keys in and out, values in, the cache's rows out, 16 bytes per lane and access. With few
// tokens, by latency: the position, then the angles, while the numbers to rotate are in flight.
#include "wave64/cache_write.h"
#include "wave64/rope.h"

namespace wave64 {

// Applies RoPE to the first rot_dim columns of every head of query and key, in place, then writes key_cache[slot] = key
// and value_cache[slot] = value.
struct RotaryEmbeddingAndCacheArgs {
    const void* positions;        // [num_tokens] int64 or int32
    void* query;                  // [num_tokens, num_heads, head_dim]
    void* key;                    // [num_tokens, num_kv_heads, head_dim]
    const void* value;            // as key
    const void* angles;           // [max_pos, rot_dim], cosines then sines
    void* key_cache;              // [slots, num_kv_heads, head_dim], contiguous; null if there are no slots
    void* value_cache;            // as key_cache
    const int64_t* slot_mapping;  // [num_tokens]; below 0: not written
    const float* k_scale;         // that of a head at head * scale_stride; null: 1
    const float* v_scale;
    int64_t positions_stride;
    int64_t query_stride;
    int64_t query_head_stride;
    int64_t key_stride;
    int64_t key_head_stride;
    int64_t value_stride;
    int64_t value_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t rot_dim;
    int32_t is_neox;         // 1: the numbers of a pair are rot_dim / 2 columns apart; 0: they are neighbors
    int32_t position_bytes;  // 8 or 4
    int32_t scale_stride;    // of k_scale and v_scale: 1, or 0 for one number
    Dtype dtype;             // of query, key and value
    Dtype angles_dtype;
    Dtype cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t pair_packs;  // of half of rot_dim: the lanes that rotate a head
    int32_t head_packs;  // of a value
    int32_t copy_packs;  // of a value and of what is not rotated of a key: the lanes that copy a head
    IntDivider by_pair_packs, by_copy_packs, by_heads, by_kv_heads;
    int32_t query_blocks;
    int32_t key_blocks;
};

constexpr int kLanesOfBlock = 256;
constexpr int kMaxRotaryDim = 2048;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// Which pack of which head of which token a lane has.
struct Item {
    int64_t token;
    int head, pack;

    WAVE64_DEVICE Item(unsigned item, const IntDivider& by_packs, int packs, const IntDivider& by_heads, int heads) {
        const unsigned head_of_all = item / by_packs, row = head_of_all / by_heads;
        token = row, head = int(head_of_all - row * unsigned(heads)), pack = int(item - head_of_all * unsigned(packs));
    }
};

template <typename T, int N>
WAVE64_DEVICE Pairs<T, N> rotate(const RotaryEmbeddingAndCacheArgs& args, T* head, const Item& at) {
    const int half = args.rot_dim / 2;
    const int64_t position = position_of(args.positions, at.token, args.positions_stride, args.position_bytes);
    const auto pairs = Pairs<T, N>::load(head, args.is_neox, half, at.pack);
    const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, at.pack);
    const auto rotated = pairs.rotated(args.is_neox, angles);
    rotated.store(head, args.is_neox, half, at.pack);
    return rotated;
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void rotary_embedding_and_cache(const RotaryEmbeddingAndCacheArgs& args) {
    int block = block_id();
    if (block < args.query_blocks) {
        const Item at(unsigned(block) * kLanesOfBlock + lane_in_block(), args.by_pair_packs, args.pair_packs,
                      args.by_heads, args.num_heads);
        if (at.token < args.num_tokens)
            rotate<T, N>(args,
                         static_cast<T*>(args.query) + at.token * args.query_stride + at.head * args.query_head_stride,
                         at);
        return;
    }
    block -= args.query_blocks;
    const bool rotates = block < args.key_blocks;
    if (!rotates) block -= args.key_blocks;
    const Item at(unsigned(block) * kLanesOfBlock + lane_in_block(), rotates ? args.by_pair_packs : args.by_copy_packs,
                  rotates ? args.pair_packs : args.copy_packs, args.by_kv_heads, args.num_kv_heads);
    if (at.token >= args.num_tokens) return;
    const int64_t slot = args.slot_mapping[at.token];
    const int64_t row = (slot * args.num_kv_heads + at.head) * args.head_dim;
    T* const key = static_cast<T*>(args.key) + at.token * args.key_stride + at.head * args.key_head_stride;
    Out* to = static_cast<Out*>(args.key_cache) + row;
    if (rotates) {
        const auto rotated = rotate<T, N>(args, key, at);
        const Divisor scale = divisor_of(args.k_scale, at.head * args.scale_stride);
        if (slot < 0) return;
        store_pack(to + rotated.low_at(args.is_neox, at.pack), stored(rotated.low, scale, to));
        store_pack(to + rotated.high_at(args.is_neox, args.rot_dim / 2, at.pack), stored(rotated.high, scale, to));
        return;
    }
    const T* from = key + args.rot_dim + (at.pack - args.head_packs) * N;
    to += args.rot_dim + (at.pack - args.head_packs) * N;
    const bool is_value = at.pack < args.head_packs;
    if (is_value) {
        from = static_cast<const T*>(args.value) + at.token * args.value_stride + at.head * args.value_head_stride +
               at.pack * N;
        to = static_cast<Out*>(args.value_cache) + row + at.pack * N;
    }
    if (slot < 0) return;
    const Divisor scale = divisor_of(is_value ? args.v_scale : args.k_scale, at.head * args.scale_stride);
    store_pack(to, stored(load_pack<T, N>(from), scale, to));
}

}  // namespace wave64

WAVE64_CACHE_KERNEL(rotary_embedding_and_cache, bf16, RotaryEmbeddingAndCacheArgs, wave64::bf16, wave64::bf16, 8)
WAVE64_CACHE_KERNEL(rotary_embedding_and_cache, fp16, RotaryEmbeddingAndCacheArgs, wave64::fp16, wave64::fp16, 8)
WAVE64_CACHE_KERNEL(rotary_embedding_and_cache, fp32, RotaryEmbeddingAndCacheArgs, float, float, 4)
#if WAVE64_HAS_FP8
WAVE64_CACHE_FP8(rotary_embedding_and_cache, RotaryEmbeddingAndCacheArgs)
#endif

#else
namespace wave64 {
namespace {

#define NAMES(DTYPE) WAVE64_CACHE_NAMES("rotary_embedding_and_cache", "_" DTYPE, "_fp8_from_" DTYPE)
constexpr CacheKernels kKernels[] = {NAMES("bf16"), NAMES("fp16"), NAMES("fp32")};  // by dtype

void rotary_embedding_and_cache(RotaryEmbeddingAndCacheArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_float("angles_dtype", args.angles_dtype);
    call.expect(args.position_bytes == 4 || args.position_bytes == 8, "position_bytes", "4 or 8", args.position_bytes);
    call.expect_range("scale_stride", args.scale_stride, 0, 1);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("num_heads", args.num_heads, 0, 1 << 20);
    call.expect_range("num_kv_heads", args.num_kv_heads, 0, 1 << 20);
    call.expect_range("head_dim", args.head_dim, 0, 1 << 20);
    call.expect(args.rot_dim % 2 == 0, "rot_dim", "an even number", args.rot_dim);
    call.expect_range("rot_dim", args.rot_dim, 0, std::min(args.head_dim, kMaxRotaryDim));
    const int64_t heads = int64_t(args.num_heads) + args.num_kv_heads;
    if (args.num_tokens == 0 || args.head_dim == 0 || heads == 0) return;
    call.expect_tensors({{"positions", args.positions}, {"angles", args.angles}, {"slot_mapping", args.slot_mapping}});
    if (args.num_heads) call.expect_tensors({{"query", args.query}});
    if (args.num_kv_heads) call.expect_tensors({{"key", args.key}, {"value", args.value}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned =
        is_16_aligned({args.query, args.key, args.value, args.angles, args.key_cache, args.value_cache},
                      {args.query_stride * bytes, args.query_head_stride * bytes, args.key_stride * bytes,
                       args.key_head_stride * bytes, args.value_stride * bytes, args.value_head_stride * bytes,
                       args.head_dim * bytes, args.rot_dim / 2 * bytes});
    const auto numbers = int32_t(aligned ? 16 / bytes : 1);
    args.pair_packs = args.rot_dim / 2 / numbers, args.head_packs = args.head_dim / numbers;
    args.copy_packs = args.head_packs + (args.head_dim - args.rot_dim) / numbers;
    const int64_t most = std::max(args.num_heads * args.pair_packs, args.num_kv_heads * args.copy_packs);
    call.expect(args.num_tokens <= ((int64_t(1) << 31) - kLanesOfBlock) / std::max<int64_t>(most, 1), "num_tokens",
                "fewer than 2^31 lanes for queries, and for values", args.num_tokens);
    args.by_pair_packs = divider(std::max(args.pair_packs, 1)), args.by_copy_packs = divider(args.copy_packs);
    args.by_heads = divider(std::max(args.num_heads, 1)), args.by_kv_heads = divider(std::max(args.num_kv_heads, 1));
    const auto blocks = [&](int64_t heads, int64_t packs) {
        return ceil_div(args.num_tokens * heads * packs, kLanesOfBlock);
    };
    args.query_blocks = int32_t(blocks(args.num_heads, args.pair_packs));
    args.key_blocks = int32_t(blocks(args.num_kv_heads, args.pair_packs));
    const CacheKernels& kernels = kKernels[args.dtype];
    call.launch((args.cache_dtype == kFp8 ? kernels.to_fp8 : kernels.copy)[!aligned],
                {args.query_blocks + args.key_blocks + blocks(args.num_kv_heads, args.copy_packs)}, kLanesOfBlock,
                args);
}

WAVE64_OP_AND_CONSTANTS(rotary_embedding_and_cache, RotaryEmbeddingAndCacheArgs, ({{"MAX_ROT_DIM", kMaxRotaryDim}}),
                        positions, query, key, value, angles, key_cache, value_cache, slot_mapping, k_scale, v_scale,
                        positions_stride, query_stride, query_head_stride, key_stride, key_head_stride, value_stride,
                        value_head_stride, num_tokens, num_heads, num_kv_heads, head_dim, rot_dim, is_neox,
                        position_bytes, scale_stride, dtype, angles_dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
