// The sum of x over the ranks of a group, residual add and root mean square normalization: residual += sum of x, then
// out = rms_norm(residual).
//
// The trick: a block exchanges whole rows, so what it has received it normalizes from registers; the other inputs are
// on their way while it waits. Bound by the latency of a launch, one trip over the links and a sum over the block.
#include "wave64/exchange.h"
#include "wave64/rms.h"

namespace wave64 {

// residual += the sum of x over all ranks, added up in their order, rounded once; then
// out = residual / sqrt(mean(residual^2) + eps) * weight.
struct FusedAllReduceRmsNormArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    const void* x;       // [num_tokens, hidden]
    void* residual;      // [num_tokens, hidden]
    const void* weight;  // [hidden]
    void* out;           // [num_tokens, hidden]
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    Dtype dtype;       // of x, residual, weight and out
    int32_t protocol;  // a Protocol: LL, or flags for any other
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of a row
    int32_t block;    // lanes of a block
    int32_t grid;     // blocks
    int32_t lines;    // of 16 bytes of a row that a lane has
    int32_t rounds;   // of every block
    int32_t longer;   // blocks, the first ones, that have one more
};

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

template <int WORLD, bool FLAGGED>
WAVE64_DEVICE void reduce_and_normalize(const FusedAllReduceRmsNormArgs& args) {
    WAVE64_LDS static float lds[2][kRankLanes / 32];  // two, so that a row's sum may begin while the last one's is read
    RankBlock<FusedAllReduceRmsNormArgs> block(args, kOpFusedAllReduceRmsNorm);
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
        const Packs<> out(static_cast<char*>(args.out) + at, args.bytes);
#pragma unroll
        for (int i = 0; i < kRowLines; i++)
            if (i < block.lines)
                out.store(lane_in_block() + i * args.block, scaled_pack(row[i], weight[i], scale, args.dtype));
    }
}

template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_ll(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, false>(args);
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_flagged(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, true>(args);
}

}  // namespace wave64

WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_ll, FusedAllReduceRmsNormArgs)
WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_flagged, FusedAllReduceRmsNormArgs)

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("fused_all_reduce_rms_norm_ll"),
                                       WAVE64_BY_WORLD("fused_all_reduce_rms_norm_flagged")};

void fused_all_reduce_rms_norm(FusedAllReduceRmsNormArgs args, const Call& call) {
    plan_ranks(call, args);
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("hidden", args.hidden, 0, kMaxRowBytes / element_bytes(args.dtype));
    call.expect_range("protocol", args.protocol, kLowLatency, kTwoShot);
    if (args.num_tokens == 0 || args.hidden == 0) return;
    call.expect_tensors({{"x", args.x}, {"residual", args.residual}, {"weight", args.weight}, {"out", args.out}});

    args.bytes = int32_t(args.hidden * element_bytes(args.dtype));
    const bool flagged = args.protocol != kLowLatency;
    const int64_t packs = ceil_div(args.bytes, 16);
    args.lines = int32_t(ceil_div(packs, kRankLanes));
    args.block = int32_t(round_up(ceil_div(packs, args.lines), call.device.wave_size));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, flagged ? kRankBlocks : kLowLatencyBlocks));
    plan_rounds(args, args.num_tokens, 1);
    call.launch(kKernels[flagged][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(fused_all_reduce_rms_norm, FusedAllReduceRmsNormArgs, ({{"MAX_ROW_BYTES", kMaxRowBytes}}),
                        arenas, rank, world, status, timeout, x, residual, weight, out, num_tokens, hidden, eps, dtype,
                        protocol)

}  // namespace
}  // namespace wave64
#endif
