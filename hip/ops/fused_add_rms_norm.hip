// Residual add and root mean square normalisation in place: residual += x, then x = rms_norm(residual).
//
// The rows are rms.h's: the sum, rounded to the residual's dtype, goes out and stays in registers to be normalised.
// Bound by memory: x and residual in, both out, 16 bytes per lane and access, eight loads under way. With few tokens,
// by the latency of one row.
#include "wave64/rms.h"

namespace wave64 {
constexpr int kMaxLanes = 512;  // more would leave a lane too few registers for what it holds
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
        const auto before = loaded.residual.values(), added = loaded.x.values();
        float sum[N];
        for (int j = 0; j < N; j++) sum[j] = float(before.at[j]) + float(added.at[j]);
        const auto rounded = Pack<T, N>::rounded(sum);
        residual.store(i, rounded);
        return rounded;
    }
    WAVE64_DEVICE Pack<T, N> again(int i) const { return residual.load(i); }
    WAVE64_DEVICE void store(int i, const Pack<T, N>& y) const { in_out.store(i, y); }
};

}  // namespace wave64

#define FUSED_ADD_RMS_NORM(NAME, T, N)                                                    \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::FusedAddRmsNormArgs args) {             \
        wave64::normalize_rows<T, N, wave64::kMaxLanes, wave64::FusedAddRow<T, N>>(args); \
    }

FUSED_ADD_RMS_NORM(fused_add_rms_norm_bf16, wave64::bf16, 8)
FUSED_ADD_RMS_NORM(fused_add_rms_norm_fp16, wave64::fp16, 8)
FUSED_ADD_RMS_NORM(fused_add_rms_norm_fp32, float, 4)
FUSED_ADD_RMS_NORM(fused_add_rms_norm_bf16_unaligned, wave64::bf16, 1)
FUSED_ADD_RMS_NORM(fused_add_rms_norm_fp16_unaligned, wave64::fp16, 1)
FUSED_ADD_RMS_NORM(fused_add_rms_norm_fp32_unaligned, float, 1)

#else
namespace wave64 {
namespace {

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "fused_add_rms_norm_bf16", "fused_add_rms_norm_bf16_unaligned"},
                                {2, "fused_add_rms_norm_fp16", "fused_add_rms_norm_fp16_unaligned"},
                                {4, "fused_add_rms_norm_fp32", "fused_add_rms_norm_fp32_unaligned"}};

}  // namespace
}  // namespace wave64

int32_t wave64_fused_add_rms_norm(const wave64::FusedAddRmsNormArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "fused_add_rms_norm";
    FusedAddRmsNormArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.hidden < 0 || args.hidden > 1 << 28) return refuse(op, "hidden", "0 to 2^28", args.hidden);
    if (args.num_tokens == 0 || args.hidden == 0) return kOk;
    for (auto [name, pointer] :
         {std::pair{"x", (const void*)args.x}, {"residual", args.residual}, {"weight", args.weight}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned = is_16_aligned({args.x, args.residual, args.weight},
                                       {args.x_stride * bytes, args.residual_stride * bytes, args.hidden * bytes});
    share_rms_rows(args, aligned ? args.hidden * bytes / 16 : args.hidden, kMaxLanes, *device);
    const uint32_t grid = args.grid, block = args.block;
    return launch({op, aligned ? kernels.aligned : kernels.unaligned, {grid, 1, 1}, {block, 1, 1}, 0}, &args,
                  sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::FusedAddRmsNormArgs, NAME)
static const bool registered = wave64::register_op<wave64::FusedAddRmsNormArgs, wave64_fused_add_rms_norm>(
    "fused_add_rms_norm", {FIELD(x), FIELD(residual), FIELD(weight), FIELD(x_stride), FIELD(residual_stride),
                           FIELD(num_tokens), FIELD(hidden), FIELD(eps), FIELD(dtype)});

#endif
