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
WAVE64_DEVICE Floats2 logistic(Floats2 x) {
    x = x * both(-1.44269504f);
    x = both(1) + Floats2{exp2(x.x), exp2(x.y)};
    return {reciprocal(x.x), reciprocal(x.y)};
}

WAVE64_DEVICE float silu(float x) { return x * logistic(x); }
WAVE64_DEVICE Floats2 silu(Floats2 x) { return x * logistic(x); }

template <typename T, int N, Floats2 F(Floats2)>
WAVE64_DEVICE Numbers<N> gated(const Pack<T, N>& gate, const Pack<T, N>& up) {
    auto y = gate.numbers();
    y.each(up.numbers(), [](const Floats2& gate, const Floats2& up) { return F(gate) * up; });
    return y;
}

// Calls store(token, out, gate, up) for this lane's pack of its rows, where `out` is at that pack of [num_tokens, d].
template <typename T, int N, typename Args, typename Out, typename Store>
WAVE64_DEVICE void for_gated_rows(const Args& args, const LaneRows& rows, Out* out, const Store& store) {
    // A lane's rows are the same distance apart: no more than its first is multiplied.
    const T* x = static_cast<const T*>(args.x) + rows.pack * N + rows.first_times(args.x_stride);
    out += rows.pack * N + rows.first_times(args.d);
    const int64_t x_step = rows.step * args.x_stride, out_step = rows.step * args.d;
    for (int64_t token = rows.first; token < args.num_tokens; token += kGatedRows * rows.step) {
        Pack<T, N> gate[kGatedRows], up[kGatedRows];
#pragma unroll
        for (int i = 0; i < kGatedRows; i++, x += x_step) {
            if (i > 0 && token + i * rows.step >= args.num_tokens) break;
            gate[i] = load_pack<T, N>(x);
            up[i] = load_pack<T, N>(x + args.d);
        }
#pragma unroll
        for (int i = 0; i < kGatedRows; i++, out += out_step) {
            if (i > 0 && token + i * rows.step >= args.num_tokens) break;
            store(token + i * rows.step, out, gate[i], up[i]);
        }
    }
}

template <typename T, int N, Floats2 F(Floats2)>
WAVE64_DEVICE void gated(const GatedArgs& args) {
    for_gated_rows<T, N>(args, lane_rows(args.partition), static_cast<T*>(args.out),
                         [&](int64_t, T* out, const Pack<T, N>& gate, const Pack<T, N>& up) {
                             store_pack(out, Pack<T, N>::rounded_of_same(gated<T, N, F>(gate, up).at));
                         });
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
