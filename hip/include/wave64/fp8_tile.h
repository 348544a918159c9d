// FP8 products of many tokens: a block of kTileWaves waves has 16 TILES of them, and each wave has columns of its own.
// Both come from memory in whole lines, while those of the step before are multiplied, and pass through LDS, their
// chunks of 16 bytes in an order that no two lanes in turn meet in one bank: tokens for all waves, a wave's weights for
// itself. So do the tokens' scales, each in a line of memory of its own, those of 8 steps at a time: asked for at each
// step by each wave, they would be as many lines as all weights.
#pragma once

#include "wave64/types.h"

namespace wave64 {

constexpr int kTileWaves = 4;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/fp8_matrix.h"

#if WAVE64_HAS_FP8_MATRIX
namespace wave64 {

// Goes before the name of a kernel of which a SIMD is to hold two waves: as many registers as that leaves.
#if defined(WAVE64_CPU)
#define WAVE64_TWO_WAVES
#else
#define WAVE64_TWO_WAVES __attribute__((amdgpu_waves_per_eu(2)))
#endif

// Neighboring blocks are on different dies, each with an L2: the item of a block, so that a die gets a range of items.
WAVE64_DEVICE unsigned item_of_die(int blocks) {
    constexpr unsigned dies = 8;
    const unsigned die = unsigned(block_id()) % dies, each = unsigned(blocks) / dies, more = unsigned(blocks) % dies;
    return die * each + (die < more ? die : more) + unsigned(block_id()) / dies;
}

// Weights of products that neighbor one another by two: rows in turns of 4 in each, so that a lane has 8 neighboring
// columns of the result, 8 part + 0, ..., 7 of token `line`.
WAVE64_DEVICE Factor weights_of_pairs(const void* base, int num_rows, int row_bytes, int columns) {
    const int row = row_of_lines() / 4 * 8 + row_of_lines() % 4;
    return Factor(base, num_rows, row_bytes, columns, row, chunk_of_lines());
}
WAVE64_DEVICE Lines load_of_pair(const Factor& weights, int product, int step, bool there) {
    return weights.load_lines(product / 2 * 32 + product % 2 * 4, 16, step, there);
}

// Steps of which tokens are in LDS: gfx942 has no room for those of two in each of two blocks.
#if defined(__gfx950__)
constexpr int kTileBuffers = 2;
#else
constexpr int kTileBuffers = 1;
#endif

template <int TILES>
struct TokenTile {
    static constexpr int tokens = 16 * TILES, chunks = kStepColumns / 16, loads = tokens * chunks / (kTileWaves * 64);
    static constexpr int held = (tokens + 63) / 64;  // of what each token has, a lane holds that of `lane`, 64 + lane
    static constexpr int scale_steps = chunks;       // whose scales are loaded at once, as a row's chunks are
    struct Memory {
        Bits128 rows[kTileBuffers][tokens][chunks];
        float scales[kTileBuffers * scale_steps][tokens + 4];  // + 4: so that 8 steps of 4 tokens are in 32 banks
        Exchange weights[kTileWaves];
    };

    // Of the chunks that a lane brings to LDS.
    WAVE64_DEVICE static int row(int load) { return lane_in_block() / chunks + tokens / loads * load; }
    WAVE64_DEVICE static int chunk() { return lane_in_block() % chunks; }

    // x of token 16 tile + line, where lanes hold those of tokens `lane` and 64 + lane.
    template <typename T>
    WAVE64_DEVICE static T of_line(const T (&x)[held], int tile) {
        return from_lane(x[tile / 4], tile % 4 * 16 + line_of_lane());
    }
};

// What a lane has loaded for a step. Weights are of KINDS with a scale each.
template <int TILES, int WEIGHTS, int KINDS>
struct TileStep {
    Bits128 tokens[TokenTile<TILES>::loads];
    Lines weights[WEIGHTS];
    float weight_scale[KINDS];
};
// For steps `step` to step + 7, of which a lane has the one of its chunk: scales of the rows of which it has chunks.
template <int TILES>
using TileScales = float[TokenTile<TILES>::loads];

// Rows of `columns` numbers, a multiple of 128, that the tokens of a tile are, wherever they stand, with a scale for
// each group of 128.
template <int TILES>
class TileRows {
    using Tile = TokenTile<TILES>;
    Bounded memory, scales;
    int groups, at[Tile::loads], scale_at[Tile::loads];

public:
    // row: of tokens `lane` and 64 + lane; -1: none, which is zeros.
    WAVE64_DEVICE TileRows(const void* base, const float* scale, int num_rows, int columns,
                           const int (&row)[Tile::held])
        : memory(base, num_rows * columns), scales(scale, num_rows * (columns / 128) * 4), groups(columns / 128) {
        constexpr int rows = Tile::tokens / Tile::loads;  // that a load of all lanes brings
        for (int i = 0; i < Tile::loads; i++) {
            const int mine = from_lane(row[rows * i / 64], rows * i % 64 + Tile::row(0));
            at[i] = mine < 0 ? kNowhere : mine * columns + 16 * Tile::chunk();
            scale_at[i] = mine < 0 ? kNowhere : mine * groups * 4;
        }
    }
    // Scales, as multiply_tile asks for them.
    WAVE64_DEVICE void operator()(int step, TileScales<TILES>& into) const {
        const int column = step + Tile::chunk() < groups ? step + Tile::chunk() : groups - 1;
#pragma unroll
        for (int i = 0; i < Tile::loads; i++)
            into[i] = __builtin_bit_cast(float, scales.load<Bits32>(scale_at[i] + column * 4));
    }
    template <typename Step>
    WAVE64_DEVICE void load(int step, bool there, Step& into) const {
#pragma unroll
        for (int i = 0; i < Tile::loads; i++)
            into.tokens[i] = memory.load<Bits128>(there ? at[i] : kNowhere, step * 128);
    }
};

// acc[i][j] += the scaled products of tokens 16 i, ... with the wave's weights j, over steps `begin` to `end`, of which
// there is one at least. load(step, into) fills a TileStep, with zeros unless step < end; load_scales(step, into),
// which is called for every 8th step, with anything behind the last. Of tokens those before `live` are there.
template <int TILES, int WEIGHTS, int KINDS, typename Load, typename LoadScales>
WAVE64_DEVICE void multiply_tile(typename TokenTile<TILES>::Memory& lds, int begin, int end, int live, const Load& load,
                                 const LoadScales& load_scales, Floats4 (&acc)[TILES][WEIGHTS]) {
    using Tile = TokenTile<TILES>;
    const int row = Tile::row(0), chunk = Tile::chunk(), line = line_of_lane(), at = part_of_lane() ^ line % 8;
    Exchange& exchange = lds.weights[uniform(lane_in_block() / 64)];
    TileStep<TILES, WEIGHTS, KINDS> next;
    TileScales<TILES> next_scales;
    load_scales(begin, next_scales);
    load(begin, next);
    keep_order();
    for (int step = begin; step < end;) {
        const int done = step - begin, buffer = done % kTileBuffers, scaled = done % (kTileBuffers * Tile::scale_steps);
        if (kTileBuffers == 1) block_barrier();
#pragma unroll
        for (int i = 0; i < Tile::loads; i++)
            lds.rows[buffer][row + Tile::tokens / Tile::loads * i][chunk ^ row % 8] = next.tokens[i];
        if (done % Tile::scale_steps == 0)
#pragma unroll
            for (int i = 0; i < Tile::loads; i++)
                lds.scales[scaled + chunk][row + Tile::tokens / Tile::loads * i] = next_scales[i];
        Columns weight[WEIGHTS];
#pragma unroll
        for (int j = 0; j < WEIGHTS; j++) weight[j] = exchanged(exchange, next.weights[j]);
        Floats2 weight_scale[KINDS];
#pragma unroll
        for (int kind = 0; kind < KINDS; kind++) weight_scale[kind] = both(next.weight_scale[kind]);
        if (++step < end && (done + 1) % Tile::scale_steps == 0) load_scales(step, next_scales);
        load(step, next);
        keep_order();
        block_barrier();
        Floats2 scale[KINDS];  // of a tile and of its neighbor
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (16 * i >= live) continue;
            const Bits128(&token)[Tile::chunks] = lds.rows[buffer][16 * i + line];
            const Columns mine = {token[at], token[at ^ 4]};
            if (i % 2 == 0) {
                const float (&of)[Tile::tokens + 4] = lds.scales[scaled];
                const Floats2 token_scale = {of[16 * i + line], of[16 * i + 16 + line]};
#pragma unroll
                for (int kind = 0; kind < KINDS; kind++) scale[kind] = token_scale * weight_scale[kind];
            }
#pragma unroll
            for (int j = 0; j < WEIGHTS; j++)
                add_scaled(acc[i][j], product(weight[j], mine), scale[j * KINDS / WEIGHTS][i % 2]);
        }
    }
}

}  // namespace wave64
#endif
#endif
