// The kernels of latents.h for many heads: a block has up to 128 rows, so that a latent is read, and transposed, once
// for all of them.
//
// The trick: each wave has a quarter of the columns of queries, latents and sums, for all rows. What its columns
// contribute to the logits goes through LDS to the wave that owns the row, which makes weights of them; those come back
// the same way. Meanwhile the waves transpose their latents. Bound by the matrix unit.
#pragma once

#include "wave64/latents.h"

#if defined(WAVE64_DEVICE_CODE) && defined(__GFX9__)

namespace wave64 {

// The waves of a block on TILES of 16 rows, of which each wave owns as many.
template <typename T, typename Stored, int TILES>
struct WideLatents {
    static constexpr int kOwn = TILES / kLatentWaves;
    static constexpr int kAtOnce = 4;                      // tiles that are multiplied with the latents at a time
    static constexpr int kColumns = kRank / kLatentWaves;  // of the values, that a wave has
    static constexpr int kPack = 16 / sizeof(Stored), kPacks = kColumns / kParts / kPack;
    static constexpr int kOperands = kPack / kNumbers, kProducts = kPacks * kOperands;
    using Words = Array<Operand, kOperands>;  // a pack in T
    struct Keys {                             // of one latent
        Pack<Stored, kPack> values[kPacks];
        Pack<Stored, kNumbers> rope;
    };
    static_assert(kRope == kLatentWaves * kParts * kNumbers);

    LanePosition lane = lane_position();
    int wave = uniform(lane_in_block() / kLanes);
    Operand identity;                          // the lane's numbers of row `line` of the identity
    Operand query[TILES][kProducts + 1] = {};  // of row `line` of a tile; behind the values' columns rope's
    Sums acc[TILES][kProducts] = {};           // of product p: columns column_of(p) + 0, 1, 2, 3
    float row_max[kOwn], row_sum[kOwn] = {};   // of the tiles that the wave owns

    WAVE64_DEVICE WideLatents() {
        float of_row[1][kNumbers];
        for (int n = 0; n < kNumbers; n++) of_row[0][n] = kNumbers * lane.part + n == lane.line ? 1 : 0;
        identity = operand_of<T>(of_row);
        for (float& each : row_max) each = kLowest;
    }

    WAVE64_DEVICE int pack_column(int j) const { return kColumns * wave + kPack * (lane.part + kParts * j); }
    WAVE64_DEVICE int column_of(int p) const { return pack_column(p / kOperands) + kNumbers * (p % kOperands); }
    WAVE64_DEVICE int rope_column() const { return kNumbers * (kParts * wave + lane.part); }

    // Of 8 numbers those from rope_column() on.
    template <typename Of>
    WAVE64_DEVICE Pack<Of, kNumbers> rope_half(const Pack<Of, 8>& eight) const {
        const auto halves = __builtin_bit_cast(Array<Pack<Of, kNumbers>, 2>, eight);
        auto bits = halves.at[0].bits;
        if (lane.part % 2) bits = halves.at[1].bits;  // of the packs themselves an array in memory would be made
        return {bits};
    }

    WAVE64_DEVICE void load(const LatentArgs& args, const LatentCursor& at, Keys& keys) const {
        const Stored* from =
            static_cast<const Stored*>(args.kv_cache) + at.page * args.page_stride + at.row * args.row_stride;
#pragma unroll
        for (int j = 0; j < kPacks; j++) keys.values[j] = load_pack<Stored, kPack>(from + pack_column(j));
        keys.rope = load_pack<Stored, kNumbers>(from + kRank + rope_column());
    }

    // Weighs 16 latents. visible(q, i): whether row `line` of the q-th own tile attends to key 4 * part + i of them.
    // All waves have to come. fetch() may change `keys`, of which other registers have what is needed then.
    template <typename Visible, typename Fetch>
    WAVE64_DEVICE void attend(const Keys& keys, float factor, Visible visible, Fetch fetch) {
        WAVE64_LDS static Array<float, kRows> lds_sums[kLatentWaves][TILES][kLanes];
        WAVE64_LDS static Operand lds_weights[TILES][kLanes];
        WAVE64_LDS static float lds_shrink[TILES][kLines];
        WAVE64_LDS static Array<int, kLatentWaves> lds_raised;  // by wave, whether sums have to shrink
        constexpr float slack = 8;  // in base 2: a row's maximum is raised only when a weight would pass 2^8
        const int id = lane_in_block() % kLanes;
        Operand operands[kProducts + 1];
#pragma unroll
        for (int j = 0; j < kPacks; j++) {
            const auto words = __builtin_bit_cast(Words, widened<T>(keys.values[j]));
            for (int k = 0; k < kOperands; k++) operands[j * kOperands + k] = words.at[k];
        }
        operands[kProducts] = __builtin_bit_cast(Operand, widened<T>(keys.rope));
#pragma unroll
        for (int first = 0; first < TILES; first += kAtOnce) {
            Sums sums[kAtOnce] = {};
            keep_order();  // more at once would not fit the registers
#pragma unroll
            for (int k = 0; k <= kProducts; k++)
#pragma unroll
                for (int t = 0; t < kAtOnce; t++) multiply<T>({operands[k]}, query[first + t][k], sums[t]);
#pragma unroll
            for (int t = 0; t < kAtOnce; t++)
                lds_sums[wave][first + t][id] = __builtin_bit_cast(Array<float, kRows>, sums[t]);
        }
        keep_order();
        Operand columns[kProducts];
        {
            Sums transposed[kProducts] = {};
#pragma unroll
            for (int p = 0; p < kProducts; p++) multiply<T>({operands[p]}, identity, transposed[p]);
#pragma unroll
            for (int p = 0; p < kProducts; p++) columns[p] = Latents<T, Stored>::exact(transposed[p]);
        }
        fetch();
        block_barrier();

        int raised = 0;
#pragma unroll
        for (int q = 0; q < kOwn; q++) {
            const int t = wave * kOwn + q;
            float logits[kNumbers] = {}, top = -__builtin_huge_valf();
            for (int w = 0; w < kLatentWaves; w++) {
                const auto sums = lds_sums[w][t][id];
                for (int i = 0; i < kNumbers; i++) logits[i] += sums.at[i];
            }
            for (int i = 0; i < kNumbers; i++) {
                logits[i] = visible(q, i) ? logits[i] * factor : -__builtin_huge_valf();
                top = max(top, logits[i]);
            }
            float shrink = 1;
            if (ballot(top > row_max[q] + slack)) {
                const float higher = max(row_max[q], max_of_rows(top));
                shrink = exp2(row_max[q] - higher);
                row_max[q] = higher, row_sum[q] *= shrink;
                raised = 1;
            }
            if (lane.part == 0) lds_shrink[t][lane.line] = shrink;
            float weights[1][kNumbers];
            for (int i = 0; i < kNumbers; i++) row_sum[q] += weights[0][i] = exp2(logits[i] - row_max[q]);
            lds_weights[t][id] = operand_of<T>(weights);
        }
        if (id == 0) lds_raised.at[wave] = raised;
        block_barrier();

        const auto each = lds_raised;
        if (__builtin_expect(uniform(each.at[0] | each.at[1] | each.at[2] | each.at[3]), 0)) {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const float shrink = lds_shrink[t][lane.line];
                for (Sums& sums : acc[t])
                    for (float& x : sums.at[0]) x *= shrink;
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const Operand weights = lds_weights[t][id];
#pragma unroll
            for (int p = 0; p < kProducts; p++) multiply<T>({columns[p]}, weights, acc[t][p]);
        }
    }
};

template <typename T, typename Stored, bool ROPE, int TILES>
WAVE64_DEVICE void load_wide_queries(const LatentArgs& args, int seq, int first_row,
                                     WideLatents<T, Stored, TILES>& state) {
    using State = WideLatents<T, Stored, TILES>;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int row = first_row + kLines * t + state.lane.line;
        if (row >= args.rows) continue;
        const int token = unsigned(row) / args.by_num_heads, head = row - token * args.num_heads;
        const T* nope = static_cast<const T*>(args.q_nope) + seq * args.q_nope_stride +
                        token * args.q_nope_token_stride + head * args.q_nope_head_stride;
        const T* pe = static_cast<const T*>(args.q_pe) + seq * args.q_pe_stride + token * args.q_pe_token_stride +
                      head * args.q_pe_head_stride;
#pragma unroll
        for (int p = 0; p < State::kProducts; p += 2) {
            const auto two = __builtin_bit_cast(Array<Operand, 2>, load_pack<T, 8>(nope + state.column_of(p)));
            state.query[t][p] = two.at[0], state.query[t][p + 1] = two.at[1];
        }
        const int column = state.rope_column();
        Pack<T, kNumbers> rope;
        if constexpr (ROPE)
            rope = state.rope_half(rotated_columns<T>(args, pe, int64_t(seq) * args.new_tokens + token, column & ~7));
        else
            rope = load_pack<T, kNumbers>(pe + column);
        state.query[t][State::kProducts] = __builtin_bit_cast(Operand, rope);
    }
}

// As take_new, the wave's columns.
template <typename T, typename Stored, int TILES>
WAVE64_DEVICE void take_new_columns(const LatentArgs& args, int seq, bool writes,
                                    const WideLatents<T, Stored, TILES>& state,
                                    typename WideLatents<T, Stored, TILES>::Keys& keys) {
    using State = WideLatents<T, Stored, TILES>;
    for (auto& each : keys.values) each.bits = {};
    keys.rope.bits = {};
    const int line = state.lane.line;
    if (line >= args.new_tokens) return;
    const int64_t index = int64_t(seq) * args.new_tokens + line, slot = args.slots[index];
    const T* c = static_cast<const T*>(args.kv_c) + seq * args.kv_c_stride + line * args.kv_c_token_stride;
    const T* pe = static_cast<const T*>(args.k_pe) + seq * args.k_pe_stride + line * args.k_pe_token_stride;
    const Divisor scale = divisor_of(args.kv_scale);
    Stored* to = static_cast<Stored*>(args.kv_cache);
    writes = writes && slot >= 0;
    if (writes) {
        const int64_t page = slot / args.page_size;
        to += page * args.page_stride + (slot - page * args.page_size) * args.row_stride;
    }
#pragma unroll
    for (int j = 0; j < State::kPacks; j++) {
        const int column = state.pack_column(j);
        Array<Pack<Stored, 8>, State::kPack / 8> eights;
        for (int i = 0; i < State::kPack / 8; i++)
            eights.at[i] = as_stored(load_pack<T, 8>(c + column + 8 * i), scale, to);
        keys.values[j] = __builtin_bit_cast(Pack<Stored, State::kPack>, eights);
        if (writes) store_pack(to + column, keys.values[j]);
    }
    const int column = state.rope_column();
    keys.rope = state.rope_half(as_stored(rotated_columns<T>(args, pe, index, column & ~7), scale, to));
    if (writes) store_pack(to + kRank + column, keys.rope);
}

template <typename T, typename Stored, bool ROPE, int TILES>
WAVE64_DEVICE void decode_wide_latents(const LatentArgs& args) {
    using State = WideLatents<T, Stored, TILES>;
    WAVE64_LDS static Array<float, 2> lds_stats[TILES][kLines];
    const LatentRange range(args, ROPE, kMinWideGroups);
    const Split split = range.split;
    if (split.seq >= args.num_seqs) return;
    const int keys = range.keys, begin = range.begin, end = range.end, first_row = kLines * TILES * range.tile;
    const int32_t* table = args.page_table + split.seq * args.table_stride;
    const float factor = args.scale * kLog2E * kv_scale_of(args);

    State state;
    const int id = lane_in_block() % kLanes;
    const bool takes_new = ROPE && split.index == split.count - 1;
    // The new latents wait in LDS, each lane's by itself: to rotate them takes registers, which are free only now.
    WAVE64_LDS static typename State::Keys lds_new[kLatentWaves][kLanes];
    if (takes_new) {
        typename State::Keys latents;
        take_new_columns<T, Stored, TILES>(args, split.seq, range.tile == 0, state, latents);
        lds_new[state.wave][id] = latents;
    }
    load_wide_queries<T, Stored, ROPE, TILES>(args, split.seq, first_row, state);
    const LanePosition lane = state.lane;
    const auto token_of = [&](int t) { return int(unsigned(first_row + kLines * t + lane.line) / args.by_num_heads); };
    // Keys of this split that a row of the tile attends to.
    const int end_key = end * kGroup < keys ? end * kGroup : keys;
    int limit[State::kOwn];
    for (int q = 0; q < State::kOwn; q++) {
        const int causal = ROPE ? keys : keys - args.new_tokens + 1 + token_of(state.wave * State::kOwn + q);
        limit[q] = causal < end_key ? causal : end_key;
    }
    // One more group is that of the new tokens.
    const int all = end + takes_new;
    const auto cursor = [&](int group) { return LatentCursor(args, table, group * kGroup + lane.line, end_key); };
    LatentCursor next;
    if (begin < end) next = cursor(begin);
    typename State::Keys latents;
    const auto fetch = [&](int group) {
        if (group < end)
            state.load(args, next, latents), next = cursor(group + 1);
        else if (ROPE && group < all)
            latents = lds_new[state.wave][id];
    };
    fetch(begin);
    for (int group = begin; group < all; group++) {
        int first_visible = 0;
        if (__builtin_expect(ROPE && group == end, 0)) {
            const int length = args.seq_lens[split.seq];
            first_visible = args.new_tokens - (length < args.capacity ? length : args.capacity);
            for (int q = 0; q < State::kOwn; q++) {
                const int seen = token_of(state.wave * State::kOwn + q) + 1;
                limit[q] = group * kGroup + (seen < args.new_tokens ? seen : args.new_tokens);
            }
        }
        const auto visible = [&](int q, int i) {
            const int key = kNumbers * lane.part + i;
            return key >= first_visible && key < limit[q] - group * kGroup;
        };
        state.attend(latents, factor, visible, [&] { fetch(group + 1); });
        keep_order();
        wait_state();
    }

    for (int q = 0; q < State::kOwn; q++) {
        const float sum = sum_of_rows(state.row_sum[q]);
        if (lane.part == 0) lds_stats[state.wave * State::kOwn + q][lane.line] = {{state.row_max[q], sum}};
    }
    block_barrier();
    const int64_t first_out = int64_t(split.count == 1 ? split.seq : range.item) * args.rows;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int of_seq = first_row + kLines * t + lane.line;
        if (of_seq >= args.rows) continue;
        const int64_t row = first_out + of_seq;
        const auto stats = lds_stats[t][lane.line];
        const bool writes_stats = t / State::kOwn == state.wave && lane.part == 0;
        if (split.count == 1) {
            const float scale = stats.at[1] == 0 ? 0 : kv_scale_of(args) / stats.at[1];
            for (int p = 0; p < State::kProducts; p++)
                store_latent_sums<T>(args, row, state.column_of(p),
                                     __builtin_bit_cast(Array<float, 4>, state.acc[t][p]), scale);
            if (args.lse && writes_stats) args.lse[row] = lse_of(stats.at[0], stats.at[1]);
        } else {
            for (int p = 0; p < State::kProducts; p++)
                store_pack(args.partial + row * kRank + state.column_of(p),
                           __builtin_bit_cast(Pack<float, 4>, state.acc[t][p]));
            if (writes_stats) store_pack(args.stats + row * 2, __builtin_bit_cast(Pack<float, 2>, stats));
        }
    }
}

}  // namespace wave64

#define WAVE64_WIDE_LATENT_KERNEL(NAME, T, STORED, ROPE, TILES)                         \
    WAVE64_KERNEL(wave64::kLatentWaves* wave64::kLanes) NAME(wave64::LatentArgs args) { \
        wave64::decode_wide_latents<T, STORED, ROPE, TILES>(args);                      \
    }
#if WAVE64_HAS_FP8
#define WAVE64_WIDE_LATENT_FP8(OP, ROPE, TILES)                                        \
    WAVE64_WIDE_LATENT_KERNEL(OP##_bf16_fp8, wave64::bf16, wave64::Bits8, ROPE, TILES) \
    WAVE64_WIDE_LATENT_KERNEL(OP##_fp16_fp8, wave64::fp16, wave64::Bits8, ROPE, TILES)
#else
#define WAVE64_WIDE_LATENT_FP8(OP, ROPE, TILES)
#endif
#define WAVE64_WIDE_LATENT_KERNELS_OF(OP, ROPE, TILES)                            \
    WAVE64_WIDE_LATENT_KERNEL(OP##_bf16, wave64::bf16, wave64::bf16, ROPE, TILES) \
    WAVE64_WIDE_LATENT_KERNEL(OP##_fp16, wave64::fp16, wave64::fp16, ROPE, TILES) \
    WAVE64_WIDE_LATENT_FP8(OP, ROPE, TILES)
#define WAVE64_WIDE_LATENT_KERNELS(OP, ROPE)             \
    WAVE64_WIDE_LATENT_KERNELS_OF(OP##_64_rows, ROPE, 4) \
    WAVE64_WIDE_LATENT_KERNELS_OF(OP##_128_rows, ROPE, 8)

#elif defined(WAVE64_DEVICE_CODE)
#define WAVE64_WIDE_LATENT_KERNELS(OP, ROPE)
#endif
