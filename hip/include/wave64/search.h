// Finds the key at which a running sum reaches a goal, among unordered keys: sums over bins in LDS, then again within
// the bin that holds the key. Quantities are integers, so the order of additions does not matter.
#pragma once

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr int kBins = 256;
constexpr unsigned kLastRank = 0xff7fffff;  // of the smallest finite number

// The rank of a number in descending order: larger numbers have lower ranks, equal ones the same.
WAVE64_DEVICE unsigned rank_of(float x) {
    const unsigned bits = __builtin_bit_cast(unsigned, x + 0.0f);  // -0 becomes 0
    return bits >> 31 ? bits : 0x7fffffff - bits;
}
WAVE64_DEVICE float number_of_rank(unsigned rank) {
    return __builtin_bit_cast(float, rank >> 31 ? rank : 0x7fffffff - rank);
}

// A weight in units of 2^-36. Sums of up to 2^26 of them are exact, and below 2^63.
WAVE64_DEVICE uint64_t fixed(float weight) {
    const float high = float(unsigned(weight * 16));
    return uint64_t(unsigned(high)) << 32 | unsigned((weight * 16 - high) * 0x1p32f);
}

// A fraction of a sum, less than all of it.
WAVE64_DEVICE uint64_t fraction_of(uint64_t sum, float part) {
    const uint64_t scaled = unsigned(min(max(part, 0), 1 - 0x1p-24f) * 0x1p32f);
    return (sum >> 32) * scaled + ((sum & 0xffffffff) * scaled >> 32);
}

WAVE64_DEVICE uint64_t from_lane(uint64_t x, int lane) {
    return uint64_t(unsigned(from_lane(int(x >> 32), lane))) << 32 | unsigned(from_lane(int(x), lane));
}

// The sum of x over the wave's lanes up to this one.
WAVE64_DEVICE uint64_t running_sum(uint64_t x) {
    const int lane = lane_in_block() % wave_size();
    for (int step = 1; step < wave_size(); step *= 2) {
        const uint64_t below = from_lane(x, lane < step ? lane : lane - step);
        if (lane >= step) x += below;
    }
    return x;
}

struct Bins {
    uint64_t sums[kBins + kBins / 8];  // at slot_of(bin); all 0 between searches
    struct {
        int bin;                // negative: none
        uint64_t before, here;  // sums of the bins before it, and its own
    } found;
};

// A bin's index in LDS: padded, so that lanes that read several neighboring bins each do not hit the same bank.
WAVE64_DEVICE int slot_of(int bin) { return bin + bin / 8; }

// Before the first search; the caller adds a barrier.
WAVE64_DEVICE void clear(Bins& bins, int block) {
    for (int i = lane_in_block(); i < kBins + kBins / 8; i += block) bins.sums[i] = 0;
}

// Among keys in [low, high], finds the first at which the running sum of their quantities, in the order of the keys,
// reaches a goal, and narrows [low, high] to it, or to the range of a bin whose sum `may_stay` accepts. each(add) calls
// add(key, quantity) for all keys of this lane; goal_of(sum over all) is the goal, at least 1. False if the sum does
// not reach it. All lanes get the same result.
template <typename Goal, typename Stay, typename Each>
WAVE64_DEVICE bool search(Bins& bins, unsigned& low, unsigned& high, Goal goal_of, Stay may_stay, Each each) {
    const int lane = lane_in_block();
    uint64_t goal = 0;
    for (;;) {
        const unsigned begin = low, span = high - low;
        const int shift = span < kBins ? 0 : 24 - __builtin_clz(span);
        int bin = 0;
        uint64_t sum = 0;  // of neighbors in one bin, so that equal numbers make one atomic
        each([&](unsigned key, uint64_t quantity) {
            if (key - begin > span) return;
            if (const int next = int((key - begin) >> shift); next != bin) {
                if (sum) atomic_add(&bins.sums[slot_of(bin)], sum);
                bin = next;
                sum = 0;
            }
            sum += quantity;
        });
        if (sum) atomic_add(&bins.sums[slot_of(bin)], sum);
        block_barrier();
        if (lane < wave_size()) {
            const int own = kBins / wave_size();
            uint64_t own_sums[kBins / 32], mine = 0;
#pragma unroll
            for (int i = 0; i < kBins / 32; i++) {
                own_sums[i] = 0;
                if (i < own) {
                    own_sums[i] = bins.sums[slot_of(lane * own + i)];
                    bins.sums[slot_of(lane * own + i)] = 0;
                }
                mine += own_sums[i];
            }
            const uint64_t running = running_sum(mine), total = from_lane(running, wave_size() - 1);
            if (goal == 0) goal = goal_of(total);
            if (lane == 0 && total < goal) bins.found.bin = -1;
            uint64_t before = running - mine;
#pragma unroll
            for (int i = 0; i < kBins / 32; i++) {
                if (before < goal && goal <= before + own_sums[i]) {
                    bins.found.bin = lane * own + i;
                    bins.found.before = before;
                    bins.found.here = own_sums[i];
                }
                before += own_sums[i];
            }
            wave_barrier();
            goal -= bins.found.before;
        }
        block_barrier();
        const int found = uniform(bins.found.bin);
        if (found < 0) return false;
        low += unsigned(found) << shift;
        if (high - low > (1u << shift) - 1) high = low + ((1u << shift) - 1);
        if (shift == 0 || uniform(int(may_stay(bins.found.here)))) return true;
    }
}

}  // namespace wave64
#endif
