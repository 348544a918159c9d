// Residual add and root mean square normalization in place: residual += x, then x = rms_norm(residual).
//
// The trick is in rms.h: the sum, rounded to the residual's dtype, is written and stays in registers to be normalized.
// Bound by memory: x and residual in, both out, 16 bytes per lane and access, eight loads in flight. With few tokens,
// by the latency of one row.
#include "wave64/rms.h"

namespace wave64 {

// residual += x, rounded to its dtype; then x = residual / sqrt(mean(residual^2) + eps) * weight.
struct FusedAddRmsNormArgs {
    void* x;             // [num_tokens, hidden]
    void* residual;      // [num_tokens, hidden]
    const void* weight;  // [hidden]
    int64_t x_stride;
    int64_t residual_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    Dtype dtype;  // of x, residual and weight
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
    float inverse_hidden;
};

constexpr int kMaxLanes = 512;  // with more, a lane would have too few registers for its packs

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, int N>
struct FusedAddRow {
    struct Loaded {
        Pack<T, N> x, residual;
    };
    Row<T, N> in_out, residual;

    WAVE64_DEVICE FusedAddRow(const FusedAddRmsNormArgs& args, int64_t token, int num_packs)
        : in_out(static_cast<const T*>(args.x) + token * args.x_stride, num_packs),
          residual(static_cast<const T*>(args.residual) + token * args.residual_stride, num_packs) {}
    WAVE64_DEVICE Loaded load(int i) const { return {in_out.load(i), residual.load(i)}; }
    WAVE64_DEVICE Pack<T, N> x(int i, const Loaded& loaded) const {
        auto sum = loaded.residual.numbers();
        sum += loaded.x.numbers();
        const auto rounded = Pack<T, N>::rounded_of_same(sum.at);
        residual.store(i, rounded);
        return rounded;
    }
    WAVE64_DEVICE Pack<T, N> again(int i) const { return residual.load(i); }
    WAVE64_DEVICE void store(int i, const Pack<T, N>& y) const { in_out.store(i, y); }
};

template <typename T, int N>
WAVE64_DEVICE void fused_add_rms_norm(const FusedAddRmsNormArgs& args) {
    normalize_rows<T, N, kMaxLanes, FusedAddRow<T, N>>(args);
}

}  // namespace wave64

WAVE64_KERNELS(fused_add_rms_norm, wave64::kMaxLanes, FusedAddRmsNormArgs)

#else
namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(fused_add_rms_norm);

void fused_add_rms_norm(FusedAddRmsNormArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("hidden", args.hidden, 0, 1 << 28);
    if (args.num_tokens == 0 || args.hidden == 0) return;
    call.expect_tensors({{"x", args.x}, {"residual", args.residual}, {"weight", args.weight}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.x, args.residual, args.weight},
                                       {args.x_stride * bytes, args.residual_stride * bytes, args.hidden * bytes});
    launch_rms_rows(call, kKernels[args.dtype].of(aligned), aligned ? args.hidden * bytes / 16 : args.hidden, kMaxLanes,
                    args);
}

WAVE64_OP(fused_add_rms_norm, FusedAddRmsNormArgs, x, residual, weight, x_stride, residual_stride, num_tokens, hidden,
          eps, dtype)

}  // namespace
}  // namespace wave64
#endif
