// SwiGLU and quantization to FP8 in groups of columns: y = silu(x[:, :d]) * x[:, d:], q = y / scale of its group.
//
// The trick: y stays in registers, in fp32, and a group lies in neighboring lanes of one wave; no LDS, no barrier.
// Bound by memory: 2 d values of a row in, 16 bytes per lane and access, four loads in flight; d bytes out.
#include "wave64/gated.h"

namespace wave64 {

// q = silu(x[t, :d]) * x[t, d:] / scale in FP8, with a scale for each group of columns, which is written.
struct SiluAndMulPerTokenGroupQuantFp8Args {
    const void* x;  // [num_tokens, 2 * d]
    void* q;        // [num_tokens, d], contiguous
    float* scale;   // [num_tokens, d / group_size]
    int64_t x_stride;
    int64_t num_tokens;
    int32_t d;
    int32_t group_size;  // 32, 64 or 128, which divides d
    Dtype dtype;         // of x
    // set by the launcher
    int32_t groups;      // of a row
    int32_t group_bits;  // a group is 2^group_bits packs, in as many lanes
    RowPartition partition;
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

template <typename T>
WAVE64_DEVICE void silu_and_mul_per_token_group_quant_fp8(const SiluAndMulPerTokenGroupQuantFp8Args& args) {
    constexpr int N = 16 / sizeof(T);
    const LaneRows rows = lane_rows(args.partition);
    const int lanes = 1 << args.group_bits, group = rows.pack >> args.group_bits;
    const auto store = [&](int64_t token, Bits8* q, const Pack<T, N>& gate, const Pack<T, N>& up) {
        const Numbers<N> y = gated<T, N, silu>(gate, up);
        const Scale scale = scale_of(__builtin_bit_cast(float, run_max(__builtin_bit_cast(int, y.amax()), lanes)));
        store_pack(q, quantized(y, scale.inverse));
        if (rows.pack == group << args.group_bits) args.scale[token * args.groups + group] = scale.scale;
    };
    for_gated_rows<T, N>(args, rows, static_cast<Bits8*>(args.q), store);
}

}  // namespace wave64

#define WAVE64_QUANTIZED_SILU(NAME, T)                                                                \
    WAVE64_KERNEL(512)                                                                                \
    silu_and_mul_per_token_group_quant_fp8_##NAME(wave64::SiluAndMulPerTokenGroupQuantFp8Args args) { \
        wave64::silu_and_mul_per_token_group_quant_fp8<T>(args);                                      \
    }
WAVE64_QUANTIZED_SILU(bf16, wave64::bf16)
WAVE64_QUANTIZED_SILU(fp16, wave64::fp16)
WAVE64_QUANTIZED_SILU(fp32, float)
#endif

#else
namespace wave64 {
namespace {

constexpr const char* kKernels[] = {"silu_and_mul_per_token_group_quant_fp8_bf16",
                                    "silu_and_mul_per_token_group_quant_fp8_fp16",
                                    "silu_and_mul_per_token_group_quant_fp8_fp32"};

void silu_and_mul_per_token_group_quant_fp8(SiluAndMulPerTokenGroupQuantFp8Args args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("d", args.d, 0, 1 << 28);
    call.expect(args.group_size == 32 || args.group_size == 64 || args.group_size == 128, "group_size", "32, 64 or 128",
                args.group_size);
    call.expect(args.d % args.group_size == 0, "d", "a multiple of group_size", args.d);
    if (args.num_tokens == 0 || args.d == 0) return;
    call.expect_tensors({{"x", args.x}, {"q", args.q}, {"scale", args.scale}});
    const int64_t bytes = element_bytes(args.dtype);
    if (args.num_tokens == 1) args.x_stride = 2 * args.d;
    call.expect(is_16_aligned({args.x, args.q}, {args.x_stride * bytes}), "x",
                "rows that begin at multiples of 16 bytes", "others");
    args.groups = args.d / args.group_size;
    args.group_bits = __builtin_ctz(unsigned(args.group_size * bytes / 16));
    launch_over_rows(call, kKernels[args.dtype], args.num_tokens, args.d * bytes / 16, kGatedRows, args);
}

WAVE64_OP(silu_and_mul_per_token_group_quant_fp8, SiluAndMulPerTokenGroupQuantFp8Args, x, q, scale, x_stride,
          num_tokens, d, group_size, dtype)

}  // namespace
}  // namespace wave64
#endif
