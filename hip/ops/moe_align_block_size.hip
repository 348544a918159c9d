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

// Calls `take` with every index from `first` on, in steps, and the expert that stands there, if it is one.
template <typename Take>
WAVE64_DEVICE void each_id(const MoeAlignBlockSizeArgs& args, int first, int end, int step, Take take) {
    const Row<int32_t, 1> ids(args.ids, args.num_ids);
    for (; first < end; first += kLoads * step) {
        Pack<int32_t, 1> loaded[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; i++) loaded[i] = ids.load(first + i * step);
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            const int index = first + i * step, expert = loaded[i].values().at[0];
            if (index < end && unsigned(expert) < unsigned(args.num_experts)) take(index, expert);
        }
    }
}

// The sum of x over the lanes of the block before this one, and over all; `lds` holds an int per wave.
struct Sums {
    int before, all;
};
WAVE64_DEVICE Sums block_sums(int x, int* lds) {
    const int lane = lane_in_block() % wave_size(), wave = lane_in_block() / wave_size();
    int sum = x;
    for (int step = 1; step < wave_size(); step *= 2) {
        const int other = from_lane(sum, (lane - step) & (wave_size() - 1));
        if (lane >= step) sum += other;
    }
    if (lane == wave_size() - 1) lds[wave] = sum;
    block_barrier();
    const int of_wave = lane < kLanes / wave_size() ? lds[lane] : 0;
    return {sum - x + wave_sum(lane < wave ? of_wave : 0), wave_sum(of_wave)};
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

WAVE64_DEVICE void moe_align_block_size(const MoeAlignBlockSizeArgs& args) {
    WAVE64_LDS static int next[kLanes / 32][kMostExperts];  // how many ids of an expert a wave has, then their places
    WAVE64_LDS static int earlier[kMostExperts];            // ids of an expert in the parts before
    WAVE64_LDS static int count[kMostExperts];              // in the parts behind, then in all
    WAVE64_LDS static int first_block[kMostExperts + 1];
    WAVE64_LDS static int of_waves[kLanes / 32];
    const int me = lane_in_block(), lane = me % wave_size(), wave = me / wave_size(), num_waves = kLanes / wave_size();
    const int num_experts = args.num_experts, block_size = args.block_size;
    const int begin = block_id() * args.part, end = begin + args.part < args.num_ids ? begin + args.part : args.num_ids;
    for (int expert = me; expert < num_experts; expert += kLanes) {
        for (int i = 0; i < num_waves; i++) next[i][expert] = 0;
        earlier[expert] = count[expert] = 0;
    }
    block_barrier();

    const int wave_part = args.part / num_waves, wave_begin = begin + wave * wave_part;
    const int wave_end = wave_begin + wave_part < end ? wave_begin + wave_part : end;
    each_id(args, wave_begin + lane, wave_end, wave_size(), [&](int, int expert) { atomic_add(&next[wave][expert], 1); });
    if (!args.counts)
        each_id(args, me, args.num_ids, kLanes, [&](int index, int expert) {
            if (index < begin) atomic_add(&earlier[expert], 1);
            if (index >= end) atomic_add(&count[expert], 1);
        });
    block_barrier();

    // A lane has up to four experts, which follow each other.
    const int per_lane = (num_experts + kLanes - 1) / kLanes, first_expert = me * per_lane;
    const int end_expert = first_expert + per_lane < num_experts ? first_expert + per_lane : num_experts;
    int num_blocks = 0;
    for (int expert = first_expert; expert < end_expert; expert++) {
        int before = earlier[expert], all = before + count[expert];
        for (int i = 0; i < num_waves; i++) all += next[i][expert];
        if (args.counts) {
            all = 0;
#pragma unroll 8
            for (int part = 0; part < args.grid; part++) {
                const int in_part = args.counts[part * num_experts + expert];
                all += in_part;
                before += part < block_id() ? in_part : 0;
            }
        }
        earlier[expert] = before;
        count[expert] = all;
        first_block[expert] = unsigned(all + block_size - 1) / unsigned(block_size);
        num_blocks += first_block[expert];
    }
    const Sums sums = block_sums(num_blocks, of_waves);
    int block = sums.before;
    for (int expert = first_expert; expert < end_expert; expert++) {
        int place = block * block_size + earlier[expert];
        for (int i = 0; i < num_waves; i++) {
            const int of_wave = next[i][expert];
            next[i][expert] = place;
            place += of_wave;
        }
        const int blocks = first_block[expert];
        first_block[expert] = block;
        block += blocks;
    }
    if (me == 0) first_block[num_experts] = sums.all;
    block_barrier();

    int bits = 0;
    while ((num_experts - 1) >> bits) bits++;
    const Row<int32_t, 1> ids(args.ids, args.num_ids);
    auto loaded = ids.load(wave_begin + lane);
    for (int index = wave_begin + lane; index - lane < wave_end; index += wave_size()) {
        const int expert = loaded.values().at[0];
        loaded = ids.load(index + wave_size());
        const bool has = index < wave_end && unsigned(expert) < unsigned(num_experts);
        const uint64_t same = lanes_with_same(expert, has, bits);
        const int place = has ? next[wave][expert] + bits_before(same) : 0;
        wave_barrier();
        if (has) args.sorted_ids[place] = index;
        if (has && same >> lane == 1) next[wave][expert] = place + 1;  // the last of the same
        wave_barrier();
    }

    for (int expert = block_id() * num_waves + wave; expert < num_experts; expert += args.grid * num_waves) {
        const int first = first_block[expert], behind = first_block[expert + 1];
        for (int i = first + lane; i < behind; i += wave_size()) args.expert_ids[i] = expert;
        for (int i = first * block_size + count[expert] + lane; i < behind * block_size; i += wave_size())
            args.sorted_ids[i] = args.num_ids;
    }
    const int share = block_id() * kLanes + me, step = args.grid * kLanes;
    for (int i = sums.all + share; i < args.num_blocks; i += step) args.expert_ids[i] = -1;
    for (int i = sums.all * block_size + share; i < args.num_blocks * block_size; i += step)
        args.sorted_ids[i] = args.num_ids;
    if (share == 0) *args.num_padded = sums.all * block_size;
}

// How often every expert occurs in the block's part of the ids.
WAVE64_DEVICE void moe_align_block_size_count(const MoeAlignBlockSizeArgs& args) {
    WAVE64_LDS static int count[kMostExperts];
    const int me = lane_in_block(), begin = block_id() * args.part;
    const int end = begin + args.part < args.num_ids ? begin + args.part : args.num_ids;
    for (int expert = me; expert < args.num_experts; expert += kLanes) count[expert] = 0;
    block_barrier();
    each_id(args, begin + me, end, kLanes, [&](int, int expert) { atomic_add(&count[expert], 1); });
    block_barrier();
    for (int expert = me; expert < args.num_experts; expert += kLanes)
        args.counts[block_id() * args.num_experts + expert] = count[expert];
}

}  // namespace wave64

WAVE64_KERNEL(wave64::kLanes) moe_align_block_size(wave64::MoeAlignBlockSizeArgs args) {
    wave64::moe_align_block_size(args);
}
WAVE64_KERNEL(wave64::kLanes) moe_align_block_size_count(wave64::MoeAlignBlockSizeArgs args) {
    wave64::moe_align_block_size_count(args);
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
    const int64_t blocks = std::max({ceil_div(args.num_ids, kLanes), ceil_div(args.num_experts, kExperts),
                                     ceil_div(places, kPlaces)});
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
    "moe_align_block_size",
    {FIELD(ids), FIELD(sorted_ids), FIELD(expert_ids), FIELD(num_padded), FIELD(counts), FIELD(num_ids),
     FIELD(num_experts), FIELD(block_size), FIELD(num_blocks)});

#endif
