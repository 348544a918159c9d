// Splits the keys of a batch among blocks: into splits of about equal size, so that a long sequence gets many and a
// short one one. Blocks compute the splits from the lengths on the device: the host need not know them.
#pragma once

#include "wave64/device.h"

namespace wave64 {

// One of the splits of a sequence.
struct Split {
    int seq;    // num_seqs if there are fewer splits than blocks
    int index;  // among the sequence's
    int count;  // of the sequence
};

// The number of splits of a sequence: each has at most 1.5 times split_work.
WAVE64_DEVICE int splits_of(int work, int split_work) {
    const int splits = int((unsigned(work) + unsigned(split_work) / 2) / unsigned(split_work));
    return splits > 1 ? splits : 1;
}

// The sum over this lane and those before it.
WAVE64_DEVICE int sum_up_to_lane(int x) {
#if defined(__GFX9__) && !defined(WAVE64_CPU)
    // In the instructions (DPP): within rows of 16 lanes, then rows 1 and 3 the last sum of the row before, then rows 2
    // and 3 that of row 1.
    x += moved_in_row<0x111>(x), x += moved_in_row<0x112>(x), x += moved_in_row<0x114>(x), x += moved_in_row<0x118>(x);
    x += __builtin_amdgcn_update_dpp(0, x, 0x142, 0xa, 0xf, false);
    return x + __builtin_amdgcn_update_dpp(0, x, 0x143, 0xc, 0xf, false);
#else
    const int lane = lane_in_block() % wave_size();
    for (int step = 1; step < wave_size(); step *= 2) {
        const int before = from_lane(x, lane < step ? lane : lane - step);
        x += lane < step ? 0 : before;
    }
    return x;
#endif
}

// The lane that has the item-th split, counted from 0, where each lane has some.
struct Found {
    int lane, before;  // `before`: the splits of earlier lanes. lane is the wave size if there are fewer splits

    WAVE64_DEVICE Found(int item, int splits) {
        const int sum = sum_up_to_lane(splits);
        lane = count_bits(ballot(sum <= item));
        before = lane ? uniform(broadcast(sum, lane - 1)) : 0;
    }
};

// The item-th split of a batch of one sequence, whose work is known.
WAVE64_DEVICE Split find_split_of_one(int item, int num_splits, int min_work, int work) {
    const int count = work <= (num_splits + 1) * min_work ? splits_of(work, min_work) : num_splits + 1;
    return {item < count ? 0 : 1, item, count};
}

// The item-th split of the batch. The work is cut into num_splits splits, plus at most one for each sequence, but none
// has less than min_work. work_of(seq) is the work of a sequence. num_seqs is at most the square of the wave size:
// first each lane looks at several neighboring sequences, then each at one of those that a lane had.
template <typename Work>
WAVE64_DEVICE Split find_split(int item, int num_seqs, int num_splits, int min_work, Work work_of) {
    const int lane = lane_in_block() % wave_size(), each = (num_seqs + wave_size() - 1) / wave_size();
    int work = 0;
    for (int seq = lane * each; seq < (lane + 1) * each && seq < num_seqs; seq++) work += work_of(seq);
    const int total = wave_sum(work), even = total / num_splits + (total % num_splits > 0);
    const int split_work = even > min_work ? even : min_work;

    int splits = 0;
    for (int seq = lane * each; seq < (lane + 1) * each && seq < num_seqs; seq++)
        splits += splits_of(each == 1 ? work : work_of(seq), split_work);
    const Found run(item, splits);
    if (run.lane == wave_size()) return {num_seqs, 0, 0};
    if (each == 1) return {run.lane, item - run.before, uniform(from_lane(splits, run.lane))};

    const int seq = run.lane * each + lane;
    splits = lane < each && seq < num_seqs ? splits_of(work_of(seq), split_work) : 0;
    const Found one(item - run.before, splits);
    return {run.lane * each + one.lane, item - run.before - one.before, uniform(from_lane(splits, one.lane))};
}

}  // namespace wave64
