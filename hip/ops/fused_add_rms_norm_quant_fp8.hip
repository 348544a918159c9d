// Residual add, root mean square normalization and quantization to FP8: residual += x, then
// q, scale = quantized(rms_norm(residual)), with a scale for each group of columns or for each token.
//
// The trick: a block keeps its row in registers from the sum to the quantized numbers. Neighboring lanes have
// neighboring numbers, so that a few lanes find the largest of a group among themselves. Bound by memory: x and
// residual in, residual and half of it (of 16-bit x) out, 16 bytes per lane and access. With few tokens, by the latency
// of one row.
#include "wave64/rms.h"

namespace wave64 {

// residual += x, rounded to its dtype; y = residual / sqrt(mean(residual^2) + eps) * weight, rounded; q = y / scale.
// Without a residual, of x.
struct FusedAddRmsNormQuantFp8Args {
    const void* x;       // [num_tokens, hidden]
    void* residual;      // [num_tokens, hidden], or null
    const void* weight;  // [hidden]
    void* q;             // [num_tokens, hidden], contiguous
    float* scale;        // [num_tokens, hidden / group_size, or 1]
    int64_t x_stride;
    int64_t residual_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    int32_t group_size;  // 32, 64 or 128, which divides hidden; or -1: one scale for each token
    Dtype dtype;         // of x, residual and weight
    // set by the launcher
    int32_t groups;      // of a row
    int32_t group_bits;  // a group is 2^group_bits packs, in as many lanes; kWholeRow: the row is the group
    int32_t block;       // lanes of a block
    int32_t grid;        // blocks
    float inverse_hidden;
};

constexpr int kMaxLanes = 512;  // with more, a lane would have too few registers for its packs
constexpr int kWholeRow = 31;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

template <typename T>
WAVE64_DEVICE void fused_add_rms_norm_quant_fp8(const FusedAddRmsNormQuantFp8Args& args) {
    constexpr int N = 16 / sizeof(T);
    // Two of each, so that a row's sum and maximum may begin while the last one's are read.
    WAVE64_LDS static float lds_sum[2][kMaxLanes / 32];
    WAVE64_LDS static int lds_amax[2][kMaxLanes / 32];
    const int num_packs = args.hidden / N, first = lane_in_block(), block = args.block;

    const Row<T, N> weight(args.weight, num_packs);
    Pack<T, N> held_weight[kRmsHeld];
#pragma unroll
    for (int i = 0; i < kRmsHeld; i++) held_weight[i] = weight.load(first + i * block);

    int parity = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, parity ^= 1) {
        const Row<T, N> x(static_cast<const T*>(args.x) + token * args.x_stride, num_packs);
        const Row<T, N> residual(static_cast<const T*>(args.residual) + token * args.residual_stride, num_packs);
        const Row<Bits8, N> q(static_cast<Bits8*>(args.q) + token * args.hidden, num_packs);
        const Row<float, 1> scales(args.scale + token * args.groups, args.groups);

        Pack<T, N> held[kRmsHeld];
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) held[i] = x.load(first + i * block);
        if (args.residual) {
            Pack<T, N> before[kRmsHeld];
#pragma unroll
            for (int i = 0; i < kRmsHeld; i++) before[i] = residual.load(first + i * block);
#pragma unroll
            for (int i = 0; i < kRmsHeld; i++) {
                auto sum = before[i].numbers();
                sum += held[i].numbers();
                held[i] = Pack<T, N>::rounded_of_same(sum.at);
                residual.store(first + i * block, held[i]);
            }
        }
        Floats2 squares = {0, 0};
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) held[i].numbers().add_squares(squares);
        const float sum = block_sum(squares.x + squares.y, lds_sum[parity], block);
        const float by = rsqrt(sum * args.inverse_hidden + args.eps);

        int amax[kRmsHeld];  // the bits of magnitudes, which are in the same order
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) {
            forget(held_weight[i].bits);  // unpacked ahead of the loop, weights double in size
            held[i] = scaled(held[i], held_weight[i], by);
            amax[i] = __builtin_bit_cast(int, amax_of(held[i]));
        }
        if (args.group_bits != kWholeRow) {
            run_max(amax, 1 << args.group_bits);
        } else {
            int largest = amax[0];
#pragma unroll
            for (int i = 1; i < kRmsHeld; i++) largest = largest > amax[i] ? largest : amax[i];
            largest = block_max(largest, lds_amax[parity], block);
#pragma unroll
            for (int i = 0; i < kRmsHeld; i++) amax[i] = largest;
        }
#pragma unroll
        for (int i = 0; i < kRmsHeld; i++) {
            const int pack = first + i * block, group = pack >> args.group_bits;
            const Scale scale = scale_of(__builtin_bit_cast(float, amax[i]));
            q.store(pack, quantized(held[i], scale.inverse));
            if (pack == group << args.group_bits) scales.store(group, Pack<float, 1>::of({scale.scale}));
        }
    }
}

}  // namespace wave64

#define WAVE64_QUANTIZED_NORM(NAME, T)                                              \
    WAVE64_KERNEL(wave64::kMaxLanes)                                                \
    fused_add_rms_norm_quant_fp8_##NAME(wave64::FusedAddRmsNormQuantFp8Args args) { \
        wave64::fused_add_rms_norm_quant_fp8<T>(args);                              \
    }
WAVE64_QUANTIZED_NORM(bf16, wave64::bf16)
WAVE64_QUANTIZED_NORM(fp16, wave64::fp16)
WAVE64_QUANTIZED_NORM(fp32, float)
#endif

#else
namespace wave64 {
namespace {

constexpr int64_t kMaxRowBytes = int64_t(kRmsHeld) * kMaxLanes * 16;
constexpr const char* kKernels[] = {"fused_add_rms_norm_quant_fp8_bf16", "fused_add_rms_norm_quant_fp8_fp16",
                                    "fused_add_rms_norm_quant_fp8_fp32"};

void fused_add_rms_norm_quant_fp8(FusedAddRmsNormQuantFp8Args args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    const int64_t bytes = element_bytes(args.dtype);
    call.expect_range("hidden", args.hidden, 0, kMaxRowBytes / bytes);
    const bool per_token = args.group_size == -1;
    call.expect(per_token || args.group_size == 32 || args.group_size == 64 || args.group_size == 128, "group_size",
                "32, 64, 128 or -1", args.group_size);
    call.expect(per_token || args.hidden % args.group_size == 0, "hidden", "a multiple of group_size", args.hidden);
    if (args.num_tokens == 0 || args.hidden == 0) return;
    call.expect_tensors({{"x", args.x}, {"weight", args.weight}, {"q", args.q}, {"scale", args.scale}});
    if (args.num_tokens == 1) args.x_stride = args.residual_stride = args.hidden;
    call.expect(is_16_aligned({args.x, args.residual, args.weight, args.q},
                              {args.x_stride * bytes, args.residual_stride * bytes, args.hidden * bytes}),
                "x", "rows that begin and end at multiples of 16 bytes", "others");
    args.groups = per_token ? 1 : args.hidden / args.group_size;
    args.group_bits = per_token ? kWholeRow : __builtin_ctz(unsigned(args.group_size * bytes / 16));
    launch_rms_rows(call, kKernels[args.dtype], args.hidden * bytes / 16, kMaxLanes, args);
}

WAVE64_OP_AND_CONSTANTS(fused_add_rms_norm_quant_fp8, FusedAddRmsNormQuantFp8Args, ({{"MAX_ROW_BYTES", kMaxRowBytes}}),
                        x, residual, weight, q, scale, x_stride, residual_stride, num_tokens, hidden, eps, group_size,
                        dtype)

}  // namespace
}  // namespace wave64
#endif
