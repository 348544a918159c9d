// How a block gets what the same block of the other ranks has: the protocols of the collectives.
//
// LL    8 bytes are 4 of data and 4 of a tag, the block's round: who finds the tag has the data. One trip, twice the
//       bytes.
// LL128 A line of 128 bytes ends in a tag of 8. It is stored and loaded by 8 lanes in one instruction, which hardware
//       must not tear: NVLink does not, nor does gfx942 within a node, where RCCL rests on the same; the emulator tears
//       whatever is no whole line.
// flags Lines of data alone, and behind them a flag: a wave waits for its own stores, a barrier for all waves', then
//       the flag is set. Who has found it may load the data.
//
// An exchange is given sent(i, line), what goes to the i-th rank behind this one, and this lane's `own` for itself; it
// gives all[line][rank]. It returns false, in all lanes of the wave, where a wait timed out.
#pragma once

#include "wave64/ranks.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// Whether there is such a rank to exchange with: known when compiled but for kernels for any number of ranks.
template <int WORLD, typename Args>
WAVE64_DEVICE bool in_world(const RankBlock<Args>& block, int rank) {
    return WORLD < kMaxRanks || rank < block.world;
}
template <int WORLD, typename Args>
WAVE64_DEVICE bool is_peer(const RankBlock<Args>& block, int rank) {
    return rank != block.rank && in_world<WORLD>(block, rank);
}

// Calls each(i, arena) for the ranks from this one on, itself among them. AT_ONCE arenas' addresses are in registers at
// the same time.
template <int WORLD, int AT_ONCE = WORLD, typename Args, typename Each>
WAVE64_DEVICE void for_ranks(const RankBlock<Args>& block, Each each) {
#pragma unroll 1
    for (int some = 0; some < WORLD; some += AT_ONCE)
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (!in_world<WORLD>(block, some + i)) break;
            const void* arena = block.args.peers.at[some + i];
            forget_uniform(arena);
            each(some + i, Shared(arena));
        }
}
// The same for the others alone.
template <int WORLD, typename Args, typename Each>
WAVE64_DEVICE void for_peers(const RankBlock<Args>& block, Each each) {
#pragma unroll
    for (int i = 1; i < WORLD; i++) {
        if (!in_world<WORLD>(block, i)) break;
        const void* arena = block.args.peers.at[i];
        forget_uniform(arena);
        each(i, Shared(arena));
    }
}

// The lowest and the highest of tags: all are alike where these are. An instruction finds those of three, where a
// comparison of each takes two.
WAVE64_DEVICE void widen(Bits32& lowest, Bits32& highest, Bits32 tag) {
    lowest = lowest < tag ? lowest : tag;
    highest = highest > tag ? highest : tag;
}

constexpr int kLineOfAll = 16 * kRankLanes;  // one of each lane

template <typename Args>
WAVE64_DEVICE int low_latency_at(const RankBlock<Args>& block, int source, int line) {
    constexpr int kSource = kLowLatencyHalf / kMaxRanks;
    static_assert(kSource == 2 * kLowLatencyPacks * kLineOfAll);
    return block.slot(kLowLatencyAt, kLowLatencyHalf, source, kSource) + 2 * line * kLineOfAll;
}

// A rank sends to itself, too, and tags the slots of ranks that there are not: the other side asks which rank is which
// of none.
template <int WORLD, typename Args, typename Sent>
WAVE64_DEVICE void send_low_latency(const RankBlock<Args>& block, int line, const Sent& sent) {
    const Bits32 tag = block.round;
    const auto store = [&](const Shared& arena, int source, const Words& words) {
        const int lane_at = lane_in_block() * 16, to = low_latency_at(block, source, line);
        arena.store(Words{{words.at[0], tag, words.at[1], tag}}.bits(), to, lane_at);
        arena.store(Words{{words.at[2], tag, words.at[3], tag}}.bits(), to + kLineOfAll, lane_at);
    };
    for_ranks<WORLD>(block, [&](int i, const Shared& arena) { store(arena, block.rank, Words::of(sent(i, line))); });
    if constexpr (WORLD == kMaxRanks)
#pragma unroll 1
        for (int source = block.world; source < WORLD; source++) store(block.own, source, Words{});
}

template <int WORLD, typename Args>
WAVE64_DEVICE bool receive_low_latency(const RankBlock<Args>& block, int line, Bits128 (&all)[WORLD]) {
    const int lane_at = lane_in_block() * 16;
    const Bits32 tag = block.round;
    Patience patience;
    for (;;) {
        look_again();
        Bits128 found[WORLD][2];
#pragma unroll
        for (int source = 0; source < WORLD; source++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                found[source][i] =
                    block.own.template load<Bits128>(low_latency_at(block, source, line) + i * kLineOfAll, lane_at);
        Bits32 lowest = tag, highest = tag;
#pragma unroll
        for (int source = 0; source < WORLD; source++) {
            const Words a = Words::of(found[source][0]), b = Words::of(found[source][1]);
            const Bits32 tags[] = {a.at[1], a.at[3], b.at[1], b.at[3]};
            for (Bits32 each : tags) widen(lowest, highest, each);
            all[source] = Words{{a.at[0], a.at[2], b.at[0], b.at[2]}}.bits();
        }
        if (!ballot(lowest != highest)) return true;
        if (patience.ends(block)) {
            int late = block.rank;
#pragma unroll
            for (int source = 0; source < WORLD; source++)
                if (ballot(Words::of(found[source][1]).at[3] != tag)) late = source;
            block.give_up(late);
            return false;
        }
    }
}

template <int WORLD, typename Args, typename Sent>
WAVE64_DEVICE bool exchange_low_latency(const RankBlock<Args>& block, const Sent& sent, Bits128 (&all)[WORLD]) {
    send_low_latency<WORLD>(block, 0, sent);
    return receive_low_latency(block, 0, all);
}

// Lines of 16 bytes that each lane has for every other rank, as many as fit into a slot.
template <int WORLD>
constexpr int kSlotLines = kSlotHalf / WORLD / (16 * kRankLanes);

template <int WORLD, typename Args>
WAVE64_DEVICE int line_at(const RankBlock<Args>& block, int region, int source, int line) {
    return block.slot(region, kSlotHalf, source, kSlotHalf / WORLD) + line * 16 * kRankLanes;
}

// Which of a block's packs a lane sends in the first line of a pair, and in the second: the last lane of 8 sends the
// halves of one, each before a tag, and has none that it could send in the second.
constexpr int kNoPack = 1 << 26;  // behind the end of any tensor
WAVE64_DEVICE bool is_before_tag() { return lane_in_block() % 8 == 7; }
WAVE64_DEVICE int low_128_pack(int line) {
    const int lane = lane_in_block() % 8, first = lane_in_block() / 8 * kLow128Packs;
    if (is_before_tag()) return line ? kNoPack : first + kLow128Packs - 1;
    return first + lane + line * 7;
}
// A pair of a lane's packs as lines, and a pair of lines as packs.
WAVE64_DEVICE void to_low_128(const Bits128& pack, Bits128& second) {
    const Words words = Words::of(pack);
    if (is_before_tag()) second = Words{{words.at[2], words.at[3], 0, 0}}.bits();
}
WAVE64_DEVICE void from_low_128(Bits128& first, const Bits128& second) {
    const Words a = Words::of(first), b = Words::of(second);
    if (is_before_tag()) first = Words{{a.at[0], a.at[1], b.at[0], b.at[1]}}.bits();
}

// Of each line, the last lane of 8 gives and gets no more than the first 8 bytes.
template <int WORLD, int LINES, typename Args>
WAVE64_DEVICE bool exchange_low_128(const RankBlock<Args>& block, int count, const Bits128 (&own)[LINES],
                                    Bits128 (&all)[LINES][WORLD]) {
    static_assert(LINES <= kSlotLines<WORLD>);
    const int lane_at = lane_in_block() * 16;
    const Bits32 tag = block.round;
    const bool has_tag = is_before_tag();

    for_peers<WORLD>(block, [&](int, const Shared& peer) {
#pragma unroll
        for (int line = 0; line < LINES; line++) {
            if (line >= count) break;
            Words words = Words::of(own[line]);
            if (has_tag) words.at[2] = words.at[3] = tag;
            peer.store(words.bits(), line_at<WORLD>(block, kLow128At, block.rank, line), lane_at);
        }
    });

    Patience patience;
    for (;;) {
        look_again();
#pragma unroll
        for (int source = 0; source < WORLD; source++)
#pragma unroll
            for (int line = 0; line < LINES; line++) {
                if (line >= count) break;
                if (is_peer<WORLD>(block, source))
                    all[line][source] =
                        block.own.template load<Bits128>(line_at<WORLD>(block, kLow128At, source, line), lane_at);
                else
                    all[line][source] = own[line];
            }
        int late = -1;
#pragma unroll
        for (int source = 0; source < WORLD; source++) {
            if (!is_peer<WORLD>(block, source)) continue;
            Bits32 differs = 0;
#pragma unroll
            for (int line = 0; line < LINES; line++)
                if (line < count) differs |= Words::of(all[line][source]).at[3] ^ tag;
            if (ballot(has_tag && differs != 0)) late = source;
        }
        if (late < 0) return true;
        if (patience.ends(block)) {
            block.give_up(late);
            return false;
        }
    }
}

// Sets this block's flag, of one of its two uses in a round, at all ranks: all that its waves have stored is there.
// AT_ONCE: as for_ranks, which sets the flag here, too.
template <int WORLD, int AT_ONCE = 0, typename Args>
WAVE64_DEVICE void set_flags(const RankBlock<Args>& block, int use) {
    finish_stores();
    block_barrier();
    if (lane_in_block() != 0) return;
    const auto set = [&](int, const Shared& peer) {
        peer.store_flag(block.round, block.flag(use) + block.rank * kLine);
    };
    if constexpr (AT_ONCE > 0)
        for_ranks<WORLD, AT_ONCE>(block, set);
    else
        for_peers<WORLD>(block, set);
}

// Waits for the flags of all ranks. That a wait timed out is told; what follows is of no use then.
template <int WORLD, typename Args>
WAVE64_DEVICE void wait_for_flags(const RankBlock<Args>& block, int use) {
    if (lane_in_block() < wave_size()) {
        const int source = lane_in_block();
        Patience patience;
        for (;;) {
            look_again();
            bool missing = false;
            if (source < block.world && source != block.rank)  // a peer may be a round ahead
                missing = int(block.own.load_flag(block.flag(use), source * kLine) - block.round) < 0;
            const uint64_t late = ballot(missing);
            if (!late) break;
            if (patience.ends(block)) {
                block.give_up(63 - __builtin_clzll(late));
                break;
            }
        }
    }
    block_barrier();
}

// A lane's packs, args.lines of them, from pack `first` on.
template <int LINES, typename T, typename Args>
WAVE64_DEVICE void load_part(Bits128 (&to)[LINES], const Packs<T>& x, int first, const Args& args) {
#pragma unroll
    for (int i = 0; i < LINES; i++)
        if (i < args.lines) to[i] = x.load(first + i * args.block);
}

// The lines lie `first` lines behind the beginning of their slot.
template <int WORLD, int LINES, typename Args, typename Sent>
WAVE64_DEVICE void send_flagged(const RankBlock<Args>& block, int use, int first, int count, const Sent& sent) {
    for_peers<WORLD>(block, [&](int i, const Shared& peer) {
#pragma unroll
        for (int line = 0; line < LINES; line++)
            if (line < count)
                peer.store(sent(i, line), line_at<WORLD>(block, kDataAt, block.rank, first + line),
                           lane_in_block() * 16);
    });
    set_flags<WORLD>(block, use);
    wait_for_flags<WORLD>(block, use);
}

template <int WORLD, typename Args>
WAVE64_DEVICE void receive_flagged(const RankBlock<Args>& block, int line, const Bits128& own, Bits128 (&all)[WORLD]) {
#pragma unroll
    for (int source = 0; source < WORLD; source++)
        if (is_peer<WORLD>(block, source))
            all[source] =
                block.own.template load<Bits128>(line_at<WORLD>(block, kDataAt, source, line), lane_in_block() * 16);
        else
            all[source] = own;
}

template <int WORLD, int LINES, typename Args, typename Sent>
WAVE64_DEVICE void exchange_flagged(const RankBlock<Args>& block, int use, int first, int count, const Sent& sent,
                                    const Bits128 (&own)[LINES], Bits128 (&all)[LINES][WORLD]) {
    send_flagged<WORLD, LINES>(block, use, first, count, sent);
#pragma unroll
    for (int line = 0; line < LINES; line++)
        if (line < count) receive_flagged(block, first + line, own[line], all[line]);
}

}  // namespace wave64
#endif
