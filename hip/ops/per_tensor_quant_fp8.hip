// Quantises activations to FP8 with one scale, given or found: q = x / scale, found scale = amax of all / limit.
//
// The trick: a first launch leaves each block's amax, and every block of the second takes the largest of them: no
// atomics, nothing to set to zero before. The second goes backwards: what the first read last is still in the cache.
// Bound by memory: x in twice (once with a given scale), 16 bytes per lane, and half of that (of 16-bit x) out.
#include "wave64/abi.h"

namespace wave64 {
inline constexpr int kMaxLanes = 512;
inline constexpr int kHeld = 2;  // packs of a chunk that a lane has
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

// What a block works on at a time: as much of a row as its lanes can hold.
template <typename T, int N>
struct Chunk {
    Row<T, N> x;
    Row<Bits8, N> q;

    WAVE64_DEVICE static Chunk of(const PerTensorQuantFp8Args& args, int index) {
        const int64_t row = args.chunks == 1 ? index : unsigned(index) / unsigned(args.chunks);
        const int64_t most = args.block * kHeld * N, in_row = (index - row * args.chunks) * most;
        const int64_t in_q = row * args.columns + in_row, left_of_q = args.num_tokens * args.columns - in_q;
        const int64_t left_of_row = args.columns - in_row, left = left_of_row < left_of_q ? left_of_row : left_of_q;
        const unsigned columns = left < most ? left : most;
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
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kBlocksPerUnit = 4;  // fill a compute unit

struct Kernels {
    int element_bytes;
    const char* aligned_amax;
    const char* aligned;
    const char* unaligned_amax;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "per_tensor_amax_bf16", "per_tensor_quant_fp8_bf16",
                                 "per_tensor_amax_bf16_unaligned", "per_tensor_quant_fp8_bf16_unaligned"},
                                {2, "per_tensor_amax_fp16", "per_tensor_quant_fp8_fp16",
                                 "per_tensor_amax_fp16_unaligned", "per_tensor_quant_fp8_fp16_unaligned"},
                                {4, "per_tensor_amax_fp32", "per_tensor_quant_fp8_fp32",
                                 "per_tensor_amax_fp32_unaligned", "per_tensor_quant_fp8_fp32_unaligned"}};

}  // namespace
}  // namespace wave64

// Of no numbers, too, there is a scale.
int32_t wave64_per_tensor_quant_fp8(const wave64::PerTensorQuantFp8Args* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "per_tensor_quant_fp8";
    PerTensorQuantFp8Args args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.columns < 0) return refuse(op, "columns", "at least 0", args.columns);
    if (args.num_parts < 1) return refuse(op, "num_parts", "at least 1", args.num_parts);
    if (!args.found) return refuse(op, "found", "an address", 0);
    if (!args.scale && !args.amax) return refuse(op, "amax", "an address where there is no scale", 0);
    const int64_t numbers = args.num_tokens * args.columns;
    if (numbers && !args.x) return refuse(op, "x", "an address", 0);
    if (numbers && !args.q) return refuse(op, "q", "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    if (args.num_tokens <= 1 || args.x_stride == args.columns) {  // rows without gaps are one row
        args.num_tokens = 1;
        args.x_stride = args.columns = numbers;
    }
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned = is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes});
    const int in_pack = aligned ? 16 / kernels.element_bytes : 1;
    const int64_t lanes = round_up(ceil_div(args.columns, in_pack * kHeld), device->wave_size);
    args.block = int32_t(std::clamp<int64_t>(lanes, device->wave_size, kMaxLanes));
    const int64_t chunks = ceil_div(args.columns, args.block * kHeld * in_pack), all_chunks = args.num_tokens * chunks;
    if (all_chunks > INT32_MAX / 2) return refuse(op, "num_tokens * columns", "at most 2^30 blocks", all_chunks);
    args.chunks = int32_t(chunks);
    args.all_chunks = int32_t(all_chunks);
    args.grid = int32_t(std::clamp<int64_t>(
        all_chunks, 1, std::min<int64_t>(args.num_parts, int64_t(device->compute_units) * kBlocksPerUnit)));

    const uint32_t grid = args.grid, block = args.block;
    const auto run = [&](const char* kernel) {
        return launch({op, kernel, {grid, 1, 1}, {block, 1, 1}, 0}, &args, sizeof args, stream);
    };
    if (!args.scale)
        if (int32_t status = run(aligned ? kernels.aligned_amax : kernels.unaligned_amax)) return status;
    return run(aligned ? kernels.aligned : kernels.unaligned);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::PerTensorQuantFp8Args, NAME)
static const bool registered = wave64::register_op<wave64::PerTensorQuantFp8Args, wave64_per_tensor_quant_fp8>(
    "per_tensor_quant_fp8", {FIELD(x), FIELD(scale), FIELD(q), FIELD(found), FIELD(amax), FIELD(x_stride),
                             FIELD(num_tokens), FIELD(columns), FIELD(num_parts), FIELD(dtype)});

#endif
