// Gated activations: out[t] = f(x[t, :d]) * x[t, d:]. The three operators differ in f alone; their kernels, launcher
// and registration are here.
//
// The trick: gate and up of the same columns meet in registers, so that nothing is written between.
// Bound by memory: 2 d values of a row in, d out, 16 bytes per lane and access, four loads under way.
#pragma once

#include "wave64/rows.h"

namespace wave64 {
constexpr int kGatedRows = 2;  // that a lane holds
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// 1 / (1 + exp(-x))
WAVE64_DEVICE float logistic(float x) { return reciprocal(1 + exp2(-1.44269504f * x)); }

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
    const RowShare share = row_share(args.shares);
    const T* x = static_cast<const T*>(args.x) + share.pack * N;
    T* out = static_cast<T*>(args.out) + share.pack * N;
    for (int64_t first = share.first; first < args.num_tokens; first += kGatedRows * share.step) {
        Pack<T, N> gate[kGatedRows], up[kGatedRows];
#pragma unroll
        for (int i = 0; i < kGatedRows; i++) {
            const int64_t token = first + i * share.step;
            if (token >= args.num_tokens) break;
            gate[i] = load_pack<T, N>(x + token * args.x_stride);
            up[i] = load_pack<T, N>(x + token * args.x_stride + args.d);
        }
#pragma unroll
        for (int i = 0; i < kGatedRows; i++) {
            const int64_t token = first + i * share.step;
            if (token >= args.num_tokens) break;
            store_pack(out + token * args.d, gated<T, N, F>(gate[i], up[i]));
        }
    }
}

}  // namespace wave64

#define WAVE64_GATED_KERNEL(NAME, T, N, F) \
    WAVE64_KERNEL(512) NAME(wave64::GatedArgs args) { wave64::gated<T, N, F>(args); }

#define WAVE64_GATED(OP, F)                                      \
    WAVE64_GATED_KERNEL(OP##_bf16, wave64::bf16, 8, F)           \
    WAVE64_GATED_KERNEL(OP##_fp16, wave64::fp16, 8, F)           \
    WAVE64_GATED_KERNEL(OP##_fp32, float, 4, F)                  \
    WAVE64_GATED_KERNEL(OP##_bf16_unaligned, wave64::bf16, 1, F) \
    WAVE64_GATED_KERNEL(OP##_fp16_unaligned, wave64::fp16, 1, F) \
    WAVE64_GATED_KERNEL(OP##_fp32_unaligned, float, 1, F)

#else
namespace wave64 {

struct GatedKernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};

inline int32_t launch_gated(const char* op, const GatedKernels (&kernels)[3], GatedArgs args, void* stream) {
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.d < 0 || args.d > 1 << 28) return refuse(op, "d", "0 to 2^28", args.d);
    if (args.num_tokens == 0 || args.d == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"x", args.x}, {"out", (const void*)args.out}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const auto& [bytes, aligned_kernel, unaligned_kernel] = kernels[args.dtype];
    const bool aligned = is_16_aligned({args.x, args.out}, {args.x_stride * bytes, int64_t(args.d) * bytes});
    const Launch over_tokens = over_rows(op, aligned ? aligned_kernel : unaligned_kernel, args.num_tokens,
                                         aligned ? args.d * bytes / 16 : args.d, kGatedRows, *device, args.shares);
    return launch(over_tokens, &args, sizeof args, stream);
}

}  // namespace wave64

#define WAVE64_GATED_FIELD(NAME) WAVE64_FIELD(wave64::GatedArgs, NAME)
#define WAVE64_GATED(OP, F)                                                                 \
    int32_t wave64_##OP(const wave64::GatedArgs* args, void* stream) {                      \
        return wave64::launch_gated(#OP,                                                    \
                                    {{2, #OP "_bf16", #OP "_bf16_unaligned"},               \
                                     {2, #OP "_fp16", #OP "_fp16_unaligned"},               \
                                     {4, #OP "_fp32", #OP "_fp32_unaligned"}},              \
                                    *args, stream);                                         \
    }                                                                                       \
    static const bool registered = wave64::register_op<wave64::GatedArgs, wave64_##OP>(     \
        #OP, {WAVE64_GATED_FIELD(x), WAVE64_GATED_FIELD(out), WAVE64_GATED_FIELD(x_stride), \
              WAVE64_GATED_FIELD(num_tokens), WAVE64_GATED_FIELD(d), WAVE64_GATED_FIELD(dtype)});

#endif
