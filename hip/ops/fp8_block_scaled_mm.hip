// FP8 GEMM with block scales, y = a b^T: the matrix cores sum 128 columns at a time, and the scaled sum is added in
// fp32.
//
// The trick: weights are the rows of the matrix instructions' products, so that a lane has one token and one scale, and
// neighboring columns of y to store. For few tokens both factors go from memory straight into registers, the waves of a
// block take the steps along K in turn, and their sums meet in LDS once, at the end: bound by reading the weights. For
// many, four waves have columns of their own, and both come in whole lines and pass through LDS (fp8_tile.h): bound by
// the matrix cores.
#include "wave64/fp8_tile.h"

namespace wave64 {

// y[m][n] = sum over groups g of a_scale[m][g] b_scale[n / block_n][g] sum over k in g of a[m][k] b[n][k].
struct Fp8BlockScaledMmArgs {
    const void* a;         // [m, k]
    const void* b;         // [n, k]
    const float* a_scale;  // [m, ceil(k / block_k)]
    const float* b_scale;  // [ceil(n / block_n), ceil(k / block_k)]
    void* y;               // [m, n], contiguous
    float* partial;        // [num_splits, m * n rounded up to 4] to work in; null without splits
    int64_t a_stride;
    int64_t b_stride;
    int64_t a_scale_stride;
    int64_t a_scale_column_stride;
    int64_t b_scale_stride;
    int64_t b_scale_column_stride;
    int32_t m;
    int32_t n;
    int32_t k;        // a multiple of 16
    int32_t block_n;  // a multiple of 128, as the next
    int32_t block_k;
    int32_t num_splits;  // of k; more than 1 only for more than few tokens
    Dtype dtype;         // of y
    // set by the launcher
    int32_t steps;        // along k, of 128 columns
    int32_t split_steps;  // of a split
    int32_t waves;        // of a block for few tokens, of which each has
    int32_t turns;        // steps, and
    int32_t more_steps;   // the first so many one more
    int32_t blocks;       // of a split
    int32_t tiles_m;
    int32_t group_tiles;      // tiles of kGroupTiles rows of tiles
    IntDivider by_group;      // group_tiles
    IntDivider by_last_rows;  // rows of tiles in the last such group
    IntDivider by_block_n;
    IntDivider by_group_steps;  // steps with the same scales
    int64_t size;               // m * n
    int64_t partial_size;       // of a split
};

constexpr int kFewColumns = 16;   // of a block for few tokens
constexpr int kTileTokens = 128;  // of a block for many
constexpr int kGroupTiles = 8;    // rows of tiles that blocks go through column by column
constexpr int kMergeLanes = 256;
constexpr int kMaxWaves[] = {16, 16, 8};  // for few tokens: of 16, 32 and 64 tokens in a block

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/rows.h"

#if WAVE64_HAS_FP8_MATRIX
namespace wave64 {

// The tile of y that a block computes.
struct Tile {
    int m, n;

    // Each die gets a range of tiles, in groups of kGroupTiles rows of tiles, column by column: blocks that run
    // together read the same rows of both factors.
    WAVE64_DEVICE Tile(const Fp8BlockScaledMmArgs& args) {
        const unsigned item = item_of_die(args.blocks);
        const unsigned group = item / args.by_group, first = group * kGroupTiles;
        const bool last = first + kGroupTiles >= unsigned(args.tiles_m);
        const unsigned rows = last ? args.tiles_m - first : kGroupTiles;
        const unsigned position = item - group * args.group_tiles;
        const unsigned column = last ? position / args.by_last_rows : position / kGroupTiles;
        m = int(first + position - column * rows), n = int(column);
    }
};

// Scales of tokens and of weights, by group of columns.
class Scales {
    Bounded tokens;
    const char* weights;
    unsigned token_step, weight_step;
    IntDivider by_group_steps;

public:
    // From token m and column n on, which is that of the last block if there are no such columns.
    WAVE64_DEVICE Scales(const Fp8BlockScaledMmArgs& args, int m, int n)
        : tokens(args.a_scale + m * args.a_scale_stride, 0x7fffffff),
          weights(reinterpret_cast<const char*>(
              args.b_scale + int64_t(unsigned(n < args.n ? n : args.n - 1) / args.by_block_n) * args.b_scale_stride)),
          token_step(unsigned(args.a_scale_column_stride) * 4),
          weight_step(unsigned(args.b_scale_column_stride) * 4),
          by_group_steps(args.by_group_steps) {}
    WAVE64_DEVICE unsigned group(int step) const { return unsigned(step) / by_group_steps; }
    // at: bytes behind token m's.
    WAVE64_DEVICE float of_token(unsigned group, int at) const {
        return __builtin_bit_cast(float, tokens.load<Bits32>(at, int(group * token_step)));
    }
    // Of a group that differs between lanes.
    WAVE64_DEVICE float of_token_and_group(unsigned group, int at) const {
        return __builtin_bit_cast(float, tokens.load<Bits32>(at + int(group * token_step)));
    }
    WAVE64_DEVICE float of_weight(unsigned group) const {
        return __builtin_bit_cast(float, load_uniform(reinterpret_cast<const int32_t*>(weights + group * weight_step)));
    }
};

// Bytes from the scale of token m to that of the one `row` behind it, or of the last token.
WAVE64_DEVICE int scale_offset(const Fp8BlockScaledMmArgs& args, int m, int row) {
    return (m + row < args.m ? row : args.m - 1 - m) * int(args.a_scale_stride) * 4;
}

// Stores neighboring numbers of y's row m from column n on; those behind the last column are left out.
template <typename T, int N>
WAVE64_DEVICE void store_run(const Fp8BlockScaledMmArgs& args, T* y, int m, int n, const float (&x)[N]) {
    T* const at = y + int64_t(m) * args.n + n;
    if (m >= args.m || n >= args.n) return;
    if (args.n % N == 0) {
        if constexpr (sizeof(T) * N <= 16) {
            store_pack(at, Pack<T, N>::rounded(x));
        } else {
            for (int i = 0; i < N; i += 4)
                store_pack(at + i, Pack<float, 4>::of({{x[i], x[i + 1], x[i + 2], x[i + 3]}}));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (n + i < args.n) at[i] = T(x[i]);
}
template <int N>
WAVE64_DEVICE void store_run(const Fp8BlockScaledMmArgs& args, int m, int n, const float (&x)[N]) {
    if (args.dtype == kBf16)
        store_run(args, static_cast<bf16*>(args.y), m, n, x);
    else if (args.dtype == kFp16)
        store_run(args, static_cast<fp16*>(args.y), m, n, x);
    else
        store_run(args, static_cast<float*>(args.y), m, n, x);
}

// ---- few tokens: a block has kFewColumns columns of y and 16 TILES tokens, a wave every args.waves-th step along K

template <int TILES>
struct Step {
    Columns weight, tokens[TILES];
    float weight_scale, token_scale[TILES];
};

// DEPTH: steps that a wave has in flight.
template <int TILES, int DEPTH>
WAVE64_DEVICE void few_tokens(const Fp8BlockScaledMmArgs& args) {
    WAVE64_LDS static Floats4 lds[kMaxWaves[TILES / 2] * TILES][64];
    const Tile tile(args);
    const int m = tile.m * 16 * TILES, n = tile.n * kFewColumns;
    const int wave = uniform(lane_in_block() / 64), lane = lane_in_block() % 64;
    const int line = line_of_lane(), part = part_of_lane();
    const auto rows = [](int left, int most) { return left < most ? left : most; };
    const Factor weights(static_cast<const char*>(args.b) + n * args.b_stride, rows(args.n - n, kFewColumns),
                         int(args.b_stride), args.k, line, part);
    const Factor tokens(static_cast<const char*>(args.a) + m * args.a_stride, rows(args.m - m, 16 * TILES),
                        int(args.a_stride), args.k, line, part);
    const Scales scales(args, m, n);
    int scale_at[TILES];
    for (int i = 0; i < TILES; i++) scale_at[i] = scale_offset(args, m, 16 * i + line);
    const int count = args.turns + (wave < args.more_steps);

    const auto load = [&](Step<TILES>& into, int turn) {
        const bool there = turn < count;
        const int step = wave + (there ? turn : count - 1) * args.waves;
        const unsigned group = scales.group(step);
        into.weight = weights.load(0, step, there);
#pragma unroll
        for (int i = 0; i < TILES; i++) into.tokens[i] = tokens.load(16 * i, step, there);
#pragma unroll
        for (int i = 0; i < TILES; i++) into.token_scale[i] = scales.of_token(group, scale_at[i]);
        into.weight_scale = scales.of_weight(group);
        keep_order();
    };
    Floats4 acc[TILES] = {};
    const auto multiply = [&](const Step<TILES>& step) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
            add_scaled(acc[i], product(step.weight, step.tokens[i]), step.token_scale[i] * step.weight_scale);
    };
    Step<TILES> ring[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load(ring[d], d);
    int turn = 0;
    for (; turn + DEPTH < count; turn += DEPTH)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            multiply(ring[d]);
            load(ring[d], turn + d + DEPTH);
        }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (turn + d < count) multiply(ring[d]);

#pragma unroll
    for (int i = 0; i < TILES; i++) lds[wave * TILES + i][lane] = acc[i];
    block_barrier();
    for (int i = wave; i < TILES; i += args.waves) {
        Floats4 sum = lds[i][lane];
        for (int other = 1; other < args.waves; other++) sum += lds[other * TILES + i][lane];
        const float x[] = {sum.x, sum.y, sum.z, sum.w};
        store_run(args, m + 16 * i + line, n + 4 * part, x);
    }
}

// ---- many tokens: a block has kTileTokens of them, and a wave 32 PAIRS columns of y

template <int PAIRS>
WAVE64_DEVICE void tile_of_tokens(const Fp8BlockScaledMmArgs& args) {
    constexpr int tiles = kTileTokens / 16, columns = kTileWaves * 32 * PAIRS;
    using Tokens = TokenTile<tiles>;
    WAVE64_LDS static typename Tokens::Memory lds;
    const Tile tile(args);
    const int wave = uniform(lane_in_block() / 64), line = line_of_lane(), part = part_of_lane();
    const int m = tile.m * kTileTokens, n = tile.n * columns + wave * 32 * PAIRS;
    const auto rows = [](int left, int most) { return left < most ? left : most; };
    const Factor weights = weights_of_pairs(static_cast<const char*>(args.b) + n * args.b_stride,
                                            rows(args.n - n, 32 * PAIRS), int(args.b_stride), args.k);
    const Factor tokens(static_cast<const char*>(args.a) + m * args.a_stride, rows(args.m - m, kTileTokens),
                        int(args.a_stride), args.k, Tokens::row(0), Tokens::chunk());
    const Scales scales(args, m, n);
    const int begin = block_id_y() * args.split_steps;
    const int end = begin + args.split_steps < args.steps ? begin + args.split_steps : args.steps;

    const auto load = [&](int step, TileStep<tiles, 2 * PAIRS, 1>& into) {
        const bool there = step < end;
        const unsigned group = scales.group(there ? step : end - 1);
#pragma unroll
        for (int i = 0; i < Tokens::loads; i++)
            into.tokens[i] = tokens.load_chunk(kTileTokens / Tokens::loads * i, step, there);
        into.weight_scale[0] = scales.of_weight(group);
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; j++) into.weights[j] = load_of_pair(weights, j, step, there);
    };
    const auto load_scales = [&](int step, TileScales<tiles>& into) {
        const int mine = step + Tokens::chunk() < end ? step + Tokens::chunk() : end - 1;
        int row = Tokens::row(0);
        forget(row);  // what is made of it would be kept over the loop, in registers that it has not
#pragma unroll
        for (int i = 0; i < Tokens::loads; i++)
            into[i] = scales.of_token_and_group(scales.group(mine),
                                                scale_offset(args, m, row + kTileTokens / Tokens::loads * i));
    };
    Floats4 acc[tiles][2 * PAIRS] = {};
    multiply_tile<tiles, 2 * PAIRS, 1>(lds, begin, end, kTileTokens, load, load_scales, acc);
#pragma unroll
    for (int i = 0; i < tiles; i++)
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const Floats4 low = acc[i][2 * j], high = acc[i][2 * j + 1];
            const float x[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            if (args.num_splits > 1)
                store_run(args, args.partial + block_id_y() * args.partial_size, m + 16 * i + line,
                          n + 32 * j + 8 * part, x);
            else
                store_run(args, m + 16 * i + line, n + 32 * j + 8 * part, x);
        }
}

// y = the sum of the splits' partial sums, four numbers a lane.
WAVE64_DEVICE void merge(const Fp8BlockScaledMmArgs& args) {
    const int64_t at = (int64_t(block_id()) * kMergeLanes + lane_in_block()) * 4;
    if (at >= args.size) return;
    Floats4 sum = {};
    for (int split = 0; split < args.num_splits; split++)
        sum += *reinterpret_cast<const Floats4*>(args.partial + split * args.partial_size + at);
    const float x[] = {sum.x, sum.y, sum.z, sum.w};
    Fp8BlockScaledMmArgs one_row = args;
    one_row.m = 1, one_row.n = int(args.size);
    store_run(one_row, 0, int(at), x);
}

}  // namespace wave64

#define FP8_BLOCK_SCALED_MM(NAME, MAX_LANES, ...) \
    WAVE64_KERNEL(MAX_LANES) NAME(wave64::Fp8BlockScaledMmArgs args) { wave64::__VA_ARGS__(args); }

FP8_BLOCK_SCALED_MM(fp8_block_scaled_mm_16_tokens, wave64::kMaxWaves[0] * 64, few_tokens<1, 4>)
FP8_BLOCK_SCALED_MM(fp8_block_scaled_mm_32_tokens, wave64::kMaxWaves[1] * 64, few_tokens<2, 3>)
FP8_BLOCK_SCALED_MM(fp8_block_scaled_mm_64_tokens, wave64::kMaxWaves[2] * 64, few_tokens<4, 3>)
FP8_BLOCK_SCALED_MM(fp8_block_scaled_mm_tile, wave64::kTileWaves * 64, tile_of_tokens<1>)
FP8_BLOCK_SCALED_MM(WAVE64_TWO_WAVES fp8_block_scaled_mm_wide_tile, wave64::kTileWaves * 64, tile_of_tokens<2>)
FP8_BLOCK_SCALED_MM(fp8_block_scaled_mm_merge, wave64::kMergeLanes, merge)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int kFewTokens = 128;        // up to here the kernels for few tokens serve; with few columns, up to
constexpr int kFewTokensNarrow = 256;  // here
constexpr int kNarrow = 2048;
constexpr int kWideTokens = 2048;  // from here on tiles are wide
constexpr int kTileColumns = 128, kWideColumns = 256;
constexpr int64_t kMaxSpan = 1 << 28;                // scales from the first group to behind the last one's
constexpr int64_t kMaxStride = (1 << 30) / 256 - 1;  // so that the rows of a tile span less than 2^30 bytes

void fp8_block_scaled_mm(Fp8BlockScaledMmArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("m", args.m, 0);
    call.expect_min("n", args.n, 0);
    if (args.m == 0 || args.n == 0) return;
    call.expect(args.k > 0 && args.k % 16 == 0, "k", "a multiple of 16", args.k);
    call.expect(args.block_n > 0 && args.block_n % 128 == 0, "block_n", "a multiple of 128", args.block_n);
    call.expect(args.block_k > 0 && args.block_k % 128 == 0, "block_k", "a multiple of 128", args.block_k);
    call.expect_tensors(
        {{"a", args.a}, {"b", args.b}, {"a_scale", args.a_scale}, {"b_scale", args.b_scale}, {"y", args.y}});
    if (args.m == 1) args.a_stride = args.k, args.a_scale_stride = 0;
    if (args.n == 1) args.b_stride = args.k;
    call.expect(is_16_aligned({args.a, args.b, args.y}, {args.a_stride, args.b_stride}), "a, b",
                std::string("rows that begin at multiples of 16 bytes"), "others");
    call.expect_range("a_stride", args.a_stride, 0, kMaxStride);
    call.expect_range("b_stride", args.b_stride, 0, kMaxStride);
    call.expect_range("a_scale_stride", args.a_scale_stride, 0, kMaxStride / 4);
    const int64_t groups = ceil_div(args.k, args.block_k);
    call.expect_range("a_scale_column_stride", args.a_scale_column_stride * groups, 0, kMaxSpan);
    call.expect_range("b_scale_column_stride", args.b_scale_column_stride * groups, 0, kMaxSpan);
    call.expect_min("num_splits", args.num_splits, 1);

    const bool few = args.m <= kFewTokens || (args.m <= kFewTokensNarrow && args.n <= kNarrow);
    const bool wide = args.m >= kWideTokens;
    const int form = args.m <= 16 ? 0 : args.m <= 32 ? 1 : 2;  // for few tokens
    const int64_t tokens = few ? 16 << form : kTileTokens;
    const int64_t columns = few ? kFewColumns : wide ? kWideColumns : kTileColumns;
    const int64_t tiles_m = ceil_div(args.m, tokens), tiles_n = ceil_div(args.n, columns);
    call.expect(tiles_m * tiles_n <= INT32_MAX / (kMaxWaves[0] * 64), "m", "fewer tiles", args.m);
    args.tiles_m = int32_t(tiles_m), args.blocks = int32_t(tiles_m * tiles_n);
    args.group_tiles = int32_t(kGroupTiles * tiles_n), args.by_group = divider(uint32_t(args.group_tiles));
    args.by_last_rows = divider(uint32_t(tiles_m - (tiles_m - 1) / kGroupTiles * kGroupTiles));
    args.by_block_n = divider(uint32_t(args.block_n));
    args.by_group_steps = divider(uint32_t(args.block_k / 128));
    args.steps = int32_t(ceil_div(args.k, 128));
    args.size = int64_t(args.m) * args.n, args.partial_size = round_up(args.size, 4);
    if (few) {
        constexpr const char* kernels[] = {"fp8_block_scaled_mm_16_tokens", "fp8_block_scaled_mm_32_tokens",
                                           "fp8_block_scaled_mm_64_tokens"};
        const int64_t turns = ceil_div(args.steps, kMaxWaves[form]);
        args.waves = int32_t(ceil_div(args.steps, turns));
        args.turns = args.steps / args.waves, args.more_steps = args.steps % args.waves;
        call.launch(kernels[form], {args.blocks}, args.waves * 64, args);
        return;
    }
    args.split_steps = int32_t(ceil_div(args.steps, args.num_splits));
    call.expect(ceil_div(args.steps, args.split_steps) == args.num_splits && args.num_splits <= kMaxGridY, "num_splits",
                "a number that leaves no split without a step", args.num_splits);
    if (args.num_splits > 1) call.expect_tensors({{"partial", args.partial}});
    call.launch(wide ? "fp8_block_scaled_mm_wide_tile" : "fp8_block_scaled_mm_tile", {args.blocks, args.num_splits},
                kTileWaves * call.device.wave_size, args);
    if (args.num_splits == 1) return;
    call.expect(args.size <= INT32_MAX, "m", "at most 2^31 numbers of y with splits", args.m);
    call.launch("fp8_block_scaled_mm_merge", {ceil_div(args.size, 4 * kMergeLanes)}, kMergeLanes, args);
}

WAVE64_OP_AND_CONSTANTS(fp8_block_scaled_mm, Fp8BlockScaledMmArgs,
                        ({{"FEW_TOKENS", kFewTokens},
                          {"FEW_TOKENS_NARROW", kFewTokensNarrow},
                          {"NARROW", kNarrow},
                          {"WIDE_TOKENS", kWideTokens},
                          {"TILE_TOKENS", kTileTokens},
                          {"TILE_COLUMNS", kTileColumns},
                          {"WIDE_COLUMNS", kWideColumns},
                          {"MAX_SPAN", kMaxSpan},
                          {"MAX_STRIDE", kMaxStride},
                          {"MAX_SCALE_STRIDE", kMaxStride / 4}}),
                        a, b, a_scale, b_scale, y, partial, a_stride, b_stride, a_scale_stride, a_scale_column_stride,
                        b_scale_stride, b_scale_column_stride, m, n, k, block_n, block_k, num_splits, dtype)

}  // namespace
}  // namespace wave64
#endif
