// The sum of x over the ranks of a group, on every rank: out = x of rank 0 + x of rank 1 + ..., in fp32, rounded once.
//
// The trick is in ranks.h: what a rank sends says itself that it has come, so that a small message takes one trip over
// the link, with no barrier before or behind it. Bound by the latency of a launch and that trip; large messages by the
// links: (world - 1) * bytes out of each rank, in two shots 2 * (world - 1) / world * bytes, of which codes of 8 bits
// are 9/16, of 4 bits 5/16.
#include "wave64/coded.h"

namespace wave64 {

// out = the sum of x over all ranks, added up in their order. out may be x.
struct AllReduceArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    int32_t max_blocks;  // of a launch; the same on all ranks
    const void* x;       // [count]
    void* out;           // [count]
    int64_t count;
    Dtype dtype;       // of x and out
    int32_t protocol;  // a Protocol
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of x
    int32_t block;    // lanes of a block
    int32_t grid;     // blocks
    int32_t lines;    // of 16 bytes that a lane sends to a rank in a round; of LL128 pairs of them
    int32_t rounds;   // of every block
    int32_t longer;   // blocks, the first ones, that have one more
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <int WORLD>
WAVE64_DEVICE void all_reduce_ll(const AllReduceArgs& args) {
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs<> x(args.x, args.bytes), out(args.out, args.bytes);
    const int begin = block_id() * args.block;
    const int step = args.grid * args.block;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const Bits128 own = x.load(first + lane_in_block());
        block.next_round(n == 0);
        Bits128 all[WORLD];
        if (exchange_low_latency(block, [&](int, int) { return own; }, all))
            out.store(first + lane_in_block(), sum_of(all, block.world, args.dtype));
    }
}

template <int WORLD>
WAVE64_DEVICE void all_reduce_ll128(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD>;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs<> x(args.x, args.bytes), out(args.out, args.bytes);
    const int packs = args.block / 8 * kLow128Packs, begin = block_id() * packs * args.lines;
    const int step = args.grid * packs * args.lines;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const int one = first + low_128_pack(0), other = first + low_128_pack(1);
        Bits128 own[LINES], all[LINES][WORLD];
#pragma unroll
        for (int i = 0; i < LINES / 2; i++) {
            if (i >= block.lines) break;
            own[2 * i] = x.load(one + i * packs);
            own[2 * i + 1] = x.load(other + i * packs);
        }
        block.next_round(n == 0);
#pragma unroll
        for (int i = 0; i < LINES / 2; i++)
            if (i < block.lines) to_low_128(own[2 * i], own[2 * i + 1]);
        if (!exchange_low_128(block, 2 * block.lines, own, all)) continue;
#pragma unroll
        for (int i = 0; i < LINES / 2; i++) {
            if (i >= block.lines) break;
#pragma unroll
            for (int rank = 0; rank < WORLD; rank++) from_low_128(all[2 * i][rank], all[2 * i + 1][rank]);
            out.store(one + i * packs, sum_of(all[2 * i], block.world, args.dtype));
            out.store(other + i * packs, sum_of(all[2 * i + 1], block.world, args.dtype));
        }
    }
}

template <int WORLD>
WAVE64_DEVICE void all_reduce_one_shot(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD>;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs<> x(args.x, args.bytes), out(args.out, args.bytes);
    const int begin = block_id() * args.block * args.lines;
    const int step = args.grid * args.block * args.lines;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const int pack = first + lane_in_block();
        Bits128 own[LINES], all[LINES][WORLD];
        load_part(own, x, pack, args);
        block.next_round(n == 0);
        exchange_flagged(block, 0, 0, block.lines, [&](int, int line) { return own[line]; }, own, all);
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < block.lines) out.store(pack + i * args.block, sum_of(all[i], block.world, args.dtype));
    }
}

// A round is `lines` lines of every rank's part; a slot has what a source sends of this rank's part, then its sums.
template <int WORLD>
WAVE64_DEVICE void all_reduce_two_shot(const AllReduceArgs& args) {
    constexpr int LINES = kSlotLines<WORLD> / 2;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs<> x(args.x, args.bytes), out(args.out, args.bytes);
    const int part = args.block * args.lines, begin = block_id() * part * args.world;
    const int step = args.grid * part * args.world;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        const int pack = first + lane_in_block();
        Bits128 own[LINES], parts[WORLD][LINES], all[LINES][WORLD];
#pragma unroll
        for (int i = 0; i < WORLD; i++)
            if (in_world<WORLD>(block, i)) load_part(parts[i], x, pack + (args.rank + i) % args.world * part, args);
        block.next_round(n == 0);
        exchange_flagged(block, 0, 0, block.lines, [&](int i, int line) { return parts[i][line]; }, parts[0], all);
#pragma unroll
        for (int i = 0; i < LINES; i++)
            if (i < block.lines) own[i] = sum_of(all[i], block.world, args.dtype);
        exchange_flagged(block, 1, LINES, block.lines, [&](int, int line) { return own[line]; }, own, all);
#pragma unroll
        for (int rank = 0; rank < WORLD; rank++)
#pragma unroll
            for (int i = 0; i < LINES; i++)
                if (i < block.lines && in_world<WORLD>(block, rank))
                    out.store(pack + rank * part + i * args.block, all[i][rank]);
    }
}

#if WAVE64_EXCHANGES
// The same with blocks of codes, of which a lane has `lines` for each rank. What a rank sends itself, too, is stored:
// all ranks' codes count alike, and no more than one block is in registers. Blocks of a few ranks at a time are under
// way: those of eight would take more registers than leave a wave to each SIMD.
template <int WORLD, typename Codes>
WAVE64_DEVICE void reduce_coded(const AllReduceArgs& args) {
    constexpr int RANKS = kCodedRanks<WORLD>;
    RankBlock<AllReduceArgs> block(args, kOpAllReduce);
    const Packs<> x(args.x, args.bytes), out(args.out, args.bytes);
    const bool is_bf16 = args.dtype == kBf16;
    const int part = args.block * args.lines, begin = block_id() * part * args.world;
    const int step = args.grid * part * args.world;
    for (int first = begin, n = 0; n < block.rounds(); n++, first += step) {
        block.next_round(n == 0);
        const int first_of_lane = first + lane_in_block();
#pragma unroll 1
        for (int j = 0; j < block.lines; j++) {
#pragma unroll 1
            for (int some = 0; some < WORLD; some += RANKS) {
                Block16 blocks[RANKS];
#pragma unroll
                for (int i = 0; i < RANKS; i++) {
                    if (!in_world<WORLD>(block, some + i)) break;
                    const int owner = args.rank + some + i;
                    blocks[i] = Block16::load(
                        x, first_of_lane + (owner - (owner < args.world ? 0 : args.world)) * part + j * args.block);
                }
#pragma unroll
                for (int i = 0; i < RANKS; i++) {
                    if (!in_world<WORLD>(block, some + i)) break;
                    float numbers[kCoded];
                    is_bf16 ? blocks[i].template numbers<bf16>(numbers) : blocks[i].template numbers<fp16>(numbers);
                    CodedSlot<WORLD, Codes>(block, 0, block.rank)
                        .store(Shared(args.peers.at[some + i]), j, Coded<Codes>::of(numbers));
                }
            }
        }
        set_flags<WORLD, RANKS>(block, 0);
        wait_for_flags<WORLD>(block, 0);
#pragma unroll 1
        for (int j = 0; j < block.lines; j++) {
            float sum[kCoded] = {};
#pragma unroll 1
            for (int some = 0; some < WORLD; some += RANKS) {
                Coded<Codes> codes[RANKS];
                receive_coded<WORLD>(block, 0, j, some, codes);
#pragma unroll
                for (int i = 0; i < RANKS; i++)
                    if (in_world<WORLD>(block, some + i)) codes[i].add_to(sum);
            }
            const Coded<Codes> sums = Coded<Codes>::of(sum);
            const CodedSlot<WORLD, Codes> slot(block, 1, block.rank);
            for_ranks<WORLD, RANKS>(block, [&](int, const Shared& arena) { slot.store(arena, j, sums); });
        }
        set_flags<WORLD, RANKS>(block, 1);
        wait_for_flags<WORLD>(block, 1);
#pragma unroll 1
        for (int j = 0; j < block.lines; j++) {
#pragma unroll 1
            for (int some = 0; some < WORLD; some += RANKS) {
                Coded<Codes> codes[RANKS];
                receive_coded<WORLD>(block, 1, j, some, codes);
#pragma unroll
                for (int i = 0; i < RANKS; i++) {
                    if (!in_world<WORLD>(block, some + i)) break;
                    float sum[kCoded] = {};
                    codes[i].add_to(sum);
                    (is_bf16 ? Block16::rounded<bf16>(sum) : Block16::rounded<fp16>(sum))
                        .store(out, first_of_lane + (some + i) * part + j * args.block);
                }
            }
        }
    }
}

template <int WORLD>
WAVE64_DEVICE void all_reduce_two_shot_fp8(const AllReduceArgs& args) {
    reduce_coded<WORLD, Fp8Codes>(args);
}
template <int WORLD>
WAVE64_DEVICE void all_reduce_two_shot_int8(const AllReduceArgs& args) {
    reduce_coded<WORLD, IntCodes<8>>(args);
}
template <int WORLD>
WAVE64_DEVICE void all_reduce_two_shot_int4(const AllReduceArgs& args) {
    reduce_coded<WORLD, IntCodes<4>>(args);
}
#endif

}  // namespace wave64

WAVE64_RANK_KERNELS(all_reduce_ll, AllReduceArgs)
WAVE64_RANK_KERNELS(all_reduce_ll128, AllReduceArgs)
WAVE64_RANK_KERNELS(all_reduce_one_shot, AllReduceArgs)
WAVE64_RANK_KERNELS(all_reduce_two_shot, AllReduceArgs)
#if WAVE64_EXCHANGES
WAVE64_RANK_KERNELS_OF(all_reduce_two_shot_fp8, AllReduceArgs, wave64::kCodedLanes)
WAVE64_RANK_KERNELS_OF(all_reduce_two_shot_int8, AllReduceArgs, wave64::kCodedLanes)
WAVE64_RANK_KERNELS_OF(all_reduce_two_shot_int4, AllReduceArgs, wave64::kCodedLanes)
#endif

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {
    WAVE64_BY_WORLD("all_reduce_ll"),           WAVE64_BY_WORLD("all_reduce_ll128"),
    WAVE64_BY_WORLD("all_reduce_one_shot"),     WAVE64_BY_WORLD("all_reduce_two_shot"),
    WAVE64_BY_WORLD("all_reduce_two_shot_fp8"), WAVE64_BY_WORLD("all_reduce_two_shot_int8"),
    WAVE64_BY_WORLD("all_reduce_two_shot_int4")};
constexpr int64_t kMaxBytes = 1 << 30;

void all_reduce(AllReduceArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_range("count", args.count, 0, kMaxBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kTwoShotInt4);
    const bool coded = args.protocol >= kTwoShotFp8;
    call.expect(!coded || args.dtype != kFp32, "dtype", "bf16 or fp16, where codes are sent", "fp32");
    if (args.count == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    args.bytes = int32_t(args.count * element_bytes(args.dtype));
    const int64_t packs = ceil_div(args.bytes, 16), lines = slot_lines(args.world);
    if (args.protocol == kLowLatency) plan_blocks(call, args, packs, 8, 1, kLowLatencyBlocks);
    if (args.protocol == kLow128) plan_blocks(call, args, packs, kLow128Packs, lines / 2, kRankBlocks);
    if (args.protocol == kOneShot) plan_blocks(call, args, packs, 8, lines, kRankBlocks);
    if (args.protocol == kTwoShot) plan_blocks(call, args, packs, 8 * args.world, lines / 2, kRankBlocks);
    if (coded) {
        const int64_t blocks = args.world == 2 ? kCodedBlocks<2> : args.world == 4 ? kCodedBlocks<4> : kCodedBlocks<8>;
        plan_blocks(call, args, ceil_div(args.count, kCoded), 8 * args.world, blocks, kRankBlocks, kCodedLanes);
    }
    call.launch(kKernels[args.protocol][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(all_reduce, AllReduceArgs,
                        ({WAVE64_RANK_CONSTANTS, {"MAX_BYTES", kMaxBytes}, {"CODED_LANES", kCodedLanes}}), arenas, rank,
                        world, status, timeout, max_blocks, x, out, count, dtype, protocol)

}  // namespace
}  // namespace wave64
#endif
