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
    int32_t lines;    // that a lane sends to each rank in a round
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

WAVE64_DEVICE Bits128 high_half_first(const Bits128& pack) {
    const Words words = Words::of(pack);
    return Words{{words.at[2], words.at[3], 0, 0}}.bits();
}
WAVE64_DEVICE Bits128 low_halves_of(const Bits128& a, const Bits128& b) {
    return Words{{Words::of(a).at[0], Words::of(a).at[1], Words::of(b).at[0], Words::of(b).at[1]}}.bits();
}

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

// Of 8 lanes' 16 packs in two lines there are 15: the last lane sends the halves of one, each before a tag.
template <int WORLD>
WAVE64_DEVICE void all_reduce_ll128(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD>, kNone = 1 << 26;  // a pack behind the end of any tensor
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs x(args.x, args.bytes), out(args.out, args.bytes);
    const int lane = lane_in_block() % 8, packs = args.block / 8 * 15, begin = block_id() * packs * (args.lines / 2);
    const bool is_last = lane == 7;
    for (int first = begin; first * 16 < args.bytes; first += args.grid * packs * (args.lines / 2)) {
        block.next_round(first != begin);
        const int pack = first + lane_in_block() / 8 * 15 + (is_last ? 14 : lane);
        Bits128 own[LINES], all[LINES][WORLD];
#pragma unroll
        for (int i = 0; i < LINES; i += 2) {
            if (i >= args.lines) break;
            own[i] = x.load(pack + i / 2 * packs);
            own[i + 1] = x.load(is_last ? kNone : pack + i / 2 * packs + 7);
        }
#pragma unroll
        for (int i = 0; i < LINES; i += 2) {
            if (i >= args.lines) break;
            if (is_last) own[i + 1] = high_half_first(own[i]);
        }
        if (!exchange_low_128(block, own, args.lines, all)) continue;
#pragma unroll
        for (int i = 0; i < LINES; i += 2) {
            if (i >= args.lines) break;
#pragma unroll
            for (int rank = 0; rank < WORLD; rank++)
                if (is_last) all[i][rank] = low_halves_of(all[i][rank], all[i + 1][rank]);
            out.store(pack + i / 2 * packs, sum_of(all[i], args.world, args.dtype));
            out.store(is_last ? kNone : pack + i / 2 * packs + 7, sum_of(all[i + 1], args.world, args.dtype));
        }
    }
    block.end();
}

template <int WORLD>
WAVE64_DEVICE void all_reduce_one_shot(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD>;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs x(args.x, args.bytes), out(args.out, args.bytes);
    const int lane_at = lane_in_block() * 16, begin = block_id() * args.block * args.lines;
    for (int first = begin; first * 16 < args.bytes; first += args.grid * args.block * args.lines) {
        block.next_round(first != begin);
        const int pack = first + lane_in_block();
        Bits128 own[LINES];
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < args.lines) own[i] = x.load(pack + i * args.block);
#pragma unroll
        for (int p = 1; p < WORLD; p++) {
            if (!in_world<WORLD>(block, p)) break;
            const Shared peer(args.peers.at[p]);
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < args.lines) peer.store(own[i], line_at<WORLD>(block, kDataAt, args.rank, i), lane_at);
        }
        set_flags<WORLD>(block, 0);
        wait_for_flags<WORLD>(block, 0);
        Bits128 all[LINES][WORLD];
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            if (i >= args.lines) break;
#pragma unroll
            for (int source = 0; source < WORLD; source++)
                all[i][source] = source != args.rank && in_world<WORLD>(block, source)
                                     ? block.own.load<Bits128>(line_at<WORLD>(block, kDataAt, source, i), lane_at)
                                     : own[i];
        }
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < args.lines) out.store(pack + i * args.block, sum_of(all[i], args.world, args.dtype));
    }
    block.end();
}

// A round is `lines` lines of every rank's part; a slot has what a source sends of this rank's part, then its sums.
template <int WORLD>
WAVE64_DEVICE void all_reduce_two_shot(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD> / 2;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs x(args.x, args.bytes), out(args.out, args.bytes);
    const int lane_at = lane_in_block() * 16, part = args.block * args.lines, begin = block_id() * part * args.world;
    for (int first = begin; first * 16 < args.bytes; first += args.grid * part * args.world) {
        block.next_round(first != begin);
        const int pack = first + lane_in_block();
        Bits128 own[LINES], sent[WORLD][LINES];
#pragma unroll
        for (int p = 1; p < WORLD; p++) {
            if (!in_world<WORLD>(block, p)) break;
            const int owner = (args.rank + p) % args.world;
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < args.lines) sent[p][i] = x.load(pack + owner * part + i * args.block);
        }
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < args.lines) own[i] = x.load(pack + args.rank * part + i * args.block);
#pragma unroll
        for (int p = 1; p < WORLD; p++) {
            if (!in_world<WORLD>(block, p)) break;
            const Shared peer(args.peers.at[p]);
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < args.lines) peer.store(sent[p][i], line_at<WORLD>(block, kDataAt, args.rank, i), lane_at);
        }
        set_flags<WORLD>(block, 0);
        wait_for_flags<WORLD>(block, 0);
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            if (i >= args.lines) break;
            Bits128 all[WORLD];
#pragma unroll
            for (int source = 0; source < WORLD; source++)
                all[source] = source != args.rank && in_world<WORLD>(block, source)
                                  ? block.own.load<Bits128>(line_at<WORLD>(block, kDataAt, source, i), lane_at)
                                  : own[i];
            own[i] = sum_of(all, args.world, args.dtype);
        }
#pragma unroll
        for (int p = 1; p < WORLD; p++) {
            if (!in_world<WORLD>(block, p)) break;
            const Shared peer(args.peers.at[p]);
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < args.lines) peer.store(own[i], line_at<WORLD>(block, kDataAt, args.rank, LINES + i), lane_at);
        }
        set_flags<WORLD>(block, 1);
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < args.lines) out.store(pack + args.rank * part + i * args.block, own[i]);
        wait_for_flags<WORLD>(block, 1);
#pragma unroll
        for (int source = 0; source < WORLD; source++)
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < args.lines && source != args.rank && in_world<WORLD>(block, source))
                    out.store(pack + source * part + i * args.block,
                              block.own.load<Bits128>(line_at<WORLD>(block, kDataAt, source, LINES + i), lane_at));
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
WAVE64_ALL_REDUCE(ll128)
WAVE64_ALL_REDUCE(one_shot)
WAVE64_ALL_REDUCE(two_shot)

#else
namespace wave64 {
namespace {

#define WAVE64_BY_WORLD(NAME) {NAME "_2", NAME "_4", NAME "_8"}
constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("all_reduce_ll"), WAVE64_BY_WORLD("all_reduce_ll128"),
                                       WAVE64_BY_WORLD("all_reduce_one_shot"), WAVE64_BY_WORLD("all_reduce_two_shot")};
constexpr int64_t kMaxBytes = 1 << 30;

void all_reduce(AllReduceArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_range("count", args.count, 0, kMaxBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kTwoShot);
    if (args.count == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    args.bytes = int32_t(args.count * element_bytes(args.dtype));
    plan_blocks(call, args, ceil_div(args.bytes, 16));
    call.launch(kKernels[args.protocol][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(all_reduce, AllReduceArgs, ({WAVE64_RANK_CONSTANTS, {"MAX_BYTES", kMaxBytes}}), arenas, rank,
                        world, status, timeout, x, out, count, dtype, protocol)

}  // namespace
}  // namespace wave64
#endif
