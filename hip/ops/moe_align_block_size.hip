// Sorts ids of experts into blocks of one expert each, in order of the index within an expert.
//
// The trick: no block waits for another. Each block counts all ids in LDS, so it knows where each expert's run begins
// and how much of it earlier blocks fill; then it scatters a part of the ids, each wave in order, with ballots that
// tell a lane which lanes before it have the same expert. For very many ids, a first launch counts the parts. Bound by
// latency up to a thousand ids, then by the counting.
#include "wave64/types.h"

namespace wave64 {

// Indices into ids, sorted by expert, each expert's run padded with num_ids to whole blocks, as is the rest.
struct MoeAlignBlockSizeArgs {
    const int32_t* ids;   // [num_ids], those outside [0, num_experts) are left out
    int32_t* sorted_ids;  // [num_blocks * block_size]
    int32_t* expert_ids;  // [num_blocks], -1 after the last run
    int32_t* num_padded;  // one number: the length of all runs
    int32_t* counts;      // [MAX_PARTS, num_experts] to work in; null: each block counts all ids, in one launch
    int32_t num_ids;
    int32_t num_experts;
    int32_t block_size;
    int32_t num_blocks;  // ceil((num_ids + min(num_ids, num_experts) * (block_size - 1)) / block_size)
    // set by the launcher
    int32_t part;  // ids that a block scatters
    int32_t grid;  // blocks
};

constexpr int kLanes = 256;
constexpr int kMaxExperts = 1024;  // capacity of the counts in LDS

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr int kLoads = 8;  // in flight at a time

// What a block knows of every expert, in LDS.
struct Board {
    int next[kLanes / 32][kMaxExperts];  // how many ids of it a wave has; then where the next of them goes
    int earlier[kMaxExperts];            // its ids in earlier parts
    int count[kMaxExperts];              // in later parts; then in all
    int first_block[kMaxExperts + 1];    // of its run
    int of_waves[kLanes / 32];
};

// A range of the ids.
struct Part {
    int begin, end;

    WAVE64_DEVICE Part piece(int index, int size) const {
        const int from = begin + index * size;
        return {from, from + size < end ? from + size : end};
    }
};

WAVE64_DEVICE int wave_in_block() { return lane_in_block() / wave_size(); }
WAVE64_DEVICE int lane_in_wave() { return lane_in_block() % wave_size(); }
WAVE64_DEVICE int num_waves() { return kLanes / wave_size(); }

// Calls take(index, expert) for each id of the part that is an expert; `lanes` lanes go through the part together.
template <typename Take>
WAVE64_DEVICE void each_id(const MoeAlignBlockSizeArgs& args, Part part, int lane, int lanes, Take take) {
    const Row<int32_t, 1> ids(args.ids, args.num_ids);
    for (int begin = part.begin; begin < part.end; begin += kLoads * lanes) {
        Pack<int32_t, 1> loaded[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; i++) loaded[i] = ids.load(begin + i * lanes + lane);
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            if (begin + i * lanes >= part.end) break;
            const int index = begin + i * lanes + lane, expert = loaded[i].values().at[0];
            if (index < part.end && unsigned(expert) < unsigned(args.num_experts)) take(index, expert);
        }
    }
}

// Counts the ids of the wave's part, and those outside the block's part unless the first launch did.
WAVE64_DEVICE void count_ids(const MoeAlignBlockSizeArgs& args, Part of_block, Part of_wave, Board& board) {
    for (int expert = lane_in_block(); expert < args.num_experts; expert += kLanes) {
        for (int wave = 0; wave < num_waves(); wave++) board.next[wave][expert] = 0;
        board.earlier[expert] = board.count[expert] = 0;
    }
    block_barrier();
    int* mine = board.next[wave_in_block()];
    each_id(args, of_wave, lane_in_wave(), wave_size(), [&](int, int expert) { atomic_add(&mine[expert], 1); });
    if (!args.counts)
        each_id(args, {0, args.num_ids}, lane_in_block(), kLanes, [&](int index, int expert) {
            if (index < of_block.begin) atomic_add(&board.earlier[expert], 1);
            if (index >= of_block.end) atomic_add(&board.count[expert], 1);
        });
    block_barrier();
}

// The sum of x over the lanes of the block before this one, and over all; `lds` holds an int per wave.
struct Sums {
    int before, all;
};
WAVE64_DEVICE Sums block_sums(int x, int* lds) {
    const int lane = lane_in_wave();
    int sum = x;
    for (int step = 1; step < wave_size(); step *= 2) {
        const int other = from_lane(sum, (lane - step) & (wave_size() - 1));
        if (lane >= step) sum += other;
    }
    if (lane == wave_size() - 1) lds[wave_in_block()] = sum;
    block_barrier();
    const int of_wave = lane < num_waves() ? lds[lane] : 0;
    return {sum - x + wave_sum(lane < wave_in_block() ? of_wave : 0), wave_sum(of_wave)};
}

// From counts to runs: where each begins, and where in it each wave's ids go. Returns the blocks of all runs.
WAVE64_DEVICE int find_runs(const MoeAlignBlockSizeArgs& args, Board& board) {
    // A lane has up to four consecutive experts.
    const int per_lane = (args.num_experts + kLanes - 1) / kLanes;
    const Part experts = Part{0, args.num_experts}.piece(lane_in_block(), per_lane);
    int num_blocks = 0;
    for (int expert = experts.begin; expert < experts.end; expert++) {
        int earlier = board.earlier[expert], count = earlier + board.count[expert];
        for (int wave = 0; wave < num_waves(); wave++) count += board.next[wave][expert];
        if (args.counts) {
            count = 0;
#pragma unroll 8
            for (int part = 0; part < args.grid; part++) {
                const int in_part = args.counts[part * args.num_experts + expert];
                count += in_part;
                earlier += part < block_id() ? in_part : 0;
            }
        }
        board.earlier[expert] = earlier;
        board.count[expert] = count;
        board.first_block[expert] = unsigned(count + args.block_size - 1) / unsigned(args.block_size);
        num_blocks += board.first_block[expert];
    }
    const Sums sums = block_sums(num_blocks, board.of_waves);
    int first = sums.before;
    for (int expert = experts.begin; expert < experts.end; expert++) {
        int position = first * args.block_size + board.earlier[expert];
        for (int wave = 0; wave < num_waves(); wave++) {
            const int of_wave = board.next[wave][expert];
            board.next[wave][expert] = position;
            position += of_wave;
        }
        const int blocks = board.first_block[expert];
        board.first_block[expert] = first;
        first += blocks;
    }
    if (lane_in_block() == 0) board.first_block[args.num_experts] = sums.all;
    block_barrier();
    return sums.all;
}

// The lanes whose expert, below 2^bits, is this lane's.
WAVE64_DEVICE uint64_t lanes_with_same(int expert, bool has, int bits) {
    uint64_t same = ballot(has);
    for (int bit = 0; bit < bits; bit++) {
        const bool set = (expert >> bit) & 1;
        const uint64_t with = ballot(set);
        same &= set ? with : ~with;
    }
    return same;
}

// Writes the indices of the wave's part to their positions, in order.
WAVE64_DEVICE void scatter_ids(const MoeAlignBlockSizeArgs& args, Part part, int* next) {
    const int lane = lane_in_wave();
    int bits = 0;
    while ((args.num_experts - 1) >> bits) bits++;
    const Row<int32_t, 1> ids(args.ids, args.num_ids);
    auto loaded = ids.load(part.begin + lane);
    for (int begin = part.begin; begin < part.end; begin += wave_size()) {
        const int index = begin + lane, expert = loaded.values().at[0];
        loaded = ids.load(index + wave_size());
        const bool has = index < part.end && unsigned(expert) < unsigned(args.num_experts);
        const uint64_t same = lanes_with_same(expert, has, bits);
        const int position = has ? next[expert] + bits_before(same) : 0;
        wave_barrier();
        if (has) args.sorted_ids[position] = index;
        if (has && same >> lane == 1) next[expert] = position + 1;  // the last of the same
        wave_barrier();
    }
}

// Writes the experts of the runs' blocks and the padding of the runs, a wave per expert, and part of what follows them.
WAVE64_DEVICE void finish(const MoeAlignBlockSizeArgs& args, int all_blocks, const Board& board) {
    const int lane = lane_in_wave(), block_size = args.block_size;
    for (int expert = block_id() * num_waves() + wave_in_block(); expert < args.num_experts;
         expert += args.grid * num_waves()) {
        const int first = board.first_block[expert], behind = board.first_block[expert + 1];
        for (int i = first + lane; i < behind; i += wave_size()) args.expert_ids[i] = expert;
        for (int i = first * block_size + board.count[expert] + lane; i < behind * block_size; i += wave_size())
            args.sorted_ids[i] = args.num_ids;
    }
    const int item = block_id() * kLanes + lane_in_block(), step = args.grid * kLanes;
    for (int i = all_blocks + item; i < args.num_blocks; i += step) args.expert_ids[i] = -1;
    for (int i = all_blocks * block_size + item; i < args.num_blocks * block_size; i += step)
        args.sorted_ids[i] = args.num_ids;
    if (item == 0) *args.num_padded = all_blocks * block_size;
}

}  // namespace wave64

WAVE64_KERNEL(wave64::kLanes) moe_align_block_size(wave64::MoeAlignBlockSizeArgs args) {
    using namespace wave64;
    WAVE64_LDS static Board board;
    const Part part = Part{0, args.num_ids}.piece(block_id(), args.part);
    const Part of_wave = part.piece(wave_in_block(), args.part / num_waves());
    count_ids(args, part, of_wave, board);
    const int all_blocks = find_runs(args, board);
    scatter_ids(args, of_wave, board.next[wave_in_block()]);
    finish(args, all_blocks, board);
}

// How often each expert occurs in the block's part of the ids.
WAVE64_KERNEL(wave64::kLanes) moe_align_block_size_count(wave64::MoeAlignBlockSizeArgs args) {
    using namespace wave64;
    WAVE64_LDS static int count[kMaxExperts];
    for (int expert = lane_in_block(); expert < args.num_experts; expert += kLanes) count[expert] = 0;
    block_barrier();
    each_id(args, Part{0, args.num_ids}.piece(block_id(), args.part), lane_in_block(), kLanes,
            [&](int, int expert) { atomic_add(&count[expert], 1); });
    block_barrier();
    for (int expert = lane_in_block(); expert < args.num_experts; expert += kLanes)
        args.counts[block_id() * args.num_experts + expert] = count[expert];
}

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMaxParts = 64;          // rows of args.counts
constexpr int64_t kBlockExperts = 16;      // that a block finishes, or more if kMaxParts blocks are not enough
constexpr int64_t kBlockPositions = 4096;  // that it fills

void moe_align_block_size(MoeAlignBlockSizeArgs args, const Call& call) {
    call.expect_range("num_ids", args.num_ids, 0, 1 << 28);
    call.expect_range("num_experts", args.num_experts, 1, kMaxExperts);
    call.expect_min("block_size", args.block_size, 1);
    const int64_t positions = int64_t(args.num_blocks) * args.block_size;
    const int64_t max_positions =
        args.num_ids + std::min<int64_t>(args.num_ids, args.num_experts) * (args.block_size - 1);
    call.expect(args.num_blocks == ceil_div(max_positions, args.block_size), "num_blocks",
                "as many as the ids can take", args.num_blocks);
    call.expect(positions <= INT32_MAX - kMaxParts * kLanes, "block_size", "less than 2^31 positions", positions);
    if (args.num_ids == 0) return;
    call.expect_tensors({{"ids", args.ids},
                         {"sorted_ids", args.sorted_ids},
                         {"expert_ids", args.expert_ids},
                         {"num_padded", args.num_padded}});

    // Blocks finish experts and padding at the same time as they scatter: more of them finish sooner.
    const int64_t blocks = std::max({ceil_div(args.num_ids, kLanes), ceil_div(args.num_experts, kBlockExperts),
                                     ceil_div(positions, kBlockPositions)});
    args.grid = int32_t(std::min(blocks, kMaxParts));
    args.part = int32_t(round_up(ceil_div(args.num_ids, args.grid), kLanes));
    if (args.counts) call.launch("moe_align_block_size_count", {args.grid}, kLanes, args);
    call.launch("moe_align_block_size", {args.grid}, kLanes, args);
}

WAVE64_OP_AND_CONSTANTS(moe_align_block_size, MoeAlignBlockSizeArgs,
                        ({{"MAX_EXPERTS", kMaxExperts}, {"MAX_PARTS", kMaxParts}}), ids, sorted_ids, expert_ids,
                        num_padded, counts, num_ids, num_experts, block_size, num_blocks)

}  // namespace
}  // namespace wave64
#endif
