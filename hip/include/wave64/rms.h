// Root mean square normalisation of rows: x / sqrt(mean(x^2) + eps) * weight.
//
// The trick: a block keeps its row in registers between the sum and the scaling, so what it is made of is read once.
#pragma once

#include "wave64/abi.h"

namespace wave64 {
constexpr int kRmsHeld = 4;  // packs of a row that a lane holds; of longer rows, the rest is read twice
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE float sum_of_squares(const Pack<T, N>& x) {
    const auto values = x.values();
    float sum = 0;
    for (int i = 0; i < N; i++) sum += float(values.at[i]) * float(values.at[i]);
    return sum;
}

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> scaled(const Pack<T, N>& x, const Pack<T, N>& weight, float scale) {
    const auto values = x.values();
    const auto weights = weight.values();
    float y[N];
    for (int i = 0; i < N; i++) y[i] = float(values.at[i]) * scale * float(weights.at[i]);
    return Pack<T, N>::rounded(y);
}

// Normalises the rows of a block of at most MAX_LANES. A TokenRow is made of (args, token, num_packs) and has
//   load(i)       reads what pack i of x is made of
//   x(i, loaded)  pack i of x; called once
//   again(i)      the same, later
//   store(i, y)   where the result goes
template <typename T, int N, int MAX_LANES, typename TokenRow, typename Args>
WAVE64_DEVICE void normalize_rows(const Args& args) {
    WAVE64_LDS static float lds[2][MAX_LANES / 32];  // two, so that a row's sum may begin while the last one's is read
    const int num_packs = args.hidden / N, first = lane_in_block(), block = args.block;
    const float share = 1 / float(args.hidden);  // here, so that no row waits for a division

    // A lane's columns are the same in every row, so its weights are read once, and beside the first row, not after it.
    const Row<T, N> weight(args.weight, num_packs);
    Pack<T, N> held_weight[kRmsHeld];
#pragma unroll
    for (int i = 0; i < kRmsHeld; i++) held_weight[i] = weight.load(first + i * block);

    int turn = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, turn ^= 1) {
        const TokenRow row(args, token, num_packs);

        decltype(row.load(0)) loaded[kRmsHeld];
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) loaded[i] = row.load(first + i * block);
        Pack<T, N> held[kRmsHeld];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) sum += sum_of_squares(held[i] = row.x(first + i * block, loaded[i]));
#pragma unroll 1
        for (int i = first + kRmsHeld * block; i < num_packs; i += block) sum += sum_of_squares(row.x(i, row.load(i)));

        const float scale = rsqrt(block_sum(sum, lds[turn], block) * share + args.eps);
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) {
            forget(held_weight[i].bits);  // unpacked ahead of the loop, weights double in size and make x's load wait
            row.store(first + i * block, scaled(held[i], held_weight[i], scale));
        }
#pragma unroll 1
        for (int i = first + kRmsHeld * block; i < num_packs; i += block)
            row.store(i, scaled(row.again(i), weight.load(i), scale));
    }
}

}  // namespace wave64

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {

// Sets the lanes and blocks of a launch: few lanes per row, so that each has much in flight and few waves meet for its
// sum, which is quicker even for a single row.
template <typename Args>
void share_rms_rows(Args& args, int64_t num_packs, int max_lanes, const Device& device) {
    constexpr int kBlocksPerUnit = 32;  // fill a compute unit; more tokens than that share blocks, and weights
    args.block = int32_t(std::min<int64_t>(round_up(ceil_div(num_packs, kRmsHeld), device.wave_size), max_lanes));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, int64_t(device.compute_units) * kBlocksPerUnit));
}

}  // namespace wave64
#endif
