// Quantises activations to FP8 in groups of columns: q = x / scale, scale = amax of the group / limit.
//
// The trick: a group lies in neighbouring lanes of one wave, in registers from load to store; no LDS, no barrier.
// Bound by memory: x in, 16 bytes per lane, and half of that (of 16-bit x) out.
#include "wave64/abi.h"

namespace wave64 {
inline constexpr int kMaxLanes = 256;
inline constexpr int kSpans = 2;  // groups that a lane works on at a time
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

// A block has args.chunk columns of a row. Of groups that are too large for a pack per lane, what is behind the first
// packs is read twice.
template <typename T, int N>
WAVE64_DEVICE void per_token_group_quant_fp8(const PerTokenGroupQuantFp8Args& args) {
    const unsigned row = block_id(), in_row = unsigned(block_id_y()) * args.chunk;
    const uint64_t in_q = uint64_t(row) * unsigned(args.columns) + in_row;
    const int left_of_row = int(args.columns) - in_row;
    const unsigned columns = row == args.short_row ? args.short_columns
                             : left_of_row < args.chunk ? left_of_row : args.chunk;
    const Row<T, N> x(static_cast<const T*>(args.x) + row * args.x_stride + in_row, columns / N);
    const Row<Bits8, N> q(static_cast<Bits8*>(args.q) + in_q, columns / N);
    const Row<float, 1> scales(args.scale + uint64_t(row) * unsigned(args.row_groups) + (in_row >> args.group_bits),
                               (columns + args.group_size - 1) >> args.group_bits);

    constexpr unsigned nowhere = 1 << 26;  // behind the end of any row
    const unsigned lane = unsigned(lane_in_block()) % wave_size(), wave = unsigned(lane_in_block()) / wave_size();
    const int lanes = 1 << args.lane_bits, lane_in_group = lane & (lanes - 1);
    const int groups_of_wave = wave_size() >> args.lane_bits;
    unsigned group[kSpans], at[kSpans];
    Pack<T, N> first[kSpans];
#pragma unroll
    for (int span = 0; span < kSpans; span++) {
        group[span] = (wave * args.spans + span) * groups_of_wave + (lane >> args.lane_bits);
        at[span] = span < args.spans ? (group[span] << args.group_bits) / N + lane_in_group : nowhere;
        first[span] = x.load(at[span]);
    }
    int amax[kSpans];  // the bits of sizes, which are in the sizes' order
#pragma unroll
    for (int span = 0; span < kSpans; span++) {
        float most = amax_of(first[span]);
#pragma unroll 1
        for (int i = 1; i < args.packs; i++) most = max(most, amax_of(x.load(at[span] + i * lanes)));
        amax[span] = __builtin_bit_cast(int, most);
    }
    run_max(amax, lanes);
    Scale scale[kSpans];
#pragma unroll
    for (int span = 0; span < kSpans; span++) {
        scale[span] = scale_of(__builtin_bit_cast(float, amax[span]));
        q.store(at[span], quantized(first[span], scale[span].inverse));
        if (lane_in_group == 0)
            scales.store(span < args.spans ? group[span] : nowhere, Pack<float, 1>::of({scale[span].scale}));
    }
    if (args.packs == 1) return;
#pragma unroll
    for (int span = 0; span < kSpans; span++)
#pragma unroll 1
        for (int i = 1; i < args.packs; i++) {
            const int next = at[span] + i * lanes;
            q.store(next, quantized(x.load(next), scale[span].inverse));
        }
}

}  // namespace wave64

#define PER_TOKEN_GROUP_QUANT_FP8(NAME, T, N)                                       \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::PerTokenGroupQuantFp8Args args) { \
        wave64::per_token_group_quant_fp8<T, N>(args);                              \
    }

PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_bf16, wave64::bf16, 8)
PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_fp16, wave64::fp16, 8)
PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_fp32, float, 4)
PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_bf16_unaligned, wave64::bf16, 1)
PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_fp16_unaligned, wave64::fp16, 1)
PER_TOKEN_GROUP_QUANT_FP8(per_token_group_quant_fp8_fp32_unaligned, float, 1)
#endif

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "per_token_group_quant_fp8_bf16", "per_token_group_quant_fp8_bf16_unaligned"},
                                {2, "per_token_group_quant_fp8_fp16", "per_token_group_quant_fp8_fp16_unaligned"},
                                {4, "per_token_group_quant_fp8_fp32", "per_token_group_quant_fp8_fp32_unaligned"}};

int32_t bits_of(int power_of_two) { return __builtin_ctz(unsigned(power_of_two)); }

}  // namespace
}  // namespace wave64

int32_t wave64_per_token_group_quant_fp8(const wave64::PerTokenGroupQuantFp8Args* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "per_token_group_quant_fp8";
    PerTokenGroupQuantFp8Args args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.columns < 0 || args.columns > 1 << 28) return refuse(op, "columns", "0 to 2^28", args.columns);
    if (args.group_size < 1 || args.group_size > 1024 || args.group_size & (args.group_size - 1))
        return refuse(op, "group_size", "a power of two, at most 1024", args.group_size);
    if (args.num_tokens == 0 || args.columns == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"x", args.x}, {"q", (const void*)args.q}, {"scale", args.scale}})
        if (!pointer) return refuse(op, name, "an address", 0);

    if (args.num_tokens == 1) args.x_stride = args.columns;
    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned =
        is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes, args.group_size * bytes});
    const int in_pack = aligned ? 16 / kernels.element_bytes : 1;
    const int lanes = std::min(args.group_size / in_pack, device->wave_size);
    args.group_bits = bits_of(args.group_size);
    args.lane_bits = bits_of(lanes);
    args.packs = args.group_size / in_pack / lanes;

    // Rows without gaps are one row, of the same groups.
    const bool one_row = args.x_stride == args.columns && args.columns % args.group_size == 0;
    const int64_t numbers = args.num_tokens * args.columns;
    const int64_t groups = ceil_div(one_row ? numbers : args.columns, args.group_size);
    // Few groups: a wave per block, for many compute units, and a group per lane.
    const int64_t all_lanes = groups * lanes * (one_row ? 1 : args.num_tokens);
    const bool many = all_lanes > int64_t(device->compute_units) * kMaxLanes * kSpans;
    args.spans = many ? kSpans : 1;
    const int64_t lanes_of_row = round_up(ceil_div(groups, args.spans) * lanes, device->wave_size);
    const auto block = uint32_t(std::min<int64_t>(many ? kMaxLanes : device->wave_size, lanes_of_row));
    args.chunk = int32_t(block) / lanes * args.spans * args.group_size;
    int64_t rows = args.num_tokens, chunks = ceil_div(args.columns, args.chunk);
    args.short_row = UINT32_MAX;
    if (one_row) {  // cut into rows of a block each
        args.x_stride = args.columns = args.chunk;
        rows = ceil_div(numbers, args.chunk), chunks = 1;
        args.short_row = uint32_t(rows - 1), args.short_columns = int32_t(numbers - (rows - 1) * args.chunk);
    }
    args.row_groups = int32_t(ceil_div(args.columns, args.group_size));
    if (rows * block > UINT32_MAX) return refuse(op, "num_tokens", "at most 2^32 lanes", rows * block);
    if (chunks > UINT16_MAX) return refuse(op, "columns", "at most 65535 blocks", chunks);
    return launch(
        {op, aligned ? kernels.aligned : kernels.unaligned, {uint32_t(rows), uint32_t(chunks), 1}, {block, 1, 1}, 0},
        &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::PerTokenGroupQuantFp8Args, NAME)
static const bool registered = wave64::register_op<wave64::PerTokenGroupQuantFp8Args, wave64_per_token_group_quant_fp8>(
    "per_token_group_quant_fp8", {FIELD(x), FIELD(q), FIELD(scale), FIELD(x_stride), FIELD(num_tokens), FIELD(columns),
                                  FIELD(group_size), FIELD(dtype)});

#endif
