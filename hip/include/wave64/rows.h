// Rows of packs that need nothing of each other, and how a launch covers them: a lane keeps to one place in a row and
// goes from row to row, several at a time, so that their loads are under way together. Narrow rows lie side by side in
// a block, wide ones are cut into pieces for several blocks.
#pragma once

#include "wave64/abi.h"

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

// A lane's share: `pack` of the rows first, first + step, and so on. Where it has none, there is no row `first`.
struct RowShare {
    int pack;
    int64_t first, step;
};

WAVE64_DEVICE RowShare row_share(const RowShares& shares) {
    const unsigned lane = lane_in_block(), row = lane / shares.by_row_lanes;
    const int pack = block_id() * shares.row_lanes + int(lane - row * unsigned(shares.row_lanes));
    const bool some = int(row) < shares.block_rows && pack < shares.packs;
    return {pack, some ? int64_t(block_id_y()) * shares.block_rows + row : int64_t(1) << 62,
            int64_t(shares.grid) * shares.block_rows};
}

}  // namespace wave64

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {

// The launch of a kernel over rows of which a lane holds up to `held` at a time. Both sizes are at least 1, and a row
// is at most 2^30 packs.
inline Launch over_rows(const char* op, const char* kernel, int64_t num_rows, int64_t packs, int held,
                        const Device& device, RowShares& shares) {
    constexpr int64_t kRowLanes = 256, kBlockLanes = 512, kLanesThatFill = 1024, kMaxGrid = 65535;
    const int64_t units = device.compute_units;
    // Few rows: small blocks, on many compute units. Many: blocks that are nearly full, each lane with rows in flight.
    const bool few = num_rows * ceil_div(packs, kRowLanes) <= units;
    const int64_t row_lanes = std::min<int64_t>(packs, few ? device.wave_size : kRowLanes);
    const int64_t block_rows = std::min(kBlockLanes / row_lanes, ceil_div(num_rows, units));
    const int64_t block = round_up(row_lanes * block_rows, device.wave_size), pieces = ceil_div(packs, row_lanes);
    int64_t grid = ceil_div(num_rows, block_rows);
    if (grid * pieces * block >= units * kLanesThatFill * held) grid = ceil_div(grid, held);
    grid = std::min(grid, kMaxGrid);
    shares = {int32_t(packs), int32_t(row_lanes), divider(uint32_t(row_lanes)), int32_t(block_rows), int32_t(grid)};
    return {op, kernel, {uint32_t(pieces), uint32_t(grid), 1}, {uint32_t(block), 1, 1}, 0};
}

}  // namespace wave64
#endif
