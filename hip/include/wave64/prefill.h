// Attention of many queries to the keys of their sequence, paged or packed: what prefill_attention and
// varlen_attention share.
//
// The trick: the product of keys with queries, rather than the reverse, leaves a query's logits in two lanes, which
// make weights of them in place, and lie as the next product takes them: weights pass through no LDS, and lanes
// exchange nothing unless a weight would pass 2^8. Keys and values pass through LDS once for four waves of 32 queries,
// in an order without bank conflicts, values transposed on the way there. Bound by the matrix unit.
#pragma once

#include "wave64/types.h"

namespace wave64 {

constexpr int kPrefillWaves = 4, kWaveQueries = 32, kBlockQueries = kPrefillWaves * kWaveQueries;
constexpr int kTileKeys = 64;                         // that a block takes at a time
constexpr int kWaveKeys = kTileKeys / kPrefillWaves;  // that a wave loads for it; a page holds whole groups of them

// out[t] = softmax(scale query[t] K^T) V; queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] are the last of sequence b.
struct PrefillArgs {
    const void* query;            // [num_tokens, num_heads, qk_dim]
    const void* key;              // [tokens, num_kv_heads, qk_dim]; in pages: [pages, page_size, num_kv_heads, qk_dim]
    const void* value;            // the same with v_dim
    const int32_t* page_table;    // [num_seqs, max_pages]; null: packed
    const int32_t* cu_seqlens_q;  // [num_seqs + 1]
    const int32_t* seq_lens;      // [num_seqs]; packed: cu_seqlens_k, [num_seqs + 1]
    const float* sinks;           // [num_heads], or null
    const float* k_scale;         // that of a key head at head * scale_stride; null: 1
    const float* v_scale;
    void* out;   // [num_tokens, num_heads, v_dim], contiguous
    float* lse;  // [num_tokens, num_heads]
    int64_t query_stride;
    int64_t query_head_stride;
    int64_t key_page_stride;
    int64_t key_row_stride;
    int64_t key_head_stride;
    int64_t value_page_stride;
    int64_t value_row_stride;
    int64_t value_head_stride;
    int64_t table_stride;
    int32_t scale_stride;  // of k_scale and v_scale: 1, or 0 for one number
    int32_t num_seqs;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t qk_dim;
    int32_t v_dim;
    int32_t page_size;  // a multiple of kWaveKeys
    int32_t max_pages;
    int32_t max_seqlen_q;
    int32_t causal;
    int32_t window;  // above 0: a query sees the last `window` keys up to its own
    float scale;
    Dtype dtype;        // of query and out
    Dtype cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t capacity;  // keys of a row of page_table
    int32_t tiles;     // blocks of a head of a sequence
    IntDivider by_heads, by_kv_heads, by_tiles, by_page_size;
};

}  // namespace wave64

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)
#include "wave64/attention.h"

namespace wave64 {

constexpr float kLn2 = 0.693147181f;

using Floats16 = float __attribute__((ext_vector_type(16)));

// sums[row][column] += x[row][k] * y[column][k] over 16 k, for 32 rows and columns. Lane l has of x row l % 32, of y
// column l % 32, of both the numbers 8 (l / 32) + 0, 1, ... 7 (where one instruction takes 8 k, two take them in
// another order, the same for x and y). Of the sums it has column l % 32, and rows 8 (i / 4) + 4 (l / 32) + i % 4.
template <typename T>
WAVE64_DEVICE void multiply_32(const Bits128& x, const Bits128& y, Floats16& sums) {
#if defined(WAVE64_CPU)
    const int lane = lane_in_block() % 64;
    T rows[16][2][8], column[2][8];
    for (int word = 0; word < 4; word++) {
        const uint64_t* all = meet_wave(10, x[word]);
        for (int i = 0; i < 16; i++)
            for (int half = 0; half < 2; half++)
                __builtin_memcpy(&rows[i][half][2 * word], all + 32 * half + i / 4 * 8 + lane / 32 * 4 + i % 4, 4);
        all = meet_wave(11, y[word]);
        for (int half = 0; half < 2; half++) __builtin_memcpy(&column[half][2 * word], all + 32 * half + lane % 32, 4);
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) sums[i] += float(rows[i][k / 8][k % 8]) * float(column[k / 8][k % 8]);
#elif defined(__gfx950__)
    using Brains = bf16 __attribute__((ext_vector_type(8)));
    using Halves = fp16 __attribute__((ext_vector_type(8)));
    if constexpr (__is_same(T, fp16))
        sums = __builtin_amdgcn_mfma_f32_32x32x16_f16(__builtin_bit_cast(Halves, x), __builtin_bit_cast(Halves, y),
                                                      sums, 0, 0, 0);
    else
        sums = __builtin_amdgcn_mfma_f32_32x32x16_bf16(__builtin_bit_cast(Brains, x), __builtin_bit_cast(Brains, y),
                                                       sums, 0, 0, 0);
#else
    using Shorts = short __attribute__((ext_vector_type(4)));
    using Halves = fp16 __attribute__((ext_vector_type(4)));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Bits64 a = half ? x.zw : x.xy, b = half ? y.zw : y.xy;
        if constexpr (__is_same(T, fp16))
            sums = __builtin_amdgcn_mfma_f32_32x32x8f16(__builtin_bit_cast(Halves, a), __builtin_bit_cast(Halves, b),
                                                        sums, 0, 0, 0);
        else
            sums = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(__builtin_bit_cast(Shorts, a),
                                                            __builtin_bit_cast(Shorts, b), sums, 0, 0, 0);
    }
#endif
}

// Where in LDS the c-th 16 bytes of a row are: of those that lanes access at once none share banks. A row of keys, in
// each 32 alike; a row of values, which are stored by columns.
template <int ROW_BYTES>
WAVE64_DEVICE int key_offset(int row, int c) {
    const int mask = ROW_BYTES % 256 == 0 ? row % 16 : (row ^ row / 8 % 4) % 8;
    return row * ROW_BYTES + (c ^ mask) * 16;
}
WAVE64_DEVICE int value_offset(int column, int c) {
    return column * kTileKeys * 2 + (c ^ (column ^ column / 8) % 8) * 16;
}

// What the waves of a block see of a sequence: its keys, and where a wave finds those that it loads.
template <typename Stored, bool PAGED>
struct Keys {
    const char *key, *value;  // of the head; packed: of the sequence
    const int32_t* table;
    int length;

    WAVE64_DEVICE Keys(const PrefillArgs& args, int seq, int kv_head) {
        constexpr int bytes = sizeof(Stored);
        key = static_cast<const char*>(args.key) + kv_head * args.key_head_stride * bytes;
        value = static_cast<const char*>(args.value) + kv_head * args.value_head_stride * bytes;
        const int first = load_uniform(args.seq_lens + seq);
        if constexpr (PAGED) {
            table = args.page_table + seq * args.table_stride;
            length = first < 0 ? 0 : first < args.capacity ? first : args.capacity;
        } else {
            table = nullptr;
            length = load_uniform(args.seq_lens + seq + 1) - first;
            key += first * args.key_row_stride * bytes, value += first * args.value_row_stride * bytes;
        }
    }
    // The page of position `at`, clamped to the keys from `first` on.
    WAVE64_DEVICE int page(const PrefillArgs& args, int at, int first) const {
        if constexpr (!PAGED) return 0;
        at = at < length ? at : length - 1;
        at = at > first ? at : first;
        return load_uniform(table + unsigned(at) / args.by_page_size);
    }
    // kWaveKeys rows from position `at` on; those that are not there read as zeros.
    WAVE64_DEVICE Bounded rows(const PrefillArgs& args, const char* base, int64_t page_stride, int64_t row_stride,
                               int page, int at, int first) const {
        constexpr int bytes = sizeof(Stored);
        int count = length - at;
        count = count < 0 ? 0 : count < kWaveKeys ? count : kWaveKeys;
        if (at + kWaveKeys <= first) count = 0;
        int64_t offset = at * row_stride;
        if constexpr (PAGED) {
            const unsigned entry = unsigned(at) / args.by_page_size;
            offset = page * page_stride + int64_t(at - int(entry) * args.page_size) * row_stride;
        }
        return Bounded(base + offset * bytes, uniform(count) * int(row_stride) * bytes);
    }
};

template <typename T, typename Stored, int QK, int V>
struct Prefill {
    static constexpr int kChunks = QK / 8, kLoads = kWaveKeys * kChunks / 64;  // of keys, by a lane
    static constexpr int kLaneKeys = V / 32;                                   // whose values a lane loads, 8 columns
    static constexpr int kKeyBytes = QK * 2, kValueTiles = V / 32;             // kKeyBytes: of a row in LDS
    static constexpr int kBlocks = kTileKeys / 32, kSteps = kTileKeys / 16;
    using Word = typename BitsOf<2 * kLaneKeys>::type;

    int lane = lane_in_block() % 64, half = lane / 32, wave = uniform(lane_in_block() / 64);
    Bits128 query[kChunks / 2];
    Pack<Stored, 8> keys[kLoads], values[kLaneKeys];
    Floats16 acc[kValueTiles] = {};
    float offset = 0, slack = -__builtin_huge_valf();  // added to logits; how large they may be after that
    Floats2 row_sum = {0, 0};
    int key_at[kChunks / 2];  // in LDS: of the lane's row, its numbers for each step

    WAVE64_DEVICE Prefill() {
        for (int j = 0; j < kChunks / 2; j++) {
            key_at[j] = key_offset<kKeyBytes>(lane % 32, 2 * j + half);
            // Else the compiler adds it up anew each time; from FP8 there are no registers left on gfx942.
            if constexpr (sizeof(Stored) == 2) forget(key_at[j]);
        }
    }

    // Which of the wave's keys and which chunk of it the i-th load has.
    WAVE64_DEVICE int key_of(int i) const { return (lane + 64 * i) / kChunks; }
    WAVE64_DEVICE int chunk_of(int i) const { return (lane + 64 * i) % kChunks; }
    // Columns and keys of the values: neighbors write LDS side by side.
    WAVE64_DEVICE int columns_of_8() const { return kLaneKeys == 4 ? lane % 8 + lane / 16 % 2 * 8 : lane % 8; }
    WAVE64_DEVICE int first_value() const {
        return kLaneKeys * (kLaneKeys == 4 ? lane / 8 % 2 + lane / 32 * 2 : lane / 8);
    }

    WAVE64_DEVICE void load_keys(const Bounded& rows, int row_bytes) {
#pragma unroll
        for (int i = 0; i < kLoads; i++)
            keys[i] = {rows.template load<typename Pack<Stored, 8>::Bits>(key_of(i) * row_bytes +
                                                                          chunk_of(i) * 8 * int(sizeof(Stored)))};
    }
    WAVE64_DEVICE void load_values(const Bounded& rows, int row_bytes) {
        const int at = first_value() * row_bytes + columns_of_8() * 8 * int(sizeof(Stored));
#pragma unroll
        for (int n = 0; n < kLaneKeys; n++)
            values[n] = {rows.template load<typename Pack<Stored, 8>::Bits>(at + n * row_bytes)};
    }

    // A product's rows of sums that a lane has are not neighbors, its numbers k are: so rows 4 and 8 change places.
    WAVE64_DEVICE void store_keys(char* lds) const {
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            const int key = key_of(i), row = wave * kWaveKeys + (key & 3) + (key & 4) * 2 + (key & 8) / 2;
            *reinterpret_cast<Bits128*>(lds + key_offset<kKeyBytes>(row, chunk_of(i))) =
                __builtin_bit_cast(Bits128, widened<T>(keys[i]));
        }
    }
    WAVE64_DEVICE void store_values(char* lds) const {
        Array<Bits32, 4> words[kLaneKeys];
#pragma unroll
        for (int n = 0; n < kLaneKeys; n++) words[n] = widened<T>(values[n]);
        const int key = wave * kWaveKeys + first_value();
#pragma unroll
        for (int c = 0; c < 8; c++) {
            Bits32 of_column[kLaneKeys / 2];
            for (int n = 0; n < kLaneKeys; n += 2) {
                const Bits32 a = words[n].at[c / 2], b = words[n + 1].at[c / 2];
                of_column[n / 2] = c % 2 ? high_halves(a, b) : low_halves(a, b);
            }
            *reinterpret_cast<Word*>(lds + value_offset(columns_of_8() * 8 + c, key / 8) + key % 8 * 2) =
                __builtin_bit_cast(Word, of_column);
        }
    }

    WAVE64_DEVICE void find_logits(const char* lds, Floats16 (&logits)[kBlocks]) const {
        for (Floats16& block : logits) block = Floats16(0);
#pragma unroll
        for (int j = 0; j < kChunks / 2; j++)
#pragma unroll
            for (int b = 0; b < kBlocks; b++)
                multiply_32<T>(*reinterpret_cast<const Bits128*>(lds + key_at[j] + 32 * kKeyBytes * b), query[j],
                               logits[b]);
    }

    // Of the tile's keys only those from `first` to `end` are seen.
    WAVE64_DEVICE void mask(int first, int end, Floats16 (&logits)[kBlocks]) const {
        first -= 8 * half, end -= 8 * half;
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int key = 32 * b + 16 * (i / 8) + i % 8;
                if (key < first || key >= end) logits[b][i] = -__builtin_huge_valf();
            }
    }

    // Makes weights of the logits, and of those the operands of the next product.
    WAVE64_DEVICE void weigh(float factor, Floats16 (&logits)[kBlocks], Bits128 (&weights)[kSteps]) {
        Floats2 x[kBlocks][8];
        float top = -__builtin_huge_valf();
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const Floats2 pair = {logits[b][2 * i], logits[b][2 * i + 1]};
                x[b][i] = __builtin_elementwise_fma(pair, Floats2(factor), Floats2(offset));
                top = max(max(top, x[b][i].x), x[b][i].y);
            }
        if (ballot(top > slack)) {
            const float highest = max(top, from_lane(top, lane ^ 32));
            const bool first = slack<0, some = highest> - __builtin_huge_valf();
            const float raise = !some ? 0 : first ? highest - Weights<T>::kEnlarge * kLog2E : max(highest, 0.f);
            const float shrink = first ? 1 : exp2(-raise);
            offset -= raise, slack = some ? 8 : slack;
            row_sum *= shrink;
            for (Floats16& tile : acc) tile *= shrink;
#pragma unroll
            for (auto& block : x)
                for (Floats2& pair : block) pair -= raise;
        }
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const Floats2 pair = {exp2(x[b][i].x), exp2(x[b][i].y)};
                row_sum += pair;
                weights[2 * b + i / 4][i % 4] = Weights<T>::pair(pair);
            }
    }

    WAVE64_DEVICE void accumulate(const char* lds, const Bits128 (&weights)[kSteps]) {
#pragma unroll
        for (int j = 0; j < kSteps; j++)
#pragma unroll
            for (int t = 0; t < kValueTiles; t++)
                multiply_32<T>(*reinterpret_cast<const Bits128*>(lds + value_offset(32 * t + lane % 32, 2 * j + half)),
                               weights[j], acc[t]);
    }

    // Stores the wave's rows of the block's output, those below `rows`, by way of LDS, which nothing else needs any
    // more: so that neighbors write neighboring bytes.
    WAVE64_DEVICE void store(char* lds, float scale, T* out, int row_stride, int rows) const {
        constexpr int chunks = V / 8;
        lds += wave * kWaveQueries * V * 2, out += int64_t(wave) * kWaveQueries * row_stride;
        rows -= wave * kWaveQueries;
#pragma unroll
        for (int t = 0; t < kValueTiles; t++)
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                const float numbers[4] = {acc[t][i] * scale, acc[t][i + 1] * scale, acc[t][i + 2] * scale,
                                          acc[t][i + 3] * scale};
                *reinterpret_cast<Bits64*>(lds + key_offset<V * 2>(lane % 32, 4 * t + i / 4) + 8 * half) =
                    Pack<T, 4>::rounded(numbers).bits;
            }
        wave_barrier();
#pragma unroll
        for (int i = 0; i < kWaveQueries * chunks / 64; i++) {
            const int row = (lane + 64 * i) / chunks, chunk = (lane + 64 * i) % chunks;
            const Bits128 bits = *reinterpret_cast<const Bits128*>(lds + key_offset<V * 2>(row, chunk));
            if (row < rows) store_pack(out + int64_t(row) * row_stride + 8 * chunk, Pack<T, 8>{bits});
        }
    }
};

template <typename T, typename Stored, int QK, int V, bool PAGED>
WAVE64_DEVICE void prefill(const PrefillArgs& args) {
    using State = Prefill<T, Stored, QK, V>;
    alignas(16) WAVE64_LDS static char lds_keys[kTileKeys * (QK + V) * 2];
    char* lds_values = lds_keys + kTileKeys * QK * 2;
    // Adjacent blocks take different key heads: blocks are assigned to dies round robin, so those of one key head share
    // one die's L2. The queries with the most keys start first.
    const unsigned id = block_id(), item = id / args.by_heads, i = id - item * args.num_heads;
    const unsigned of_kv = i / args.by_kv_heads, kv_head = i - of_kv * args.num_kv_heads;
    const int head = kv_head * (args.num_heads / args.by_kv_heads) + of_kv;
    const int seq = item / args.by_tiles, tile = args.tiles - 1 - (item - seq * args.tiles);
    const int start = load_uniform(args.cu_seqlens_q + seq), row = tile * kBlockQueries;
    const int queries = load_uniform(args.cu_seqlens_q + seq + 1) - start;
    if (row >= queries) return;
    const Keys<Stored, PAGED> keys(args, seq, kv_head);

    State state;
    const int before = keys.length - queries;  // position of a query = its row + before
    const int own = row + kWaveQueries * state.wave + state.lane % 32;
    const int64_t token = start + (own < queries ? own : queries - 1);
    const T* from = static_cast<const T*>(args.query) + token * args.query_stride + head * args.query_head_stride;
    const float scale = args.scale * (args.k_scale ? args.k_scale[kv_head * args.scale_stride] : 1);
    for (int j = 0; j < State::kChunks / 2; j++) {
        state.query[j] = load_pack<T, 8>(from + 8 * (2 * j + state.half)).bits;
        if (scale < 0) state.query[j] ^= 0x80008000;
    }
    // With a factor above 0 the largest product is the largest logit, and one fma makes an exponent of it.
    const float factor = max((scale < 0 ? -scale : scale) * kLog2E, 1e-30f);

    // Some query of the block sees each key from `first` to `end`; a wave's all see those of tiles from `inner` up to
    // `outer`.
    const int position = own + before, lowest = row + before;
    const int highest = (row + kBlockQueries < queries ? row + kBlockQueries : queries) - 1 + before;
    const int wave_lowest = lowest + kWaveQueries * state.wave;
    const bool windowed = args.window > 0;
    const int end = args.causal ? highest + 1 : keys.length;
    const int first = windowed && lowest >= args.window ? lowest - args.window + 1 : 0;
    const int outer = args.causal && wave_lowest + 1 < keys.length ? wave_lowest + 1 : keys.length;
    const int wave_end = row + kWaveQueries * state.wave >= queries ? 0
                         : args.causal                              ? wave_lowest + kWaveQueries
                                                                    : keys.length;
    const int inner = windowed ? wave_lowest + kWaveQueries - args.window : 0;
    const int seen = args.causal && position + 1 < keys.length ? position + 1 : keys.length;
    const int seen_from = windowed ? position - args.window + 1 : 0;

    const int key_bytes = int(args.key_row_stride) * int(sizeof(Stored));
    const int value_bytes = int(args.value_row_stride) * int(sizeof(Stored));
    const auto load_keys = [&](int at, int page) {
        at += kWaveKeys * state.wave;
        state.load_keys(keys.rows(args, keys.key, args.key_page_stride, args.key_row_stride, page, at, first),
                        key_bytes);
    };
    const auto load_values = [&](int at, int page) {
        at += kWaveKeys * state.wave;
        state.load_values(keys.rows(args, keys.value, args.value_page_stride, args.value_row_stride, page, at, first),
                          value_bytes);
    };
    const auto page_of = [&](int at) { return keys.page(args, at + kWaveKeys * state.wave, first); };

    const int begin = first & -kTileKeys;
    if (begin < end) {
        // Keys are loaded two tiles ahead, values one, and page numbers a tile before both.
        int page = page_of(begin), next_page = page_of(begin + kTileKeys), later_page = 0;
        load_keys(begin, page);
        load_values(begin, page);
        state.store_keys(lds_keys);
        load_keys(begin + kTileKeys, next_page);
        later_page = page_of(begin + 2 * kTileKeys);
        block_barrier();
        for (int at = begin; at < end; at += kTileKeys) {
            Floats16 logits[State::kBlocks];
            const bool active = at < wave_end;  // a wave without queries that see the tile loads its part only
            if (active) state.find_logits(lds_keys, logits);
            if (windowed && at < first) {  // what the cache has before the first key may be no numbers
                const int key = at + kWaveKeys * state.wave + state.first_value();
#pragma unroll
                for (int n = 0; n < State::kLaneKeys; n++)
                    if (key + n < first) state.values[n].bits = {};
            }
            state.store_values(lds_values);
            load_values(at + kTileKeys, next_page);
            Bits128 weights[State::kSteps];
            if (active) {
                if (at + kTileKeys > outer || at < inner) state.mask(seen_from - at, seen - at, logits);
                state.weigh(factor, logits, weights);
            }
            block_barrier();
            state.store_keys(lds_keys);
            load_keys(at + 2 * kTileKeys, later_page);
            next_page = later_page, later_page = page_of(at + 3 * kTileKeys);
            if (active) state.accumulate(lds_values, weights);
            block_barrier();
        }
    }

    float row_sum = state.row_sum.x + state.row_sum.y;
    row_sum += from_lane(row_sum, state.lane ^ 32);
    if (args.sinks) {
        const float sink = args.sinks[head] * kLog2E + state.offset;
        // Where no key is seen, or the sink's weight would be too large, it is the maximum.
        const float raise = row_sum == 0 || sink > 64 ? sink : 0, shrink = row_sum == 0 ? 0 : exp2(-raise);
        row_sum = row_sum * shrink + exp2(sink - raise), state.offset -= raise;
        for (Floats16& sums : state.acc) sums *= shrink;
    }
    const bool none = row_sum == 0;
    if (state.half == 0 && own < queries)
        args.lse[token * args.num_heads + head] = none ? -__builtin_huge_valf() : (log2(row_sum) - state.offset) * kLn2;
    const float v_scale = args.v_scale ? args.v_scale[kv_head * args.scale_stride] : 1;
    state.store(lds_keys, none ? 0 : (1 + Weights<T>::kEnlarge) * v_scale / row_sum,
                static_cast<T*>(args.out) + (int64_t(start + row) * args.num_heads + head) * V, args.num_heads * V,
                queries - row);
}

}  // namespace wave64

#define WAVE64_PREFILL_KERNEL(NAME, T, STORED, QK, V, PAGED)                              \
    WAVE64_KERNEL(wave64::kPrefillWaves* wave64::kLanes) NAME(wave64::PrefillArgs args) { \
        wave64::prefill<T, STORED, QK, V, PAGED>(args);                                   \
    }
#elif !defined(WAVE64_DEVICE_CODE)
#include "wave64/prefill_host.h"
#endif
