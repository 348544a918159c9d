// Quantises activations to FP8 with a scale for each token: q[t] = x[t] / scale[t], scale[t] = amax of x[t] / limit.
//
// The trick: a block keeps its row in registers between the maximum and the scaling, so x is read once.
// Bound by memory: x in, 16 bytes per lane, and half of that (of 16-bit x) out. With few tokens, by the latency of one
// row: a load, a maximum over the block, a store.
#include "wave64/abi.h"

namespace wave64 {
inline constexpr int kMaxLanes = 1024;
inline constexpr int kHeld = 4;  // packs of a row that a lane holds; of longer rows, the rest is read twice
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE void per_token_quant_fp8(const PerTokenQuantFp8Args& args) {
    WAVE64_LDS static int lds[2][kMaxLanes / 32];  // two, so that a row's maximum may begin while the last's is read
    const int num_packs = args.columns / N, first = lane_in_block(), block = args.block;

    int turn = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, turn ^= 1) {
        const Row<T, N> x(static_cast<const T*>(args.x) + token * args.x_stride, num_packs);
        const Row<Bits8, N> q(static_cast<Bits8*>(args.q) + token * args.columns, num_packs);

        Pack<T, N> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = x.load(first + i * block);
        float amax = 0;
#pragma unroll
        for (int i = 0; i < kHeld; i++) amax = max(amax, amax_of(held[i]));
#pragma unroll 1
        for (int i = first + kHeld * block; i < num_packs; i += block) amax = max(amax, amax_of(x.load(i)));

        const Scale scale = scale_of_block(amax, lds[turn], block);
#pragma unroll
        for (int i = 0; i < kHeld; i++) q.store(first + i * block, quantized(held[i], scale.inverse));
#pragma unroll 1
        for (int i = first + kHeld * block; i < num_packs; i += block) q.store(i, quantized(x.load(i), scale.inverse));
        if (first == 0) args.scale[token] = scale.scale;
    }
}

}  // namespace wave64

#define PER_TOKEN_QUANT_FP8(NAME, T, N)                                        \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::PerTokenQuantFp8Args args) { \
        wave64::per_token_quant_fp8<T, N>(args);                               \
    }

PER_TOKEN_QUANT_FP8(per_token_quant_fp8_bf16, wave64::bf16, 8)
PER_TOKEN_QUANT_FP8(per_token_quant_fp8_fp16, wave64::fp16, 8)
PER_TOKEN_QUANT_FP8(per_token_quant_fp8_fp32, float, 4)
PER_TOKEN_QUANT_FP8(per_token_quant_fp8_bf16_unaligned, wave64::bf16, 1)
PER_TOKEN_QUANT_FP8(per_token_quant_fp8_fp16_unaligned, wave64::fp16, 1)
PER_TOKEN_QUANT_FP8(per_token_quant_fp8_fp32_unaligned, float, 1)
#endif

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kBlocksPerUnit = 32;  // enough to fill a compute unit; more tokens than that share blocks

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "per_token_quant_fp8_bf16", "per_token_quant_fp8_bf16_unaligned"},
                                {2, "per_token_quant_fp8_fp16", "per_token_quant_fp8_fp16_unaligned"},
                                {4, "per_token_quant_fp8_fp32", "per_token_quant_fp8_fp32_unaligned"}};

}  // namespace
}  // namespace wave64

int32_t wave64_per_token_quant_fp8(const wave64::PerTokenQuantFp8Args* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "per_token_quant_fp8";
    PerTokenQuantFp8Args args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.columns < 0 || args.columns > 1 << 28) return refuse(op, "columns", "0 to 2^28", args.columns);
    if (args.num_tokens == 0 || args.columns == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"x", args.x}, {"q", (const void*)args.q}, {"scale", args.scale}})
        if (!pointer) return refuse(op, name, "an address", 0);

    if (args.num_tokens == 1) args.x_stride = args.columns;
    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned = is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes});
    const int64_t num_packs = aligned ? args.columns * bytes / 16 : args.columns;
    // Few lanes per row, so that each has much in flight and few waves meet for its maximum: quicker even for one row.
    args.block = int32_t(std::min<int64_t>(round_up(ceil_div(num_packs, kHeld), device->wave_size), kMaxLanes));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, int64_t(device->compute_units) * kBlocksPerUnit));

    const uint32_t grid = args.grid, block = args.block;
    return launch({op, aligned ? kernels.aligned : kernels.unaligned, {grid, 1, 1}, {block, 1, 1}, 0}, &args,
                  sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::PerTokenQuantFp8Args, NAME)
static const bool registered = wave64::register_op<wave64::PerTokenQuantFp8Args, wave64_per_token_quant_fp8>(
    "per_token_quant_fp8",
    {FIELD(x), FIELD(q), FIELD(scale), FIELD(x_stride), FIELD(num_tokens), FIELD(columns), FIELD(dtype)});

#endif
