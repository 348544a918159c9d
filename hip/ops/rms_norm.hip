// Root mean square normalisation: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight.
//
// The rows are rms.h's: a block keeps its row in registers between the sum and the scaling, so x is read once.
// Bound by memory: 2 * num_tokens * hidden elements, moved 16 bytes per lane. With few tokens, by the latency of one
// row: a load, a sum over the block, a store.
#include "wave64/rms.h"

namespace wave64 {
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

}  // namespace wave64

#define RMS_NORM(NAME, T, N)                                                             \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::RmsNormArgs args) {                    \
        wave64::normalize_rows<T, N, wave64::kMaxLanes, wave64::RmsNormRow<T, N>>(args); \
    }

RMS_NORM(rms_norm_bf16, wave64::bf16, 8)
RMS_NORM(rms_norm_fp16, wave64::fp16, 8)
RMS_NORM(rms_norm_fp32, float, 4)
RMS_NORM(rms_norm_bf16_unaligned, wave64::bf16, 1)
RMS_NORM(rms_norm_fp16_unaligned, wave64::fp16, 1)
RMS_NORM(rms_norm_fp32_unaligned, float, 1)

#else
namespace wave64 {
namespace {

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "rms_norm_bf16", "rms_norm_bf16_unaligned"},
                                {2, "rms_norm_fp16", "rms_norm_fp16_unaligned"},
                                {4, "rms_norm_fp32", "rms_norm_fp32_unaligned"}};

}  // namespace
}  // namespace wave64

int32_t wave64_rms_norm(const wave64::RmsNormArgs* caller_args, void* stream) {
    using namespace wave64;
    RmsNormArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse("rms_norm", "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse("rms_norm", "num_tokens", "at least 0", args.num_tokens);
    if (args.hidden < 0 || args.hidden > 1 << 28) return refuse("rms_norm", "hidden", "0 to 2^28", args.hidden);
    if (args.num_tokens == 0 || args.hidden == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"x", args.x}, {"weight", args.weight}, {"out", (const void*)args.out}})
        if (!pointer) return refuse("rms_norm", name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned = is_16_aligned({args.x, args.weight, args.out},
                                       {args.x_stride * bytes, args.out_stride * bytes, args.hidden * bytes});
    share_rms_rows(args, aligned ? args.hidden * bytes / 16 : args.hidden, kMaxLanes, *device);
    const uint32_t grid = args.grid, block = args.block;
    return launch({"rms_norm", aligned ? kernels.aligned : kernels.unaligned, {grid, 1, 1}, {block, 1, 1}, 0}, &args,
                  sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::RmsNormArgs, NAME)
static const bool registered = wave64::register_op<wave64::RmsNormArgs, wave64_rms_norm>(
    "rms_norm", {FIELD(x), FIELD(weight), FIELD(out), FIELD(x_stride), FIELD(out_stride), FIELD(num_tokens),
                 FIELD(hidden), FIELD(eps), FIELD(dtype)});

#endif
