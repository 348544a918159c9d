// Rows that are added up over the ranks, added to the residual stream and normalized: what the operators have in common
// that differ in what they make of the result.
//
// The trick: a block exchanges whole rows, so what it has received it normalizes from registers; the other inputs are
// on their way while it waits.
#pragma once

#include "wave64/exchange.h"
#include "wave64/rms.h"

namespace wave64 {
constexpr int kRowLines = kLowLatencyPacks;  // of a lane
constexpr int64_t kMaxRowBytes = int64_t(kRowLines) * kRankLanes * 16;
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// The residual's pack + the sum of all; adds its squares to `squares`.
template <typename T, int WORLD>
WAVE64_DEVICE Bits128 added(const Bits128& before, const Bits128 (&all)[WORLD], int world, float& squares) {
    constexpr int N = 16 / sizeof(T);
    float sum[N];
    add_up<T>(sum, all, world);
    const auto values = Pack<T, N>{before}.values();
    for (int i = 0; i < N; i++) sum[i] += float(values.at[i]);
    const auto row = Pack<T, N>::rounded(sum);
    squares += sum_of_squares(row);
    return row.bits;
}
template <int WORLD>
WAVE64_DEVICE Bits128 added(const Bits128& before, const Bits128 (&all)[WORLD], int world, float& squares,
                            Dtype dtype) {
    if (dtype == kBf16) return added<bf16>(before, all, world, squares);
    if (dtype == kFp16) return added<fp16>(before, all, world, squares);
    return added<float>(before, all, world, squares);
}

template <typename T>
WAVE64_DEVICE Bits128 scaled_pack(const Bits128& row, const Bits128& weight, float scale) {
    constexpr int N = 16 / sizeof(T);
    return scaled(Pack<T, N>{row}, Pack<T, N>{weight}, scale).bits;
}
WAVE64_DEVICE Bits128 scaled_pack(const Bits128& row, const Bits128& weight, float scale, Dtype dtype) {
    if (dtype == kBf16) return scaled_pack<bf16>(row, weight, scale);
    if (dtype == kFp16) return scaled_pack<fp16>(row, weight, scale);
    return scaled_pack<float>(row, weight, scale);
}

// store(token, i, row, weight, scale) is given what the result of a lane's i-th line of a row is made of, in all lanes.
template <int WORLD, bool FLAGGED, typename Args, typename Store>
WAVE64_DEVICE void reduce_and_normalize(const Args& args, RankOp op, const Store& store) {
    WAVE64_LDS static float lds[2][kRankLanes / 32];  // two, so that a row's sum may begin while the last one's is read
    RankBlock<Args> block(args, op);
    Bits128 weight[kRowLines];
    load_part(weight, Packs<>(args.weight, args.bytes), lane_in_block(), args);
    int parity = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, parity ^= 1) {
        const int64_t at = token * args.bytes;
        const Packs<> residual(static_cast<char*>(args.residual) + at, args.bytes);
        Bits128 own[kRowLines], row[kRowLines];
        load_part(own, Packs<>(static_cast<const char*>(args.x) + at, args.bytes), lane_in_block(), args);
        load_part(row, residual, lane_in_block(), args);
        block.next_round(token == block_id());
        const auto sent = [&](int, int line) { return own[line]; };
        if constexpr (FLAGGED)
            send_flagged<WORLD, kRowLines>(block, 0, 0, block.lines, sent);
        else
#pragma unroll
            for (int i = 0; i < kRowLines; i++)
                if (i < block.lines) send_low_latency<WORLD>(block, i, sent);
        float squares = 0;
#pragma unroll
        for (int i = 0; i < kRowLines; i++) {
            if (i >= block.lines) break;
            Bits128 all[WORLD];
            if constexpr (FLAGGED)
                receive_flagged(block, i, own[i], all);
            else
                receive_low_latency(block, i, own[i], all);  // or not: all waves go on, for they meet for the sum
            row[i] = added(row[i], all, block.world, squares, args.dtype);
            residual.store(lane_in_block() + i * args.block, row[i]);
        }
        const float scale = rsqrt(block_sum(squares, lds[parity], args.block) / float(args.hidden) + args.eps);
#pragma unroll
        for (int i = 0; i < kRowLines; i++)
            if (i < block.lines) store(token, i, row[i], weight[i], scale);
    }
}

}  // namespace wave64

#else
namespace wave64 {

// Checks and plans rows of args.hidden elements; returns whether to launch the kernels for flags. args.grid is 0 where
// there is nothing to do.
template <typename Args>
bool plan_rows(const Call& call, Args& args) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("hidden", args.hidden, 0, kMaxRowBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kTwoShot);
    args.grid = 0;
    const bool flagged = args.protocol != kLowLatency;
    if (args.num_tokens == 0 || args.hidden == 0) return flagged;
    call.expect_tensors({{"x", args.x}, {"residual", args.residual}, {"weight", args.weight}});

    args.bytes = int32_t(args.hidden * element_bytes(args.dtype));
    const int64_t packs = ceil_div(args.bytes, 16), max_blocks = flagged ? kRankBlocks : kLowLatencyBlocks;
    args.lines = int32_t(ceil_div(packs, kRankLanes));
    args.block = int32_t(round_up(ceil_div(packs, args.lines), call.device.wave_size));
    args.grid = int32_t(std::min({args.num_tokens, max_blocks, int64_t(args.max_blocks)}));
    plan_rounds(args, args.num_tokens, 1);
    return flagged;
}

}  // namespace wave64
#endif
