// The sum of x over the ranks of a group, residual add and root mean square normalization: residual += sum of x, then
// out = rms_norm(residual).
//
// The trick is in reduced_rows.h: a block exchanges whole rows. Bound by the latency of a launch, one trip over the
// links and a sum over the block.
#include "wave64/reduced_rows.h"

namespace wave64 {

// residual += the sum of x over all ranks, added up in their order, rounded once; then
// out = residual / sqrt(mean(residual^2) + eps) * weight.
struct FusedAllReduceRmsNormArgs {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    int32_t max_blocks;  // of a launch; the same on all ranks
    const void* x;       // [num_tokens, hidden]
    void* residual;      // [num_tokens, hidden]
    const void* weight;  // [hidden]
    void* out;           // [num_tokens, hidden]
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    Dtype dtype;       // of x, residual, weight and out
    int32_t protocol;  // a Protocol: LL, LL128 for rows that fit, or flags for any other
    // set by the launcher
    Addresses peers;  // arenas, from this rank's own on
    int32_t bytes;    // of a row
    int32_t block;    // lanes of a block
    int32_t grid;     // blocks
    int32_t lines;    // of 16 bytes of a row that a lane has
    int32_t rounds;   // of every block
    int32_t longer;   // blocks, the first ones, that have one more
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <int WORLD, int PROTOCOL>
WAVE64_DEVICE void reduce_and_normalize(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, PROTOCOL>(
        args, kOpFusedAllReduceRmsNorm,
        [&](int64_t token, int pack, const Bits128& row, const Bits128& weight, float scale) {
            Packs<>(static_cast<char*>(args.out) + token * args.bytes, args.bytes)
                .store(pack, scaled_pack(row, weight, scale, args.dtype));
        });
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_ll(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, kLowLatency>(args);
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_ll128(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, kLow128>(args);
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_flagged(const FusedAllReduceRmsNormArgs& args) {
    reduce_and_normalize<WORLD, kOneShot>(args);
}

}  // namespace wave64

WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_ll, FusedAllReduceRmsNormArgs)
WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_ll128, FusedAllReduceRmsNormArgs)
WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_flagged, FusedAllReduceRmsNormArgs)

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("fused_all_reduce_rms_norm_ll"),
                                       WAVE64_BY_WORLD("fused_all_reduce_rms_norm_ll128"),
                                       WAVE64_BY_WORLD("fused_all_reduce_rms_norm_flagged")};

void fused_all_reduce_rms_norm(FusedAllReduceRmsNormArgs args, const Call& call) {
    const Protocol protocol = plan_rows(call, args, true);
    if (args.grid == 0) return;
    call.expect_tensors({{"out", args.out}});
    call.launch(kKernels[protocol][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(fused_all_reduce_rms_norm, FusedAllReduceRmsNormArgs, ({{"MAX_ROW_BYTES", kMaxRowBytes}}),
                        arenas, rank, world, status, timeout, max_blocks, x, residual, weight, out, num_tokens, hidden,
                        eps, dtype, protocol)

}  // namespace
}  // namespace wave64
#endif
