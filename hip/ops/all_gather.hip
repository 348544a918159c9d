// The x of all ranks of a group behind each other, on every rank.
//
// The trick is in ranks.h: what a rank sends says itself that it has come. Bound by the latency of a launch and one
// trip over the links, large messages by the links: (world - 1) * count bytes out of each rank.
#include "wave64/exchange.h"

namespace wave64 {

// out[rank] = that rank's x. Elements are bytes, whatever the dtype.
struct AllGatherArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    int32_t max_blocks;  // of a launch; the same on all ranks
    const void* x;       // [count]
    void* out;           // [world, count]
    int64_t count;
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of x
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
WAVE64_DEVICE void gather(const AllGatherArgs& args) {
    constexpr int LINES = FLAGGED ? kSlotLines<WORLD> : 1;
    RankBlock<AllGatherArgs> block(args, kOpAllGather);
    const Packs<Bits8> x(args.x, args.bytes);
    const int begin = block_id() * args.block * args.lines;
    const int step = args.grid * args.block * args.lines;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const int pack = first + lane_in_block();
        Bits128 own[LINES], all[LINES][WORLD];
        load_part(own, x, pack, args);
        block.next_round(n == 0);
        const auto sent = [&](int, int line) { return own[line]; };
        if constexpr (FLAGGED)
            exchange_flagged(block, 0, 0, block.lines, sent, own, all);
        else if (!exchange_low_latency(block, sent, all[0]))
            continue;
#pragma unroll
        for (int rank = 0; rank < WORLD; rank++) {
            if (!in_world<WORLD>(block, rank)) break;
            int bytes = args.bytes;
            forget_uniform(bytes);
            const Packs<Bits8> out(static_cast<char*>(args.out) + int64_t(rank) * bytes, bytes);
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < block.lines) out.store(pack + i * args.block, all[i][rank]);
        }
    }
}

template <int WORLD>
WAVE64_DEVICE void all_gather_ll(const AllGatherArgs& args) {
    gather<WORLD, false>(args);
}
template <int WORLD>
WAVE64_DEVICE void all_gather_flagged(const AllGatherArgs& args) {
    gather<WORLD, true>(args);
}

}  // namespace wave64

WAVE64_RANK_KERNELS(all_gather_ll, AllGatherArgs)
WAVE64_RANK_KERNELS(all_gather_flagged, AllGatherArgs)

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("all_gather_ll"), WAVE64_BY_WORLD("all_gather_flagged")};

void all_gather(AllGatherArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_range("count", args.count, 0, kMaxBytes);
    if (args.count == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    args.bytes = int32_t(args.count);
    const bool flagged = args.bytes > kLowLatencyBytes;
    const int64_t packs = ceil_div(args.bytes, 16);
    plan_blocks(call, args, packs, 8, flagged ? slot_lines(args.world) : 1, flagged ? kRankBlocks : kLowLatencyBlocks);
    call.launch(kKernels[flagged][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(all_gather, AllGatherArgs, ({{"MAX_BYTES", kMaxBytes}, {"LL_BYTES", kLowLatencyBytes}}), arenas,
                        rank, world, status, timeout, max_blocks, x, out, count)

}  // namespace
}  // namespace wave64
#endif
