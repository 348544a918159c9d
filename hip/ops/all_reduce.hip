// The sum of x over the ranks of a group, on every rank: out = x of rank 0 + x of rank 1 + ..., in fp32, rounded once.
//
// The trick is in ranks.h: what a rank sends says itself that it has come, so that a small message takes one trip over
// the link, with no barrier before or behind it. Bound by the latency of a launch and that trip; large messages by the
// links: (world - 1) * bytes out of each rank, in two shots 2 * (world - 1) / world * bytes.
#include "wave64/exchange.h"

namespace wave64 {

// out = the sum of x over all ranks, added up in their order. out may be x.
struct AllReduceArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;   // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;  // of a wait, in ticks of the device's steady clock; 0: none
    const void* x;    // [count]
    void* out;        // [count]
    int64_t count;
    Dtype dtype;       // of x and out
    int32_t protocol;  // a Protocol
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of x
    int32_t block;    // lanes of a block
    int32_t grid;     // blocks
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <int WORLD>
WAVE64_DEVICE void all_reduce_ll(const AllReduceArgs& args) {
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs x(args.x, args.bytes), out(args.out, args.bytes);
    const int begin = block_id() * args.block;
    for (int first = begin; first * 16 < args.bytes; first += args.grid * args.block) {
        block.next_round(first != begin);
        const Bits128 own[] = {x.load(first + lane_in_block())};
        Bits128 all[1][WORLD];
        if (exchange_low_latency(block, own, all))
            out.store(first + lane_in_block(), sum_of(all[0], args.world, args.dtype));
    }
    block.end();
}

}  // namespace wave64

#define WAVE64_ALL_REDUCE(PROTOCOL)                                                           \
    WAVE64_KERNEL(wave64::kRankLanes) all_reduce_##PROTOCOL##_2(wave64::AllReduceArgs args) { \
        wave64::all_reduce_##PROTOCOL<2>(args);                                               \
    }                                                                                         \
    WAVE64_KERNEL(wave64::kRankLanes) all_reduce_##PROTOCOL##_4(wave64::AllReduceArgs args) { \
        wave64::all_reduce_##PROTOCOL<4>(args);                                               \
    }                                                                                         \
    WAVE64_KERNEL(wave64::kRankLanes) all_reduce_##PROTOCOL##_8(wave64::AllReduceArgs args) { \
        wave64::all_reduce_##PROTOCOL<8>(args);                                               \
    }
WAVE64_ALL_REDUCE(ll)

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {{"all_reduce_ll_2", "all_reduce_ll_4", "all_reduce_ll_8"}};
constexpr int64_t kMaxBytes = 1 << 30;

void all_reduce(AllReduceArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_range("count", args.count, 0, kMaxBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kLowLatency);
    if (args.count == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    args.bytes = int32_t(args.count * element_bytes(args.dtype));
    const int64_t packs = ceil_div(args.bytes, 16);
    args.block = int32_t(std::min<int64_t>(round_up(packs, call.device.wave_size), 256));
    args.grid = int32_t(std::min<int64_t>(ceil_div(packs, args.block), kLowLatencyBlocks));
    call.launch(kKernels[args.protocol][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(all_reduce, AllReduceArgs, ({WAVE64_RANK_CONSTANTS, {"MAX_BYTES", kMaxBytes}}), arenas, rank,
                        world, status, timeout, x, out, count, dtype, protocol)

}  // namespace
}  // namespace wave64
#endif
