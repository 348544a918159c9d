// FP8 products on matrix cores, and how their factors come from memory. A wave multiplies 16 rows of weights with 16
// tokens over 128 columns at a time:
//
//     product[row][token] = sum of weight[row][k] * token[token][k] over 128 k
//
// A lane is (line, part) = (lane % 16, lane / 16). It holds of weight `line` and of token `line` the columns
// 16 part + 0, ..., 15 and 64 more; of the product rows 4 part + 0, ..., 3 of token `line`. Which columns a lane has
// does not matter as long as both factors agree; with these a load takes runs of 64 bytes from memory.
#pragma once

#include "wave64/fp8.h"

#if defined(__gfx942__) || defined(__gfx950__)
#define WAVE64_HAS_FP8_MATRIX 1
#else
#define WAVE64_HAS_FP8_MATRIX 0
#endif

#if WAVE64_HAS_FP8_MATRIX
namespace wave64 {

constexpr int kStepColumns = 128;  // that a product sums

using Floats2 = float __attribute__((ext_vector_type(2)));
using Floats4 = float __attribute__((ext_vector_type(4)));

// A lane's 32 of 128 columns of a row: 16 from 16 part on, and 16 from 64 + 16 part on.
struct Columns {
    Bits128 low, high;
};

WAVE64_DEVICE int line_of_lane() { return lane_in_block() % 16; }
WAVE64_DEVICE int part_of_lane() { return lane_in_block() % 64 / 16; }

#if defined(WAVE64_CPU)
// A function of its own: inlined wherever a kernel multiplies, it takes the compiler long.
inline Floats4 product(const Columns& weight, const Columns& token) {
    Floats4 sums = {};
    struct Words {
        uint64_t at[4];
    };
    const auto rows = __builtin_bit_cast(Words, weight), tokens = __builtin_bit_cast(Words, token);
    for (int word = 0; word < 4; word++) {
        uint64_t others[64];
        const uint64_t* all = meet_wave(10, rows.at[word]);
        for (int lane = 0; lane < 64; lane++) others[lane] = all[lane];
        all = meet_wave(11, tokens.at[word]);
        for (int part = 0; part < 4; part++)
            for (int half = 0; half < 2; half++) {
                const auto y = from_fp8(Bits32(all[16 * part + line_of_lane()] >> 32 * half));
                for (int i = 0; i < 4; i++) {
                    const auto x = from_fp8(Bits32(others[16 * part + 4 * part_of_lane() + i] >> 32 * half));
                    for (int k = 0; k < 4; k++) sums[i] += x.at[k] * y.at[k];
                }
            }
    }
    return sums;
}
#else
WAVE64_DEVICE Floats4 product(const Columns& weight, const Columns& token) {
    Floats4 sums = {};
#if defined(__gfx950__)
    using Words = int __attribute__((ext_vector_type(8)));
    sums = __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(__builtin_bit_cast(Words, weight),
                                                            __builtin_bit_cast(Words, token), sums, 0, 0, 0, 0, 0, 0);
#else
    struct Words {
        long at[4];
    };
    const auto rows = __builtin_bit_cast(Words, weight), tokens = __builtin_bit_cast(Words, token);
#pragma unroll
    for (int word = 0; word < 4; word++)
        sums = __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(rows.at[word], tokens.at[word], sums, 0, 0, 0);
#endif
    return sums;
}
#endif

// acc += scale * sums. As pairs, which gfx942 and gfx950 multiply and add in one instruction.
WAVE64_DEVICE void add_scaled(Floats4& acc, const Floats4& sums, float scale) {
    const Floats2 both = {scale, scale};
    acc.xy = __builtin_elementwise_fma(sums.xy, both, acc.xy);
    acc.zw = __builtin_elementwise_fma(sums.zw, both, acc.zw);
}

// A scale that is the same for all lanes.
WAVE64_DEVICE float load_scale(const float* scales, int at) {
    return __builtin_bit_cast(float, load_uniform(reinterpret_cast<const int32_t*>(scales + at)));
}

// What a lane loads of 16 rows so that each load takes 8 rows in whole lines of memory, by neighboring lanes: chunk
// `lane % 8` of the 8 that 128 columns have, of rows `lane / 8` and 8 + lane / 8.
struct Lines {
    Bits128 at[2];
};
WAVE64_DEVICE int row_of_lines() { return lane_in_block() % 64 / 8; }
WAVE64_DEVICE int chunk_of_lines() { return lane_in_block() % 8; }

// Through it a wave's lanes give each other what a product needs of them, 16 rows at a time.
using Exchange = Bits128[16][8];

// A product's factor of such rows; no two lanes in turn meet in one bank.
WAVE64_DEVICE Columns exchanged(Exchange& lds, const Lines& lines) {
    const int row = row_of_lines(), chunk = chunk_of_lines(), line = line_of_lane(), at = part_of_lane() ^ line % 8;
    wave_barrier();  // the rows before are read
    for (int i = 0; i < 2; i++) lds[8 * i + row][chunk ^ row] = lines.at[i];
    wave_barrier();
    return {lds[line][at], lds[line][at ^ 4]};
}

constexpr int kNowhere = 1 << 30;  // past any end

// Some rows of a factor, and the 16 bytes of each that a lane loads: `chunk` of the eight that 128 columns have, and
// for `Columns` the fourth behind it. Rows past the last and columns past the end are zeros.
class Factor {
    Bounded memory;
    int row_bytes, at, last_step, low, high;  // low, high: where the lane's bytes of the last step are

public:
    // num_rows * row_bytes is below 2^30, as is what a load asks for. A lane without a row has -1: zeros.
    WAVE64_DEVICE Factor(const void* base, int num_rows, int row_bytes, int columns, int row, int chunk)
        : memory(base, num_rows > 0 ? (num_rows - 1) * row_bytes + columns : 0),
          row_bytes(row_bytes),
          at(row < 0 ? kNowhere : row * row_bytes + 16 * chunk),
          last_step((columns - 1) / kStepColumns) {
        const int left = columns - last_step * kStepColumns;
        low = 16 * chunk < left ? at : kNowhere;
        high = 16 * chunk + 64 < left ? at + 64 : kNowhere;
    }

    // The lane's columns of a step, of the row that is `further` rows behind its own; zeros, and no memory is read,
    // unless `there`.
    WAVE64_DEVICE Columns load(int further, int step, bool there = true) const {
        const int behind = further * row_bytes + step * kStepColumns;
        const bool last = step == last_step;
        return {memory.load<Bits128>(!there ? kNowhere
                                     : last ? low
                                            : at,
                                     behind),
                memory.load<Bits128>(!there ? kNowhere
                                     : last ? high
                                            : at + 64,
                                     behind)};
    }
    WAVE64_DEVICE Bits128 load_chunk(int further, int step, bool there) const {
        const int behind = further * row_bytes + step * kStepColumns;
        return memory.load<Bits128>(!there ? kNowhere : step == last_step ? low : at, behind);
    }
    // Of a lane whose own row is the first of `Lines`, `apart` rows before the second.
    WAVE64_DEVICE Lines load_lines(int further, int apart, int step, bool there) const {
        return {load_chunk(further, step, there), load_chunk(further + apart, step, there)};
    }
};

}  // namespace wave64
#endif
