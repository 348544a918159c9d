// Gated activations: out[t] = f(x[t, :d]) * x[t, d:]. The three operators differ in f alone; their kernels, launcher
// and registration are here.
//
// The trick: gate and up of the same columns meet in registers, so no intermediate is written.
// Bound by memory: 2 d values of a row in, d out, 16 bytes per lane and access, four loads in flight.
#pragma once

#include "wave64/rows.h"

namespace wave64 {

// out[t] = f(x[t, :d]) * x[t, d:], in fp32, rounded once.
struct GatedArgs {
    const void* x;  // [num_tokens, 2 * d]
    void* out;      // [num_tokens, d]
    int64_t x_stride;
    int64_t num_tokens;
    int32_t d;
    Dtype dtype;  // of x and out
    // set by the launcher
    RowPartition partition;
};

constexpr int kGatedRows = 2;  // that a lane holds

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// 1 / (1 + exp(-x))
WAVE64_DEVICE float logistic(float x) { return reciprocal(1 + exp2(-1.44269504f * x)); }

WAVE64_DEVICE float silu(float x) { return x * logistic(x); }

template <typename T, int N, float F(float)>
WAVE64_DEVICE Pack<T, N> gated(const Pack<T, N>& gate, const Pack<T, N>& up) {
    const auto gates = gate.values();
    const auto ups = up.values();
    float y[N];
    for (int i = 0; i < N; i++) y[i] = F(float(gates.at[i])) * float(ups.at[i]);
    return Pack<T, N>::rounded(y);
}

template <typename T, int N, float F(float)>
WAVE64_DEVICE void gated(const GatedArgs& args) {
    const LaneRows rows = lane_rows(args.partition);
    const T* x = static_cast<const T*>(args.x) + rows.pack * N;
    T* out = static_cast<T*>(args.out) + rows.pack * N;
    for (int64_t first = rows.first; first < args.num_tokens; first += kGatedRows * rows.step) {
        Pack<T, N> gate[kGatedRows], up[kGatedRows];
#pragma unroll
        for (int i = 0; i < kGatedRows; i++) {
            const int64_t token = first + i * rows.step;
            if (token >= args.num_tokens) break;
            gate[i] = load_pack<T, N>(x + token * args.x_stride);
            up[i] = load_pack<T, N>(x + token * args.x_stride + args.d);
        }
#pragma unroll
        for (int i = 0; i < kGatedRows; i++) {
            const int64_t token = first + i * rows.step;
            if (token >= args.num_tokens) break;
            store_pack(out + token * args.d, gated<T, N, F>(gate[i], up[i]));
        }
    }
}

}  // namespace wave64

#define WAVE64_GATED(OP, F)                        \
    namespace wave64 {                             \
    template <typename T, int N>                   \
    WAVE64_DEVICE void OP(const GatedArgs& args) { \
        gated<T, N, F>(args);                      \
    }                                              \
    }                                              \
    WAVE64_KERNELS(OP, 512, GatedArgs)

#else
namespace wave64 {

inline void launch_gated(GatedArgs args, const Call& call, const KernelPairs& kernels) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("d", args.d, 0, 1 << 28);
    if (args.num_tokens == 0 || args.d == 0) return;
    call.expect_tensors({{"x", args.x}, {"out", args.out}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.x, args.out}, {args.x_stride * bytes, args.d * bytes});
    launch_over_rows(call, kernels[args.dtype].of(aligned), args.num_tokens, aligned ? args.d * bytes / 16 : args.d,
                     kGatedRows, args);
}

}  // namespace wave64

#define WAVE64_GATED(OP, F)                                                                          \
    namespace wave64 {                                                                               \
    namespace {                                                                                      \
    void OP(GatedArgs args, const Call& call) { launch_gated(args, call, WAVE64_KERNEL_PAIRS(OP)); } \
    WAVE64_OP(OP, GatedArgs, x, out, x_stride, num_tokens, d, dtype)                                 \
    }                                                                                                \
    }

#endif
