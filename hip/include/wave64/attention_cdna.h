// How a wave of gfx9 attends to keys in pages of a cache, 32 at a time. As in attention.h, keys and values go from
// memory straight into the registers that matrix instructions read them from, and logits become weights in place. The
// lanes compute in pairs of numbers, the first step needs neither zeros nor factors, and the waves of a block merge
// their sums by columns, each all heads of a quarter.
#pragma once

#include "wave64/attention.h"

namespace wave64 {
constexpr int kStepGroups = 2;  // groups of keys that a wave of gfx9 takes at a time
}  // namespace wave64

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)

namespace wave64 {

// What a lane holds while its wave attends: queries in T of D columns, keys and values as Stored.
template <typename T, typename Stored, int D>
struct CdnaAttention {
    static constexpr int kKeyPack = 16 / sizeof(Stored), kKeyPacks = D / kParts / kKeyPack;
    static constexpr int kOperands = kKeyPack / kNumbers;  // in a pack of keys
    static constexpr int kColumns = D / kLines;            // of the values, in a pack, and products with them
    static constexpr float kEnlargeLog2 = Weights<T>::kEnlarge * kLog2E;
    using Values = Pack<Stored, kColumns>;

    LanePosition lane = lane_position();
    int value_row_bytes;
    unsigned key_at, value_at[kNumbers];                  // bytes from a group's first row
    Operand query[D / 16];                                // of head `line`, the columns that it has of keys
    Pack<Stored, kKeyPack> keys[kStepGroups][kKeyPacks];  // of row `row`, every kParts-th pack from `part` on
    Values values[kStepGroups][kNumbers];                 // of rows kNumbers * part + n, pack `row`
    float offset;                                         // added to logits
    Floats2 row_sum;                                      // of head `line`, over its keys
    Sums acc[kColumns];  // of head `line`, columns kColumns * (kRows * part + i) + 0, 1, ...

    WAVE64_DEVICE CdnaAttention(int key_row_bytes, int value_row_bytes)
        : value_row_bytes(value_row_bytes), key_at(unsigned(lane.row * key_row_bytes + 16 * lane.part)) {
        for (int n = 0; n < kNumbers; n++)
            value_at[n] = unsigned((kNumbers * lane.part + n) * value_row_bytes + int(sizeof(Values)) * lane.row);
    }

    // For a wave without keys.
    WAVE64_DEVICE void clear() {
        float zero = 0;
        forget(zero);  // else the compiler clears what other waves write, too
        offset = -kLowest, row_sum = Floats2(zero);
        for (Sums& sums : acc)
            for (float& x : sums.at[0]) x = zero;
    }

    // What would be heads from num_heads on are the last of them.
    WAVE64_DEVICE void load_query(const T* first_head, int64_t head_stride, int num_heads) {
        const int head = lane.line < num_heads ? lane.line : num_heads - 1;
        const T* at = first_head + head * head_stride + kKeyPack * lane.part;
#pragma unroll
        for (int j = 0; j < kKeyPacks; j++) {
            Array<Pack<T, 8>, kKeyPack / 8> packs;
            for (int i = 0; i < kKeyPack / 8; i++) packs.at[i] = load_pack<T, 8>(at + kKeyPack * kParts * j + 8 * i);
            const auto operands = __builtin_bit_cast(Array<Operand, kOperands>, packs);
            for (int k = 0; k < kOperands; k++) query[j * kOperands + k] = operands.at[k];
        }
    }
    WAVE64_DEVICE void negate_query() {
        for (Operand& operand : query)
            for (Bits32& word : operand.words) word ^= 0x80008000;
    }

    WAVE64_DEVICE void load_keys(int group, const char* rows) {
#pragma unroll
        for (int j = 0; j < kKeyPacks; j++) keys[group][j] = {load_behind<Bits128>(rows + 16 * kParts * j, key_at)};
    }
    // Of the group's rows those from `first` to `last` are seen. The lanes of others load one of these in their place:
    // their weights are zero, but 0 times what the memory holds could be NaN.
    WAVE64_DEVICE void load_values(int group, const char* rows, int first, int last) {
        if (first <= 0 && last >= kGroup - 1) {
#pragma unroll
            for (int n = 0; n < kNumbers; n++)
                values[group][n] = {load_behind<typename Values::Bits>(rows, value_at[n])};
            return;
        }
#pragma unroll
        for (int n = 0; n < kNumbers; n++) {
            const int row = kNumbers * lane.part + n, seen = row < first ? first : row > last ? last : row;
            values[group][n] = {
                load_behind<typename Values::Bits>(rows, value_at[n] + unsigned((seen - row) * value_row_bytes))};
        }
    }

    // Products of the queries with keys kRows * part + i of each group.
    WAVE64_DEVICE void find_logits(const Logit& logit, Sums (&logits)[kStepGroups]) const {
#pragma unroll
        for (int g = 0; g < kStepGroups; g++) {
            logits[g] = {};
#pragma unroll
            for (int j = 0; j < kKeyPacks; j++) {
                const auto x = __builtin_bit_cast(Array<Operand, kOperands>, widened<T>(keys[g][j]));
#pragma unroll
                for (int k = 0; k < kOperands; k += 2)
                    multiply_two<T>(x.at[k], x.at[k + 1], query[j * kOperands + k], query[j * kOperands + k + 1],
                                    logits[g]);
            }
        }
        if (logit.cap > 0)
            for (Sums& sums : logits)
                for (float& x : sums.at[0]) x = logit.capped(x * logit.factor);
    }

    // Masks all keys of the step from first_key on but those from `first` to `end`.
    WAVE64_DEVICE void mask_all_but(int first, int end, int first_key, Sums (&logits)[kStepGroups]) const {
#pragma unroll
        for (int g = 0; g < kStepGroups; g++)
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                const int key = first_key + kGroup * g + kRows * lane.part + i;
                if (key < first || key >= end) logits[g].at[0][i] = -__builtin_huge_valf();
            }
    }

    // Makes weights of the logits times a factor above 0. FIRST: of the wave.
    template <bool FIRST>
    WAVE64_DEVICE void weigh(float factor, const Sums (&logits)[kStepGroups], Operand (&weights)[kStepGroups]) {
        constexpr int pairs = kRows / 2, num = kStepGroups * pairs;
        Floats2 x[num];
#pragma unroll
        for (int i = 0; i < num; i++) {
            const auto& at = logits[i / pairs].at[0];
            x[i] = Floats2{at[i % pairs * 2], at[i % pairs * 2 + 1]};
        }
        const auto scaled = [&] {
#pragma unroll
            for (Floats2& pair : x) pair = __builtin_elementwise_fma(pair, Floats2(factor), Floats2(offset));
        };
        const auto top_of = [&] {
            float top = max(x[0].x, x[0].y);
#pragma unroll
            for (int i = 1; i < num; i++) top = max(max(top, x[i].x), x[i].y);
            return top;
        };
        if constexpr (FIRST) {
            offset = kEnlargeLog2 - max_of_rows(top_of()) * factor;
            scaled();
        } else {
            constexpr float slack = 8;
            scaled();
            const float top = top_of();
            if (ballot(top > slack)) {
                const float raise = max(max_of_rows(top) - kEnlargeLog2, 0.f), shrink = exp2(-raise);
                offset -= raise, row_sum *= shrink;
#pragma unroll
                for (Sums& sums : acc)
                    for (float& each : sums.at[0]) each *= shrink;
#pragma unroll
                for (Floats2& pair : x) pair -= raise;
            }
        }
#pragma unroll
        for (int i = 0; i < num; i++) {
            const Floats2 pair = {exp2(x[i].x), exp2(x[i].y)};
            row_sum = FIRST && i == 0 ? pair : row_sum + pair;
            weights[i / pairs].words[i % pairs] = Weights<T>::pair(pair);
        }
    }

    template <bool FIRST>
    WAVE64_DEVICE void accumulate(const Operand (&weights)[kStepGroups]) {
        Array<Bits32, kColumns / 2> rows[kStepGroups][kNumbers];
#pragma unroll
        for (int g = 0; g < kStepGroups; g++)
#pragma unroll
            for (int n = 0; n < kNumbers; n++) rows[g][n] = widened<T>(values[g][n]);
#pragma unroll
        for (int p = 0; p < kColumns; p++) {
            Operand x[kStepGroups];
#pragma unroll
            for (int g = 0; g < kStepGroups; g++)
#pragma unroll
                for (int n = 0; n < kNumbers; n += 2) {
                    const Bits32 a = rows[g][n].at[p / 2], b = rows[g][n + 1].at[p / 2];
                    x[g].words[n / 2] = p % 2 ? high_halves(a, b) : low_halves(a, b);
                }
            Sums sums = {};
            if constexpr (!FIRST) sums = acc[p];
            multiply_two<T>(x[0], x[1], weights[0], weights[1], sums);
            acc[p] = sums;
        }
    }

    // What a wave has of the block's state: of each run of kColumns columns kEach, from kEach * wave on, as four lie in
    // registers: no number moves. `acc` has those of the lane's runs, kRows * part + i, the c-th of each in acc[c].
    static constexpr int kEach = kColumns / kRows;
    struct Joined {
        float row_max, row_sum;
        Array<float, kRows> acc[kEach];
    };
    // The column of the x-th number of a row in which a block's lanes are one behind the other.
    WAVE64_DEVICE static int column_of(int x) {
        const int i = x % kRows, c = x / kRows % kEach, part = x / (kRows * kEach) % kParts, wave = x / (D / kRows);
        return kColumns * (kRows * part + i) + kEach * wave + c;
    }

    // Merges the states of a block's waves.
    WAVE64_DEVICE Joined join_waves(int wave) const {
        constexpr int waves = kRows;
        static_assert(waves == kParts);  // since a part merges the maxima of a wave
        alignas(16) WAVE64_LDS static Array<float, kRows> lds_acc[waves][waves][kLanes];
        alignas(16) WAVE64_LDS static Array<float, kParts> lds_sum[waves][kLines];
        WAVE64_LDS static float lds_max[waves][kLines];
        const int id = lane_in_block() % kLanes;
        lds_max[wave][lane.line] = -offset, lds_sum[wave][lane.line].at[lane.part] = row_sum.x + row_sum.y;
        Joined joined;
        float scale[waves];
#pragma unroll
        for (int c = 0; c < kEach; c++) {
            if (c > 0) block_barrier();
#pragma unroll
            for (int w = 0; w < waves; w++)
                lds_acc[wave][w][id] = __builtin_bit_cast(Array<float, kRows>, acc[kEach * w + c]);
            block_barrier();
            if (c == 0) {
                const float row_max = lds_max[lane.part][lane.line];
                const auto [sum] = lds_sum[lane.part][lane.line];
                joined.row_max = max_of_rows(row_max);
                const float shrink = exp2(row_max - joined.row_max);
                joined.row_sum = sum_of_rows((sum[0] + sum[1] + sum[2] + sum[3]) * shrink);
                for (int w = 0; w < waves; w++) scale[w] = from_lane(shrink, kLines * w + lane.line);
            }
            Floats2 low = {0, 0}, high = {0, 0};
#pragma unroll
            for (int w = 0; w < waves; w++) {
                const auto [x] = lds_acc[w][wave][id];
                low = __builtin_elementwise_fma(Floats2{x[0], x[1]}, Floats2(scale[w]), low);
                high = __builtin_elementwise_fma(Floats2{x[2], x[3]}, Floats2(scale[w]), high);
            }
            joined.acc[c] = {{low.x, low.y, high.x, high.y}};
        }
        return joined;
    }
};

}  // namespace wave64
#endif
