// FP8 products of many tokens: a block of kTileWaves waves has 16 TILES of them, and each wave has columns of its own.
// Tokens pass through LDS, their chunks of 16 bytes in an order that no two lanes in turn meet in one bank; weights go
// from memory straight to registers, which hold those of one step while those of the next arrive.
#pragma once

#include "wave64/types.h"

namespace wave64 {

constexpr int kTileWaves = 4;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/fp8_matrix.h"

#if WAVE64_HAS_FP8_MATRIX
namespace wave64 {

// Neighboring blocks are on different dies, each with an L2: the item of a block, so that a die gets a range of items.
WAVE64_DEVICE unsigned item_of_die(int blocks) {
    constexpr unsigned dies = 8;
    const unsigned die = unsigned(block_id()) % dies, each = unsigned(blocks) / dies, more = unsigned(blocks) % dies;
    return die * each + (die < more ? die : more) + unsigned(block_id()) / dies;
}

// Which rows of weights a lane loads for two products that neighbor one another: in turns of 4 in each, so that it has
// 8 neighboring columns of the result, 8 part + 0, ..., 7 of token `line`.
WAVE64_DEVICE int line_of_pair() { return line_of_lane() / 4 * 8 + line_of_lane() % 4; }
WAVE64_DEVICE constexpr int further_of_pair(int product) { return product / 2 * 32 + product % 2 * 4; }

template <int TILES>
struct TokenTile {
    static constexpr int tokens = 16 * TILES, chunks = kStepColumns / 16, loads = tokens * chunks / (kTileWaves * 64);
    static constexpr int scales = (tokens + 63) / 64;  // of tokens that a lane holds: `lane`, 64 + lane
    using Memory = Bits128[2][tokens][chunks];

    // Of the chunks that a lane brings to LDS.
    WAVE64_DEVICE static int row(int load) { return lane_in_block() / chunks + tokens / loads * load; }
    WAVE64_DEVICE static int chunk() { return lane_in_block() % chunks; }

    // x of token 16 tile + line, where lanes hold those of tokens `lane` and 64 + lane.
    template <typename T>
    WAVE64_DEVICE static T of_line(const T (&x)[scales], int tile) {
        return from_lane(x[tile / 4], tile % 4 * 16 + line_of_lane());
    }
};

// What a lane has loaded for a step. Weights are of KINDS with a scale each.
template <int TILES, int WEIGHTS, int KINDS>
struct TileStep {
    Bits128 tokens[TokenTile<TILES>::loads];
    float token_scale[TokenTile<TILES>::scales], weight_scale[KINDS];
};

// Rows of `columns` numbers, a multiple of 128, that the tokens of a tile are, wherever they stand, with a scale for
// each group of 128.
template <int TILES>
class TileRows {
    using Tile = TokenTile<TILES>;
    Bounded memory, scales;
    int at[Tile::loads], scale_at[Tile::scales];

public:
    // row: of tokens `lane` and 64 + lane; -1: none, which is zeros.
    WAVE64_DEVICE TileRows(const void* base, const float* scale, int num_rows, int columns,
                           const int (&row)[Tile::scales])
        : memory(base, num_rows * columns), scales(scale, num_rows * (columns / 128) * 4) {
        constexpr int rows = Tile::tokens / Tile::loads;  // that a load of all lanes brings
        for (int i = 0; i < Tile::loads; i++) {
            const int mine = from_lane(row[rows * i / 64], rows * i % 64 + Tile::row(0));
            at[i] = mine < 0 ? kNowhere : mine * columns + 16 * Tile::chunk();
        }
        for (int i = 0; i < Tile::scales; i++) scale_at[i] = row[i] < 0 ? kNowhere : row[i] * (columns / 128) * 4;
    }
    template <typename Step>
    WAVE64_DEVICE void load(int step, bool there, Step& into) const {
#pragma unroll
        for (int i = 0; i < Tile::loads; i++)
            into.tokens[i] = memory.load<Bits128>(there ? at[i] : kNowhere, step * 128);
        for (int i = 0; i < Tile::scales; i++)
            into.token_scale[i] = __builtin_bit_cast(float, scales.load<Bits32>(scale_at[i], step * 4));
    }
};

// acc[i][j] += the scaled products of tokens 16 i, ... with the wave's weights j, over steps `begin` to `end`, of which
// there is one at least. load(step, into, weights) fills both, with zeros unless step < end. Of tokens those before
// `live` are there.
template <int TILES, int WEIGHTS, int KINDS, typename Load>
WAVE64_DEVICE void multiply_tile(typename TokenTile<TILES>::Memory& lds, int begin, int end, int live, const Load& load,
                                 Floats4 (&acc)[TILES][WEIGHTS]) {
    using Tile = TokenTile<TILES>;
    const int row = Tile::row(0), chunk = Tile::chunk(), line = line_of_lane(), part = part_of_lane();
    TileStep<TILES, WEIGHTS, KINDS> next;
    Columns weight[2][WEIGHTS];
    load(begin, next, weight[0]);
    keep_order();
    for (int step = begin; step < end;) {
#pragma unroll
        for (int turn = 0; turn < 2; turn++) {
#pragma unroll
            for (int i = 0; i < Tile::loads; i++)
                lds[turn][row + Tile::tokens / Tile::loads * i][chunk ^ row % 8] = next.tokens[i];
            float scale[KINDS][Tile::scales];
#pragma unroll
            for (int kind = 0; kind < KINDS; kind++)
                for (int i = 0; i < Tile::scales; i++) scale[kind][i] = next.token_scale[i] * next.weight_scale[kind];
            load(++step, next, weight[1 - turn]);
            keep_order();
            block_barrier();
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                if (16 * i >= live) continue;
                const Bits128(&token)[Tile::chunks] = lds[turn][16 * i + line];
                const int at = part ^ line % 8;
                const Columns mine = {token[at], token[at ^ 4]};
                float mine_scale[KINDS];
#pragma unroll
                for (int kind = 0; kind < KINDS; kind++) mine_scale[kind] = Tile::of_line(scale[kind], i);
#pragma unroll
                for (int j = 0; j < WEIGHTS; j++)
                    add_scaled(acc[i][j], product(weight[turn][j], mine), mine_scale[j * KINDS / WEIGHTS]);
            }
            if (step >= end) break;
        }
    }
}

}  // namespace wave64
#endif
#endif
