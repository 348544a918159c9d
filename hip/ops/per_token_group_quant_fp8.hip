// Quantizes activations to FP8 in groups of columns: q = x / scale, scale = amax of the group / limit.
//
// The trick: a group lies in neighboring lanes of one wave, in registers from load to store; no LDS, no barrier.
// Bound by memory: x in, 16 bytes per lane, and half of that (of 16-bit x) out.
#include "wave64/types.h"

namespace wave64 {

// q = x / scale in FP8, with a scale for each group of columns, which is written.
struct PerTokenGroupQuantFp8Args {
    const void* x;  // [num_tokens, columns]
    void* q;        // [num_tokens, columns], contiguous
    float* scale;   // [num_tokens, ceil(columns / group_size)]
    int64_t x_stride;
    int64_t num_tokens;
    int64_t columns;
    int32_t group_size;  // a power of two, at most 1024
    Dtype dtype;         // of x
    // set by the launcher
    int32_t chunk;       // columns of a block
    int32_t row_groups;  // groups of a row
    uint32_t short_row;  // the row with fewer columns than the others, if there is one
    int32_t short_columns;
    int32_t group_bits;  // 2^group_bits is group_size
    int32_t lane_bits;   // a group has 2^lane_bits lanes
    int32_t packs;       // of a group, in each of these lanes
    int32_t spans;       // groups of a lane
};

constexpr int kMaxLanes = 256;
constexpr int kSpans = 2;  // groups that a lane works on at a time

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/quant.h"

#if WAVE64_HAS_FP8
namespace wave64 {

// A block has args.chunk columns of a row. If a group is too large for a pack per lane, all but the first packs are
// read twice.
template <typename T, int N>
WAVE64_DEVICE void per_token_group_quant_fp8(const PerTokenGroupQuantFp8Args& args) {
    const unsigned row = block_id(), in_row = unsigned(block_id_y()) * args.chunk;
    const uint64_t in_q = uint64_t(row) * unsigned(args.columns) + in_row;
    const int left_of_row = int(args.columns) - in_row;
    const unsigned columns = row == args.short_row      ? args.short_columns
                             : left_of_row < args.chunk ? left_of_row
                                                        : args.chunk;
    const Row<T, N> x(static_cast<const T*>(args.x) + row * args.x_stride + in_row, columns / N);
    const Row<Bits8, N> q(static_cast<Bits8*>(args.q) + in_q, columns / N);
    const Row<float, 1> scales(args.scale + uint64_t(row) * unsigned(args.row_groups) + (in_row >> args.group_bits),
                               (columns + args.group_size - 1) >> args.group_bits);

    constexpr unsigned nowhere = 1 << 26;  // past the end of any row
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
    int amax[kSpans];  // the bits of magnitudes, which are in the same order
#pragma unroll
    for (int span = 0; span < kSpans; span++) {
        float largest = amax_of(first[span]);
#pragma unroll 1
        for (int i = 1; i < args.packs; i++) largest = max(largest, amax_of(x.load(at[span] + i * lanes)));
        amax[span] = __builtin_bit_cast(int, largest);
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

WAVE64_KERNELS(per_token_group_quant_fp8, wave64::kMaxLanes, PerTokenGroupQuantFp8Args)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(per_token_group_quant_fp8);

int32_t bits_of(int power_of_two) { return __builtin_ctz(unsigned(power_of_two)); }

void per_token_group_quant_fp8(PerTokenGroupQuantFp8Args args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("columns", args.columns, 0, 1 << 28);
    call.expect(args.group_size >= 1 && args.group_size <= 1024 && !(args.group_size & (args.group_size - 1)),
                "group_size", "a power of two, at most 1024", args.group_size);
    if (args.num_tokens == 0 || args.columns == 0) return;
    call.expect_tensors({{"x", args.x}, {"q", args.q}, {"scale", args.scale}});

    if (args.num_tokens == 1) args.x_stride = args.columns;
    const Device& device = call.device;
    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned =
        is_16_aligned({args.x, args.q}, {args.x_stride * bytes, args.columns * bytes, args.group_size * bytes});
    const int in_pack = aligned ? int(16 / bytes) : 1;
    const int lanes = std::min(args.group_size / in_pack, device.wave_size);
    args.group_bits = bits_of(args.group_size);
    args.lane_bits = bits_of(lanes);
    args.packs = args.group_size / in_pack / lanes;

    // Rows without gaps are one row with the same groups.
    const bool one_row = args.x_stride == args.columns && args.columns % args.group_size == 0;
    const int64_t numbers = args.num_tokens * args.columns;
    const int64_t groups = ceil_div(one_row ? numbers : args.columns, args.group_size);
    // Few groups: a wave per block, for many compute units, and a group per lane.
    const int64_t all_lanes = groups * lanes * (one_row ? 1 : args.num_tokens);
    const bool many = all_lanes > int64_t(device.compute_units) * kMaxLanes * kSpans;
    args.spans = many ? kSpans : 1;
    const int64_t lanes_of_row = round_up(ceil_div(groups, args.spans) * lanes, device.wave_size);
    const int64_t block = std::min<int64_t>(many ? kMaxLanes : device.wave_size, lanes_of_row);
    args.chunk = int32_t(block) / lanes * args.spans * args.group_size;
    int64_t rows = args.num_tokens, chunks = ceil_div(args.columns, args.chunk);
    args.short_row = UINT32_MAX;
    if (one_row) {  // cut into rows of a block each
        args.x_stride = args.columns = args.chunk;
        rows = ceil_div(numbers, args.chunk), chunks = 1;
        args.short_row = uint32_t(rows - 1), args.short_columns = int32_t(numbers - (rows - 1) * args.chunk);
    }
    args.row_groups = int32_t(ceil_div(args.columns, args.group_size));
    call.expect(rows * block <= UINT32_MAX, "num_tokens", "at most 2^32 lanes", rows * block);
    call.expect(chunks <= kMaxGridY, "columns", "at most 65535 blocks", chunks);
    call.launch(kKernels[args.dtype].of(aligned), {rows, chunks}, block, args);
}

WAVE64_OP(per_token_group_quant_fp8, PerTokenGroupQuantFp8Args, x, q, scale, x_stride, num_tokens, columns, group_size,
          dtype)

}  // namespace
}  // namespace wave64
#endif
