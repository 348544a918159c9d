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

// The item-th part, counted through the batch. All work is dealt in `shares` parts, and one more for each sequence at
// most, but none for less than `least`. work_of(seq) is what a sequence takes; every wave asks for all.
template <typename Work>
WAVE64_DEVICE Part find_part(int item, int num_seqs, int shares, int least, Work work_of) {
    const int lane = lane_in_block() % wave_size();
    const auto work_of_any = [&](int seq) { return seq < num_seqs ? work_of(seq) : 0; };
    const int first_work = work_of_any(lane);  // kept: mostly there are no more sequences than lanes
    int work = first_work;
    for (int seq = wave_size(); seq < num_seqs; seq += wave_size()) work += work_of_any(seq + lane);
    const int total = wave_sum(work), even = total / shares + (total % shares > 0), share = even > least ? even : least;

    int dealt = 0;
    for (int seq = 0; seq < num_seqs; seq += wave_size()) {
        const int parts = seq + lane < num_seqs ? parts_of(seq ? work_of_any(seq + lane) : first_work, share) : 0;
        const int end = dealt + sum_up_to_lane(parts);
        const bool passed = end <= item;
        const int skipped = wave_sum(passed ? parts : 0), num_passed = wave_sum(int(passed));
        if (num_passed < wave_size()) {
            const int count = from_lane(parts, num_passed);
            return {seq + num_passed, item - dealt - skipped, uniform(count)};
        }
        dealt += skipped;
    }
    return {num_seqs, 0, 0};
}

}  // namespace wave64
