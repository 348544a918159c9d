// Rotary embedding: applies RoPE to the first rot_dim columns of every head of query and key, in place.
//
// The trick: both numbers of a pair belong to one lane, so lanes exchange nothing and nothing is read after it was
// overwritten. A token's angles come from memory once: a lane rotates two heads by them, others have them from L1.
// Bound by memory: the rotated part of query and key in and out, 16 bytes per lane and access. With few tokens, by
// latency: the position, then the angles, while the heads are in flight.
#include "wave64/rope.h"

namespace wave64 {

// Applies RoPE to the first rot_dim columns of every head, in place.
struct RotaryEmbeddingArgs {
    const void* positions;  // [num_tokens] int64 or int32
    void* query;            // [num_tokens, num_heads, >= rot_dim]
    void* key;              // [num_tokens, num_kv_heads, >= rot_dim]; null if there are no such heads
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
    int32_t is_neox;         // 1: the numbers of a pair are rot_dim / 2 columns apart; 0: they are neighbors
    int32_t position_bytes;  // 8 or 4
    Dtype dtype;             // of query and key
    Dtype angles_dtype;
    // set by the launcher
    int32_t packs;  // of half of rot_dim: the lanes of a head
    IntDivider by_packs;
    int32_t block_heads;  // heads of a block, side by side
    int32_t held_heads;   // heads of a lane: its first one and the one block_heads further
    int32_t grid;         // blocks from token to token
};

constexpr int kMaxLanes = 512;
constexpr int kMaxRotDim = 2 * kMaxLanes;
constexpr int kHeldHeads = 2;  // of a lane, at most

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

template <typename T, int N>
WAVE64_DEVICE void rotary_embedding(const RotaryEmbeddingArgs& args) {
    const unsigned lane = lane_in_block(), head_in_block = lane / args.by_packs;
    const int pack = lane - head_in_block * args.packs, half = args.rot_dim / 2;
    const int first = block_id() * args.block_heads * args.held_heads + head_in_block;
    const int heads = args.num_heads + args.num_kv_heads;
    if (int(head_in_block) >= args.block_heads || first >= heads) return;
    const bool two = args.held_heads == kHeldHeads && first + args.block_heads < heads;

    for (int64_t token = block_id_y(); token < args.num_tokens; token += args.grid) {
        const int64_t position = position_of(args.positions, token, args.positions_stride, args.position_bytes);
        T* const x = head_of<T>(args, token, first);
        T* const y = head_of<T>(args, token, first + args.block_heads);
        const auto pairs = Pairs<T, N>::load(x, args.is_neox, half, pack);
        Pairs<T, N> others = pairs;
        if (two) others = Pairs<T, N>::load(y, args.is_neox, half, pack);
        const auto angles = load_angles<N>(args.angles, args.angles_dtype, position, half, pack);
        pairs.rotated(args.is_neox, angles).store(x, args.is_neox, half, pack);
        if (two) others.rotated(args.is_neox, angles).store(y, args.is_neox, half, pack);
    }
}

}  // namespace wave64

WAVE64_KERNELS(rotary_embedding, wave64::kMaxLanes, RotaryEmbeddingArgs)

#else
namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(rotary_embedding);

void rotary_embedding(RotaryEmbeddingArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_float("angles_dtype", args.angles_dtype);
    call.expect(args.position_bytes == 4 || args.position_bytes == 8, "position_bytes", "4 or 8", args.position_bytes);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("num_heads", args.num_heads, 0, 1 << 20);
    call.expect_range("num_kv_heads", args.num_kv_heads, 0, 1 << 20);
    call.expect(args.rot_dim % 2 == 0, "rot_dim", "an even number", args.rot_dim);
    call.expect_range("rot_dim", args.rot_dim, 0, kMaxRotDim);
    const int heads = args.num_heads + args.num_kv_heads;
    if (args.num_tokens == 0 || heads == 0 || args.rot_dim == 0) return;
    call.expect_tensors({{"positions", args.positions}, {"angles", args.angles}});
    if (args.num_heads) call.expect_tensors({{"query", args.query}});
    if (args.num_kv_heads) call.expect_tensors({{"key", args.key}});

    const Device& device = call.device;
    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned =
        is_16_aligned({args.query, args.key, args.angles},
                      {args.query_stride * bytes, args.query_head_stride * bytes, args.key_stride * bytes,
                       args.key_head_stride * bytes, args.rot_dim / 2 * bytes});
    args.packs = int32_t(aligned ? args.rot_dim / 2 * bytes / 16 : args.rot_dim / 2);
    args.by_packs = divider(args.packs);
    // Few heads: blocks of one wave, on many compute units.
    const bool few = args.num_tokens * heads * args.packs <= int64_t(device.compute_units) * kMaxLanes;
    const int lanes = few ? device.wave_size : kMaxLanes;
    args.held_heads = few ? 1 : std::min(heads, kHeldHeads);
    const int64_t head_blocks = ceil_div(heads, args.held_heads * std::max(lanes / args.packs, 1));
    args.block_heads = int32_t(ceil_div(heads, head_blocks * args.held_heads));
    args.grid = int32_t(std::min(args.num_tokens, kMaxGridY));
    call.launch(kKernels[args.dtype].of(aligned), {head_blocks, args.grid},
                round_up(args.packs * args.block_heads, device.wave_size), args);
}

WAVE64_OP_AND_CONSTANTS(rotary_embedding, RotaryEmbeddingArgs, ({{"MAX_ROT_DIM", kMaxRotDim}}), positions, query, key,
                        angles, positions_stride, query_stride, query_head_stride, key_stride, key_head_stride,
                        num_tokens, num_heads, num_kv_heads, rot_dim, is_neox, position_bytes, dtype, angles_dtype)

}  // namespace
}  // namespace wave64
#endif
