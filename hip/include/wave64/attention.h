// How a wave attends to keys in pages of a cache, 16 at a time: what its lanes hold, and what they do with it. Keys and
// values go from memory straight into the registers that the matrix instructions read them from, 16 bytes at a time
// where a lane has as many. Logits are in base 2, for exp2.
#pragma once

#include "wave64/matrix.h"

namespace wave64 {
constexpr int kGroup = 16;  // keys that a wave takes at a time; a page holds whole groups
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/fp8.h"
#include "wave64/rows.h"

namespace wave64 {

constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -1e38f;  // below any logit, and finite, so that no difference of two is NaN

// The keys or the values of one head.
struct Pool {
    const char* base;
    int64_t page_bytes;
    int row_bytes;

    WAVE64_DEVICE const char* rows(int page, int row) const {
        const char* rows = base + page * page_bytes + int64_t(row) * row_bytes;
        keep_uniform(rows);
        return rows;
    }
};

// cap(scale x) in base 2, where cap(x) = c tanh(x / c).
struct Logit {
    float factor, cap;

    WAVE64_DEVICE float capped(float y) const {
        const float size = y < 0 ? -y : y, square = y * y;
        // Near 0 a series, since 1 - e would cancel.
        const float near = size * (1 - square * (1.f / 3 - square * (2.f / 15 - square * (17.f / 315))));
        const float e = exp2(size * (-2 * kLog2E)), tanh = size < 0.2f ? near : (1 - e) * reciprocal(1 + e);
        return (y < 0 ? -tanh : tanh) * (cap * kLog2E);
    }
};

template <typename T, int N>
struct Array {
    T at[N];
};

// A pack of the cache in T, two numbers to a word. T represents every FP8 number: nothing is rounded.
template <typename T, typename Stored, int N>
WAVE64_DEVICE Array<Bits32, N / 2> widened(const Pack<Stored, N>& pack) {
    if constexpr (sizeof(Stored) == 2) {
        return __builtin_bit_cast(Array<Bits32, N / 2>, pack.bits);
    } else {
        const auto quads = __builtin_bit_cast(Array<Bits32, N / 4>, pack.bits);
        Array<Bits32, N / 2> words;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const auto [x] = from_fp8(quads.at[i / 2]);
            const float a = x[i % 2 * 2], b = x[i % 2 * 2 + 1];
            if constexpr (__is_same(T, bf16))
                words.at[i] = high_halves(__builtin_bit_cast(Bits32, a), __builtin_bit_cast(Bits32, b));
            else
                words.at[i] = rounded_pair(a, b, T());
        }
        return words;
    }
}

#if defined(__GFX9__)
using Floats2 = float __attribute__((ext_vector_type(2)));

// Softmax weights in T, two to a word. Where rounding to nearest takes instructions of its own they are truncated, and
// kEnlarge is what that takes from a number in the mean: weights are as much too large before, and results corrected.
template <typename T>
struct Weights {
#if defined(WAVE64_CPU)
    static constexpr float kEnlarge = 0;
    WAVE64_DEVICE static Bits32 pair(const Floats2& x) { return rounded_pair(x.x, x.y, T()); }
#elif defined(__gfx950__)
    static constexpr float kEnlarge = 0;
    WAVE64_DEVICE static Bits32 pair(const Floats2& x) {
        using Pair = T __attribute__((ext_vector_type(2)));
        return __builtin_bit_cast(Bits32, __builtin_convertvector(x, Pair));
    }
#else
    // Half of log2(e) of the last place, for numbers whose logarithms are evenly distributed.
    static constexpr float kEnlarge = kLog2E / 2 * (__is_same(T, bf16) ? 0x1p-8f : 0x1p-11f);
    WAVE64_DEVICE static Bits32 pair(const Floats2& x) {
        const auto bits = __builtin_bit_cast(Bits64, x);
        if constexpr (__is_same(T, bf16)) return high_halves(bits.x, bits.y);
        return __builtin_bit_cast(Bits32, __builtin_amdgcn_cvt_pkrtz(x.x, x.y));
    }
#endif
};
#endif

// What a lane holds while its wave attends: queries in T of D columns, keys and values as Stored.
template <typename T, typename Stored, int D>
struct Attention {
    static constexpr int kKeyPack = 16 / sizeof(Stored), kKeyPacks = D / kParts / kKeyPack;
    static constexpr int kColumns = D / kLines;  // of the values
    static constexpr int kValuePack = kColumns < kKeyPack ? kColumns : kKeyPack, kValuePacks = kColumns / kValuePack;
    static constexpr int kOperands = kKeyPack / kNumbers;  // in a pack of keys
    static constexpr int kProducts = kValuePack / kTiles;  // of a pack of values with the weights
    static constexpr int kAcc = kValuePacks * kProducts;
    static constexpr int kJoined = kHeads * (kAcc * kRows + 2);  // numbers that waves exchange
    using Logits = float[kHeads][kRows];

    LanePosition lane = lane_position();
    // A lane has every kParts-th pack (of values: every kLines-th)
    Operand query[D / 16] = {};                              // of head `line`, the columns that it has of keys
    Pack<Stored, kKeyPack> keys[kTiles][kKeyPacks];          // of rows row_of_16(tile), from pack `part` on
    Pack<Stored, kValuePack> values[kNumbers][kValuePacks];  // of rows kNumbers * part + n, from pack `row` on
    float row_max[kHeads], row_sum[kHeads];                  // of heads lane.head(h): over its keys, of its weights
    Sums acc[kValuePacks][kProducts] = {};                   // the weighted sum of values; see acc_at

    WAVE64_DEVICE Attention() {
        for (int h = 0; h < kHeads; h++) row_max[h] = kLowest, row_sum[h] = 0;
    }

    // The rows of a product with pack u are every kValuePack-th of kLines columns, and their kTiles - 1 neighbors. So a
    // lane has kRuns runs of kValuePack columns: where one begins, and the sum of its t-th column.
    static constexpr int kRuns = kRows / kTiles;
    WAVE64_DEVICE int first_column(int u, int run) const {
        return kValuePack * ((kTiles == 1 ? kRows * lane.part + run : lane.line) + kLines * u);
    }
    WAVE64_DEVICE float acc_at(int h, int u, int run, int t) const {
        return acc[u][t / kTiles].at[h][run * kTiles + t % kTiles];
    }

    // Heads from num_heads on stay zero.
    WAVE64_DEVICE void load_query(const T* first_head, int64_t head_stride, int num_heads) {
        if (lane.line >= num_heads) return;
        const T* at = first_head + lane.line * head_stride + kKeyPack * lane.part;
#pragma unroll
        for (int j = 0; j < kKeyPacks; j++) {
            Array<Pack<T, 8>, kKeyPack / 8> packs;
            for (int i = 0; i < kKeyPack / 8; i++) packs.at[i] = load_pack<T, 8>(at + kKeyPack * kParts * j + 8 * i);
            const auto operands = __builtin_bit_cast(Array<Operand, kOperands>, packs);
            for (int k = 0; k < kOperands; k++) query[j * kOperands + k] = operands.at[k];
        }
    }

    WAVE64_DEVICE void load_keys(const Pool& pool, int page, int row) {
        const char* rows = pool.rows(page, row);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
            const unsigned at = unsigned(lane.row_of_16(tile) * pool.row_bytes + 16 * lane.part);
#pragma unroll
            for (int j = 0; j < kKeyPacks; j++) keys[tile][j] = {load_behind<Bits128>(rows + 16 * kParts * j, at)};
        }
    }

    WAVE64_DEVICE void load_values(const Pool& pool, int page, int row) {
        constexpr int bytes = kValuePack * sizeof(Stored);
        const char* rows = pool.rows(page, row);
        const unsigned at = unsigned(kNumbers * lane.part * pool.row_bytes + bytes * lane.row);
#pragma unroll
        for (int n = 0; n < kNumbers; n++)
#pragma unroll
            for (int u = 0; u < kValuePacks; u++)
                values[n][u] = {load_behind<typename BitsOf<bytes>::type>(
                    rows + int64_t(n) * pool.row_bytes + bytes * kLines * u, at)};
    }

    // Logits of the group's keys lane.row_of_sums(i).
    WAVE64_DEVICE void find_logits(const Logit& logit, Logits& logits) const {
        Sums sums = {};
#pragma unroll
        for (int j = 0; j < kKeyPacks; j++) {
            Array<Operand, kOperands> operands[kTiles];
            for (int tile = 0; tile < kTiles; tile++)
                operands[tile] = __builtin_bit_cast(Array<Operand, kOperands>, widened<T>(keys[tile][j]));
#pragma unroll
            for (int k = 0; k < kOperands; k++) {
                Operand x[kTiles];
                for (int tile = 0; tile < kTiles; tile++) x[tile] = operands[tile].at[k];
                multiply<T>(x, query[j * kOperands + k], sums);
            }
        }
        for (int h = 0; h < kHeads; h++)
            for (int i = 0; i < kRows; i++) logits[h][i] = sums.at[h][i] * logit.factor;
        if (logit.cap > 0)
            for (auto& row : logits)
                for (float& x : row) x = logit.capped(x);
    }

    // Masks all keys of the group from first_key on but those from `first` to `end`: their logits become -inf, and
    // their values zeros, since 0 times what the memory holds could be NaN.
    WAVE64_DEVICE void mask_all_but(int first, int end, int first_key, Logits& logits) {
#pragma unroll
        for (int n = 0; n < kNumbers; n++) {
            const int key = first_key + kNumbers * lane.part + n;
            if (key >= first && key < end) continue;
            for (int u = 0; u < kValuePacks; u++) values[n][u].bits = {};
        }
        for (int i = 0; i < kRows; i++) {
            const int key = first_key + lane.row_of_sums(i);
            if (key >= first && key < end) continue;
            for (int h = 0; h < kHeads; h++) logits[h][i] = -__builtin_huge_valf();
        }
    }

    WAVE64_DEVICE void raise_row_max_to(int h, float higher) {
        const float shrink = exp2(row_max[h] - higher);
        row_max[h] = higher, row_sum[h] *= shrink;
#pragma unroll
        for (int u = 0; u < kValuePacks; u++)
#pragma unroll
            for (int p = 0; p < kProducts; p++)
                for (int i = 0; i < kRows; i++) acc[u][p].at[h][i] *= shrink;
    }

    WAVE64_DEVICE void raise_row_max(const Logits& logits) {
        constexpr float slack = 8;
        float top[kHeads];
        bool above = false;
        for (int h = 0; h < kHeads; h++) {
            top[h] = logits[h][0];
            for (int i = 1; i < kRows; i++) top[h] = max(top[h], logits[h][i]);
            above |= top[h] > row_max[h] + slack;
        }
        if (!ballot(above)) return;
        for (int h = 0; h < kHeads; h++) raise_row_max_to(h, max(row_max[h], max_of_rows(top[h])));
    }

    WAVE64_DEVICE void accumulate(const Logits& logits) {
        float unrounded[kHeads][kRows];
        for (int h = 0; h < kHeads; h++)
            for (int i = 0; i < kRows; i++) row_sum[h] += unrounded[h][i] = exp2(logits[h][i] - row_max[h]);
        const Operand weights = operand_of<T>(unrounded);
#pragma unroll
        for (int u = 0; u < kValuePacks; u++) {
            Array<Bits32, kValuePack / 2> rows[kNumbers];
#pragma unroll
            for (int n = 0; n < kNumbers; n++) rows[n] = widened<T>(values[n][u]);
#pragma unroll
            for (int p = 0; p < kProducts; p++) {
                Operand columns[kTiles];
                for (int tile = 0; tile < kTiles; tile++)
                    for (int n = 0; n < kNumbers; n += 2) {
                        const int t = p * kTiles + tile;
                        const Bits32 x = rows[n].at[t / 2], y = rows[n + 1].at[t / 2];
                        columns[tile].words[n / 2] = t % 2 ? high_halves(x, y) : low_halves(x, y);
                    }
                multiply<T>(columns, weights, acc[u][p]);
            }
        }
    }

    // Merges the states of a block's WAVES waves into the first one's.
    template <int WAVES>
    WAVE64_DEVICE void join_waves(int wave) {
        WAVE64_LDS static float lds[WAVES / 2][kJoined][kLanes];
        const int id = lane_in_block() % kLanes;
        const auto index_of = [](int u, int p, int h, int i) {
            return 2 * kHeads + ((u * kProducts + p) * kHeads + h) * kRows + i;
        };
        for (int h = 0; h < kHeads; h++) row_sum[h] = sum_of_rows(row_sum[h]);
        for (int half = WAVES / 2; half > 0; half /= 2) {
            if (wave >= half && wave < 2 * half) {
                auto& theirs = lds[wave - half];
                for (int h = 0; h < kHeads; h++) theirs[2 * h][id] = row_max[h], theirs[2 * h + 1][id] = row_sum[h];
#pragma unroll
                for (int u = 0; u < kValuePacks; u++)
#pragma unroll
                    for (int p = 0; p < kProducts; p++)
                        for (int h = 0; h < kHeads; h++)
                            for (int i = 0; i < kRows; i++) theirs[index_of(u, p, h, i)][id] = acc[u][p].at[h][i];
            }
            block_barrier();
            if (wave < half) {
                const auto& theirs = lds[wave];
                for (int h = 0; h < kHeads; h++) {
                    const float other = theirs[2 * h][id];
                    raise_row_max_to(h, max(row_max[h], other));
                    const float scale = exp2(other - row_max[h]);
                    row_sum[h] += theirs[2 * h + 1][id] * scale;
#pragma unroll
                    for (int u = 0; u < kValuePacks; u++)
#pragma unroll
                        for (int p = 0; p < kProducts; p++)
                            for (int i = 0; i < kRows; i++)
                                acc[u][p].at[h][i] += theirs[index_of(u, p, h, i)][id] * scale;
                }
            }
            block_barrier();
        }
    }

    // Calls store(column, numbers) for the lane's columns of its h-th head, times `scale`, four at a time.
    template <typename Store>
    WAVE64_DEVICE void store_acc(int h, float scale, Store store) const {
#pragma unroll
        for (int u = 0; u < kValuePacks; u++)
            for (int run = 0; run < kRuns; run++)
#pragma unroll
                for (int t = 0; t < kValuePack; t += 4) {
                    Array<float, 4> columns;
                    for (int c = 0; c < 4; c++) columns.at[c] = acc_at(h, u, run, t + c) * scale;
                    store(first_column(u, run) + t, columns);
                }
    }
};

}  // namespace wave64
#endif
