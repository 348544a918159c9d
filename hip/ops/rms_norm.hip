// Root mean square normalisation: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight.
//
// The trick: a block keeps its row in registers between the sum and the scaling, so x is read once.
// Bound by memory: 2 * num_tokens * hidden elements, moved 16 bytes per lane. With few tokens, by the latency of one
// row: a load, a sum over the block, a store.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kMaxLanes = 1024;
constexpr int kHeld = 4;  // packs of a row that a lane holds; of longer rows, the rest is read twice
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE float sum_of_squares(const Pack<T, N>& x) {
    const auto values = x.values();
    float sum = 0;
    for (int i = 0; i < N; i++) sum += float(values.at[i]) * float(values.at[i]);
    return sum;
}

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> scaled(const Pack<T, N>& x, const Pack<T, N>& weight, float scale) {
    auto values = x.values();
    const auto weights = weight.values();
    for (int i = 0; i < N; i++) values.at[i] = T(float(values.at[i]) * scale * float(weights.at[i]));
    return Pack<T, N>::of(values);
}

template <typename T, int N>
WAVE64_DEVICE void rms_norm(const RmsNormArgs& args) {
    WAVE64_LDS static float lds[2][kMaxLanes / 32];  // two, so that a row's sum may begin while the last one's is read
    const int num_packs = args.hidden / N, first = lane_in_block(), block = args.block;

    // A lane's columns are the same in every row, so its weights are read once, and beside the first row, not after it.
    const Row<T, N> weight(args.weight, num_packs);
    Pack<T, N> held_weight[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) held_weight[i] = weight.load(first + i * block);

    int turn = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, turn ^= 1) {
        const Row<T, N> x(static_cast<const T*>(args.x) + token * args.x_stride, num_packs);
        const Row<T, N> out(static_cast<T*>(args.out) + token * args.out_stride, num_packs);

        Pack<T, N> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = x.load(first + i * block);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kHeld; i++) sum += sum_of_squares(held[i]);
        for (int i = first + kHeld * block; i < num_packs; i += block) sum += sum_of_squares(x.load(i));

        const float scale = rsqrt(block_sum(sum, lds[turn], block) / float(args.hidden) + args.eps);
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            forget(held_weight[i].bits);  // unpacked ahead of the loop, weights double in size and make x's load wait
            out.store(first + i * block, scaled(held[i], held_weight[i], scale));
        }
        for (int i = first + kHeld * block; i < num_packs; i += block)
            out.store(i, scaled(x.load(i), weight.load(i), scale));
    }
}

}  // namespace wave64

#define RMS_NORM(NAME, T, N) \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::RmsNormArgs args) { wave64::rms_norm<T, N>(args); }

RMS_NORM(rms_norm_bf16, wave64::bf16, 8)
RMS_NORM(rms_norm_fp16, wave64::fp16, 8)
RMS_NORM(rms_norm_fp32, float, 4)
RMS_NORM(rms_norm_bf16_unaligned, wave64::bf16, 1)
RMS_NORM(rms_norm_fp16_unaligned, wave64::fp16, 1)
RMS_NORM(rms_norm_fp32_unaligned, float, 1)

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kBlocksPerUnit = 32;  // enough to fill a compute unit; more tokens than that share blocks, and weights

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "rms_norm_bf16", "rms_norm_bf16_unaligned"},
                                {2, "rms_norm_fp16", "rms_norm_fp16_unaligned"},
                                {4, "rms_norm_fp32", "rms_norm_fp32_unaligned"}};

// Whether every row of every tensor begins at a multiple of 16 bytes and ends at one.
bool is_aligned(const RmsNormArgs& args, int element_bytes) {
    const auto bases = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight) |
                       reinterpret_cast<uintptr_t>(args.out);
    const int64_t steps = args.x_stride | args.out_stride | args.hidden;
    return bases % 16 == 0 && steps * element_bytes % 16 == 0;
}

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
    const bool aligned = is_aligned(args, kernels.element_bytes);
    const int64_t num_packs = aligned ? args.hidden * kernels.element_bytes / 16 : args.hidden;
    // Many tokens: few lanes per row, so that each has much in flight. Few tokens: as many as shorten the row.
    const int packs_per_lane = args.num_tokens > device->compute_units ? kHeld : 1;
    args.block =
        int32_t(std::min<int64_t>(round_up(ceil_div(num_packs, packs_per_lane), device->wave_size), kMaxLanes));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, int64_t(device->compute_units) * kBlocksPerUnit));

    const uint32_t grid = args.grid, block = args.block;
    return launch({"rms_norm", aligned ? kernels.aligned : kernels.unaligned, {grid, 1, 1}, {block, 1, 1}, 0}, &args,
                  sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::RmsNormArgs, NAME)
static const bool registered = wave64::register_op<wave64::RmsNormArgs, wave64_rms_norm>(
    "rms_norm", {FIELD(x), FIELD(weight), FIELD(out), FIELD(x_stride), FIELD(out_stride), FIELD(num_tokens),
                 FIELD(hidden), FIELD(eps), FIELD(dtype)});

#endif
