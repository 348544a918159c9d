// Product of a few tokens with a weight matrix: out[t] = x[t] weight^T + bias.
//
// The trick: weights go from memory straight into the registers that the matrix instructions read them from (matrix.h),
// 16 rows to a block, whose waves split the columns in turn, so that a block reads its rows one piece after another.
// Each weight is read once, with no barrier before the sums of the waves are added at the end. Bound by memory: the
// weight, 16 bytes per lane and access, several in flight.
#include "wave64/matrix.h"

namespace wave64 {

// out[t] = x[t] weight^T + bias, accumulated in fp32, rounded once.
struct LinearArgs {
    const void* x;       // [num_tokens, in_features]
    const void* weight;  // [out_features, in_features]
    const void* bias;    // [out_features], or null
    void* out;           // [num_tokens, out_features], contiguous
    int64_t x_stride;
    int64_t weight_stride;
    int32_t num_tokens;
    int32_t in_features;  // a multiple of 8
    int32_t out_features;
    Dtype dtype;  // bf16 or fp16, of all
};

constexpr int kWaves = 8;        // of a block, which take the steps of its rows in turn
constexpr int kPackNumbers = 8;  // of 16 bits, in a pack of 16 bytes

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/rows.h"

namespace wave64 {

constexpr int kPacks = 2;                              // of a row in a step, for each lane that has the row
constexpr int kStep = kPacks * kParts * kPackNumbers;  // columns of a step
constexpr int kOperands = kPackNumbers / kNumbers;     // in a pack
constexpr int kInFlight = 3;                           // steps

template <typename T, int N>
struct Columns {
    Pack<T, kPackNumbers> at[N][kPacks];
};

// Adds the products of a step.
template <typename T, int TILES>
WAVE64_DEVICE void multiply_step(const Columns<T, kTiles>& rows, const Columns<T, TILES>& tokens, Sums (&sums)[TILES]) {
    struct Operands {
        Operand at[kOperands];
    };
#pragma unroll
    for (int pack = 0; pack < kPacks; pack++) {
        Operands weights[kTiles];
        for (int tile = 0; tile < kTiles; tile++)
            weights[tile] = __builtin_bit_cast(Operands, rows.at[tile][pack].bits);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const auto x = __builtin_bit_cast(Operands, tokens.at[tile][pack].bits);
            for (int k = 0; k < kOperands; k++) {
                Operand both[kTiles];
                for (int i = 0; i < kTiles; i++) both[i] = weights[i].at[k];
                multiply<T>(both, x.at[k], sums[tile]);
            }
        }
    }
}

// Where a lane's packs of 16 rows of a matrix, or of some tokens, begin.
template <typename T, int N>
struct Lines {
    const T* at[N];

    WAVE64_DEVICE Columns<T, N> load(int column) const {
        Columns<T, N> columns;
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int pack = 0; pack < kPacks; pack++)
                columns.at[i][pack] = load_pack<T, kPackNumbers>(at[i] + column + pack * kParts * kPackNumbers);
        return columns;
    }
    // The same, zeros from column `end` on.
    WAVE64_DEVICE Columns<T, N> load_before(int column, int end) const {
        Columns<T, N> columns = {};
        const int part = lane_position().part;
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int pack = 0; pack < kPacks; pack++)
                if (column + (pack * kParts + part) * kPackNumbers < end)
                    columns.at[i][pack] = load_pack<T, kPackNumbers>(at[i] + column + pack * kParts * kPackNumbers);
        return columns;
    }
};

template <typename T, int TILES>
WAVE64_DEVICE void linear(const LinearArgs& args) {
    WAVE64_LDS static float lds[kWaves - 1][TILES * kHeads * kRows][kLanes];
    const LanePosition lane = lane_position();
    const int wave = uniform(lane_in_block() / kLanes), first_row = block_id() * 16, columns = args.in_features;
    const auto row_of = [&](int row) { return row < args.out_features ? row : args.out_features - 1; };

    Lines<T, kTiles> rows;
    Lines<T, TILES> tokens;
    const int own = lane.part * kPackNumbers;
    for (int tile = 0; tile < kTiles; tile++)
        rows.at[tile] =
            static_cast<const T*>(args.weight) + row_of(first_row + lane.row_of_16(tile)) * args.weight_stride + own;
    for (int tile = 0; tile < TILES;
         tile++) {  // tokens from num_tokens on repeat the last one: nothing is stored of them
        const int token = tile * kTileHeads + lane.line;
        const int64_t kept = token < args.num_tokens ? token : args.num_tokens - 1;
        tokens.at[tile] = static_cast<const T*>(args.x) + kept * args.x_stride + own;
    }

    Sums sums[TILES] = {};
    Columns<T, kTiles> weights[kInFlight];
    Columns<T, TILES> x[kInFlight];
    const int steps = columns / kStep;
#pragma unroll
    for (int i = 0; i < kInFlight; i++)
        if (const int step = wave + i * kWaves; step < steps)
            weights[i] = rows.load(step * kStep), x[i] = tokens.load(step * kStep);
    int first = wave;
    for (; first + (kInFlight - 1) * kWaves < steps; first += kInFlight * kWaves)
#pragma unroll
        for (int i = 0; i < kInFlight; i++) {
            multiply_step<T, TILES>(weights[i], x[i], sums);
            if (const int next = first + (i + kInFlight) * kWaves; next < steps)
                weights[i] = rows.load(next * kStep), x[i] = tokens.load(next * kStep);
        }
#pragma unroll
    for (int i = 0; i < kInFlight - 1; i++)
        if (first + i * kWaves < steps) multiply_step<T, TILES>(weights[i], x[i], sums);
    if (steps * kStep < columns && wave == steps % kWaves)
        multiply_step<T, TILES>(rows.load_before(steps * kStep, columns), tokens.load_before(steps * kStep, columns),
                                sums);

    const int id = lane_in_block() % kLanes;
    const auto index_of = [](int tile, int h, int i) { return (tile * kHeads + h) * kRows + i; };
    if (wave > 0)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            for (int h = 0; h < kHeads; h++)
                for (int i = 0; i < kRows; i++) lds[wave - 1][index_of(tile, h, i)][id] = sums[tile].at[h][i];
    block_barrier();
    if (wave > 0) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        for (int h = 0; h < kHeads; h++) {
            const int token = tile * kTileHeads + lane.head(h);
            if (token >= args.num_tokens) continue;
            for (int i = 0; i < kRows; i++) {
                const int row = first_row + lane.row_of_sums(i);
                if (row >= args.out_features) continue;
                float y = sums[tile].at[h][i];
                for (int other = 0; other < kWaves - 1; other++) y += lds[other][index_of(tile, h, i)][id];
                if (args.bias) y += float(static_cast<const T*>(args.bias)[row]);
                static_cast<T*>(args.out)[int64_t(token) * args.out_features + row] = T(y);
            }
        }
}

}  // namespace wave64

#define WAVE64_LINEAR(NAME, T, TILES)             \
    WAVE64_KERNEL(wave64::kWaves* wave64::kLanes) \
    linear_##NAME(wave64::LinearArgs args) { wave64::linear<T, TILES>(args); }
WAVE64_LINEAR(bf16_one, wave64::bf16, 1)
WAVE64_LINEAR(fp16_one, wave64::fp16, 1)
#if !defined(__gfx1100__)  // whose matrix instructions take each factor twice: two tiles spill there
WAVE64_LINEAR(bf16_two, wave64::bf16, 2)
WAVE64_LINEAR(fp16_two, wave64::fp16, 2)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kTokenTiles = 2;  // of kTileHeads tokens, at most
constexpr const char* kKernels[][kTokenTiles] = {{"linear_bf16_one", "linear_bf16_two"},
                                                 {"linear_fp16_one", "linear_fp16_two"}};

void linear(LinearArgs args, const Call& call) {
    expect_matrix_dtype(call, args.dtype);
    const int tile = call.device.is_nvidia() ? kNvidiaTileHeads : kAmdTileHeads;
    call.expect_range("num_tokens", args.num_tokens, 0, kTokenTiles * tile);
    call.expect_range("in_features", args.in_features, 0, 1 << 28);
    call.expect(args.in_features % kPackNumbers == 0, "in_features", "a multiple of 8", args.in_features);
    call.expect_min("out_features", args.out_features, 0);
    if (args.num_tokens == 0 || args.out_features == 0) return;
    call.expect_tensors({{"x", args.x}, {"weight", args.weight}, {"out", args.out}});
    call.expect(is_16_aligned({args.x, args.weight}, {args.x_stride * 2, args.weight_stride * 2}), "weight",
                "rows of x and weight that begin at multiples of 16 bytes", "others");
    call.launch(kKernels[args.dtype][args.num_tokens > tile], {ceil_div(args.out_features, 16)},
                kWaves * call.device.wave_size, args);
}

WAVE64_OP_AND_CONSTANTS(linear, LinearArgs,
                        ({{"AMD_MAX_TOKENS", kTokenTiles * kAmdTileHeads},
                          {"NVIDIA_MAX_TOKENS", kTokenTiles * kNvidiaTileHeads}}),
                        x, weight, bias, out, x_stride, weight_stride, num_tokens, in_features, out_features, dtype)

}  // namespace
}  // namespace wave64
#endif
