// Root mean square normalization: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight.
//
// The trick is in rms.h: a block keeps its row in registers between the sum and the scaling, so x is read once.
// Bound by memory: 2 * num_tokens * hidden elements, moved 16 bytes per lane. With few tokens, by the latency of one
// row: a load, a sum over the block, a store.
#include "wave64/rms.h"

namespace wave64 {

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, in fp32, rounded once. out may be x.
struct RmsNormArgs {
    const void* x;       // [num_tokens, hidden]
    const void* weight;  // [hidden]
    void* out;           // [num_tokens, hidden]
    int64_t x_stride;
    int64_t out_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    Dtype dtype;  // of x, weight and out
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
    float inverse_hidden;
};

constexpr int kMaxLanes = 1024;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, int N>
struct RmsNormRow {
    Row<T, N> in, out;

    WAVE64_DEVICE RmsNormRow(const RmsNormArgs& args, int64_t token, int num_packs)
        : in(static_cast<const T*>(args.x) + token * args.x_stride, num_packs),
          out(static_cast<T*>(args.out) + token * args.out_stride, num_packs) {}
    WAVE64_DEVICE Pack<T, N> load(int i) const { return in.load(i); }
    WAVE64_DEVICE Pack<T, N> x(int, const Pack<T, N>& loaded) const { return loaded; }
    WAVE64_DEVICE Pack<T, N> again(int i) const { return in.load(i); }
    WAVE64_DEVICE void store(int i, const Pack<T, N>& y) const { out.store(i, y); }
};

template <typename T, int N>
WAVE64_DEVICE void rms_norm(const RmsNormArgs& args) {
    normalize_rows<T, N, kMaxLanes, RmsNormRow<T, N>>(args);
}

}  // namespace wave64

WAVE64_KERNELS(rms_norm, wave64::kMaxLanes, RmsNormArgs)

#else
namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(rms_norm);

void rms_norm(RmsNormArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("hidden", args.hidden, 0, 1 << 28);
    if (args.num_tokens == 0 || args.hidden == 0) return;
    call.expect_tensors({{"x", args.x}, {"weight", args.weight}, {"out", args.out}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.x, args.weight, args.out},
                                       {args.x_stride * bytes, args.out_stride * bytes, args.hidden * bytes});
    launch_rms_rows(call, kKernels[args.dtype].of(aligned), aligned ? args.hidden * bytes / 16 : args.hidden, kMaxLanes,
                    args);
}

WAVE64_OP(rms_norm, RmsNormArgs, x, weight, out, x_stride, out_stride, num_tokens, hidden, eps, dtype)

}  // namespace
}  // namespace wave64
#endif
