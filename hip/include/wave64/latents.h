// Decode attention over a paged cache of latents, split along the keys: what mla_decode and mla_decode_rope share. A
// latent is the key of all heads, and its first kRank columns are the value.
//
// The trick: a wave has the rows of 16 heads, and takes 16 latents at a time from memory straight into the registers
// that the products with the queries read them from. Those with the weights need them transposed: the matrix unit does
// that, too, multiplying by the identity, so that a latent is read once, and passes through no LDS. The waves of a
// block take the groups of its split in turn, and their sums meet in LDS once, at the end. Bound by memory, the
// latents, of which a wave has a group more in flight, up to 32 heads; by the matrix unit for more.
#pragma once

#include "wave64/latent_args.h"

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)
#include "wave64/cache_write.h"
#include "wave64/rope.h"
#include "wave64/splits.h"

namespace wave64 {

constexpr float kLn2 = 0.693147181f;

template <typename T, typename Stored>
struct Latents {
    static constexpr int kPack = 16 / sizeof(Stored);  // columns
    static constexpr int kPacks = kWidth / kParts / kPack, kValuePacks = kRank / kParts / kPack;
    static constexpr int kOperands = kPack / kNumbers, kTilesOfColumns = kValuePacks * kOperands;
    static constexpr int kAtOnce = 8;  // tiles that are transposed before they are multiplied
    static constexpr int kQuarter = kTilesOfColumns / kLatentWaves;
    using Keys = Pack<Stored, kPack>[kPacks];  // of one latent: every kParts-th pack from pack `part` on
    using Words = Array<Operand, kOperands>;   // a pack in T

    LanePosition lane = lane_position();
    int row, token, head;             // the query's, of `line`
    Operand query[kWidth / 16] = {};  // the columns that the lane has of keys
    Operand identity;                 // the lane's numbers of row `line` of the identity
    float row_max = kLowest, row_sum = 0;
    Sums acc[kTilesOfColumns] = {};  // of tile u: columns column_of(u) + 0, 1, 2, 3

    WAVE64_DEVICE Latents(const LatentArgs& args, int tile) {
        row = kLatentRows * tile + lane.line;
        token = unsigned(row) / args.by_num_heads, head = row - token * args.num_heads;
        float of_row[1][kNumbers];
        for (int n = 0; n < kNumbers; n++) of_row[0][n] = kNumbers * lane.part + n == lane.line ? 1 : 0;
        identity = operand_of<T>(of_row);
    }

    WAVE64_DEVICE int column_of(int u) const {
        return kPack * (lane.part + kParts * (u / kOperands)) + kNumbers * (u % kOperands);
    }

    // The queries' columns 8 by 8, each from load(column).
    template <typename Load>
    WAVE64_DEVICE void set_query(int first_pack, int packs, Load load) {
#pragma unroll
        for (int j = first_pack; j < first_pack + packs; j++) {
            Array<Pack<T, 8>, kPack / 8> found;
            for (int i = 0; i < kPack / 8; i++) found.at[i] = load(kPack * (lane.part + kParts * j) + 8 * i);
            const auto operands = __builtin_bit_cast(Words, found);
            for (int k = 0; k < kOperands; k++) query[j * kOperands + k] = operands.at[k];
        }
    }

    // Weighs 16 latents. visible(i): whether the row attends to key 4 * part + i of them.
    template <typename Visible>
    WAVE64_DEVICE void attend(const Keys& keys, float factor, Visible visible) {
        Sums sums[2] = {};
        Words words[kPacks];
#pragma unroll
        for (int j = 0; j < kPacks; j++) {
            words[j] = __builtin_bit_cast(Words, widened<T>(keys[j]));
#pragma unroll
            for (int k = 0; k < kOperands; k++) multiply<T>({words[j].at[k]}, query[j * kOperands + k], sums[k % 2]);
        }
        float logits[kNumbers], top = -__builtin_huge_valf();
        for (int i = 0; i < kNumbers; i++) {
            logits[i] = (sums[0].at[0][i] + sums[1].at[0][i]) * factor;
            if (!visible(i)) logits[i] = -__builtin_huge_valf();
            top = max(top, logits[i]);
        }
        raise_row_max(top);
        float weights[1][kNumbers];
        for (int i = 0; i < kNumbers; i++) row_sum += weights[0][i] = exp2(logits[i] - row_max);
        const Operand y = operand_of<T>(weights);
#pragma unroll
        for (int first = 0; first < kTilesOfColumns; first += kAtOnce) {
            Sums transposed[kAtOnce] = {};
            keep_order();  // a product is there only after some others; and more at once would not fit the registers
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int u = first + i;
                multiply<T>({words[u / kOperands].at[u % kOperands]}, identity, transposed[i]);
            }
            keep_order();
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) multiply<T>({exact(transposed[i])}, y, acc[first + i]);
        }
    }

    // Numbers of T, in T again.
    WAVE64_DEVICE static Operand exact(const Sums& x) {
        if constexpr (__is_same(T, bf16)) {
            Operand y;
            for (int n = 0; n < kNumbers; n += 2)
                y.words[n / 2] =
                    high_halves(__builtin_bit_cast(Bits32, x.at[0][n]), __builtin_bit_cast(Bits32, x.at[0][n + 1]));
            return y;
        } else {
            return operand_of<T>(x.at);
        }
    }

    WAVE64_DEVICE void scale_to(float higher) {
        const float shrink = exp2(row_max - higher);
        row_max = higher, row_sum *= shrink;
#pragma unroll
        for (Sums& sums : acc)
            for (float& x : sums.at[0]) x *= shrink;
    }

    // A row's maximum is raised only when a weight would pass 2^8.
    WAVE64_DEVICE void raise_row_max(float top) {
        constexpr float slack = 8;
        if (ballot(top > row_max + slack)) scale_to(max(row_max, max_of_rows(top)));
    }

    // Merges the states of a block's waves; then wave w calls store(u, sums) for its quarter of the tiles of columns.
    template <typename Store>
    WAVE64_DEVICE void join_waves(int wave, Store store) {
        WAVE64_LDS static Array<float, 2> lds_stats[kLatentWaves][kLines];
        WAVE64_LDS static Array<float, 4> lds_acc[kLatentWaves - 1][kQuarter][kLanes];
        const int id = lane_in_block() % kLanes;
        row_sum = sum_of_rows(row_sum);
        if (lane.part == 0) lds_stats[wave][lane.line] = {{row_max, row_sum}};
        block_barrier();
        Array<float, 2> stats[kLatentWaves];
        float higher = kLowest, total = 0;
        for (int w = 0; w < kLatentWaves; w++) stats[w] = lds_stats[w][lane.line], higher = max(higher, stats[w].at[0]);
        for (const auto& each : stats) total += each.at[1] * exp2(each.at[0] - higher);
        scale_to(higher), row_sum = total;
#pragma unroll
        for (int q = 0; q < kLatentWaves; q++) {
            if (wave != q) {
                auto& mine = lds_acc[wave < q ? wave : wave - 1];
                for (int u = 0; u < kQuarter; u++)
                    mine[u][id] = __builtin_bit_cast(Array<float, 4>, acc[q * kQuarter + u]);
            }
            block_barrier();
            if (wave == q)
                for (int u = 0; u < kQuarter; u++) {
                    auto sum = __builtin_bit_cast(Array<float, 4>, acc[q * kQuarter + u]);
                    for (const auto& theirs : lds_acc)
                        for (int i = 0; i < 4; i++) sum.at[i] += theirs[u][id].at[i];
                    store(q * kQuarter + u, sum);
                }
            block_barrier();
        }
    }
};

// Latents of the cache, of which a lane reads its part of one: where its key of a group is.
struct LatentCursor {
    int page, row;

    LatentCursor() = default;
    WAVE64_DEVICE LatentCursor(const LatentArgs& args, const int32_t* table, int key, int end) {
        const unsigned at = key < end ? key : end - 1, entry = at / args.by_page_size;
        page = table[entry], row = at - entry * args.page_size;
    }
};

template <typename T, typename Stored>
WAVE64_DEVICE void load_latents(const LatentArgs& args, const LatentCursor& at, int part,
                                typename Latents<T, Stored>::Keys& keys) {
    using State = Latents<T, Stored>;
    const Stored* from = static_cast<const Stored*>(args.kv_cache) + at.page * args.page_stride +
                         at.row * args.row_stride + State::kPack * part;
#pragma unroll
    for (int j = 0; j < State::kPacks; j++) keys[j] = load_pack<Stored, State::kPack>(from + State::kPack * kParts * j);
}

// 8 columns from `column` on of a head, rotated.
template <typename T>
WAVE64_DEVICE Pack<T, 8> rotated_columns(const LatentArgs& args, const T* head, int64_t token, int column) {
    const int64_t position = position_of(args.positions, token, 1, args.position_bytes);
    const int pack = args.is_neox ? column % (kRope / 2) / 8 : column / 16;
    const auto pairs =
        Pairs<T, 8>::load(head, args.is_neox, kRope / 2, pack)
            .rotated(args.is_neox, load_angles<8>(args.angles, args.angles_dtype, position, kRope / 2, pack));
    return column == pairs.low_at(args.is_neox, pack) ? pairs.low : pairs.high;
}

template <typename T, typename Stored, bool ROPE>
WAVE64_DEVICE void load_queries(const LatentArgs& args, int seq, Latents<T, Stored>& state) {
    using State = Latents<T, Stored>;
    if (state.row >= args.rows) return;
    const T* nope = static_cast<const T*>(args.q_nope) + seq * args.q_nope_stride +
                    state.token * args.q_nope_token_stride + state.head * args.q_nope_head_stride;
    const T* pe = static_cast<const T*>(args.q_pe) + seq * args.q_pe_stride + state.token * args.q_pe_token_stride +
                  state.head * args.q_pe_head_stride;
    state.set_query(0, State::kValuePacks, [&](int column) { return load_pack<T, 8>(nope + column); });
    state.set_query(State::kValuePacks, State::kPacks - State::kValuePacks, [&](int column) {
        if constexpr (ROPE)
            return rotated_columns<T>(args, pe, int64_t(seq) * args.new_tokens + state.token, column - kRank);
        else
            return load_pack<T, 8>(pe + column - kRank);
    });
}

template <typename T>
WAVE64_DEVICE Pack<T, 8> as_stored(const Pack<T, 8>& x, const Divisor&, T*) {
    return x;
}
template <typename T>
WAVE64_DEVICE Pack<Bits8, 8> as_stored(const Pack<T, 8>& x, const Divisor& scale, Bits8* to) {
    return stored(x, scale, to);
}

// The new tokens' latents, rotated and as the cache holds them: token `line` of the sequence. Where `writes`, they go
// to the cache, too.
template <typename T, typename Stored>
WAVE64_DEVICE void take_new(const LatentArgs& args, int seq, const LanePosition& lane, bool writes,
                            typename Latents<T, Stored>::Keys& keys) {
    using State = Latents<T, Stored>;
    for (auto& each : keys) each.bits = {};
    if (lane.line >= args.new_tokens) return;
    const int64_t index = int64_t(seq) * args.new_tokens + lane.line, slot = args.slots[index];
    const T* c = static_cast<const T*>(args.kv_c) + seq * args.kv_c_stride + lane.line * args.kv_c_token_stride;
    const T* pe = static_cast<const T*>(args.k_pe) + seq * args.k_pe_stride + lane.line * args.k_pe_token_stride;
    const Divisor scale = divisor_of(args.kv_scale);
    Stored* to = static_cast<Stored*>(args.kv_cache);
    if (slot >= 0) {
        const int64_t page = slot / args.page_size;
        to += page * args.page_stride + (slot - page * args.page_size) * args.row_stride;
    }
#pragma unroll
    for (int j = 0; j < State::kPacks; j++) {
        const int first = State::kPack * (lane.part + kParts * j);
        Array<Pack<Stored, 8>, State::kPack / 8> halves;
        for (int i = 0; i < State::kPack / 8; i++) {
            const int column = first + 8 * i;
            const auto x = j < State::kValuePacks ? load_pack<T, 8>(c + column)
                                                  : rotated_columns<T>(args, pe, index, column - kRank);
            halves.at[i] = as_stored(x, scale, to);
        }
        keys[j] = __builtin_bit_cast(Pack<Stored, State::kPack>, halves);
        if (writes && slot >= 0) store_pack(to + first, keys[j]);
    }
}

template <typename T>
WAVE64_DEVICE void store_latent_sums(const LatentArgs& args, int64_t row, int column, const Array<float, 4>& x,
                                     float scale) {
    const float numbers[4] = {x.at[0] * scale, x.at[1] * scale, x.at[2] * scale, x.at[3] * scale};
    store_pack(static_cast<T*>(args.out) + row * kRank + column, Pack<T, 4>::rounded(numbers));
}

WAVE64_DEVICE float kv_scale_of(const LatentArgs& args) { return args.kv_scale ? *args.kv_scale : 1; }
WAVE64_DEVICE float lse_of(float row_max, float row_sum) {
    return row_sum == 0 ? -__builtin_huge_valf() : (row_max + log2(row_sum)) * kLn2;
}

// What a block attends to: groups begin to end of a sequence's keys in the cache, which are all but the new tokens of
// mla_decode_rope.
struct LatentRange {
    int item, tile, keys, begin, end;
    Split split;  // split.seq is num_seqs if there is nothing to do

    WAVE64_DEVICE LatentRange(const LatentArgs& args, bool rope, int min_groups) : item(block_id()), tile(0) {
        if (args.tiles > 1) {  // those of one item on one die
            const int round = unsigned(item) / unsigned(kDies * args.tiles);
            const int of_round = item - round * kDies * args.tiles;
            tile = unsigned(of_round) / unsigned(kDies), item = round * kDies + of_round % kDies;
        }
        const auto keys_of = [&](int seq) {
            const int length = args.seq_lens[seq];
            const int old = (length < args.capacity ? length : args.capacity) - (rope ? args.new_tokens : 0);
            return old > 0 ? old : 0;
        };
        const auto work_of = [&](int seq) { return (keys_of(seq) + kGroup - 1) / kGroup; };
        const bool is_one = args.num_seqs == 1;
        if (is_one) keys = keys_of(0);
        if (args.num_splits == 0)
            split = {item, 0, 1};
        else if (is_one)
            split = find_split_of_one(item, args.num_splits, min_groups, (keys + kGroup - 1) / kGroup);
        else
            split = find_split(item, args.num_seqs, args.num_splits, min_groups, work_of);
        if (split.seq >= args.num_seqs) return;
        if (args.num_splits && tile == 0 && split.index == 0 && lane_in_block() == 0) {
            args.plan[2 * split.seq] = item;
            args.plan[2 * split.seq + 1] = split.count;
        }
        keys = uniform(is_one ? keys : keys_of(split.seq));
        const int groups = (keys + kGroup - 1) / kGroup;
        const int even = unsigned(groups) / unsigned(split.count), rest = groups - even * split.count;
        begin = split.index * even + (split.index < rest ? split.index : rest);
        end = begin + even + (split.index < rest);
    }
};

template <typename T, typename Stored, bool ROPE>
WAVE64_DEVICE void decode_latents(const LatentArgs& args) {
    using State = Latents<T, Stored>;
    const int wave = uniform(lane_in_block() / kLanes);
    const LatentRange range(args, ROPE, kMinLatentGroups);
    const Split split = range.split;
    if (split.seq >= args.num_seqs) return;
    const int item = range.item, tile = range.tile, keys = range.keys, begin = range.begin, end = range.end;
    const int32_t* table = args.page_table + split.seq * args.table_stride;
    const float factor = args.scale * kLog2E * kv_scale_of(args);

    State state(args, tile);
    load_queries<T, Stored, ROPE>(args, split.seq, state);
    const LanePosition lane = state.lane;
    // Keys that the row attends to, in this split.
    const int end_key = end * kGroup < keys ? end * kGroup : keys;
    const int causal = ROPE ? keys : keys - args.new_tokens + 1 + state.token;
    const int limit = causal < end_key ? causal : end_key;
    if (begin + wave < end) {
        // Two groups at a time, the second one masked where there is one only: branches would cost registers. Behind
        // the last group lanes load its last latent. Where a group's latents are is loaded before the latents of the
        // two groups before it, so that to wait for it is not to wait for them.
        const auto cursor = [&](int group) { return LatentCursor(args, table, group * kGroup + lane.line, end_key); };
        const auto take = [&](const typename State::Keys& latents, int group) {
            const int visible = limit - group * kGroup - kNumbers * lane.part;
            state.attend(latents, factor, [&](int i) { return i < visible; });
        };
        typename State::Keys one, other;
        LatentCursor at_one = cursor(begin + wave), at_other = cursor(begin + wave + kLatentWaves);
        load_latents<T, Stored>(args, at_one, lane.part, one);
        at_one = cursor(begin + wave + 2 * kLatentWaves);
        for (int group = begin + wave; group < end; group += 2 * kLatentWaves) {
            load_latents<T, Stored>(args, at_other, lane.part, other);
            at_other = cursor(group + 3 * kLatentWaves);
            take(one, group);
            load_latents<T, Stored>(args, at_one, lane.part, one);
            at_one = cursor(group + 4 * kLatentWaves);
            take(other, group + kLatentWaves);
        }
    }
    if (ROPE && split.index == split.count - 1 && wave == (end - begin) % kLatentWaves) {
        const int length = args.seq_lens[split.seq];
        const int missing = args.new_tokens - (length < args.capacity ? length : args.capacity);
        typename State::Keys latents;
        take_new<T, Stored>(args, split.seq, lane, tile == 0, latents);
        state.attend(latents, factor, [&](int i) {
            const int key = kNumbers * lane.part + i;
            return key <= state.token && key < args.new_tokens && key >= missing;
        });
    }

    const bool is_row = state.row < args.rows;
    if (split.count == 1) {
        const int64_t row = int64_t(split.seq) * args.rows + state.row;
        state.join_waves(wave, [&](int u, const Array<float, 4>& sums) {
            const float scale = state.row_sum == 0 ? 0 : kv_scale_of(args) / state.row_sum;
            if (is_row) store_latent_sums<T>(args, row, state.column_of(u), sums, scale);
        });
        if (args.lse && is_row && wave == 0 && lane.part == 0) args.lse[row] = lse_of(state.row_max, state.row_sum);
        return;
    }
    const int64_t row = int64_t(item) * args.rows + state.row;
    state.join_waves(wave, [&](int u, const Array<float, 4>& sums) {
        if (is_row)
            store_pack(args.partial + row * kRank + state.column_of(u),
                       Pack<float, 4>::of({{sums.at[0], sums.at[1], sums.at[2], sums.at[3]}}));
    });
    if (is_row && wave == 0 && lane.part == 0)
        store_pack(args.stats + row * 2, Pack<float, 2>::of({{state.row_max, state.row_sum}}));
}

// The splits of a row, each wave every fourth of them, many of which it loads at once.
template <typename T>
WAVE64_DEVICE void merge_latents(const LatentArgs& args) {
    constexpr int waves = kLatentMergeLanes / kLanes, at_once = 4, packs = kRank / kLanes / 4;
    using Part = Array<Array<float, 4>, packs>;
    WAVE64_LDS static Part lds_acc[waves - 1][kLanes];
    WAVE64_LDS static Array<float, 2> lds_stats[waves - 1];
    const int wave = uniform(lane_in_block() / kLanes), lane = lane_in_block() % kLanes;
    const auto column_of = [&](int pack) { return 4 * (lane + kLanes * pack); };
    for (int64_t row = block_id(); row < args.num_rows; row += args.merge_grid) {
        const int seq = uint32_t(row) / uint32_t(args.rows), of_seq = int(row - int64_t(seq) * args.rows);
        int64_t first = load_uniform(args.plan + 2 * seq);
        int count = load_uniform(args.plan + 2 * seq + 1);
        forget_uniform(first), forget_uniform(count);  // both are loaded here, at once
        if (count == 1) continue;
        float row_max = kLowest, row_sum = 0;
        Part acc = {};
        const auto take = [&](const Array<float, 2>& stats, const Part& other) {
            const float higher = max(row_max, stats.at[0]);
            const float shrink = exp2(row_max - higher), scale = exp2(stats.at[0] - higher);
            row_max = higher, row_sum = row_sum * shrink + stats.at[1] * scale;
            for (int k = 0; k < packs; k++)
                for (int i = 0; i < 4; i++) acc.at[k].at[i] = acc.at[k].at[i] * shrink + other.at[k].at[i] * scale;
        };
        // Behind the last split the last one again, since a branch would wait for each.
        const auto take_some = [&](int next, auto&& parts) {
            constexpr int N = sizeof(parts.at) / sizeof(Part);
            Array<float, 2> stats[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                const int split = next + waves * i, loaded = split < count ? split : count - 1;
                const int64_t from = (first + loaded) * args.rows + of_seq;
                stats[i] = __builtin_bit_cast(Array<float, 2>, load_pack<float, 2>(args.stats + from * 2));
                for (int k = 0; k < packs; k++)
                    parts.at[i].at[k] = __builtin_bit_cast(
                        Array<float, 4>, load_pack<float, 4>(args.partial + from * kRank + column_of(k)));
            }
            keep_order();
#pragma unroll
            for (int i = 0; i < N; i++)
                take(next + waves * i < count ? stats[i] : Array<float, 2>{{kLowest, 0}}, parts.at[i]);
        };
        if (count > waves) {
            Array<Part, at_once> parts;
            for (int next = wave; next < count; next += waves * at_once) take_some(next, parts);
        } else if (wave < count) {
            Array<Part, 1> parts;
            take_some(wave, parts);
        }
        if (wave) lds_acc[wave - 1][lane] = acc;
        if (wave && lane == 0) lds_stats[wave - 1] = {{row_max, row_sum}};
        block_barrier();
        if (wave == 0) {
            for (int w = 0; w < waves - 1; w++) take(lds_stats[w], lds_acc[w][lane]);
            const float scale = row_sum == 0 ? 0 : kv_scale_of(args) / row_sum;
            for (int k = 0; k < packs; k++) store_latent_sums<T>(args, row, column_of(k), acc.at[k], scale);
            if (args.lse && lane == 0) args.lse[row] = lse_of(row_max, row_sum);
        }
        block_barrier();
    }
}

}  // namespace wave64

#define WAVE64_LATENT_KERNEL(NAME, T, STORED, ROPE)                                     \
    WAVE64_KERNEL(wave64::kLatentWaves* wave64::kLanes) NAME(wave64::LatentArgs args) { \
        wave64::decode_latents<T, STORED, ROPE>(args);                                  \
    }
#define WAVE64_LATENT_MERGE(NAME, T) \
    WAVE64_KERNEL(wave64::kLatentMergeLanes) NAME(wave64::LatentArgs args) { wave64::merge_latents<T>(args); }
#if WAVE64_HAS_FP8
#define WAVE64_LATENT_FP8(OP, ROPE)                                        \
    WAVE64_LATENT_KERNEL(OP##_bf16_fp8, wave64::bf16, wave64::Bits8, ROPE) \
    WAVE64_LATENT_KERNEL(OP##_fp16_fp8, wave64::fp16, wave64::Bits8, ROPE)
#else
#define WAVE64_LATENT_FP8(OP, ROPE)
#endif
#define WAVE64_LATENT_KERNELS(OP, ROPE)                               \
    WAVE64_LATENT_KERNEL(OP##_bf16, wave64::bf16, wave64::bf16, ROPE) \
    WAVE64_LATENT_KERNEL(OP##_fp16, wave64::fp16, wave64::fp16, ROPE) \
    WAVE64_LATENT_FP8(OP, ROPE)                                       \
    WAVE64_LATENT_MERGE(OP##_merge_bf16, wave64::bf16)                \
    WAVE64_LATENT_MERGE(OP##_merge_fp16, wave64::fp16)

#elif defined(WAVE64_DEVICE_CODE)
#define WAVE64_LATENT_KERNELS(OP, ROPE)
#else
#include "wave64/latents_host.h"
#endif
