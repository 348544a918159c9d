// Rotation and cache write of latent attention in one launch: turns the query's heads and the key by their token's
// angles, in place, and kv_cache[slot_mapping[t]] = [kv_c[t], the turned key], converted where it is FP8.
//
// The trick: latents, keys and queries have blocks of their own in one grid, so that no wave goes two ways. Nothing is
// exchanged between lanes, the key goes to the cache from the registers it was turned in, and a lane turns two heads by
// the angles it has.
// Bound by memory: the query in and out, of the rest the new rows in and out, 16 bytes per lane and access. With few
// tokens, by latency: the position, then the angles, while the numbers to turn are under way.
#include "wave64/cache_write.h"
#include "wave64/rope.h"

namespace wave64 {
constexpr int kFusedLanes = 256;  // of a block
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// A position's low word says it all: no table of angles has 2^32 rows. So one load serves both widths.
WAVE64_DEVICE int64_t position_of(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token) {
    return static_cast<const Bits32*>(args.positions)[token * args.positions_stride * (args.position_bytes / 4)];
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void move_latents(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int64_t row) {
    const int64_t slot = args.slot_mapping[token];
    const auto x = load_pack<T, N>(static_cast<const T*>(args.kv_c) + token * args.kv_c_stride + pack * N);
    const Divisor scale = divisor_of(args.scale);
    Out* const to = static_cast<Out*>(args.kv_cache) + slot * row + pack * N;
    if (slot >= 0) store_pack(to, kept(x, scale, to));
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void turn_key(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int64_t row) {
    const int half = args.rope_dim / 2;
    const int64_t slot = args.slot_mapping[token], position = position_of(args, token);
    T* const x = static_cast<T*>(args.k_pe) + token * args.k_pe_stride;
    const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
    const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
    const Divisor scale = divisor_of(args.scale);
    const auto turned = pairs.turned(args.is_neox, angles);
    turned.store(x, args.is_neox, half, pack);
    if (slot < 0) return;
    Out* const to = static_cast<Out*>(args.kv_cache) + slot * row + args.kv_lora_rank;
    store_pack(to + turned.low_at(args.is_neox, pack), kept(turned.low, scale, to));
    store_pack(to + turned.high_at(args.is_neox, half, pack), kept(turned.high, scale, to));
}

// Two heads by the same angles, while there are.
template <typename T, int N>
WAVE64_DEVICE void turn_queries(const ConcatAndCacheMlaRopeFusedArgs& args, int64_t token, int pack, int head) {
    const int half = args.rope_dim / 2;
    const bool two = head + args.head_lanes < args.num_heads;
    const int64_t position = position_of(args, token);
    T* const x = static_cast<T*>(args.q_pe) + token * args.q_pe_stride + head * args.q_pe_head_stride;
    T* const y = x + args.head_lanes * args.q_pe_head_stride;
    const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
    Pairs<T, N> others = pairs;
    if (two) others = Pairs<T, N>::load(y, args.is_neox, half, pack);
    const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
    pairs.turned(args.is_neox, angles).store(x, args.is_neox, half, pack);
    if (two) others.turned(args.is_neox, angles).store(y, args.is_neox, half, pack);
}

template <typename T, typename Out, int N>
WAVE64_DEVICE void concat_and_cache_mla_rope_fused(const ConcatAndCacheMlaRopeFusedArgs& args) {
    const int64_t row = args.kv_lora_rank + args.rope_dim;
    int block = block_id();
    if (block < args.latent_blocks) {
        const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_latent_packs;
        if (token < args.num_tokens)
            move_latents<T, Out, N>(args, token, item - token * unsigned(args.kv_lora_rank / N), row);
        return;
    }
    block -= args.latent_blocks;
    if (block < args.key_blocks) {
        const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_head_packs;
        if (token < args.num_tokens) turn_key<T, Out, N>(args, token, item - token * unsigned(args.head_packs), row);
        return;
    }
    block -= args.key_blocks;
    const unsigned item = unsigned(block) * kFusedLanes + lane_in_block(), token = item / args.by_query_packs;
    if (token >= args.num_tokens) return;
    const unsigned in_token = item - token * unsigned(args.head_lanes * args.head_packs);
    const unsigned head = in_token / args.by_head_packs;
    turn_queries<T, N>(args, token, in_token - head * unsigned(args.head_packs), head);
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
#include <algorithm>

namespace wave64 {
namespace {

#define NAMES(BYTES, DTYPE) WAVE64_CACHE_NAMES("concat_and_cache_mla_rope_fused", BYTES, "_" DTYPE, "_fp8_from_" DTYPE)
constexpr CacheKernels kKernels[] = {NAMES(2, "bf16"), NAMES(2, "fp16"), NAMES(4, "fp32")};  // by dtype

}  // namespace
}  // namespace wave64

int32_t wave64_concat_and_cache_mla_rope_fused(const wave64::ConcatAndCacheMlaRopeFusedArgs* caller_args,
                                               void* stream) {
    using namespace wave64;
    constexpr const char* op = "concat_and_cache_mla_rope_fused";
    ConcatAndCacheMlaRopeFusedArgs args = *caller_args;
    if (int32_t status = check_cache_dtypes(op, args.dtype, args.cache_dtype)) return status;
    if (args.angles_dtype < kBf16 || args.angles_dtype > kFp32)
        return refuse(op, "angles_dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.angles_dtype);
    if (args.position_bytes != 4 && args.position_bytes != 8)
        return refuse(op, "position_bytes", "4 or 8", args.position_bytes);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.num_heads < 0 || args.num_heads > 1 << 20) return refuse(op, "num_heads", "0 to 2^20", args.num_heads);
    if (args.kv_lora_rank < 1 || args.kv_lora_rank > 1 << 27)
        return refuse(op, "kv_lora_rank", "1 to 2^27", args.kv_lora_rank);
    if (args.rope_dim < 2 || args.rope_dim % 2 || args.rope_dim > 1024)
        return refuse(op, "rope_dim", "an even number, 2 to 1024", args.rope_dim);
    if (args.num_tokens == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"positions", args.positions},
                                 {"q_pe", args.num_heads ? args.q_pe : args.k_pe},
                                 {"k_pe", (const void*)args.k_pe},
                                 {"kv_c", args.kv_c},
                                 {"angles", args.angles},
                                 {"slot_mapping", (const void*)args.slot_mapping}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const CacheKernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned =
        is_16_aligned({args.q_pe, args.k_pe, args.kv_c, args.angles, args.kv_cache},
                      {args.q_pe_stride * bytes, args.q_pe_head_stride * bytes, args.k_pe_stride * bytes,
                       args.kv_c_stride * bytes, args.kv_lora_rank * bytes, args.rope_dim / 2 * bytes});
    const int32_t numbers = aligned ? 16 / kernels.element_bytes : 1;
    args.head_packs = args.rope_dim / 2 / numbers;
    // Few heads: a lane for each, on many compute units.
    const bool few = args.num_tokens * args.num_heads * args.head_packs <= int64_t(device->compute_units) * 512;
    args.head_lanes = few ? args.num_heads : int32_t(ceil_div(args.num_heads, 2));
    const int64_t latent_packs = args.kv_lora_rank / numbers, query_packs = int64_t(args.head_lanes) * args.head_packs;
    const int64_t most = std::max({latent_packs, query_packs, int64_t(args.head_packs)});
    if (args.num_tokens > ((int64_t(1) << 31) - kFusedLanes) / most)
        return refuse(op, "num_tokens", "fewer than 2^31 lanes for latents, and for heads", args.num_tokens);
    args.by_latent_packs = divider(latent_packs), args.by_head_packs = divider(args.head_packs);
    args.by_query_packs = divider(std::max<int64_t>(query_packs, 1));
    args.latent_blocks = int32_t(ceil_div(args.num_tokens * latent_packs, kFusedLanes));
    args.key_blocks = int32_t(ceil_div(args.num_tokens * args.head_packs, kFusedLanes));
    const auto query_blocks = uint32_t(ceil_div(args.num_tokens * query_packs, kFusedLanes));
    const uint32_t blocks = args.latent_blocks + args.key_blocks + query_blocks;
    return launch({op, (args.cache_dtype == kFp8 ? kernels.to_fp8 : kernels.copy)[!aligned], {blocks, 1, 1},
                   {kFusedLanes, 1, 1}, 0},
                  &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::ConcatAndCacheMlaRopeFusedArgs, NAME)
static const bool registered =
    wave64::register_op<wave64::ConcatAndCacheMlaRopeFusedArgs, wave64_concat_and_cache_mla_rope_fused>(
        "concat_and_cache_mla_rope_fused", {FIELD(positions),
                                            FIELD(q_pe),
                                            FIELD(k_pe),
                                            FIELD(kv_c),
                                            FIELD(angles),
                                            FIELD(slot_mapping),
                                            FIELD(kv_cache),
                                            FIELD(scale),
                                            FIELD(positions_stride),
                                            FIELD(q_pe_stride),
                                            FIELD(q_pe_head_stride),
                                            FIELD(k_pe_stride),
                                            FIELD(kv_c_stride),
                                            FIELD(num_tokens),
                                            FIELD(num_heads),
                                            FIELD(kv_lora_rank),
                                            FIELD(rope_dim),
                                            FIELD(is_neox),
                                            FIELD(position_bytes),
                                            FIELD(dtype),
                                            FIELD(angles_dtype),
                                            FIELD(cache_dtype)});

#endif
