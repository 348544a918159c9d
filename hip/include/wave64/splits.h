// How the keys of a batch are dealt out to blocks: in shares of about equal size, so that a long sequence gets many
// parts and a short one one. Blocks work out the shares from the lengths themselves: the host need not know them.
#pragma once

#include "wave64/device.h"

namespace wave64 {

// One of the parts of a sequence.
struct Part {
    int seq;    // num_seqs where there are fewer parts than blocks
    int index;  // among the sequence's
    int count;  // of the sequence
};

// Into how many parts so much work is dealt: each has at most 1.5 times the share.
WAVE64_DEVICE int parts_of(int work, int share) {
    const int parts = int((unsigned(work) + unsigned(share) / 2) / unsigned(share));
    return parts > 1 ? parts : 1;
}

// The sum over this lane and those before it.
WAVE64_DEVICE int sum_up_to_lane(int x) {
    const int lane = lane_in_block() % wave_size();
    for (int step = 1; step < wave_size(); step *= 2) {
        const int before = from_lane(x, lane < step ? lane : lane - step);
        x += lane < step ? 0 : before;
    }
    return x;
}

// Lanes with some parts each, and the one among them that has the item-th, counted from 0.
struct Found {
    int lane, before;  // the parts of the lanes before it; lane is the wave size if there are fewer parts

    WAVE64_DEVICE Found(int item, int parts) {
        const bool passed = sum_up_to_lane(parts) <= item;
        lane = wave_sum(int(passed)), before = wave_sum(passed ? parts : 0);
    }
};

// The item-th part, counted through the batch. All work is dealt in `shares` parts, and one more for each sequence at
// most, but none for less than `least`. work_of(seq) is what a sequence takes. There are at most as many sequences as
// the square of the wave size: first each lane looks at several neighbours, then each at one of a lane's.
template <typename Work>
WAVE64_DEVICE Part find_part(int item, int num_seqs, int shares, int least, Work work_of) {
    const int lane = lane_in_block() % wave_size(), each = (num_seqs + wave_size() - 1) / wave_size();
    int work = 0;
    for (int seq = lane * each; seq < (lane + 1) * each && seq < num_seqs; seq++) work += work_of(seq);
    const int total = wave_sum(work), even = total / shares + (total % shares > 0), share = even > least ? even : least;

    int parts = 0;
    for (int seq = lane * each; seq < (lane + 1) * each && seq < num_seqs; seq++)
        parts += parts_of(each == 1 ? work : work_of(seq), share);
    const Found run(item, parts);
    if (run.lane == wave_size()) return {num_seqs, 0, 0};
    if (each == 1) return {run.lane, item - run.before, uniform(from_lane(parts, run.lane))};

    const int seq = run.lane * each + lane;
    parts = lane < each && seq < num_seqs ? parts_of(work_of(seq), share) : 0;
    const Found one(item - run.before, parts);
    return {run.lane * each + one.lane, item - run.before - one.before, uniform(from_lane(parts, one.lane))};
}

}  // namespace wave64
