// Sorts ids of experts into blocks of one expert each, in order of the index within an expert.
//
// The trick: nobody waits for anybody. Every block of lanes counts all ids in LDS, so that it knows where each expert's
// run begins and how much of it the blocks before fill; then it places a part of the ids, each wave in order, by
// ballots that tell a lane which lanes before it have the same expert. Where ids are very many, a launch before counts
// the parts.
// Bound by latency up to a thousand ids, then by the counting.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kLanes = 256;
constexpr int kMostExperts = 1024;
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr int kLoads = 8;  // under way at a time

// What a block knows of every expert, in LDS.
struct Board {
    int next[kLanes / 32][kMostExperts];  // how many ids a wave has of it; then where the next of them goes
    int earlier[kMostExperts];            // its ids in the parts before
    int count[kMostExperts];              // in the parts behind; then in all
    int first_block[kMostExperts + 1];    // of its run
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

// Calls `take` with each index of the part and the expert that stands there, if it is one: `lane` of `lanes` that go
// through the part together.
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

// Counts the ids of the wave's part, and, unless a launch before did, those outside of the block's.
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

// From counts to runs: where each begins, and where in it each wave's ids go. Gives the blocks of all runs.
WAVE64_DEVICE int find_runs(const MoeAlignBlockSizeArgs& args, Board& board) {
    // A lane has up to four experts, which follow each other.
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
        int place = first * args.block_size + board.earlier[expert];
        for (int wave = 0; wave < num_waves(); wave++) {
            const int of_wave = board.next[wave][expert];
            board.next[wave][expert] = place;
            place += of_wave;
        }
        const int blocks = board.first_block[expert];
        board.first_block[expert] = first;
        first += blocks;
    }
    if (lane_in_block() == 0) board.first_block[args.num_experts] = sums.all;
    block_barrier();
    return sums.all;
}

// The lanes that have an expert and the same as this one, which is below 2^bits.
WAVE64_DEVICE uint64_t lanes_with_same(int expert, bool has, int bits) {
    uint64_t same = ballot(has);
    for (int bit = 0; bit < bits; bit++) {
        const bool set = (expert >> bit) & 1;
        const uint64_t with = ballot(set);
        same &= set ? with : ~with;
    }
    return same;
}

// Writes the indices of the wave's part to their places, in order.
WAVE64_DEVICE void place_ids(const MoeAlignBlockSizeArgs& args, Part part, int* next) {
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
        const int place = has ? next[expert] + bits_before(same) : 0;
        wave_barrier();
        if (has) args.sorted_ids[place] = index;
        if (has && same >> lane == 1) next[expert] = place + 1;  // the last of the same
        wave_barrier();
    }
}

// Writes the experts of the runs' blocks and what pads the runs, a wave per expert, and a share of what is behind.
WAVE64_DEVICE void finish(const MoeAlignBlockSizeArgs& args, int all_blocks, const Board& board) {
    const int lane = lane_in_wave(), block_size = args.block_size;
    for (int expert = block_id() * num_waves() + wave_in_block(); expert < args.num_experts;
         expert += args.grid * num_waves()) {
        const int first = board.first_block[expert], behind = board.first_block[expert + 1];
        for (int i = first + lane; i < behind; i += wave_size()) args.expert_ids[i] = expert;
        for (int i = first * block_size + board.count[expert] + lane; i < behind * block_size; i += wave_size())
            args.sorted_ids[i] = args.num_ids;
    }
    const int share = block_id() * kLanes + lane_in_block(), step = args.grid * kLanes;
    for (int i = all_blocks + share; i < args.num_blocks; i += step) args.expert_ids[i] = -1;
    for (int i = all_blocks * block_size + share; i < args.num_blocks * block_size; i += step)
        args.sorted_ids[i] = args.num_ids;
    if (share == 0) *args.num_padded = all_blocks * block_size;
}

}  // namespace wave64

WAVE64_KERNEL(wave64::kLanes) moe_align_block_size(wave64::MoeAlignBlockSizeArgs args) {
    using namespace wave64;
    WAVE64_LDS static Board board;
    const Part part = Part{0, args.num_ids}.piece(block_id(), args.part);
    const Part of_wave = part.piece(wave_in_block(), args.part / num_waves());
    count_ids(args, part, of_wave, board);
    const int all_blocks = find_runs(args, board);
    place_ids(args, of_wave, board.next[wave_in_block()]);
    finish(args, all_blocks, board);
}

// How often every expert occurs in the block's part of the ids.
WAVE64_KERNEL(wave64::kLanes) moe_align_block_size_count(wave64::MoeAlignBlockSizeArgs args) {
    using namespace wave64;
    WAVE64_LDS static int count[kMostExperts];
    for (int expert = lane_in_block(); expert < args.num_experts; expert += kLanes) count[expert] = 0;
    block_barrier();
    each_id(args, Part{0, args.num_ids}.piece(block_id(), args.part), lane_in_block(), kLanes,
            [&](int, int expert) { atomic_add(&count[expert], 1); });
    block_barrier();
    for (int expert = lane_in_block(); expert < args.num_experts; expert += kLanes)
        args.counts[block_id() * args.num_experts + expert] = count[expert];
}

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMostParts = 64;  // rows of args.counts
constexpr int64_t kExperts = 16;    // that a block finishes, or more where there are very many
constexpr int64_t kPlaces = 4096;   // that it fills

}  // namespace
}  // namespace wave64

int32_t wave64_moe_align_block_size(const wave64::MoeAlignBlockSizeArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "moe_align_block_size";
    MoeAlignBlockSizeArgs args = *caller_args;
    if (args.num_ids < 0 || args.num_ids > 1 << 28) return refuse(op, "num_ids", "0 to 2^28", args.num_ids);
    if (args.num_experts < 1 || args.num_experts > kMostExperts)
        return refuse(op, "num_experts", "1 to 1024", args.num_experts);
    if (args.block_size < 1) return refuse(op, "block_size", "at least 1", args.block_size);
    const int64_t places = int64_t(args.num_blocks) * args.block_size;
    const int64_t most = args.num_ids + std::min<int64_t>(args.num_ids, args.num_experts) * (args.block_size - 1);
    if (args.num_blocks != ceil_div(most, args.block_size))
        return refuse(op, "num_blocks", "as many as the ids can take", args.num_blocks);
    if (places > INT32_MAX - kMostParts * kLanes) return refuse(op, "block_size", "less than 2^31 places", places);
    if (args.num_ids == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"ids", (const void*)args.ids},
                                 {"sorted_ids", args.sorted_ids},
                                 {"expert_ids", args.expert_ids},
                                 {"num_padded", args.num_padded}})
        if (!pointer) return refuse(op, name, "an address", 0);

    // What blocks do beside placing their part, they do at the same time: more of them finish sooner.
    const int64_t blocks =
        std::max({ceil_div(args.num_ids, kLanes), ceil_div(args.num_experts, kExperts), ceil_div(places, kPlaces)});
    args.grid = int32_t(std::min(blocks, kMostParts));
    args.part = int32_t(round_up(ceil_div(args.num_ids, args.grid), kLanes));
    const auto run = [&](const char* kernel) {
        return launch({op, kernel, {uint32_t(args.grid), 1, 1}, {kLanes, 1, 1}, 0}, &args, sizeof args, stream);
    };
    if (args.counts)
        if (int32_t status = run("moe_align_block_size_count")) return status;
    return run("moe_align_block_size");
}

#define FIELD(NAME) WAVE64_FIELD(wave64::MoeAlignBlockSizeArgs, NAME)
static const bool registered = wave64::register_op<wave64::MoeAlignBlockSizeArgs, wave64_moe_align_block_size>(
    "moe_align_block_size", {FIELD(ids), FIELD(sorted_ids), FIELD(expert_ids), FIELD(num_padded), FIELD(counts),
                             FIELD(num_ids), FIELD(num_experts), FIELD(block_size), FIELD(num_blocks)});

#endif
