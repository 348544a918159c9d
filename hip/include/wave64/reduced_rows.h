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

// Which pack of a row is a lane's i-th.
template <int PROTOCOL, typename Args>
WAVE64_DEVICE int pack_of_row(const Args& args, int i) {
    return PROTOCOL == kLow128 ? low_128_pack(i) : lane_in_block() + i * args.block;
}

template <int PROTOCOL, typename Args>
WAVE64_DEVICE void load_row(Bits128 (&to)[kRowLines], const Packs<>& from, const Args& args) {
#pragma unroll
    for (int i = 0; i < kRowLines; i++)
        if (i < args.lines) to[i] = from.load(pack_of_row<PROTOCOL>(args, i));
}

// store(token, pack, row, weight, scale) is given what a pack of the result is made of, in all lanes. PROTOCOL is LL,
// LL128, or stands for flags.
template <int WORLD, int PROTOCOL, typename Args, typename Store>
WAVE64_DEVICE void reduce_and_normalize(const Args& args, RankOp op, const Store& store) {
    WAVE64_LDS static float lds[2][kRankLanes / 32];  // two, so that a row's sum may begin while the last one's is read
    RankBlock<Args> block(args, op);
    Bits128 weight[kRowLines];
    load_row<PROTOCOL>(weight, Packs<>(args.weight, args.bytes), args);
    int parity = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, parity ^= 1) {
        const int64_t at = token * args.bytes;
        const Packs<> residual(static_cast<char*>(args.residual) + at, args.bytes);
        Bits128 own[kRowLines], row[kRowLines];
        load_row<PROTOCOL>(own, Packs<>(static_cast<const char*>(args.x) + at, args.bytes), args);
        load_row<PROTOCOL>(row, residual, args);
        block.next_round(token == block_id());
        // Where a wait times out, all waves go on: they meet for the sum.
        Bits128 lines[kRowLines][WORLD];
        const auto sent = [&](int, int line) { return own[line]; };
        if constexpr (PROTOCOL == kLow128) {
            to_low_128(own[0], own[1]);
            exchange_low_128(block, kRowLines, own, lines);
#pragma unroll
            for (int rank = 0; rank < WORLD; rank++) {
                from_low_128(lines[0][rank], lines[1][rank]);
                if (is_before_tag()) lines[1][rank] = {};  // of which there is no pack, but a sum of squares
            }
        } else if constexpr (PROTOCOL == kLowLatency) {
#pragma unroll
            for (int i = 0; i < kRowLines; i++)
                if (i < block.lines) send_low_latency<WORLD>(block, i, sent);
        } else {
            send_flagged<WORLD, kRowLines>(block, 0, 0, block.lines, sent);
        }
        float squares = 0;
#pragma unroll
        for (int i = 0; i < kRowLines; i++) {
            if (i >= block.lines) break;
            if constexpr (PROTOCOL == kLowLatency)
                receive_low_latency(block, i, lines[i]);
            else if constexpr (PROTOCOL != kLow128)
                receive_flagged(block, i, own[i], lines[i]);
            row[i] = added(row[i], lines[i], block.world, squares, args.dtype);
            residual.store(pack_of_row<PROTOCOL>(args, i), row[i]);
        }
        const float scale = rsqrt(block_sum(squares, lds[parity], args.block) / float(args.hidden) + args.eps);
#pragma unroll
        for (int i = 0; i < kRowLines; i++)
            if (i < block.lines) store(token, pack_of_row<PROTOCOL>(args, i), row[i], weight[i], scale);
    }
}

}  // namespace wave64

#else
namespace wave64 {

// Checks and plans rows of args.hidden elements; returns which kernels to launch: those for LL, LL128 or, by any other
// protocol, flags. Rows that do not fit LL128's lines of a block are exchanged by flags, as all are where has_low_128
// is false. args.grid is 0 where there is nothing to do.
template <typename Args>
Protocol plan_rows(const Call& call, Args& args, bool has_low_128) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("hidden", args.hidden, 0, kMaxRowBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kTwoShot);
    args.grid = 0;
    args.bytes = int32_t(args.hidden * element_bytes(args.dtype));
    const int64_t packs = ceil_div(args.bytes, 16), runs = ceil_div(packs, kLow128Packs);  // of 8 lanes
    Protocol protocol = args.protocol == kLowLatency ? kLowLatency : kOneShot;
    if (has_low_128 && args.protocol == kLow128 && runs * 8 <= kRankLanes) protocol = kLow128;
    if (args.num_tokens == 0 || args.hidden == 0) return protocol;
    call.expect_tensors({{"x", args.x}, {"residual", args.residual}, {"weight", args.weight}});

    args.lines = protocol == kLow128 ? kRowLines : int32_t(ceil_div(packs, kRankLanes));
    const int64_t lanes = protocol == kLow128 ? runs * 8 : ceil_div(packs, args.lines);
    args.block = int32_t(round_up(lanes, call.device.wave_size));
    const int64_t max_blocks = protocol == kLowLatency ? kLowLatencyBlocks : kRankBlocks;
    args.grid = int32_t(std::min({args.num_tokens, max_blocks, int64_t(args.max_blocks)}));
    plan_rounds(args, args.num_tokens, 1);
    return protocol;
}

}  // namespace wave64
#endif
