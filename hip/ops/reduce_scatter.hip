// The sum of x over the ranks of a group, of which each rank gets its part: out = part `rank` of x of rank 0 + that of
// rank 1 + ..., in fp32, rounded once.
//
// The trick is in ranks.h: what a rank sends says itself that it has come. Bound by the latency of a launch and one
// trip over the links, large messages by the links: (world - 1) * count elements out of each rank.
#include "wave64/exchange.h"

namespace wave64 {

// out = the sum over all ranks of x[rank], added up in their order.
struct ReduceScatterArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    int32_t max_blocks;  // of a launch; the same on all ranks
    const void* x;       // [world, count]
    void* out;           // [count]
    int64_t count;
    Dtype dtype;  // of x and out
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of out
    int32_t block;    // lanes of a block
    int32_t grid;     // blocks
    int32_t lines;    // of 16 bytes that a lane sends to a rank in a round
    int32_t rounds;   // of every block
    int32_t longer;   // blocks, the first ones, that have one more
};

constexpr int64_t kMaxBytes = 1 << 28;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <int WORLD, bool FLAGGED>
WAVE64_DEVICE void scatter(const ReduceScatterArgs& args) {
    constexpr int LINES = FLAGGED ? kSlotLines<WORLD> : 1;
    RankBlock<ReduceScatterArgs> block(args, kOpReduceScatter);
    const Packs<> out(args.out, args.bytes);
    const int begin = block_id() * args.block * args.lines;
    const int step = args.grid * args.block * args.lines;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const int pack = first + lane_in_block();
        Bits128 parts[WORLD][LINES], all[LINES][WORLD];
#pragma unroll
        for (int i = 0; i < WORLD; i++) {
            if (!in_world<WORLD>(block, i)) break;
            int bytes = args.bytes, owner = args.rank + i;
            forget_uniform(bytes), forget_uniform(owner);
            owner -= owner < args.world ? 0 : args.world;
            load_part(parts[i], Packs<>(static_cast<const char*>(args.x) + int64_t(owner) * bytes, bytes), pack, args);
        }
        block.next_round(n == 0);
        const auto sent = [&](int i, int line) { return parts[i][line]; };
        if constexpr (FLAGGED)
            exchange_flagged(block, 0, 0, block.lines, sent, parts[0], all);
        else if (!exchange_low_latency(block, sent, all[0]))
            continue;
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < block.lines) out.store(pack + i * args.block, sum_of(all[i], block.world, args.dtype));
    }
}

template <int WORLD>
WAVE64_DEVICE void reduce_scatter_ll(const ReduceScatterArgs& args) {
    scatter<WORLD, false>(args);
}
template <int WORLD>
WAVE64_DEVICE void reduce_scatter_flagged(const ReduceScatterArgs& args) {
    scatter<WORLD, true>(args);
}

}  // namespace wave64

WAVE64_RANK_KERNELS(reduce_scatter_ll, ReduceScatterArgs)
WAVE64_RANK_KERNELS(reduce_scatter_flagged, ReduceScatterArgs)

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("reduce_scatter_ll"), WAVE64_BY_WORLD("reduce_scatter_flagged")};

void reduce_scatter(ReduceScatterArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_range("count", args.count, 0, kMaxBytes / element_bytes(args.dtype));
    if (args.count == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    args.bytes = int32_t(args.count * element_bytes(args.dtype));
    const bool flagged = args.bytes > kLowLatencyBytes;
    const int64_t packs = ceil_div(args.bytes, 16);
    plan_blocks(call, args, packs, 8, flagged ? slot_lines(args.world) : 1, flagged ? kRankBlocks : kLowLatencyBlocks);
    call.launch(kKernels[flagged][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(reduce_scatter, ReduceScatterArgs, ({{"MAX_BYTES", kMaxBytes}, {"LL_BYTES", kLowLatencyBytes}}),
                        arenas, rank, world, status, timeout, max_blocks, x, out, count, dtype)

}  // namespace
}  // namespace wave64
#endif
