// The sum of x over the ranks of a group, residual add, root mean square normalization and quantization to FP8:
// residual += sum of x, then q, scale = per_token_group_quant_fp8(rms_norm(residual)).
//
// The trick is in reduced_rows.h: a block exchanges whole rows. Neighboring lanes have neighboring elements, so that a
// group's largest magnitude is found by a few lanes among themselves. Bound by the latency of a launch, one trip over
// the links and a sum over the block.
#include "wave64/reduced_rows.h"

namespace wave64 {

// residual += the sum of x over all ranks, added up in their order, rounded once; then
// y = residual / sqrt(mean(residual^2) + eps) * weight, rounded, and q = y / scale of its group.
struct FusedAllReduceRmsNormQuantFp8Args {
    Addresses arenas;  // of all ranks, as this process maps them
    int32_t rank;
    int32_t world;
    int64_t status;      // address of 64 bytes of host memory: where a wait that times out says so; see RankBlock
    int64_t timeout;     // of a wait, in ticks of the device's steady clock; 0: none
    int32_t max_blocks;  // of a launch; the same on all ranks
    const void* x;       // [num_tokens, hidden]
    void* residual;      // [num_tokens, hidden]
    const void* weight;  // [hidden]
    void* out;           // q [num_tokens, hidden]
    float* scale;        // [num_tokens, hidden / group_size]
    int64_t num_tokens;
    int32_t hidden;  // a multiple of group_size
    float eps;
    Dtype dtype;         // of x, residual and weight
    int32_t protocol;    // a Protocol: LL, or flags for any other
    int32_t group_size;  // 32, 64 or 128
    // set by the launcher
    Addresses peers;      // arenas, from this rank's own on
    int32_t groups;       // of a row
    int32_t group_lanes;  // lanes that have a group
    int32_t bytes;        // of a row
    int32_t block;        // lanes of a block
    int32_t grid;         // blocks
    int32_t lines;        // of 16 bytes of a row that a lane has
    int32_t rounds;       // of every block
    int32_t longer;       // blocks, the first ones, that have one more
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#if WAVE64_EXCHANGES
#include "wave64/quant.h"

namespace wave64 {

// Quantizes this lane's pack of a row, and stores it. All lanes of the group must be here.
template <typename T>
WAVE64_DEVICE void store_quantized(const FusedAllReduceRmsNormQuantFp8Args& args, int64_t token, int pack,
                                   const Bits128& bits) {
    constexpr int N = 16 / sizeof(T);
    const Pack<T, N> y{bits};
    const Scale scale =
        scale_of(__builtin_bit_cast(float, run_max(__builtin_bit_cast(int, amax_of(y)), args.group_lanes)));
    Row<Bits8, N>(static_cast<Bits8*>(args.out) + token * args.hidden, args.hidden / N)
        .store(pack, quantized(y, scale.inverse));
    if (pack % args.group_lanes == 0)
        Row<float, 1>(args.scale + token * args.groups, args.groups)
            .store(pack / args.group_lanes, Pack<float, 1>::of({scale.scale}));
}

template <int WORLD, int PROTOCOL>
WAVE64_DEVICE void reduce_and_normalize(const FusedAllReduceRmsNormQuantFp8Args& args) {
    reduce_and_normalize<WORLD, PROTOCOL>(
        args, kOpFusedAllReduceRmsNormQuantFp8,
        [&](int64_t token, int pack, const Bits128& row, const Bits128& weight, float scale) {
            const Bits128 y = scaled_pack(row, weight, scale, args.dtype);
            if (args.dtype == kBf16) return store_quantized<bf16>(args, token, pack, y);
            if (args.dtype == kFp16) return store_quantized<fp16>(args, token, pack, y);
            store_quantized<float>(args, token, pack, y);
        });
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_quant_fp8_ll(const FusedAllReduceRmsNormQuantFp8Args& args) {
    reduce_and_normalize<WORLD, kLowLatency>(args);
}
template <int WORLD>
WAVE64_DEVICE void fused_all_reduce_rms_norm_quant_fp8_flagged(const FusedAllReduceRmsNormQuantFp8Args& args) {
    reduce_and_normalize<WORLD, kOneShot>(args);
}

}  // namespace wave64

WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_quant_fp8_ll, FusedAllReduceRmsNormQuantFp8Args)
WAVE64_RANK_KERNELS(fused_all_reduce_rms_norm_quant_fp8_flagged, FusedAllReduceRmsNormQuantFp8Args)
#endif

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[][3] = {WAVE64_BY_WORLD("fused_all_reduce_rms_norm_quant_fp8_ll"),
                                       WAVE64_BY_WORLD("fused_all_reduce_rms_norm_quant_fp8_flagged")};

void fused_all_reduce_rms_norm_quant_fp8(FusedAllReduceRmsNormQuantFp8Args args, const Call& call) {
    call.expect(args.group_size == 32 || args.group_size == 64 || args.group_size == 128, "group_size", "32, 64 or 128",
                args.group_size);
    call.expect(args.hidden % args.group_size == 0, "hidden", "a multiple of group_size", args.hidden);
    const bool flagged = plan_rows(call, args, false) != kLowLatency;
    if (args.grid == 0) return;
    call.expect_tensors({{"out", args.out}, {"scale", args.scale}});
    args.groups = args.hidden / args.group_size;
    args.group_lanes = int32_t(args.group_size * element_bytes(args.dtype) / 16);
    call.launch(kKernels[flagged][world_kernel(args.world)], {args.grid}, args.block, args);
}

WAVE64_OP_AND_CONSTANTS(fused_all_reduce_rms_norm_quant_fp8, FusedAllReduceRmsNormQuantFp8Args,
                        ({{"MAX_ROW_BYTES", kMaxRowBytes}}), arenas, rank, world, status, timeout, max_blocks, x,
                        residual, weight, out, scale, num_tokens, hidden, eps, dtype, protocol, group_size)

}  // namespace
}  // namespace wave64
#endif
