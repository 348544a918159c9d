// Decode attention over a paged cache, split along the keys: out[b] = softmax(scale q[b] K[b]^T) V[b].
//
// The trick: keys and values go from memory straight into the registers that the matrix instructions read them from
// (matrix.h), and logits become weights in place: lanes exchange only the row maxima, and rarely, since a row maximum
// is raised only when a weight would pass 2^8. The heads that share a key head are the instructions' columns, so keys
// are read once. Bound by memory: keys and values. A wave has 16 of each in flight, on gfx9 32, and a compute unit
// has several waves.
#include "wave64/attention_cdna.h"

namespace wave64 {

// out[b] = softmax(cap(scale query[b] K[b]^T)) V[b] over the keys of sequence b; key p is row p % page_size of page
// page_table[b, p / page_size].
struct PagedAttentionArgs {
    const void* query;          // [num_seqs, num_heads, head_dim]
    const void* key_cache;      // [pages, page_size, num_kv_heads, head_dim]
    const void* value_cache;    // as key_cache
    const int32_t* page_table;  // [num_seqs, max_pages]
    const int32_t* seq_lens;    // [num_seqs]
    const float* sinks;         // [num_heads], or null
    const float* k_scale;       // that of a key head at head * scale_stride; null: 1
    const float* v_scale;
    void* out;       // [num_seqs, num_heads, head_dim], contiguous
    float* partial;  // [num_seqs + num_splits, num_heads, head_dim] to work in, as the next two; null without splits
    float* stats;    // [num_seqs + num_splits, num_heads, 2]
    int32_t* plan;   // [num_seqs, 2]
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
    int32_t head_dim;   // 64 or 128
    int32_t page_size;  // a multiple of 16
    int32_t max_pages;
    int32_t window;      // above 0: only the last `window` keys are seen
    int32_t num_splits;  // of the batch's keys; 0: no sequence is split
    float scale;
    float logit_cap;    // above 0: cap(x) = logit_cap tanh(x / logit_cap)
    Dtype dtype;        // of query and out
    Dtype cache_dtype;  // dtype, or FP8
    // set by the launcher
    int32_t capacity;      // keys of a row of page_table
    int32_t group;         // heads of a key head
    int32_t tiles;         // blocks of a split
    int32_t step_entries;  // a wave's step in the page table, and in a page
    int32_t step_rows;
    int64_t num_rows;  // num_seqs * num_heads
    IntDivider by_tiles, by_kv_heads, by_heads, by_group, by_page_size;
};

constexpr int kWaves = 4;           // of a block, which take the groups of its split in turn
constexpr int kMinSplitGroups = 8;  // of a split
constexpr int kMergeLanes = 256;

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/splits.h"

namespace wave64 {

// The keys that a sequence's query sees: `first` to `end`, in num_groups groups from first_group on.
struct Seen {
    int first, end, first_group, num_groups;

    WAVE64_DEVICE Seen(const PagedAttentionArgs& args, int length) {
        end = length < 0 ? 0 : length < args.capacity ? length : args.capacity;
        first = args.window > 0 && end > args.window ? end - args.window : 0;
        first_group = first / kGroup, num_groups = (end + kGroup - 1) / kGroup - first_group;
    }
};

#if defined(__GFX9__)
// Where the rows of a group are, and which of them are seen.
struct Rows {
    int page, row, first, last;
};

// Attends to two groups from `group` on, of which the keys from `first` to `end` are seen. Their keys and values are in
// flight; with MORE those of the wave's next step are loaded.
template <bool FIRST, bool MORE, typename T, typename Stored, int D, typename Find>
WAVE64_DEVICE void take(CdnaAttention<T, Stored, D>& attention, const Pool& keys, const Pool& values, int first,
                        int end, const Logit& logit, int group, Find rows_of) {
    Rows next[kStepGroups];
    if constexpr (MORE)
        for (int g = 0; g < kStepGroups; g++) next[g] = rows_of(group + kStepGroups * kWaves + g);
    Sums logits[kStepGroups];
    attention.find_logits(logit, logits);
    if constexpr (MORE)
        for (int g = 0; g < kStepGroups; g++) attention.load_keys(g, keys.rows(next[g].page, next[g].row));
    // Only the first step of a window and the last one of a sequence have keys that are not seen.
    if constexpr (FIRST || !MORE)
        if (group * kGroup < first || (group + kStepGroups) * kGroup > end)
            attention.mask_all_but(first, end, group * kGroup, logits);
    Operand weights[kStepGroups];
    attention.template weigh<FIRST>(logit.cap > 0 ? 1 : logit.factor, logits, weights);
    attention.template accumulate<FIRST>(weights);
    if constexpr (MORE)
        for (int g = 0; g < kStepGroups; g++)
            attention.load_values(g, values.rows(next[g].page, next[g].row), next[g].first, next[g].last);
}
#else
// A wave's current group: where its rows are.
struct Cursor {
    int first_key, entry, row, page;  // entry of the page table, row in its page

    WAVE64_DEVICE Cursor(const PagedAttentionArgs& args, const int32_t* table, int group)
        : first_key(group * kGroup),
          entry(unsigned(first_key) / unsigned(args.page_size)),
          row(first_key - entry * args.page_size),
          page(load_uniform(table + entry)) {}
    WAVE64_DEVICE Cursor next(const PagedAttentionArgs& args, const int32_t* table) const {
        Cursor next = *this;
        next.first_key += kWaves * kGroup, next.entry += args.step_entries, next.row += args.step_rows;
        if (next.row >= args.page_size) next.entry++, next.row -= args.page_size;
        next.page = load_uniform(table + next.entry);
        return next;
    }
};

// Attends to the group at `at`, whose keys are in flight, and loads the keys of the next one, if any.
template <typename T, typename Stored, int D>
WAVE64_DEVICE void take(Attention<T, Stored, D>& attention, const Pool& keys, const Pool& values, const Seen& seen,
                        const Logit& logit, const Cursor& at, const Cursor* next) {
    attention.load_values(values, at.page, at.row);
    keep_order();
    typename Attention<T, Stored, D>::Logits logits;
    attention.find_logits(logit, logits);
    if (next) attention.load_keys(keys, next->page, next->row);
    if (at.first_key < seen.first || at.first_key + kGroup > seen.end)
        attention.mask_all_but(seen.first, seen.end, at.first_key, logits);
    attention.raise_row_max(logits);
    attention.accumulate(logits);
}
#endif

// The factor that turns the weighted sum of values into the output: it adds the sink to the sum of weights.
template <typename T>
WAVE64_DEVICE float finish(const PagedAttentionArgs& args, int kv_head, int head, float row_max, float row_sum) {
#if defined(__GFX9__)
    float shrink = 1 + Weights<T>::kEnlarge;
#else
    float shrink = 1;
#endif
    if (args.sinks) {
        const float sink = args.sinks[head] * kLog2E, higher = max(row_max, sink);
        const float scale = exp2(row_max - higher);
        row_sum = row_sum * scale + exp2(sink - higher), shrink *= scale;
    }
    return row_sum == 0 ? 0 : shrink * (args.v_scale ? args.v_scale[kv_head * args.scale_stride] : 1) / row_sum;
}

template <typename T>
WAVE64_DEVICE void store_finished(const PagedAttentionArgs& args, int64_t row, int column, const Array<float, 4>& x) {
    const typename Pack<T, 4>::Values values{{T(x.at[0]), T(x.at[1]), T(x.at[2]), T(x.at[3])}};
    store_pack(static_cast<T*>(args.out) + row * args.head_dim + column, Pack<T, 4>::of(values));
}

template <typename T, typename Stored, int D>
WAVE64_DEVICE void paged_attention(PagedAttentionArgs args) {
    // What addresses of keys are made of is loaded with the other arguments, not behind the lengths.
    forget_uniform(args.query_stride), forget_uniform(args.query_head_stride);
    forget_uniform(args.key_page_stride), forget_uniform(args.key_row_stride), forget_uniform(args.key_head_stride);
    forget_uniform(args.value_page_stride), forget_uniform(args.value_row_stride);
    forget_uniform(args.value_head_stride), forget_uniform(args.table_stride), forget_uniform(args.by_page_size.factor),
        forget_uniform(args.page_size);
    const int item = unsigned(block_id()) / args.by_tiles, tile = block_id() - item * args.tiles;
    const int head_tile = unsigned(tile) / args.by_kv_heads, kv_head = tile - head_tile * args.num_kv_heads;
    const int num_heads = args.group - kTileHeads * head_tile;
    const int first_head = kv_head * args.group + kTileHeads * head_tile;
    const int wave = uniform(lane_in_block() / kLanes);
    const bool one = args.num_splits > 0 && args.num_seqs == 1;
    int length = one ? load_uniform(args.seq_lens) : 0;
    const auto work_of = [&](int seq) { return Seen(args, args.seq_lens[seq]).num_groups; };
    const Split split = args.num_splits == 0 ? Split{item, 0, 1}
                        : one ? find_split_of_one(item, args.num_splits, kMinSplitGroups, Seen(args, length).num_groups)
                              : find_split(item, args.num_seqs, args.num_splits, kMinSplitGroups, work_of);
    if (split.seq >= args.num_seqs) return;
    if (args.num_splits && tile == 0 && split.index == 0 && lane_in_block() == 0) {
        args.plan[2 * split.seq] = item;
        args.plan[2 * split.seq + 1] = split.count;
    }

    if (!one) length = load_uniform(args.seq_lens + split.seq);
    const Seen seen(args, length);
    const int even = unsigned(seen.num_groups) / unsigned(split.count), rest = seen.num_groups - even * split.count;
    const int begin = seen.first_group + split.index * even + (split.index < rest ? split.index : rest);
    const int end = begin + even + (split.index < rest);
    constexpr int bytes = sizeof(Stored);
    const Pool keys = {static_cast<const char*>(args.key_cache) + kv_head * args.key_head_stride * bytes,
                       args.key_page_stride * bytes, int(args.key_row_stride) * bytes};
    const Pool values = {static_cast<const char*>(args.value_cache) + kv_head * args.value_head_stride * bytes,
                         args.value_page_stride * bytes, int(args.value_row_stride) * bytes};
    const int32_t* table = args.page_table + split.seq * args.table_stride;
    const float scale = args.scale * (args.k_scale ? args.k_scale[kv_head * args.scale_stride] : 1);
#if defined(__GFX9__)  // queries are negated instead, so that the largest product is the largest logit
    const float size = max(scale < 0 ? -scale : scale, 1e-30f);
#else
    const float size = scale;
#endif
    const Logit logit = {args.logit_cap > 0 ? size / args.logit_cap : size * kLog2E, args.logit_cap};

#if defined(__GFX9__)
    static_assert(kWaves == kRows);
    CdnaAttention<T, Stored, D> attention(keys.row_bytes, values.row_bytes);
    int group = begin + kStepGroups * wave;
    if (group < end) {
        const int last_key = end * kGroup < seen.end ? end * kGroup : seen.end;
        const auto rows_of = [&](int group) {  // past the split those of its last group, none of which are used
            const int key = (group < end ? group : end - 1) * kGroup, entry = unsigned(key) / args.by_page_size;
            return Rows{load_uniform(table + entry), key - entry * args.page_size, seen.first - key,
                        last_key - key - 1};
        };
        Rows at[kStepGroups];
        for (int g = 0; g < kStepGroups; g++) at[g] = rows_of(group + g);
        keep_order();
        attention.load_query(
            static_cast<const T*>(args.query) + split.seq * args.query_stride + first_head * args.query_head_stride,
            args.query_head_stride, num_heads);
        keep_order();
        for (int g = 0; g < kStepGroups; g++) attention.load_keys(g, keys.rows(at[g].page, at[g].row));
        for (int g = 0; g < kStepGroups; g++) {
            attention.load_values(g, values.rows(at[g].page, at[g].row), at[g].first, at[g].last);
        }
        keep_order();
        if (scale < 0) attention.negate_query();
        constexpr int step = kStepGroups * kWaves;
        // The last step is separate: if the compiler did not know whether more keys are in flight, values would wait.
        if (group + step < end) {
            take<true, true>(attention, keys, values, seen.first, last_key, logit, group, rows_of);
            for (group += step; group + step < end; group += step)
                take<false, true>(attention, keys, values, seen.first, last_key, logit, group, rows_of);
            take<false, false>(attention, keys, values, seen.first, last_key, logit, group, rows_of);
        } else {
            take<true, false>(attention, keys, values, seen.first, last_key, logit, group, rows_of);
        }
    } else {
        attention.clear();
    }
    const auto joined = attention.join_waves(wave);
    const int line = attention.lane.line, part = attention.lane.part, head = first_head + line;
    if (line >= num_heads) return;
    constexpr int each = CdnaAttention<T, Stored, D>::kEach;
    if (split.count == 1) {
        const float factor = finish<T>(args, kv_head, head, joined.row_max, joined.row_sum);
        T* out = static_cast<T*>(args.out) + (int64_t(split.seq) * args.num_heads + first_head) * D;
        for (int i = 0; i < kRows; i++) {
            float x[each];
            for (int c = 0; c < each; c++) x[c] = joined.acc[c].at[i] * factor;
            const int column = attention.kColumns * (kRows * part + i) + each * wave;
            store_pack(out + line * D + column, Pack<T, each>::rounded(x));
        }
        return;
    }
    const int64_t row = int64_t(item) * args.num_heads + first_head;
    float* partial = args.partial + row * D;
    for (int c = 0; c < each; c++) {
        const auto& x = joined.acc[c].at;
        store_pack(partial + line * D + ((wave * kParts + part) * each + c) * kRows,
                   Pack<float, 4>::of({{x[0], x[1], x[2], x[3]}}));
    }
    if (wave == 0 && part == 0)
        store_pack(args.stats + row * 2 + line * 2, Pack<float, 2>::of({{joined.row_max, joined.row_sum}}));
#else
    Attention<T, Stored, D> attention;
    attention.load_query(
        static_cast<const T*>(args.query) + split.seq * args.query_stride + first_head * args.query_head_stride,
        args.query_head_stride, num_heads);
    if (begin + wave < end) {
        Cursor at(args, table, begin + wave);
        attention.load_keys(keys, at.page, at.row);
        // The last group is separate: if the compiler did not know whether more keys are in flight, values would wait.
        for (int group = begin + wave + kWaves; group < end; group += kWaves) {
            const Cursor next = at.next(args, table);
            take(attention, keys, values, seen, logit, at, &next);
            at = next;
        }
        take(attention, keys, values, seen, logit, at, nullptr);
    }
    attention.template join_waves<kWaves>(wave);
    if (wave > 0) return;

    for (int h = 0; h < kHeads; h++) {
        const int head = first_head + attention.lane.head(h);
        if (attention.lane.head(h) >= num_heads) continue;
        const float row_max = attention.row_max[h], row_sum = attention.row_sum[h];
        if (split.count == 1) {
            const int64_t row = int64_t(split.seq) * args.num_heads + head;
            attention.store_acc(h, finish<T>(args, kv_head, head, row_max, row_sum),
                                [&](int column, const Array<float, 4>& x) { store_finished<T>(args, row, column, x); });
            continue;
        }
        const int64_t row = int64_t(item) * args.num_heads + head;
        attention.store_acc(h, 1, [&](int column, const Array<float, 4>& x) {
            store_pack(args.partial + row * D + column, Pack<float, 4>::of({{x.at[0], x.at[1], x.at[2], x.at[3]}}));
        });
        if (attention.lane.first_of_heads()) store_pack(args.stats + row * 2, Pack<float, 2>::of({{row_max, row_sum}}));
    }
#endif
}

// Merges the splits of a row, the query of a head. Consecutive lanes of a wave hold its columns, four each; as many
// runs of them as there are take splits in turn. A wave takes wave_splits of them at a time, whose weights its lanes
// find: a row of few splits is one wave's, and needs no barrier.
template <typename T, int D>
WAVE64_DEVICE void merge(PagedAttentionArgs args) {
    // Loaded with the other arguments, not behind the plan.
    forget_uniform(args.stats), forget_uniform(args.partial), forget_uniform(args.by_group.factor),
        forget_uniform(args.num_heads), forget_uniform(args.scale_stride);
    using Floats = Array<float, 4>;
    WAVE64_LDS static Floats lds_acc[kMergeLanes];
    WAVE64_LDS static Array<float, 2> lds_stats[kMergeLanes / kLanes];
    const int row = block_id(), seq = int(unsigned(row) / args.by_heads), head = row - seq * args.num_heads;
    int first = load_uniform(args.plan + 2 * seq), count = load_uniform(args.plan + 2 * seq + 1);
    forget_uniform(first), forget_uniform(count);
    if (count == 1) return;
    const int lane = lane_in_block() % kLanes, wave = uniform(lane_in_block() / kLanes);
    constexpr int lanes = D / 4, runs = kLanes / lanes, num_waves = kMergeLanes / kLanes;
    constexpr int at_once = 16, wave_splits = at_once * runs;  // loads of a lane, splits of a wave
    static_assert(wave_splits <= kLanes);
    const int run = lane / lanes, column = 4 * (lane % lanes);
    // Of a split: bytes from its stats, and from its columns, to the next one's.
    const int stats_step = args.num_heads * 8, step = args.num_heads * D * 4;
    float row_max = kLowest, row_sum = 0;
    Floats acc = {};
    for (int from = wave * wave_splits; from < count; from += num_waves * wave_splits) {
        const int splits = count - from < wave_splits ? count - from : wave_splits;
        const int64_t from_row = int64_t(first + from) * args.num_heads + head;
        // Reads zeros for splits that are not there.
        const Bounded stats(args.stats + from_row * 2, (splits - 1) * stats_step + 8);
        const Bounded partial(args.partial + from_row * D, (splits - 1) * step + D * 4);
        const Pack<float, 2> of_split = {stats.load<Bits64>(lane * stats_step)};
        Pack<float, 4> packs[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++) packs[i] = {partial.load<Bits128>(run * step + column * 4, i * runs * step)};
        const auto [max_of_split, sum_of_split] = of_split.values().at;
        const float higher = max(row_max, wave_max(lane < splits ? max_of_split : kLowest));
        const float shrink = exp2(row_max - higher), weight = lane < splits ? exp2(max_of_split - higher) : 0;
        row_sum = row_sum * shrink + wave_sum(sum_of_split * weight), row_max = higher;
        for (float& x : acc.at) x *= shrink;
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            const float scale = from_lane(weight, i * runs + run);
            const auto [x] = packs[i].values();
            for (int c = 0; c < 4; c++) acc.at[c] = fma(x[c], scale, acc.at[c]);
        }
    }
    for (int other = lanes; other < kLanes; other *= 2)
        for (float& x : acc.at) x += from_lane(x, lane ^ other);
    if (count > wave_splits) {
        lds_acc[lane_in_block()] = acc;
        if (lane == 0) lds_stats[wave] = {{row_max, row_sum}};
        block_barrier();
        for (int other = 1; wave == 0 && other < num_waves && other * wave_splits < count; other++) {
            const auto [max_of_other, sum_of_other] = lds_stats[other].at;
            const Floats acc_of_other = lds_acc[other * kLanes + lane];
            const float higher = max(row_max, max_of_other);
            const float shrink = exp2(row_max - higher), scale = exp2(max_of_other - higher);
            row_max = higher, row_sum = row_sum * shrink + sum_of_other * scale;
            for (int c = 0; c < 4; c++) acc.at[c] = acc.at[c] * shrink + acc_of_other.at[c] * scale;
        }
    }
    if (wave > 0 || run > 0) return;
    const float scale = finish<T>(args, int(unsigned(head) / args.by_group), head, row_max, row_sum);
    for (float& x : acc.at) x *= scale;
#if defined(__GFX9__)
    T* out = static_cast<T*>(args.out) + int64_t(row) * D;
    for (int i = 0; i < 4; i++) out[CdnaAttention<T, T, D>::column_of(column + i)] = T(acc.at[i]);
#else
    store_finished<T>(args, row, column, acc);
#endif
}

}  // namespace wave64

#define PAGED_ATTENTION(NAME, T, STORED, D)                                               \
    WAVE64_KERNEL(wave64::kWaves* wave64::kLanes) NAME(wave64::PagedAttentionArgs args) { \
        wave64::paged_attention<T, STORED, D>(args);                                      \
    }
#define PAGED_ATTENTION_MERGE(NAME, T, D) \
    WAVE64_KERNEL(wave64::kMergeLanes) NAME(wave64::PagedAttentionArgs args) { wave64::merge<T, D>(args); }

PAGED_ATTENTION(paged_attention_bf16_64, wave64::bf16, wave64::bf16, 64)
PAGED_ATTENTION(paged_attention_bf16_128, wave64::bf16, wave64::bf16, 128)
PAGED_ATTENTION(paged_attention_fp16_64, wave64::fp16, wave64::fp16, 64)
PAGED_ATTENTION(paged_attention_fp16_128, wave64::fp16, wave64::fp16, 128)
#if WAVE64_HAS_FP8
PAGED_ATTENTION(paged_attention_bf16_fp8_64, wave64::bf16, wave64::Bits8, 64)
PAGED_ATTENTION(paged_attention_bf16_fp8_128, wave64::bf16, wave64::Bits8, 128)
PAGED_ATTENTION(paged_attention_fp16_fp8_64, wave64::fp16, wave64::Bits8, 64)
PAGED_ATTENTION(paged_attention_fp16_fp8_128, wave64::fp16, wave64::Bits8, 128)
#endif
PAGED_ATTENTION_MERGE(paged_attention_merge_bf16_64, wave64::bf16, 64)
PAGED_ATTENTION_MERGE(paged_attention_merge_bf16_128, wave64::bf16, 128)
PAGED_ATTENTION_MERGE(paged_attention_merge_fp16_64, wave64::fp16, 64)
PAGED_ATTENTION_MERGE(paged_attention_merge_fp16_128, wave64::fp16, 128)

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMaxInt = INT32_MAX;

// [fp16][fp8][head_dim == 128]
constexpr const char* kKernels[2][2][2] = {{{"paged_attention_bf16_64", "paged_attention_bf16_128"},
                                            {"paged_attention_bf16_fp8_64", "paged_attention_bf16_fp8_128"}},
                                           {{"paged_attention_fp16_64", "paged_attention_fp16_128"},
                                            {"paged_attention_fp16_fp8_64", "paged_attention_fp16_fp8_128"}}};
constexpr const char* kMergeKernels[2][2] = {{"paged_attention_merge_bf16_64", "paged_attention_merge_bf16_128"},
                                             {"paged_attention_merge_fp16_64", "paged_attention_merge_fp16_128"}};

void check(const PagedAttentionArgs& args, const Call& call) {
    expect_matrix_dtype(call, args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect(args.head_dim == 64 || args.head_dim == 128, "head_dim", "64 or 128", args.head_dim);
    call.expect(args.page_size > 0 && args.page_size % kGroup == 0, "page_size", "a multiple of 16", args.page_size);
    call.expect_range("scale_stride", args.scale_stride, 0, 1);
    call.expect_min("num_seqs", args.num_seqs, 0);
    call.expect_min("num_heads", args.num_heads, 0);
    if (args.num_seqs == 0 || args.num_heads == 0) return;
    call.expect(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, "num_kv_heads",
                "a divisor of num_heads", args.num_kv_heads);
    expect_capacity(call, args.max_pages, args.page_size);
    const int capacity = args.max_pages * args.page_size;
    call.expect(int64_t(args.num_seqs) * (capacity / kGroup) <= kMaxInt, "num_seqs",
                "a capacity of at most 2^35 keys in all", args.num_seqs);
    const int64_t bytes = element_bytes(args.cache_dtype);
    call.expect(
        is_16_aligned({args.query, args.key_cache, args.value_cache, args.out},
                      {args.query_stride * 2, args.query_head_stride * 2, args.key_page_stride * bytes,
                       args.key_row_stride * bytes, args.key_head_stride * bytes, args.value_page_stride * bytes,
                       args.value_row_stride * bytes, args.value_head_stride * bytes}),
        "query, key_cache, value_cache", std::string("rows that begin at multiples of 16 bytes"), "others");
    expect_row_stride(call, "key_row_stride", args.key_row_stride);
    expect_row_stride(call, "value_row_stride", args.value_row_stride);
    call.expect_tensors({{"query", args.query}, {"seq_lens", args.seq_lens}, {"out", args.out}});
    if (capacity)
        call.expect_tensors(
            {{"key_cache", args.key_cache}, {"value_cache", args.value_cache}, {"page_table", args.page_table}});
    call.expect_min("num_splits", args.num_splits, 0);
    if (args.num_splits) {
        call.expect_tensors({{"partial", args.partial}, {"stats", args.stats}, {"plan", args.plan}});
        call.expect(args.num_seqs <= call.device.wave_size * call.device.wave_size, "num_seqs",
                    "at most the square of the wave size with splits", args.num_seqs);
    }
}

void paged_attention(PagedAttentionArgs args, const Call& call) {
    check(args, call);
    if (args.num_seqs == 0 || args.num_heads == 0) return;

    args.capacity = args.max_pages * args.page_size;
    args.group = args.num_heads / args.num_kv_heads;
    const int tile_heads = call.device.is_nvidia() ? kNvidiaTileHeads : kAmdTileHeads;
    const int64_t tiles = args.num_kv_heads * ceil_div(args.group, tile_heads);
    const int64_t blocks = (int64_t(args.num_seqs) + args.num_splits) * tiles;
    args.num_rows = int64_t(args.num_seqs) * args.num_heads;
    call.expect(blocks <= kMaxInt && args.num_rows <= kMaxInt, "num_seqs", "fewer, or fewer heads", args.num_seqs);
    args.tiles = int32_t(tiles);
    args.by_tiles = divider(uint32_t(tiles)), args.by_kv_heads = divider(uint32_t(args.num_kv_heads));
    args.by_heads = divider(uint32_t(args.num_heads)), args.by_group = divider(uint32_t(args.group));
    args.by_page_size = divider(uint32_t(args.page_size));
    args.step_entries = kWaves * kGroup / args.page_size, args.step_rows = kWaves * kGroup % args.page_size;
    call.launch(kKernels[args.dtype][args.cache_dtype == kFp8][args.head_dim == 128], {blocks},
                kWaves * call.device.wave_size, args);
    if (args.num_splits == 0) return;
    call.launch(kMergeKernels[args.dtype][args.head_dim == 128], {args.num_rows}, kMergeLanes, args);
}

WAVE64_OP_AND_CONSTANTS(paged_attention, PagedAttentionArgs,
                        ({{"MIN_SPLIT_KEYS", kMinSplitGroups * kGroup},
                          {"AMD_TILE_HEADS", kAmdTileHeads},
                          {"NVIDIA_TILE_HEADS", kNvidiaTileHeads}}),
                        query, key_cache, value_cache, page_table, seq_lens, sinks, k_scale, v_scale, out, partial,
                        stats, plan, query_stride, query_head_stride, key_page_stride, key_row_stride, key_head_stride,
                        value_page_stride, value_row_stride, value_head_stride, table_stride, scale_stride, num_seqs,
                        num_heads, num_kv_heads, head_dim, page_size, max_pages, window, num_splits, scale, logit_cap,
                        dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
