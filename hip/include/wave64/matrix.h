// Matrix instructions, in one shape for all architectures:
//
//     sums[row][head] += x[row][k] * y[head][k], over 16 k, for 16 rows and for kTileHeads heads
//
// The lanes of a wave are kLines lines of kParts parts. A lane holds of y's heads the line-th, of x's rows one in each
// of kTiles operands, and of both the kNumbers k that its part has. Of the sums it gets kHeads heads and kRows rows.
//
//                   kLines  kParts  line       part       heads of sums        rows of sums
//     gfx9              16       4  lane % 16  lane / 16  line                 kRows * part + 0, 1, ...
//     gfx11, gfx12      16       2  lane % 16  lane / 16  line                 kRows * part + 0, 1, ...
//     sm_90              8       4  lane / 4   lane % 4   2 part, 2 part + 1   line, line + 8
//
// Which k a part has does not matter as long as x and y agree. So on AMD the sums of 16 rows lie as a y does: a lane
// that finds logits of some keys needs, for the weighted sum of values, the weights of the same keys, and lanes
// exchange nothing. On sm_90 the sums are transposed first (operand_of).
#pragma once

#include "wave64/types.h"

namespace wave64 {
constexpr int kAmdTileHeads = 16, kNvidiaTileHeads = 8;  // kTileHeads, which the host and Python plan with
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

#if defined(__GFX9__)
constexpr int kLines = 16, kParts = 4;
#elif defined(__GFX11__) || defined(__GFX12__)
constexpr int kLines = 16, kParts = 2;
#else
constexpr int kLines = 8, kParts = 4;
#endif
constexpr int kLanes = kLines * kParts;  // the wave size
constexpr int kTileHeads = kLines;
static_assert(kTileHeads == kAmdTileHeads || kTileHeads == kNvidiaTileHeads);
constexpr int kTiles = 16 / kLines;       // rows of x that a lane holds
constexpr int kNumbers = 16 / kParts;     // k of a lane
constexpr int kHeads = kTiles;            // of a lane, in its sums
constexpr int kRows = kNumbers / kHeads;  // of a lane, in its sums

// What a lane holds of operands and sums.
struct LanePosition {
    int line, part;
    int row;  // of an x

    // Which of 16 rows the lane holds in the tile-th x, and which one its i-th sums belong to. In this order, the rows
    // that it holds as k of the next product are kNumbers * part + 0, 1, ...
    WAVE64_DEVICE int row_of_16(int tile) const { return kTiles == 1 ? row : row / 2 * kNumbers + tile * 2 + row % 2; }
    WAVE64_DEVICE int row_of_sums(int i) const { return kTiles == 1 ? kRows * part + i : row_of_16(i); }
    WAVE64_DEVICE int head(int h) const { return kTiles == 1 ? line : kHeads * part + h; }
    // Whether this is the first of the lanes with the same heads.
    WAVE64_DEVICE bool first_of_heads() const { return (kTiles == 1 ? part : line) == 0; }
};

WAVE64_DEVICE LanePosition lane_position() {
    const int lane = lane_in_block() % kLanes;
    if constexpr (kLines == 8) return {lane / kParts, lane % kParts, lane / kParts};
#if defined(__GFX11__)  // a part gets every other row
    return {lane % 16, lane / 16, lane % 2 * 8 + lane % 16 / 2};
#else
    return {lane % 16, lane / 16, lane % 16};
#endif
}

// The sum or the maximum over the lanes that have the same heads in their sums, in each of them.
template <typename Join>
WAVE64_DEVICE float joined_rows(float x, Join join) {
    for (int bit = kTiles == 1 ? kLines : kParts; bit < kLanes; bit *= 2)
        x = join(x, from_lane(x, lane_in_block() % kLanes ^ bit));
    return x;
}
WAVE64_DEVICE float sum_of_rows(float x) {
    return joined_rows(x, [](float a, float b) { return a + b; });
}
WAVE64_DEVICE float max_of_rows(float x) {
    return joined_rows(x, [](float a, float b) { return max(a, b); });
}

// A lane's k of a row or head, two 16-bit numbers to a word.
struct Operand {
    Bits32 words[kNumbers / 2];
};

struct Sums {
    float at[kHeads][kRows];
};

#if defined(WAVE64_CPU) || defined(__HIP__)
// Sums, rounded, as a y.
template <typename T>
WAVE64_DEVICE Operand operand_of(const float (&x)[kHeads][kRows]) {
    Operand y;
    for (int n = 0; n < kNumbers; n += 2) y.words[n / 2] = rounded_pair(x[0][n], x[0][n + 1], T());
    return y;
}
#endif

#if defined(WAVE64_CPU)

template <typename T>
WAVE64_DEVICE void multiply(const Operand (&x)[kTiles], const Operand& y, Sums& sums) {
    const auto [line, part, row] = lane_position();
    int line_of[kLines];  // of the lanes that hold a row of x
    const uint64_t* all = meet_wave(9, row);
    for (int l = 0; l < kLines; l++) line_of[all[part * kLines + l]] = l;
    T rows[kRows][kParts][kNumbers], head[kParts][kNumbers];
    for (int word = 0; word < kNumbers / 2; word++) {
        all = meet_wave(7, x[0].words[word]);
        for (int p = 0; p < kParts; p++)
            for (int i = 0; i < kRows; i++)
                __builtin_memcpy(&rows[i][p][2 * word], all + p * kLines + line_of[kRows * part + i], 4);
        all = meet_wave(8, y.words[word]);
        for (int p = 0; p < kParts; p++) __builtin_memcpy(&head[p][2 * word], all + p * kLines + line, 4);
    }
    for (int i = 0; i < kRows; i++)
        for (int p = 0; p < kParts; p++)
            for (int n = 0; n < kNumbers; n++) sums.at[0][i] += float(rows[i][p][n]) * float(head[p][n]);
}

#elif defined(__HIP__)

#if defined(__GFX11__)
// All 16 k of a row or head, which the instruction takes from both parts alike.
struct Whole {
    Bits32 words[8];

    WAVE64_DEVICE Whole(const Operand& mine) {
        const bool second = lane_in_block() % kLanes >= 16;
        for (int i = 0; i < 4; i++) {
            const Bits32 other =
                __builtin_amdgcn_permlanex16(0, mine.words[i], 0x76543210, 0xfedcba98, false, false);  // from lane ^ 16
            words[i] = second ? other : mine.words[i], words[i + 4] = second ? mine.words[i] : other;
        }
    }
};
#elif defined(__gfx1250__)
// The instruction takes 32 k; the second half is zeros.
struct Whole {
    Bits32 words[8];

    WAVE64_DEVICE Whole(const Operand& mine) : words{mine.words[0], mine.words[1], mine.words[2], mine.words[3]} {}
};
#else
using Whole = Operand;
#endif

template <typename T>
WAVE64_DEVICE void multiply(const Operand (&x)[kTiles], const Operand& y, Sums& sums) {
    constexpr int numbers = sizeof(Whole) / 2;
    using Floats = float __attribute__((ext_vector_type(kRows)));
    using Halves = fp16 __attribute__((ext_vector_type(numbers)));
    using Shorts = short __attribute__((ext_vector_type(numbers)));
    const auto a = __builtin_bit_cast(Shorts, Whole(x[0])), b = __builtin_bit_cast(Shorts, Whole(y));
    auto c = __builtin_bit_cast(Floats, sums);
    if constexpr (__is_same(T, fp16)) {
        const auto rows = __builtin_bit_cast(Halves, a), heads = __builtin_bit_cast(Halves, b);
#if defined(__GFX9__)
        c = __builtin_amdgcn_mfma_f32_16x16x16f16(rows, heads, c, 0, 0, 0);
#elif defined(__GFX11__)
        c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(rows, heads, c);
#elif defined(__gfx1250__)
        c = __builtin_amdgcn_wmma_f32_16x16x32_f16(false, rows, false, heads, short(0), c, false, false);
#else
        c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(rows, heads, c);
#endif
    } else {
#if defined(__GFX9__)
        c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, 0, 0, 0);
#elif defined(__GFX11__)
        c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c);
#elif defined(__gfx1250__)
        using Brains = bf16 __attribute__((ext_vector_type(numbers)));
        c = __builtin_amdgcn_wmma_f32_16x16x32_bf16(false, __builtin_bit_cast(Brains, a), false,
                                                    __builtin_bit_cast(Brains, b), short(0), c, false, false);
#else
        c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(a, b, c);
#endif
    }
    sums = __builtin_bit_cast(Sums, c);
}

#else

template <typename T>
WAVE64_DEVICE void multiply(const Operand (&x)[kTiles], const Operand& y, Sums& sums) {
    auto& [low, high] = sums.at;
#define WAVE64_MMA(TYPE)                                                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                                        \
        "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
        : "+f"(low[0]), "+f"(high[0]), "+f"(low[1]), "+f"(high[1])                                         \
        : "r"(x[0].words[0]), "r"(x[1].words[0]), "r"(x[0].words[1]), "r"(x[1].words[1]), "r"(y.words[0]), \
          "r"(y.words[1]))
    if constexpr (__is_same(T, fp16))
        WAVE64_MMA("f16");
    else
        WAVE64_MMA("bf16");
#undef WAVE64_MMA
}

// A word has one row and two heads; transposed, one head and two rows.
template <typename T>
WAVE64_DEVICE Operand operand_of(const float (&x)[kHeads][kRows]) {
    Operand y;
    for (int i = 0; i < kRows; i++) {
        y.words[i] = rounded_pair(x[0][i], x[1][i], T());
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(y.words[i]));
    }
    return y;
}

#endif

#if defined(__GFX9__)
// Over 32 k, in one instruction where there is one.
template <typename T>
WAVE64_DEVICE void multiply_two(const Operand& x0, const Operand& x1, const Operand& y0, const Operand& y1,
                                Sums& sums) {
#if defined(__gfx950__) && !defined(WAVE64_CPU)
    using Floats = float __attribute__((ext_vector_type(kRows)));
    using Numbers = T __attribute__((ext_vector_type(8)));
    struct Two {
        Operand at[2];
    };
    const auto x = __builtin_bit_cast(Numbers, Two{{x0, x1}}), y = __builtin_bit_cast(Numbers, Two{{y0, y1}});
    auto c = __builtin_bit_cast(Floats, sums);
    if constexpr (__is_same(T, fp16))
        c = __builtin_amdgcn_mfma_f32_16x16x32_f16(x, y, c, 0, 0, 0);
    else
        c = __builtin_amdgcn_mfma_f32_16x16x32_bf16(x, y, c, 0, 0, 0);
    sums = __builtin_bit_cast(Sums, c);
#else
    const Operand first[kTiles] = {x0}, second[kTiles] = {x1};
    multiply<T>(first, y0, sums);
    multiply<T>(second, y1, sums);
#endif
}
#endif

}  // namespace wave64
#endif
