// Decode attention over a paged cache, split along the keys: out[b] = softmax(scale q[b] K[b]^T) V[b].
//
// The trick: keys and values go from memory straight into the registers that the matrix instructions read them from
// (matrix.h), and logits become weights in place: lanes exchange only the row maxima, and rarely, since a row maximum
// is raised only when a weight would pass 2^8. The heads that share a key head are the instructions' columns, so keys
// are read once. Bound by memory: keys and values. A wave has 16 of each in flight, and a compute unit has several
// waves.
#include "wave64/attention.h"

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
    int32_t merge_grid;  // blocks of the merge
    int64_t num_rows;    // num_seqs * num_heads
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

// The factor that turns the weighted sum of values into the output: it adds the sink to the sum of weights.
WAVE64_DEVICE float finish(const PagedAttentionArgs& args, int kv_head, int head, float row_max, float row_sum) {
    float shrink = 1;
    if (args.sinks) {
        const float sink = args.sinks[head] * kLog2E, higher = max(row_max, sink);
        shrink = exp2(row_max - higher);
        row_sum = row_sum * shrink + exp2(sink - higher);
    }
    return row_sum == 0 ? 0 : shrink * (args.v_scale ? args.v_scale[kv_head * args.scale_stride] : 1) / row_sum;
}

template <typename T>
WAVE64_DEVICE void store_finished(const PagedAttentionArgs& args, int64_t row, int column, const Array<float, 4>& x) {
    const typename Pack<T, 4>::Values values{{T(x.at[0]), T(x.at[1]), T(x.at[2]), T(x.at[3])}};
    store_pack(static_cast<T*>(args.out) + row * args.head_dim + column, Pack<T, 4>::of(values));
}

template <typename T, typename Stored, int D>
WAVE64_DEVICE void paged_attention(const PagedAttentionArgs& args) {
    const int item = unsigned(block_id()) / unsigned(args.tiles), tile = block_id() - item * args.tiles;
    const int head_tile = unsigned(tile) / unsigned(args.num_kv_heads), kv_head = tile - head_tile * args.num_kv_heads;
    const int num_heads = args.group - kTileHeads * head_tile;
    const int first_head = kv_head * args.group + kTileHeads * head_tile;
    const int wave = uniform(lane_in_block() / kLanes);
    const auto work_of = [&](int seq) { return Seen(args, args.seq_lens[seq]).num_groups; };
    const Split split = args.num_splits == 0
                            ? Split{item, 0, 1}
                            : find_split(item, args.num_seqs, args.num_splits, kMinSplitGroups, work_of);
    if (split.seq >= args.num_seqs) return;
    if (args.num_splits && tile == 0 && split.index == 0 && lane_in_block() == 0) {
        args.plan[2 * split.seq] = item;
        args.plan[2 * split.seq + 1] = split.count;
    }

    const Seen seen(args, load_uniform(args.seq_lens + split.seq));
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
    const Logit logit = {args.logit_cap > 0 ? scale / args.logit_cap : scale * kLog2E, args.logit_cap};

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
            attention.store_acc(h, finish(args, kv_head, head, row_max, row_sum),
                                [&](int column, const Array<float, 4>& x) { store_finished<T>(args, row, column, x); });
            continue;
        }
        const int64_t row = int64_t(item) * args.num_heads + head;
        attention.store_acc(h, 1, [&](int column, const Array<float, 4>& x) {
            store_pack(args.partial + row * D + column, Pack<float, 4>::of({{x.at[0], x.at[1], x.at[2], x.at[3]}}));
        });
        if (attention.lane.first_of_heads()) store_pack(args.stats + row * 2, Pack<float, 2>::of({{row_max, row_sum}}));
    }
}

// The merged state of some splits of a sequence, for four columns of one head.
struct Merged {
    float row_max = kLowest, row_sum = 0;
    Array<float, 4> acc = {};

    WAVE64_DEVICE void take(float other_max, float other_sum, const Array<float, 4>& other_acc) {
        const float higher = max(row_max, other_max), shrink = exp2(row_max - higher), scale = exp2(other_max - higher);
        row_max = higher, row_sum = row_sum * shrink + other_sum * scale;
        for (int i = 0; i < 4; i++) acc.at[i] = acc.at[i] * shrink + other_acc.at[i] * scale;
    }
};

// Consecutive lanes hold a head's columns; as many runs of them as fit a block take the splits in turn.
template <typename T>
WAVE64_DEVICE void merge(const PagedAttentionArgs& args) {
    constexpr int at_once = 4;
    WAVE64_LDS static Array<float, 4> lds_acc[kMergeLanes];
    WAVE64_LDS static Array<float, 2> lds_stats[kMergeLanes];
    const int lanes = args.head_dim / 4, runs = unsigned(kMergeLanes) / unsigned(lanes);
    const int run = unsigned(lane_in_block()) / unsigned(lanes), lane = lane_in_block() - run * lanes;
    for (int64_t row = block_id(); row < args.num_rows; row += args.merge_grid) {
        const int seq = uint32_t(row) / uint32_t(args.num_heads), head = int(row - int64_t(seq) * args.num_heads);
        const int64_t first = load_uniform(args.plan + 2 * seq);
        const int count = load_uniform(args.plan + 2 * seq + 1);
        if (count == 1) continue;
        Merged found;
        for (int split = run; split < count; split += at_once * runs) {
            Array<float, 2> stats[at_once];
            Array<float, 4> acc[at_once];
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                if (split + i * runs >= count) break;
                const int64_t from = (first + split + i * runs) * args.num_heads + head;
                stats[i] = __builtin_bit_cast(Array<float, 2>, load_pack<float, 2>(args.stats + from * 2).bits);
                acc[i] = __builtin_bit_cast(Array<float, 4>,
                                            load_pack<float, 4>(args.partial + from * args.head_dim + lane * 4).bits);
            }
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                if (split + i * runs >= count) break;
                found.take(stats[i].at[0], stats[i].at[1], acc[i]);
            }
        }
        lds_stats[lane_in_block()] = {{found.row_max, found.row_sum}}, lds_acc[lane_in_block()] = found.acc;
        block_barrier();
        if (run == 0) {
            for (int other = lane + lanes; other < kMergeLanes; other += lanes)
                found.take(lds_stats[other].at[0], lds_stats[other].at[1], lds_acc[other]);
            const int kv_head = unsigned(head) / unsigned(args.group);
            const float scale = finish(args, kv_head, head, found.row_max, found.row_sum);
            for (float& x : found.acc.at) x *= scale;
            store_finished<T>(args, row, lane * 4, found.acc);
        }
        block_barrier();
    }
}

}  // namespace wave64

#define PAGED_ATTENTION(NAME, T, STORED, D)                                               \
    WAVE64_KERNEL(wave64::kWaves* wave64::kLanes) NAME(wave64::PagedAttentionArgs args) { \
        wave64::paged_attention<T, STORED, D>(args);                                      \
    }
#define PAGED_ATTENTION_MERGE(NAME, T) \
    WAVE64_KERNEL(wave64::kMergeLanes) NAME(wave64::PagedAttentionArgs args) { wave64::merge<T>(args); }

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
PAGED_ATTENTION_MERGE(paged_attention_merge_bf16, wave64::bf16)
PAGED_ATTENTION_MERGE(paged_attention_merge_fp16, wave64::fp16)

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMaxInt = INT32_MAX;
constexpr int kMergeBlocksPerUnit = 8;

// [fp16][fp8][head_dim == 128]
constexpr const char* kKernels[2][2][2] = {{{"paged_attention_bf16_64", "paged_attention_bf16_128"},
                                            {"paged_attention_bf16_fp8_64", "paged_attention_bf16_fp8_128"}},
                                           {{"paged_attention_fp16_64", "paged_attention_fp16_128"},
                                            {"paged_attention_fp16_fp8_64", "paged_attention_fp16_fp8_128"}}};
constexpr const char* kMergeKernels[] = {"paged_attention_merge_bf16", "paged_attention_merge_fp16"};

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
    args.step_entries = kWaves * kGroup / args.page_size, args.step_rows = kWaves * kGroup % args.page_size;
    call.launch(kKernels[args.dtype][args.cache_dtype == kFp8][args.head_dim == 128], {blocks},
                kWaves * call.device.wave_size, args);
    if (args.num_splits == 0) return;
    args.merge_grid =
        int32_t(std::min<int64_t>(args.num_rows, int64_t(call.device.compute_units) * kMergeBlocksPerUnit));
    call.launch(kMergeKernels[args.dtype], {args.merge_grid}, kMergeLanes, args);
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
