// Quantizes activations to FP8 with a scale for each token: q[t] = x[t] / scale[t], scale[t] = amax of x[t] / limit.
//
// The trick: a block keeps its row in registers between the maximum and the scaling, so x is read once.
// Bound by memory: x in, 16 bytes per lane, and half of that (of 16-bit x) out. With few tokens, by the latency of one
// row: a load, a maximum over the block, a store.
#include "wave64/types.h"

namespace wave64 {

// q = x / scale in FP8, with a scale for each row, which is written.
struct PerTokenQuantFp8Args {
    const void* x;  // [num_tokens, columns]
    void* q;        // [num_tokens, columns], contiguous
    float* scale;   // [num_tokens]
    int64_t x_stride;
    int64_t num_tokens;
    int32_t columns;
    Dtype dtype;  // of x
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
};

constexpr int kMaxLanes = 1024;
constexpr int kHeld = 4;  // packs of a row that a lane holds; the rest of a longer row is read twice

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE void per_token_quant_fp8(const PerTokenQuantFp8Args& args) {
    WAVE64_LDS static int lds[2]
                             [kMaxLanes / 32];  // two, so that a row's maximum may begin while the last one's is read
    const int num_packs = args.columns / N, first = lane_in_block(), block = args.block;

    int parity = 0;
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid, parity ^= 1) {
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

        const Scale scale = scale_of_block(amax, lds[parity], block);
#pragma unroll
        for (int i = 0; i < kHeld; i++) q.store(first + i * block, quantized(held[i], scale.inverse));
#pragma unroll 1
        for (int i = first + kHeld * block; i < num_packs; i += block) q.store(i, quantized(x.load(i), scale.inverse));
        if (first == 0) args.scale[token] = scale.scale;
    }
}

}  // namespace wave64

WAVE64_KERNELS(per_token_quant_fp8, wave64::kMaxLanes, PerTokenQuantFp8Args)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kBlocksPerUnit = 32;  // enough to fill a compute unit; with more tokens, blocks take several
constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(per_token_quant_fp8);

void per_token_quant_fp8(PerTokenQuantFp8Args args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("columns", args.columns, 0, 1 << 28);
    if (args.num_tokens == 0 || args.columns == 0) return;
    call.expect_tensors({{"x", args.x}, {"q", args.q}, {"scale", args.scale}});

    if (args.num_tokens == 1) args.x_stride = args.columns;
    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes});
    const int64_t num_packs = aligned ? args.columns * bytes / 16 : args.columns;
    // Few lanes per row, so that each has many loads in flight and few waves meet for its maximum: faster even for one
    // row.
    args.block = int32_t(std::min<int64_t>(round_up(ceil_div(num_packs, kHeld), call.device.wave_size), kMaxLanes));
    args.grid = int32_t(std::min<int64_t>(args.num_tokens, int64_t(call.device.compute_units) * kBlocksPerUnit));
    call.launch(kKernels[args.dtype].of(aligned), {args.grid}, args.block, args);
}

WAVE64_OP(per_token_quant_fp8, PerTokenQuantFp8Args, x, q, scale, x_stride, num_tokens, columns, dtype)

}  // namespace
}  // namespace wave64
#endif
