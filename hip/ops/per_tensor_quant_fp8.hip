// Quantizes activations to FP8 with one scale, given or found: q = x / scale, found scale = amax of all / limit.
//
// The trick: a first launch leaves each block's amax, and each block of the second takes the maximum of them: no
// atomics, nothing to zero before. The second goes backwards: the rows that the first read last are still in the cache.
// Bound by memory: x in twice (once with a given scale), 16 bytes per lane, and half of that (of 16-bit x) out.
#include "wave64/types.h"

namespace wave64 {

// q = x / scale in FP8, with one scale, given or found from all numbers; found is written either way.
struct PerTensorQuantFp8Args {
    const void* x;       // [num_tokens, columns]
    const float* scale;  // one number, or null
    void* q;             // [num_tokens, columns], contiguous
    float* found;        // one number
    float* amax;         // [num_parts] to work in, without a scale
    int64_t x_stride;
    int64_t num_tokens;
    int64_t columns;
    int32_t num_parts;  // at least 1
    Dtype dtype;        // of x
    // set by the launcher
    int32_t block;       // lanes of a block
    int32_t grid;        // blocks, at most num_parts
    int32_t chunks;      // of a row
    int32_t all_chunks;  // of all rows
};

constexpr int kMaxLanes = 512;
constexpr int kHeld = 2;  // packs of a chunk that a lane holds

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

// As much of a row as the lanes of a block hold: they work on one chunk at a time.
template <typename T, int N>
struct Chunk {
    Row<T, N> x;
    Row<Bits8, N> q;

    WAVE64_DEVICE static Chunk of(const PerTensorQuantFp8Args& args, int index) {
        const int64_t row = args.chunks == 1 ? index : unsigned(index) / unsigned(args.chunks);
        const int64_t capacity = args.block * kHeld * N, in_row = (index - row * args.chunks) * capacity;
        const int64_t in_q = row * args.columns + in_row, left_of_q = args.num_tokens * args.columns - in_q;
        const int64_t left_of_row = args.columns - in_row, left = left_of_row < left_of_q ? left_of_row : left_of_q;
        const unsigned columns = left < capacity ? left : capacity;
        return {{static_cast<const T*>(args.x) + row * args.x_stride + in_row, int(columns / N)},
                {static_cast<Bits8*>(args.q) + in_q, int(columns / N)}};
    }
};

template <typename T, int N>
WAVE64_DEVICE void per_tensor_amax(const PerTensorQuantFp8Args& args) {
    WAVE64_LDS static float lds[kMaxLanes / 32];
    float amax = 0;
    for (int index = block_id(); index < args.all_chunks; index += args.grid) {
        const Row<T, N> x = Chunk<T, N>::of(args, index).x;
        Pack<T, N> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = x.load(lane_in_block() + i * args.block);
#pragma unroll
        for (int i = 0; i < kHeld; i++) amax = max(amax, amax_of(held[i]));
    }
    amax = block_max(amax, lds, args.block);
    if (lane_in_block() == 0) args.amax[block_id()] = amax;
}

template <typename T, int N>
WAVE64_DEVICE void per_tensor_quant_fp8(const PerTensorQuantFp8Args& args) {
    WAVE64_LDS static int lds[kMaxLanes / 32];
    Scale scale;
    if (args.scale) {
        scale = {*args.scale, 1 / max(*args.scale, kMinScale)};
    } else {
        float amax = 0;
        for (int i = lane_in_block(); i < args.grid; i += args.block) amax = max(amax, args.amax[i]);
        scale = scale_of_block(amax, lds, args.block);
    }
    if (block_id() == 0 && lane_in_block() == 0) *args.found = scale.scale;

    for (int index = args.all_chunks - 1 - block_id(); index >= 0; index -= args.grid) {
        const auto chunk = Chunk<T, N>::of(args, index);
        Pack<T, N> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = chunk.x.load(lane_in_block() + i * args.block);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            chunk.q.store(lane_in_block() + i * args.block, quantized<false>(held[i], scale.inverse));
    }
}

}  // namespace wave64

#define PER_TENSOR_QUANT_FP8(AMAX, NAME, T, N)                                                                         \
    WAVE64_KERNEL(wave64::kMaxLanes) AMAX(wave64::PerTensorQuantFp8Args args) { wave64::per_tensor_amax<T, N>(args); } \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::PerTensorQuantFp8Args args) {                                        \
        wave64::per_tensor_quant_fp8<T, N>(args);                                                                      \
    }

PER_TENSOR_QUANT_FP8(per_tensor_amax_bf16, per_tensor_quant_fp8_bf16, wave64::bf16, 8)
PER_TENSOR_QUANT_FP8(per_tensor_amax_fp16, per_tensor_quant_fp8_fp16, wave64::fp16, 8)
PER_TENSOR_QUANT_FP8(per_tensor_amax_fp32, per_tensor_quant_fp8_fp32, float, 4)
PER_TENSOR_QUANT_FP8(per_tensor_amax_bf16_unaligned, per_tensor_quant_fp8_bf16_unaligned, wave64::bf16, 1)
PER_TENSOR_QUANT_FP8(per_tensor_amax_fp16_unaligned, per_tensor_quant_fp8_fp16_unaligned, wave64::fp16, 1)
PER_TENSOR_QUANT_FP8(per_tensor_amax_fp32_unaligned, per_tensor_quant_fp8_fp32_unaligned, float, 1)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kBlocksPerUnit = 4;  // fill a compute unit
constexpr KernelPairs kAmaxKernels = WAVE64_KERNEL_PAIRS(per_tensor_amax);
constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(per_tensor_quant_fp8);

// Even an empty x has a scale.
void per_tensor_quant_fp8(PerTensorQuantFp8Args args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_min("columns", args.columns, 0);
    call.expect_min("num_parts", args.num_parts, 1);
    call.expect_tensors({{"found", args.found}});
    if (!args.scale) call.expect_tensors({{"amax", args.amax}});
    const int64_t numbers = args.num_tokens * args.columns;
    if (numbers) call.expect_tensors({{"x", args.x}, {"q", args.q}});

    if (args.num_tokens <= 1 || args.x_stride == args.columns) {  // rows without gaps are one row
        args.num_tokens = 1;
        args.x_stride = args.columns = numbers;
    }
    const int64_t bytes = element_bytes(args.dtype), wave_size = call.device.wave_size;
    const bool aligned = is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes});
    const int64_t in_pack = aligned ? 16 / bytes : 1;
    args.block = int32_t(
        std::clamp<int64_t>(round_up(ceil_div(args.columns, in_pack * kHeld), wave_size), wave_size, kMaxLanes));
    const int64_t chunks = ceil_div(args.columns, args.block * kHeld * in_pack), all_chunks = args.num_tokens * chunks;
    call.expect(all_chunks <= INT32_MAX / 2, "num_tokens * columns", "at most 2^30 blocks", all_chunks);
    args.chunks = int32_t(chunks);
    args.all_chunks = int32_t(all_chunks);
    args.grid = int32_t(std::clamp<int64_t>(
        all_chunks, 1, std::min<int64_t>(args.num_parts, call.device.compute_units * kBlocksPerUnit)));
    if (!args.scale) call.launch(kAmaxKernels[args.dtype].of(aligned), {args.grid}, args.block, args);
    call.launch(kKernels[args.dtype].of(aligned), {args.grid}, args.block, args);
}

WAVE64_OP(per_tensor_quant_fp8, PerTensorQuantFp8Args, x, scale, q, found, amax, x_stride, num_tokens, columns,
          num_parts, dtype)

}  // namespace
}  // namespace wave64
#endif
