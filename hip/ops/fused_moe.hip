// Mixture of experts with FP8 weights in blocks of 128: each block of pairs of a token and one expert is multiplied
// with that expert's weights.
//
// The trick: weights come in whole lines of memory, and through LDS into the registers that the matrix instructions
// read them from (fp8_matrix.h). Of few pairs blocks have 16: in the first product the waves of a block take the steps
// along K in turn; they meet once, in LDS, for gate and up of the same columns, so that the activation happens there.
// The second product quantizes h as it loads it: a group of its columns lies in four lanes. Of many, blocks have 64 or
// 128, whose tokens are shared by four waves (fp8_tile.h), and the first product has whole groups of columns of h,
// which it quantizes. Bound by reading the chosen experts' weights, and, of many pairs, y.
#include "wave64/fp8_tile.h"

namespace wave64 {

// out[t] = sum over j of topk_weights[t, j] W2 h, h = silu(G x[t]) * (U x[t]), with the weights of expert topk_ids[t,
// j]. A pair is an index into topk_ids.
struct FusedMoeArgs {
    const void* x;              // [num_tokens, hidden], FP8, contiguous
    const float* x_scale;       // [num_tokens, hidden / 128]
    const void* w13;            // [num_experts, 2 inter, hidden], FP8
    const float* w13_scale;     // [num_experts, 2 inter / 128, hidden / 128]
    const void* w2;             // [num_experts, hidden, inter], FP8
    const float* w2_scale;      // [num_experts, hidden / 128, inter / 128]
    const float* topk_weights;  // [num_tokens, top_k]
    const int32_t* topk_ids;    // [num_tokens, top_k]
    const int32_t* expert_map;  // [num_routed]: local experts of the router's ids, or null
    const int32_t* block_ids;   // [num_blocks]: the router's id of a block of pairs
    const int32_t* pairs;       // [block_pairs num_blocks]: sorted by expert, in blocks, whose last ones may be padding
    const int32_t* num_padded;  // how many of them there are, padding included
    void* h;                    // [num_tokens * top_k, inter] to work in; FP8 if blocks have more than 16 pairs
    float* h_scale;             // [num_tokens * top_k, inter / 128] to work in; null with blocks of 16
    void* y;                    // [num_tokens * top_k, hidden] to work in
    void* out;                  // [num_tokens, hidden], contiguous
    int64_t w13_expert_stride;
    int64_t w13_stride;
    int64_t w2_expert_stride;
    int64_t w2_stride;
    int32_t num_tokens;
    int32_t top_k;
    int32_t num_experts;
    int32_t num_routed;
    int32_t hidden;  // a multiple of 128, as inter
    int32_t inter;
    int32_t num_blocks;
    int32_t block_pairs;  // 16, 64 or 128
    int32_t weigh_input;  // not 0: G x and U x are multiplied by the weight, not y
    Dtype dtype;          // of h, y and out
    // set by the launcher
    int32_t num_pairs;
    int32_t waves;       // of a block of the first product, of which each has
    int32_t turns;       // steps, and
    int32_t more_steps;  // the first so many one more
    IntDivider by_top_k;
    IntDivider by_up_tiles;
    IntDivider by_down_tiles;
    IntDivider by_out_tiles;
};

constexpr int kFewPairs = 16;                     // of a block; else there are 64 or 128
constexpr int kUpColumns = 16;                    // of h, of a block of the first product
constexpr int kMaxUpWaves = 16;                   // of such a block
constexpr int kDownWaves = 4, kDownColumns = 64;  // of y: of a wave of the second product
constexpr int kTileDownColumns = 256;             // of y: of a block of many pairs
constexpr int kOutLanes = 256, kOutPack = 8;      // of the sum over a token's pairs

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/gated.h"

#if WAVE64_HAS_FP8_MATRIX
#include "wave64/quant.h"

namespace wave64 {

// The local expert of a router's id, which is the same in all lanes; -1: none.
WAVE64_DEVICE int local_expert(const FusedMoeArgs& args, int id) {
    if (id < 0 || id >= args.num_routed) return -1;
    if (!args.expert_map) return id;
    const int expert = load_uniform(args.expert_map + id);
    return expert < args.num_experts ? expert : -1;
}

// What a workgroup computes: a block of few pairs of one expert, and a tile of columns.
struct Part {
    int tile, expert = -1;
    int pair = -1;  // of the lane's line; -1: none

    WAVE64_DEVICE Part(const FusedMoeArgs& args, int tiles, const IntDivider& by_tiles) {
        const int block = int(unsigned(block_id()) / by_tiles);
        tile = block_id() - block * tiles;
        if (block * kFewPairs >= load_uniform(args.num_padded)) return;
        expert = local_expert(args, load_uniform(args.block_ids + block));
        const int found = args.pairs[block * kFewPairs + line_of_lane()];
        if (found < args.num_pairs) pair = found;
    }
};

struct UpStep {
    Lines gate, up;
    Columns token;
    float gate_scale, up_scale, token_scale;
};

// h = silu(gate) * up of kUpColumns columns.
template <typename T>
WAVE64_DEVICE void up(const FusedMoeArgs& args) {
    constexpr int depth = 3;  // steps that a wave has in flight
    WAVE64_LDS static union {
        Exchange weights;
        Floats4 sums[2][64];
    } lds[kMaxUpWaves];
    const Part mine(args, args.inter / kUpColumns, args.by_up_tiles);
    if (mine.expert < 0) return;
    const int wave = uniform(lane_in_block() / 64), lane = lane_in_block() % 64;
    const int part = part_of_lane(), n = mine.tile * kUpColumns, groups = args.hidden / 128;
    const char* const expert = static_cast<const char*>(args.w13) + mine.expert * args.w13_expert_stride;
    const auto rows = [&](int first) {
        return Factor(expert + first * args.w13_stride, kUpColumns, int(args.w13_stride), args.hidden, row_of_lines(),
                      chunk_of_lines());
    };
    const Factor gates = rows(n), ups = rows(args.inter + n);
    const int token = mine.pair < 0 ? -1 : int(unsigned(mine.pair) / args.by_top_k);
    const Factor tokens(args.x, args.num_tokens, args.hidden, args.hidden, token, part);
    const Bounded token_scales(args.x_scale, args.num_tokens * groups * 4);
    const int scale_at = token < 0 ? 0 : token * groups * 4;
    const float* const gate_scales = args.w13_scale + (int64_t(mine.expert) * (args.inter / 64) + n / 128) * groups;
    const float* const up_scales = gate_scales + args.inter / 128 * groups;
    const int count = args.turns + (wave < args.more_steps);

    const auto load = [&](UpStep& into, int turn) {
        const bool there = turn < count;
        const int step = wave + (there ? turn : count - 1) * args.waves;
        into.gate = gates.load_lines(0, 8, step, there), into.up = ups.load_lines(0, 8, step, there);
        into.token = tokens.load(0, step, there);
        into.token_scale = __builtin_bit_cast(float, token_scales.load<Bits32>(scale_at, step * 4));
        into.gate_scale = load_scale(gate_scales, step);
        into.up_scale = load_scale(up_scales, step);
        keep_order();
    };
    Floats4 gate = {}, up = {};
    const auto multiply = [&](const UpStep& step) {
        Exchange& own = lds[wave].weights;
        add_scaled(gate, product(exchanged(own, step.gate), step.token), step.token_scale * step.gate_scale);
        add_scaled(up, product(exchanged(own, step.up), step.token), step.token_scale * step.up_scale);
    };
    UpStep ring[depth];
#pragma unroll
    for (int d = 0; d < depth; d++) load(ring[d], d);
    int turn = 0;
    for (; turn + depth < count; turn += depth)
#pragma unroll
        for (int d = 0; d < depth; d++) {
            multiply(ring[d]);
            load(ring[d], turn + d + depth);
        }
#pragma unroll
    for (int d = 0; d < depth; d++)
        if (turn + d < count) multiply(ring[d]);

    lds[wave].sums[0][lane] = gate, lds[wave].sums[1][lane] = up;
    block_barrier();
    if (wave > 0 || mine.pair < 0) return;
    for (int other = 1; other < args.waves; other++) gate += lds[other].sums[0][lane], up += lds[other].sums[1][lane];
    const float weight = args.weigh_input ? args.topk_weights[mine.pair] : 1;
    float h[4];
    for (int i = 0; i < 4; i++) h[i] = silu(gate[i] * weight) * (up[i] * weight);
    store_pack(static_cast<T*>(args.h) + int64_t(mine.pair) * args.inter + n + 4 * part, Pack<T, 4>::rounded(h));
}

// A lane's columns of a group of h, as they are in memory.
template <typename T>
struct Hidden {
    Pack<T, 8> packs[4];

    WAVE64_DEVICE float amax() const {
        float amax = 0;
        for (const auto& pack : packs) amax = max(amax, amax_of(pack));
        amax = max(amax, from_other_half<16>(amax));
        return max(amax, from_other_half<32>(amax));
    }
    WAVE64_DEVICE Columns quantized_by(float inverse) const {
        struct {
            Pack<Bits8, 8> packs[4];
        } all;
        for (int i = 0; i < 4; i++) all.packs[i] = quantized(packs[i], inverse);
        return __builtin_bit_cast(Columns, all);
    }
};

template <typename T>
struct DownStep {
    Lines weight[kDownColumns / 16];
    Hidden<T> h;
    float weight_scale;
};

// y = weight * h w2^T, kDownColumns columns a wave. The rows of weights of two products are in turns of 4 in each, so
// that a lane has 8 neighboring columns.
template <typename T>
WAVE64_DEVICE void down(const FusedMoeArgs& args) {
    constexpr int columns = kDownWaves * kDownColumns, depth = 2, tiles = kDownColumns / 16;
    const Part mine(args, (args.hidden + columns - 1) / columns, args.by_down_tiles);
    const int wave = uniform(lane_in_block() / 64), n = mine.tile * columns + wave * kDownColumns;
    if (mine.expert < 0 || n >= args.hidden) return;
    WAVE64_LDS static Exchange lds[kDownWaves];
    const int part = part_of_lane(), steps = args.inter / 128;
    const Factor weights =
        weights_of_pairs(static_cast<const char*>(args.w2) + mine.expert * args.w2_expert_stride + n * args.w2_stride,
                         kDownColumns, int(args.w2_stride), args.inter);
    const Bounded hidden(args.h, args.num_pairs * args.inter * 2);
    const int h_at = mine.pair < 0 ? kNowhere : mine.pair * args.inter * 2 + 32 * part;
    const float* const scales = args.w2_scale + (int64_t(mine.expert) * (args.hidden / 128) + n / 128) * steps;

    const auto load = [&](DownStep<T>& into, int step) {
        const bool there = step < steps;
        const int at = there ? h_at : kNowhere;
#pragma unroll
        for (int i = 0; i < 4; i++)
            into.h.packs[i] = {hidden.load<Bits128>(at + (i / 2 * 64 + i % 2 * 8) * 2, step * 256)};
#pragma unroll
        for (int j = 0; j < tiles; j++) into.weight[j] = load_of_pair(weights, j, step, there);
        into.weight_scale = load_scale(scales, there ? step : steps - 1);
        keep_order();
    };
    Floats4 acc[tiles] = {};
    const auto multiply = [&](const DownStep<T>& step) {
        const Scale scale = scale_of(step.h.amax());
        const Columns h = step.h.quantized_by(scale.inverse);
#pragma unroll
        for (int j = 0; j < tiles; j++)
            add_scaled(acc[j], product(exchanged(lds[wave], step.weight[j]), h), scale.scale * step.weight_scale);
    };
    DownStep<T> ring[depth];
#pragma unroll
    for (int d = 0; d < depth; d++) load(ring[d], d);
    for (int step = 0; step < steps; step += depth)
#pragma unroll
        for (int d = 0; d < depth; d++) {
            if (step + d >= steps) break;
            multiply(ring[d]);
            load(ring[d], step + d + depth);
        }
    if (mine.pair < 0) return;
    const float weight = args.weigh_input ? 1 : args.topk_weights[mine.pair];
#pragma unroll
    for (int j = 0; j < tiles; j += 2) {
        float y[8];
        for (int i = 0; i < 8; i++) y[i] = acc[j + i / 4][i % 4] * weight;
        store_pack(static_cast<T*>(args.y) + int64_t(mine.pair) * args.hidden + n + 16 * j + 8 * part,
                   Pack<T, 8>::rounded(y));
    }
}

// ---- many pairs

// What a workgroup computes: a block of 16 TILES pairs of one expert, of which the first `live` are no padding, and a
// tile of columns.
template <int TILES>
struct TilePart {
    using Tokens = TokenTile<TILES>;
    int tile, expert = -1, live = 0;
    int pair[Tokens::held];  // `lane` and 64 + lane of the block; -1: none

    WAVE64_DEVICE TilePart(const FusedMoeArgs& args, int tiles, const IntDivider& by_tiles) {
        const int items = int(unsigned(load_uniform(args.num_padded)) / Tokens::tokens) * tiles;
        if (block_id() >= items) return;
        const unsigned item = item_of_die(items);
        const int block = int(item / by_tiles);
        tile = int(item) - block * tiles;
        expert = local_expert(args, load_uniform(args.block_ids + block));
        for (int i = 0; i < Tokens::held; i++) {
            const int found = args.pairs[block * Tokens::tokens + 64 * i + lane_in_block() % 64];
            pair[i] = found < args.num_pairs ? found : -1;
            live += __builtin_popcountll(ballot(pair[i] >= 0));
        }
    }
};

// h = silu(gate) * up of 128 columns, quantized, 32 a wave.
template <typename T, int TILES>
WAVE64_DEVICE void up_tile(const FusedMoeArgs& args) {
    using Tokens = TokenTile<TILES>;
    WAVE64_LDS static typename Tokens::Memory lds;
    WAVE64_LDS static float lds_amax[kTileWaves][Tokens::tokens];
    const TilePart<TILES> mine(args, args.inter / 128, args.by_up_tiles);
    if (mine.expert < 0) return;
    const int wave = uniform(lane_in_block() / 64), line = line_of_lane(), part = part_of_lane();
    const int groups = args.hidden / 128, n = mine.tile * 128 + wave * 32;
    const char* const expert = static_cast<const char*>(args.w13) + mine.expert * args.w13_expert_stride;
    const auto rows = [&](int first) {
        return weights_of_pairs(expert + first * args.w13_stride, 32, int(args.w13_stride), args.hidden);
    };
    const Factor gates = rows(n), ups = rows(args.inter + n);
    int token[Tokens::held];
    for (int i = 0; i < Tokens::held; i++)
        token[i] = mine.pair[i] < 0 ? -1 : int(unsigned(mine.pair[i]) / args.by_top_k);
    const TileRows<TILES> tokens(args.x, args.x_scale, args.num_tokens, args.hidden, token);
    const float* const gate_scales = args.w13_scale + (int64_t(mine.expert) * (args.inter / 64) + mine.tile) * groups;
    const float* const up_scales = gate_scales + args.inter / 128 * groups;

    const auto load = [&](int step, TileStep<TILES, 4, 2>& into) {
        const bool there = step < groups;
        const int column = there ? step : groups - 1;
        tokens.load(column, there, into);
        into.weight_scale[0] = load_scale(gate_scales, column), into.weight_scale[1] = load_scale(up_scales, column);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            into.weights[j] = load_of_pair(gates, j, step, there);
            into.weights[2 + j] = load_of_pair(ups, j, step, there);
        }
    };
    Floats4 acc[TILES][4] = {};
    multiply_tile<TILES, 4, 2>(lds, 0, groups, mine.live, load, tokens, acc);

    Pack<T, 8> h[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int pair = Tokens::of_line(mine.pair, i);
        const float weight = args.weigh_input && pair >= 0 ? args.topk_weights[pair] : 1;
        float numbers[8];
        for (int j = 0; j < 8; j++)
            numbers[j] = silu(acc[i][j / 4][j % 4] * weight) * (acc[i][2 + j / 4][j % 4] * weight);
        h[i] = Pack<T, 8>::rounded(numbers);
        float amax = amax_of(h[i]);
        amax = max(amax, from_other_half<16>(amax));
        lds_amax[wave][16 * i + line] = max(amax, from_other_half<32>(amax));
    }
    block_barrier();
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int pair = Tokens::of_line(mine.pair, i);
        if (pair < 0) continue;
        float amax = 0;
        for (int other = 0; other < kTileWaves; other++) amax = max(amax, lds_amax[other][16 * i + line]);
        const Scale scale = scale_of(amax);
        store_pack(static_cast<Bits8*>(args.h) + int64_t(pair) * args.inter + n + 8 * part,
                   quantized(h[i], scale.inverse));
        if (wave == 0 && part == 0) args.h_scale[pair * (args.inter / 128) + mine.tile] = scale.scale;
    }
}

// y = weight * h w2^T of kTileDownColumns columns, 64 a wave.
template <typename T, int TILES>
WAVE64_DEVICE void down_tile(const FusedMoeArgs& args) {
    constexpr int products = kTileDownColumns / kTileWaves / 16;
    using Tokens = TokenTile<TILES>;
    WAVE64_LDS static typename Tokens::Memory lds;
    const TilePart<TILES> mine(args, (args.hidden + kTileDownColumns - 1) / kTileDownColumns, args.by_down_tiles);
    if (mine.expert < 0) return;
    const int wave = uniform(lane_in_block() / 64), part = part_of_lane(), groups = args.inter / 128;
    const int n = mine.tile * kTileDownColumns + wave * (kTileDownColumns / kTileWaves);
    const bool any = n < args.hidden;  // of the wave's columns, or it only brings tokens to LDS
    const Factor weights =
        weights_of_pairs(static_cast<const char*>(args.w2) + mine.expert * args.w2_expert_stride + n * args.w2_stride,
                         any ? kTileDownColumns / kTileWaves : 0, int(args.w2_stride), args.inter);
    const TileRows<TILES> tokens(args.h, args.h_scale, args.num_pairs, args.inter, mine.pair);
    const float* const scales =
        args.w2_scale + (int64_t(mine.expert) * (args.hidden / 128) + (any ? n / 128 : 0)) * groups;

    const auto load = [&](int step, TileStep<TILES, products, 1>& into) {
        const bool there = step < groups;
        const int column = there ? step : groups - 1;
        tokens.load(column, there, into);
        into.weight_scale[0] = load_scale(scales, column);
#pragma unroll
        for (int j = 0; j < products; j++) into.weights[j] = load_of_pair(weights, j, step, there);
    };
    Floats4 acc[TILES][products] = {};
    multiply_tile<TILES, products, 1>(lds, 0, groups, mine.live, load, tokens, acc);
    if (!any) return;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int pair = Tokens::of_line(mine.pair, i);
        if (pair < 0) continue;
        const float weight = args.weigh_input ? 1 : args.topk_weights[pair];
#pragma unroll
        for (int j = 0; j < products; j += 2) {
            float y[8];
            for (int k = 0; k < 8; k++) y[k] = acc[i][j + k / 4][k % 4] * weight;
            store_pack(static_cast<T*>(args.y) + int64_t(pair) * args.hidden + n + 16 * j + 8 * part,
                       Pack<T, 8>::rounded(y));
        }
    }
}

// out = for each token the sum of its pairs' rows of y, in order.
template <typename T>
WAVE64_DEVICE void sum_pairs(const FusedMoeArgs& args) {
    const int chunks = (args.hidden + kOutLanes * kOutPack - 1) / (kOutLanes * kOutPack);
    const int token = int(unsigned(block_id()) / args.by_out_tiles);
    const int n = ((block_id() - token * chunks) * kOutLanes + lane_in_block()) * kOutPack;
    if (n >= args.hidden) return;
    float sum[kOutPack] = {};
    for (int j = 0; j < args.top_k; j++) {
        const int pair = token * args.top_k + j;
        if (local_expert(args, load_uniform(args.topk_ids + pair)) < 0) continue;
        const auto y = load_pack<T, kOutPack>(static_cast<const T*>(args.y) + int64_t(pair) * args.hidden + n).values();
        for (int i = 0; i < kOutPack; i++) sum[i] += float(y.at[i]);
    }
    store_pack(static_cast<T*>(args.out) + int64_t(token) * args.hidden + n, Pack<T, kOutPack>::rounded(sum));
}

}  // namespace wave64

#define FUSED_MOE_OF(NAME, MAX_LANES, ...) \
    WAVE64_KERNEL(MAX_LANES) NAME(wave64::FusedMoeArgs args) { wave64::__VA_ARGS__(args); }
#define FUSED_MOE(NAME, MAX_LANES, KERNEL)                     \
    FUSED_MOE_OF(NAME##_bf16, MAX_LANES, KERNEL<wave64::bf16>) \
    FUSED_MOE_OF(NAME##_fp16, MAX_LANES, KERNEL<wave64::fp16>)
#define FUSED_MOE_TILE(NAME, KERNEL, PAIRS)                                              \
    FUSED_MOE_OF(NAME##_bf16, wave64::kTileWaves * 64, KERNEL<wave64::bf16, PAIRS / 16>) \
    FUSED_MOE_OF(NAME##_fp16, wave64::kTileWaves * 64, KERNEL<wave64::fp16, PAIRS / 16>)

FUSED_MOE(fused_moe_up, wave64::kMaxUpWaves * 64, up)
FUSED_MOE(fused_moe_down, wave64::kDownWaves * 64, down)
FUSED_MOE_TILE(fused_moe_up_64, up_tile, 64)
FUSED_MOE_TILE(fused_moe_up_128, up_tile, 128)
FUSED_MOE_TILE(fused_moe_down_64, down_tile, 64)
FUSED_MOE_TILE(fused_moe_down_128, down_tile, 128)
FUSED_MOE(fused_moe_sum, wave64::kOutLanes, sum_pairs)
#endif

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMaxBytes = 1 << 30;  // of a tile's rows, of x and of h
constexpr int64_t kMaxStride = kMaxBytes / 64 - 1;

constexpr const char* kUp[][2] = {{"fused_moe_up_bf16", "fused_moe_up_fp16"},
                                  {"fused_moe_up_64_bf16", "fused_moe_up_64_fp16"},
                                  {"fused_moe_up_128_bf16", "fused_moe_up_128_fp16"}};
constexpr const char* kDown[][2] = {{"fused_moe_down_bf16", "fused_moe_down_fp16"},
                                    {"fused_moe_down_64_bf16", "fused_moe_down_64_fp16"},
                                    {"fused_moe_down_128_bf16", "fused_moe_down_128_fp16"}};
constexpr const char* kSum[] = {"fused_moe_sum_bf16", "fused_moe_sum_fp16"};

void fused_moe(FusedMoeArgs args, const Call& call) {
    expect_matrix_dtype(call, args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    if (args.num_tokens == 0) return;
    call.expect_min("top_k", args.top_k, 1);
    call.expect_min("num_experts", args.num_experts, 1);
    call.expect(args.hidden > 0 && args.hidden % 128 == 0, "hidden", "a multiple of 128", args.hidden);
    call.expect(args.inter > 0 && args.inter % 128 == 0, "inter", "a multiple of 128", args.inter);
    call.expect_tensors({{"x", args.x},
                         {"x_scale", args.x_scale},
                         {"w13", args.w13},
                         {"w13_scale", args.w13_scale},
                         {"w2", args.w2},
                         {"w2_scale", args.w2_scale},
                         {"topk_weights", args.topk_weights},
                         {"topk_ids", args.topk_ids},
                         {"block_ids", args.block_ids},
                         {"pairs", args.pairs},
                         {"num_padded", args.num_padded},
                         {"h", args.h},
                         {"y", args.y},
                         {"out", args.out}});
    call.expect(is_16_aligned({args.x, args.w13, args.w2, args.h, args.y, args.out},
                              {args.w13_expert_stride, args.w13_stride, args.w2_expert_stride, args.w2_stride}),
                "x, w13, w2", std::string("rows that begin at multiples of 16 bytes"), "others");
    call.expect_range("w13_stride", args.w13_stride, 0, kMaxStride);
    call.expect_range("w2_stride", args.w2_stride, 0, kMaxStride);
    const int64_t pairs = int64_t(args.num_tokens) * args.top_k;
    call.expect(int64_t(args.num_tokens) * args.hidden < kMaxBytes && pairs * args.inter * 2 < kMaxBytes, "num_tokens",
                "fewer: less than 2^30 bytes of x and of h", args.num_tokens);
    args.num_pairs = int32_t(pairs);
    const bool few = args.block_pairs == kFewPairs;
    call.expect(few || args.block_pairs == 64 || args.block_pairs == 128, "block_pairs", "16, 64 or 128",
                args.block_pairs);
    if (!few) call.expect_tensors({{"h_scale", args.h_scale}});
    const int64_t up_tiles = args.inter / (few ? kUpColumns : 128);
    const int64_t down_tiles = ceil_div(args.hidden, few ? kDownWaves * kDownColumns : kTileDownColumns);
    const int64_t out_tiles = ceil_div(args.hidden, kOutLanes * kOutPack);
    call.expect(args.num_blocks * std::max(up_tiles, down_tiles) <= INT32_MAX / (kMaxUpWaves * 64), "num_blocks",
                "fewer workgroups", args.num_blocks);
    const int32_t steps = args.hidden / 128;
    args.waves = int32_t(ceil_div(steps, ceil_div(steps, kMaxUpWaves)));
    args.turns = steps / args.waves, args.more_steps = steps % args.waves;
    args.by_top_k = divider(uint32_t(args.top_k));
    args.by_up_tiles = divider(uint32_t(up_tiles)), args.by_down_tiles = divider(uint32_t(down_tiles));
    args.by_out_tiles = divider(uint32_t(out_tiles));
    const int form = few ? 0 : args.block_pairs == 64 ? 1 : 2;
    call.launch(kUp[form][args.dtype], {args.num_blocks * up_tiles}, (few ? args.waves : kTileWaves) * 64, args);
    call.launch(kDown[form][args.dtype], {args.num_blocks * down_tiles}, (few ? kDownWaves : kTileWaves) * 64, args);
    call.launch(kSum[args.dtype], {args.num_tokens * out_tiles}, kOutLanes, args);
}

WAVE64_OP_AND_CONSTANTS(fused_moe, FusedMoeArgs,
                        ({{"FEW_PAIRS", kFewPairs}, {"MAX_STRIDE", kMaxStride}, {"MAX_BYTES", kMaxBytes}}), x, x_scale,
                        w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, block_ids, pairs, num_padded,
                        h, h_scale, y, out, w13_expert_stride, w13_stride, w2_expert_stride, w2_stride, num_tokens,
                        top_k, num_experts, num_routed, hidden, inter, num_blocks, block_pairs, weigh_input, dtype)

}  // namespace
}  // namespace wave64
#endif
