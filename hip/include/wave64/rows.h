// Independent rows of packs, and how a launch covers them: a lane keeps to one column of packs and goes from row to
// row, several at a time, so that their loads are in flight together. A block holds several narrow rows; a wide row is
// cut into pieces for several blocks.
#pragma once

#include "wave64/types.h"

namespace wave64 {

// How a launch's grid is partitioned over rows. Set by the launcher.
struct RowPartition {
    int32_t packs;      // of a row
    int32_t row_lanes;  // lanes on a row, side by side
    IntDivider by_row_lanes;
    int32_t block_rows;  // rows of a block, side by side
    int32_t grid;        // blocks from row to row; the grid's other dimension goes along a row
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> load_pack(const T* at) {
    return {*reinterpret_cast<const typename Pack<T, N>::Bits*>(at)};
}

template <typename T, int N>
WAVE64_DEVICE void store_pack(T* at, const Pack<T, N>& pack) {
    *reinterpret_cast<typename Pack<T, N>::Bits*>(at) = pack.bits;
}

// What a lane works on: `pack` of the rows first, first + step, ... For an idle lane `first` is past all rows.
struct LaneRows {
    int pack;
    int64_t first, step;

    // first * stride, where the lane is not idle: of two 32-bit factors and a carry.
    WAVE64_DEVICE int64_t first_times(int64_t stride) const { return int64_t(uint64_t(uint32_t(first)) * stride); }
};

WAVE64_DEVICE LaneRows lane_rows(const RowPartition& partition) {
    const unsigned lane = lane_in_block(), row = lane / partition.by_row_lanes;
    const int pack = block_id() * partition.row_lanes + int(lane - row * unsigned(partition.row_lanes));
    const bool idle = int(row) >= partition.block_rows || pack >= partition.packs;
    const unsigned first = unsigned(block_id_y()) * partition.block_rows + row;
    return {pack, int64_t(uint64_t(idle ? 1u << 30 : 0) << 32 | first),  // in halves: no branch, around which step
            int64_t(partition.grid) * partition.block_rows};             // would be in vector registers
}

}  // namespace wave64

#else
#include "wave64/host.h"

namespace wave64 {

// Launches a kernel over rows of which a lane holds up to `held` at a time, with the partition in `args`. num_rows and
// packs are at least 1, and a row is at most 2^30 packs.
template <typename Args>
void launch_over_rows(const Call& call, const char* kernel, int64_t num_rows, int64_t packs, int held, Args& args) {
    constexpr int64_t kRowLanes = 256, kBlockLanes = 512, kLanesThatFill = 1024;
    const int64_t units = call.device.compute_units, wave_size = call.device.wave_size;
    // Few rows: small blocks, on many compute units. Many: blocks that are nearly full, each lane with rows in flight.
    const bool few = num_rows * ceil_div(packs, kRowLanes) <= units;
    const int64_t row_lanes = std::min<int64_t>(packs, few ? wave_size : kRowLanes);
    const int64_t block_rows = std::min(kBlockLanes / row_lanes, ceil_div(num_rows, units));
    const int64_t block = round_up(row_lanes * block_rows, wave_size), pieces = ceil_div(packs, row_lanes);
    int64_t grid = ceil_div(num_rows, block_rows);
    if (grid * pieces * block >= units * kLanesThatFill * held) grid = ceil_div(grid, held);
    grid = std::min(grid, kMaxGridY);
    args.partition = {int32_t(packs), int32_t(row_lanes), divider(uint32_t(row_lanes)), int32_t(block_rows),
                      int32_t(grid)};
    call.launch(kernel, {pieces, grid}, block, args);
}

}  // namespace wave64
#endif
