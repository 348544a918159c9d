// Decode attention over a paged cache, split along the keys: out[b] = softmax(scale q[b] K[b]^T) V[b].
//
// The trick: keys and values go from memory straight into the registers that the matrix instructions read them from
// (matrix.h), and logits become weights where they are: lanes exchange nothing but peaks, and those seldom, since a
// peak is raised only when a weight would pass 2^8. The heads that share a key head are the instructions' columns, so
// keys are read once.
// Bound by: reading keys and values. A wave has 16 of either under way, and a compute unit several waves.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kWaves = 4;        // of a block, which take the groups of its part in turn
constexpr int kLeastGroups = 8;  // no sequence is split for less
constexpr int kMergeLanes = 256;
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/attention.h"
#include "wave64/splits.h"

namespace wave64 {

// The keys that a sequence's query sees: from `first` to `end`, in the groups from `first_group` on.
struct Seen {
    int first, end, first_group, num_groups;

    WAVE64_DEVICE Seen(const PagedAttentionArgs& args, int length) {
        end = length < 0 ? 0 : length < args.room ? length : args.room;
        first = args.window > 0 && end > args.window ? end - args.window : 0;
        first_group = first / kGroup, num_groups = (end + kGroup - 1) / kGroup - first_group;
    }
};

// A wave's way through the groups: where the present one's rows are.
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

// Attends to the group at `at`, whose keys are loaded or under way, and loads those of the next one, if there is one.
template <typename T, typename Stored, int D>
WAVE64_DEVICE void take(Attention<T, Stored, D>& attention, const Pool& keys, const Pool& values, const Seen& seen,
                        const Logit& logit, const Cursor& at, const Cursor* next) {
    attention.load_values(values, at.page, at.row);
    keep_order();
    typename Attention<T, Stored, D>::Logits logits;
    attention.find_logits(logit, logits);
    if (next) attention.load_keys(keys, next->page, next->row);
    if (at.first_key < seen.first || at.first_key + kGroup > seen.end)
        attention.hide_all_but(seen.first, seen.end, at.first_key, logits);
    attention.raise_peaks(logits);
    attention.mix(logits);
}

// A sink's part in a sum of weights, and what sum and values are to be multiplied by for a value that is finished.
WAVE64_DEVICE float finish(const PagedAttentionArgs& args, int head, float peak, float total) {
    float shrink = 1;
    if (args.sinks) {
        const float sink = args.sinks[head] * kLog2E, higher = max(peak, sink);
        shrink = exp2(peak - higher);
        total = total * shrink + exp2(sink - higher);
    }
    return total == 0 ? 0 : shrink * (args.v_scale ? *args.v_scale : 1) / total;
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
    const Part part = args.shares == 0 ? Part{item, 0, 1}
                                       : find_part(item, args.num_seqs, args.shares, kLeastGroups, [&](int seq) {
                                             return Seen(args, args.seq_lens[seq]).num_groups;
                                         });
    if (part.seq >= args.num_seqs) return;
    if (args.shares && tile == 0 && part.index == 0 && lane_in_block() == 0) {
        args.plan[2 * part.seq] = item;
        args.plan[2 * part.seq + 1] = part.count;
    }

    const Seen seen(args, load_uniform(args.seq_lens + part.seq));
    const int even = unsigned(seen.num_groups) / unsigned(part.count), rest = seen.num_groups - even * part.count;
    const int begin = seen.first_group + part.index * even + (part.index < rest ? part.index : rest);
    const int end = begin + even + (part.index < rest);
    constexpr int bytes = sizeof(Stored);
    const Pool keys = {static_cast<const char*>(args.key_cache) + kv_head * args.key_head_stride * bytes,
                       args.key_page_stride * bytes, int(args.key_row_stride) * bytes};
    const Pool values = {static_cast<const char*>(args.value_cache) + kv_head * args.value_head_stride * bytes,
                         args.value_page_stride * bytes, int(args.value_row_stride) * bytes};
    const int32_t* table = args.page_table + part.seq * args.table_stride;
    const float scale = args.scale * (args.k_scale ? *args.k_scale : 1);
    const Logit logit = {args.logit_cap > 0 ? scale / args.logit_cap : scale * kLog2E, args.logit_cap};

    Attention<T, Stored, D> attention;
    attention.load_query(static_cast<const T*>(args.query) + part.seq * args.query_stride +
                             first_head * args.query_head_stride,
                         args.query_head_stride, num_heads);
    if (begin + wave < end) {
        Cursor at(args, table, begin + wave);
        attention.load_keys(keys, at.page, at.row);
        // The last group is apart: were it not known whether more keys are under way, values would wait for them.
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
        const int head = first_head + attention.place.head(h);
        if (attention.place.head(h) >= num_heads) continue;
        const float peak = attention.peak[h], total = attention.total[h];
        if (part.count == 1) {
            const int64_t row = int64_t(part.seq) * args.num_heads + head;
            attention.store_mixed(h, finish(args, head, peak, total), [&](int column, const Array<float, 4>& x) {
                store_finished<T>(args, row, column, x);
            });
            continue;
        }
        const int64_t row = int64_t(item) * args.num_heads + head;
        attention.store_mixed(h, 1, [&](int column, const Array<float, 4>& x) {
            store_pack(args.partial + row * D + column, Pack<float, 4>::of({{x.at[0], x.at[1], x.at[2], x.at[3]}}));
        });
        if (attention.place.first_of_heads())
            store_pack(args.stats + row * 2, Pack<float, 2>::of({{peak, total}}));
    }
}

// What some parts of a sequence found of four columns of one head.
struct Merged {
    float peak = kLowest, total = 0;
    Array<float, 4> mixed = {};

    WAVE64_DEVICE void take(float other_peak, float other_total, const Array<float, 4>& other_mixed) {
        const float higher = max(peak, other_peak), shrink = exp2(peak - higher), scale = exp2(other_peak - higher);
        peak = higher, total = total * shrink + other_total * scale;
        for (int i = 0; i < 4; i++) mixed.at[i] = mixed.at[i] * shrink + other_mixed.at[i] * scale;
    }
};

// Lanes side by side hold a head's columns; as many runs of them as fit a block take the parts in turn.
template <typename T>
WAVE64_DEVICE void merge(const PagedAttentionArgs& args) {
    constexpr int at_once = 4;
    WAVE64_LDS static Array<float, 4> lds_mixed[kMergeLanes];
    WAVE64_LDS static Array<float, 2> lds_stats[kMergeLanes];
    const int lanes = args.head_dim / 4, runs = unsigned(kMergeLanes) / unsigned(lanes);
    const int run = unsigned(lane_in_block()) / unsigned(lanes), lane = lane_in_block() - run * lanes;
    for (int64_t row = block_id(); row < args.num_rows; row += args.merge_grid) {
        const int seq = uint32_t(row) / uint32_t(args.num_heads), head = int(row - int64_t(seq) * args.num_heads);
        const int64_t first = load_uniform(args.plan + 2 * seq);
        const int count = load_uniform(args.plan + 2 * seq + 1);
        if (count == 1) continue;
        Merged found;
        for (int part = run; part < count; part += at_once * runs) {
            Array<float, 2> stats[at_once];
            Array<float, 4> mixed[at_once];
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                if (part + i * runs >= count) break;
                const int64_t from = (first + part + i * runs) * args.num_heads + head;
                stats[i] = __builtin_bit_cast(Array<float, 2>, load_pack<float, 2>(args.stats + from * 2).bits);
                mixed[i] = __builtin_bit_cast(
                    Array<float, 4>, load_pack<float, 4>(args.partial + from * args.head_dim + lane * 4).bits);
            }
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                if (part + i * runs >= count) break;
                found.take(stats[i].at[0], stats[i].at[1], mixed[i]);
            }
        }
        lds_stats[lane_in_block()] = {{found.peak, found.total}}, lds_mixed[lane_in_block()] = found.mixed;
        block_barrier();
        if (run == 0) {
            for (int other = lane + lanes; other < kMergeLanes; other += lanes)
                found.take(lds_stats[other].at[0], lds_stats[other].at[1], lds_mixed[other]);
            const float scale = finish(args, head, found.peak, found.total);
            for (float& x : found.mixed.at) x *= scale;
            store_finished<T>(args, row, lane * 4, found.mixed);
        }
        block_barrier();
    }
}

}  // namespace wave64

#define PAGED_ATTENTION(NAME, T, STORED, D)                                                \
    WAVE64_KERNEL(wave64::kWaves * wave64::kLanes) NAME(wave64::PagedAttentionArgs args) { \
        wave64::paged_attention<T, STORED, D>(args);                                       \
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
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;
constexpr int kGroup = 16;  // keys, as in attention.h; pages hold whole groups
constexpr int kMergeBlocksPerUnit = 8;

// Heads that a block attends with: kTileHeads of matrix.h.
int tile_heads(const Device& device) { return device.arch.rfind("sm_", 0) == 0 ? 8 : 16; }

// [fp16][fp8][head_dim == 128]
constexpr const char* kKernels[2][2][2] = {
    {{"paged_attention_bf16_64", "paged_attention_bf16_128"},
     {"paged_attention_bf16_fp8_64", "paged_attention_bf16_fp8_128"}},
    {{"paged_attention_fp16_64", "paged_attention_fp16_128"},
     {"paged_attention_fp16_fp8_64", "paged_attention_fp16_fp8_128"}}};
constexpr const char* kMergeKernels[] = {"paged_attention_merge_bf16", "paged_attention_merge_fp16"};

}  // namespace
}  // namespace wave64

int32_t wave64_paged_attention(const wave64::PagedAttentionArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "paged_attention";
    PagedAttentionArgs args = *caller_args;
    if (args.dtype != kBf16 && args.dtype != kFp16) return refuse(op, "dtype", "0 (bf16) or 1 (fp16)", args.dtype);
    if (args.cache_dtype != args.dtype && args.cache_dtype != kFp8)
        return refuse(op, "cache_dtype", "dtype or 3 (FP8)", args.cache_dtype);
    if (args.head_dim != 64 && args.head_dim != 128) return refuse(op, "head_dim", "64 or 128", args.head_dim);
    if (args.page_size <= 0 || args.page_size % kGroup)
        return refuse(op, "page_size", "a multiple of 16", args.page_size);
    if (args.num_seqs < 0) return refuse(op, "num_seqs", "at least 0", args.num_seqs);
    if (args.num_heads < 0) return refuse(op, "num_heads", "at least 0", args.num_heads);
    if (args.num_seqs == 0 || args.num_heads == 0) return kOk;
    if (args.num_kv_heads <= 0 || args.num_heads % args.num_kv_heads)
        return refuse(op, "num_kv_heads", "a divisor of num_heads", args.num_kv_heads);
    if (args.max_pages < 0 || args.max_pages > (1 << 30) / args.page_size)
        return refuse(op, "max_pages", "room for 2^30 keys at most", args.max_pages);
    args.room = args.max_pages * args.page_size;
    if (int64_t(args.num_seqs) * (args.room / kGroup) > kMost)
        return refuse(op, "num_seqs", "room for 2^35 keys in all at most", args.num_seqs);
    const int bytes = args.cache_dtype == kFp8 ? 1 : 2;
    if (!is_16_aligned({args.query, args.key_cache, args.value_cache, args.out},
                       {args.query_stride * 2, args.query_head_stride * 2, args.key_page_stride * bytes,
                        args.key_row_stride * bytes, args.key_head_stride * bytes, args.value_page_stride * bytes,
                        args.value_row_stride * bytes, args.value_head_stride * bytes}))
        return refuse(op, "query, key_cache, value_cache", "rows that begin at multiples of 16 bytes", 0);
    for (auto [name, stride] :
         {std::pair{"key_row_stride", args.key_row_stride}, {"value_row_stride", args.value_row_stride}})
        if (stride < 0 || stride >= (1 << 26)) return refuse(op, name, "0 to 2^26 - 1", stride);
    for (auto [name, pointer] : {std::pair{"query", args.query}, {"seq_lens", (const void*)args.seq_lens},
                                 {"out", (const void*)args.out}})
        if (!pointer) return refuse(op, name, "an address", 0);
    for (auto [name, pointer] : {std::pair{"key_cache", args.key_cache}, {"value_cache", args.value_cache},
                                 {"page_table", (const void*)args.page_table}})
        if (!pointer && args.room) return refuse(op, name, "an address", 0);
    if (args.shares < 0) return refuse(op, "shares", "at least 0", args.shares);
    for (auto [name, pointer] : {std::pair{"partial", (const void*)args.partial}, {"stats", (const void*)args.stats},
                                 {"plan", (const void*)args.plan}})
        if (args.shares && !pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    if (args.shares && args.num_seqs > device->wave_size * device->wave_size)
        return refuse(op, "num_seqs", "at most the square of the wave size where there are shares", args.num_seqs);
    args.group = args.num_heads / args.num_kv_heads;
    const int64_t tiles = args.num_kv_heads * ceil_div(args.group, tile_heads(*device));
    const int64_t blocks = (int64_t(args.num_seqs) + args.shares) * tiles;
    args.num_rows = int64_t(args.num_seqs) * args.num_heads;
    if (blocks > kMost || args.num_rows > kMost) return refuse(op, "num_seqs", "fewer, or fewer heads", args.num_seqs);
    args.tiles = int32_t(tiles);
    args.step_entries = kWaves * kGroup / args.page_size, args.step_rows = kWaves * kGroup % args.page_size;
    const uint32_t lanes = kWaves * device->wave_size;
    const char* kernel = kKernels[args.dtype][args.cache_dtype == kFp8][args.head_dim == 128];
    if (int32_t status = launch({op, kernel, {uint32_t(blocks), 1, 1}, {lanes, 1, 1}, 0}, &args, sizeof args, stream))
        return status;
    if (args.shares == 0) return kOk;
    args.merge_grid = int32_t(std::min<int64_t>(args.num_rows, int64_t(device->compute_units) * kMergeBlocksPerUnit));
    const uint32_t grid = args.merge_grid;
    return launch({op, kMergeKernels[args.dtype], {grid, 1, 1}, {kMergeLanes, 1, 1}, 0}, &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::PagedAttentionArgs, NAME)
static const bool registered = wave64::register_op<wave64::PagedAttentionArgs, wave64_paged_attention>(
    "paged_attention",
    {FIELD(query), FIELD(key_cache), FIELD(value_cache), FIELD(page_table), FIELD(seq_lens), FIELD(sinks),
     FIELD(k_scale), FIELD(v_scale), FIELD(out), FIELD(partial), FIELD(stats), FIELD(plan), FIELD(query_stride),
     FIELD(query_head_stride), FIELD(key_page_stride), FIELD(key_row_stride), FIELD(key_head_stride),
     FIELD(value_page_stride), FIELD(value_row_stride), FIELD(value_head_stride), FIELD(table_stride), FIELD(num_seqs),
     FIELD(num_heads), FIELD(num_kv_heads), FIELD(head_dim), FIELD(page_size), FIELD(max_pages), FIELD(window),
     FIELD(shares), FIELD(scale), FIELD(logit_cap), FIELD(dtype), FIELD(cache_dtype)});

#endif
