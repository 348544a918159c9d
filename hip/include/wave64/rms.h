// Root mean square normalization of rows: x / sqrt(mean(x^2) + eps) * weight.
//
// The trick: a block keeps its row in registers between the sum and the scaling, so that its inputs are read once.
#pragma once

#include "wave64/types.h"

namespace wave64 {
constexpr int kRmsHeld = 4;  // packs of a row that a lane holds; the rest of a longer row is read twice
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE float sum_of_squares(const Pack<T, N>& x) {
    Floats2 squares = {0, 0};
    x.numbers().add_squares(squares);
    return squares.x + squares.y;
}

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> scaled(const Pack<T, N>& x, const Pack<T, N>& weight, float scale) {
    auto y = x.numbers();
    y *= scale;
    y *= weight.numbers();
    return Pack<T, N>::rounded_of_same(y.at);
}

// Normalizes the rows of a block of at most MAX_LANES. TokenRow(args, token, num_packs) has
//   load(i)       reads the inputs of pack i of x
//   x(i, loaded)  returns pack i of x; called once
//   again(i)      reads pack i of x again
//   store(i, y)   writes pack i of the result
template <typename T, int N, int MAX_LANES, typename TokenRow, typename Args>
WAVE64_DEVICE void normalize_rows(const Args& args) {
    WAVE64_LDS static float lds[2][MAX_LANES / 32];  // two, so that a row's sum may begin while the last one's is read
    const int num_packs = args.hidden / N, first = lane_in_block(), block = args.block;

    // A lane's columns are the same in every row, so its weights are read once, together with the first row.
    const Row<T, N> weight(args.weight, num_packs);
    Pack<T, N> held_weight[kRmsHeld];
#pragma unroll
    for (int i = 0; i < kRmsHeld; i++) held_weight[i] = weight.load(first + i * block);

    int parity = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, parity ^= 1) {
        const TokenRow row(args, token, num_packs);

        decltype(row.load(0)) loaded[kRmsHeld];
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) loaded[i] = row.load(first + i * block);
        Pack<T, N> held[kRmsHeld];
        Floats2 squares = {0, 0};
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) {
            held[i] = row.x(first + i * block, loaded[i]);
            held[i].numbers().add_squares(squares);
        }
#pragma unroll 1
        for (int i = first + kRmsHeld * block; i < num_packs; i += block)
            row.x(i, row.load(i)).numbers().add_squares(squares);

        const float scale =
            rsqrt(block_sum(squares.x + squares.y, lds[parity], block) * args.inverse_hidden + args.eps);
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
#include "wave64/host.h"

namespace wave64 {

// Launches over rows of num_packs packs: few lanes per row, so that each has many loads in flight and few waves meet
// for its sum, which is faster even for a single row.
template <typename Args>
void launch_rms_rows(const Call& call, const char* kernel, int64_t num_packs, int max_lanes, Args& args) {
    constexpr int64_t kBlocksPerUnit = 32;  // fill a compute unit; a block of more tokens reads its weights once
    args.block = int32_t(std::min<int64_t>(round_up(ceil_div(num_packs, kRmsHeld), call.device.wave_size), max_lanes));
    args.inverse_hidden = 1 / float(args.hidden);
    args.grid = int32_t(std::min(args.num_tokens, call.device.compute_units * kBlocksPerUnit));
    call.launch(kernel, {args.grid}, args.block, args);
}

}  // namespace wave64
#endif
