// Rotary embedding: turns the first rot_dim columns of every head of query and key by its token's angles, in place.
//
// The trick: both halves of a pair belong to one lane, so nothing is exchanged and nothing can be read after it was
// overwritten. A token's angles come from memory once: a lane turns two heads by them, others have them from L1.
// Bound by memory: the turned part of query and key in and out, 16 bytes per lane and access. With few tokens, by
// latency: the position, then the angles, while the heads are under way.
#include "wave64/rope.h"

namespace wave64 {
constexpr int kMaxLanes = 512;
constexpr int kHeldHeads = 2;  // that a lane holds
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// Query's heads, then key's.
template <typename T>
WAVE64_DEVICE T* head_of(const RotaryEmbeddingArgs& args, int64_t token, int head) {
    const int key_head = head - args.num_heads;
    return key_head < 0 ? static_cast<T*>(args.query) + token * args.query_stride + head * args.query_head_stride
                        : static_cast<T*>(args.key) + token * args.key_stride + key_head * args.key_head_stride;
}

// A position's low word says it all: no cache has 2^32 rows. So one load serves both widths, and may be under way.
WAVE64_DEVICE Bits32 position_of(const RotaryEmbeddingArgs& args, int64_t token) {
    return static_cast<const Bits32*>(args.positions)[token * args.positions_stride * (args.position_bytes / 4)];
}

template <typename T, int N>
WAVE64_DEVICE void rotary_embedding(const RotaryEmbeddingArgs& args) {
    const unsigned lane = lane_in_block(), head_in_block = lane / args.by_packs;
    const int pack = lane - head_in_block * args.packs, half = args.rot_dim / 2;
    const int first = block_id() * args.block_heads * args.held_heads + head_in_block;
    const int heads = args.num_heads + args.num_kv_heads;
    if (int(head_in_block) >= args.block_heads || first >= heads) return;
    const bool two = args.held_heads == kHeldHeads && first + args.block_heads < heads;

    for (int64_t token = block_id_y(); token < args.num_tokens; token += args.grid) {
        const int64_t position = position_of(args, token);
        T* const x = head_of<T>(args, token, first);
        T* const y = head_of<T>(args, token, first + args.block_heads);
        const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
        Pairs<T, N> others = pairs;
        if (two) others = Pairs<T, N>::load(y, args.is_neox, half, pack);
        const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
        pairs.turned(args.is_neox, angles).store(x, args.is_neox, half, pack);
        if (two) others.turned(args.is_neox, angles).store(y, args.is_neox, half, pack);
    }
}

}  // namespace wave64

#define ROTARY_EMBEDDING(NAME, T, N) \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::RotaryEmbeddingArgs args) { wave64::rotary_embedding<T, N>(args); }

ROTARY_EMBEDDING(rotary_embedding_bf16, wave64::bf16, 8)
ROTARY_EMBEDDING(rotary_embedding_fp16, wave64::fp16, 8)
ROTARY_EMBEDDING(rotary_embedding_fp32, float, 4)
ROTARY_EMBEDDING(rotary_embedding_bf16_unaligned, wave64::bf16, 1)
ROTARY_EMBEDDING(rotary_embedding_fp16_unaligned, wave64::fp16, 1)
ROTARY_EMBEDDING(rotary_embedding_fp32_unaligned, float, 1)

#else
namespace wave64 {
namespace {

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "rotary_embedding_bf16", "rotary_embedding_bf16_unaligned"},
                                {2, "rotary_embedding_fp16", "rotary_embedding_fp16_unaligned"},
                                {4, "rotary_embedding_fp32", "rotary_embedding_fp32_unaligned"}};

// Whether all packs of 16 bytes begin at multiples of as many, in every head of every token.
bool is_aligned(const RotaryEmbeddingArgs& args, int64_t bytes) {
    return is_16_aligned({args.query, args.key, args.angles},
                         {args.query_stride * bytes, args.query_head_stride * bytes, args.key_stride * bytes,
                          args.key_head_stride * bytes, args.rot_dim / 2 * bytes});
}

}  // namespace
}  // namespace wave64

int32_t wave64_rotary_embedding(const wave64::RotaryEmbeddingArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "rotary_embedding";
    RotaryEmbeddingArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.angles_dtype < kBf16 || args.angles_dtype > kFp32)
        return refuse(op, "angles_dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.angles_dtype);
    if (args.position_bytes != 4 && args.position_bytes != 8)
        return refuse(op, "position_bytes", "4 or 8", args.position_bytes);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.num_heads < 0 || args.num_heads > 1 << 20) return refuse(op, "num_heads", "0 to 2^20", args.num_heads);
    if (args.num_kv_heads < 0 || args.num_kv_heads > 1 << 20)
        return refuse(op, "num_kv_heads", "0 to 2^20", args.num_kv_heads);
    if (args.rot_dim < 0 || args.rot_dim % 2 || args.rot_dim > 2 * kMaxLanes)
        return refuse(op, "rot_dim", "an even number, 0 to 1024", args.rot_dim);
    const int heads = args.num_heads + args.num_kv_heads;
    if (args.num_tokens == 0 || heads == 0 || args.rot_dim == 0) return kOk;
    if (!args.positions) return refuse(op, "positions", "an address", 0);
    if (!args.angles) return refuse(op, "angles", "an address", 0);
    if (!args.query && args.num_heads) return refuse(op, "query", "an address", 0);
    if (!args.key && args.num_kv_heads) return refuse(op, "key", "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const bool aligned = is_aligned(args, kernels.element_bytes);
    args.packs = aligned ? args.rot_dim / 2 * kernels.element_bytes / 16 : args.rot_dim / 2;
    args.by_packs = divider(args.packs);
    // Few heads: blocks of one wave, on many compute units.
    const bool few = args.num_tokens * heads * args.packs <= int64_t(device->compute_units) * kMaxLanes;
    const int lanes = few ? device->wave_size : kMaxLanes;
    args.held_heads = few ? 1 : std::min(heads, kHeldHeads);
    const auto head_blocks = uint32_t(ceil_div(heads, args.held_heads * std::max(lanes / args.packs, 1)));
    args.block_heads = int32_t(ceil_div(heads, head_blocks * args.held_heads));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, 65535));
    const uint32_t grid = args.grid;
    const auto block = uint32_t(round_up(args.packs * args.block_heads, device->wave_size));
    return launch({op, aligned ? kernels.aligned : kernels.unaligned, {head_blocks, grid, 1}, {block, 1, 1}, 0}, &args,
                  sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::RotaryEmbeddingArgs, NAME)
static const bool registered = wave64::register_op<wave64::RotaryEmbeddingArgs, wave64_rotary_embedding>(
    "rotary_embedding",
    {FIELD(positions), FIELD(query), FIELD(key), FIELD(angles), FIELD(positions_stride), FIELD(query_stride),
     FIELD(query_head_stride), FIELD(key_stride), FIELD(key_head_stride), FIELD(num_tokens), FIELD(num_heads),
     FIELD(num_kv_heads), FIELD(rot_dim), FIELD(is_neox), FIELD(position_bytes), FIELD(dtype), FIELD(angles_dtype)});

#endif
