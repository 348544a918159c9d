// How a block gets what the same block of the other ranks has: the protocols of the collectives.
//
// LL    8 bytes are 4 of data and 4 of a tag, the block's round: who finds the tag has the data. One trip, twice the
//       bytes.
// LL128 A line of 128 bytes ends in a tag of 8. It is stored and loaded by 8 lanes in one instruction, which hardware
//       must not tear: NVLink does not, nor does gfx942 within a node, where RCCL rests on the same; the emulator tears
//       whatever is no whole line.
// flags Lines of data alone, and behind them a flag: a wave waits for its own stores, a barrier for all waves', then
//       the flag is set. Who has found it may load the data.
#pragma once

#include "wave64/ranks.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// Whether there is such a rank to exchange with: known when compiled but for kernels for any number of ranks.
template <int WORLD, typename Block>
WAVE64_DEVICE bool in_world(const Block& block, int rank) {
    return WORLD < kMaxRanks || rank < block.args.world;
}

// all[m][rank] becomes that rank's own[m] of this lane. False, in all lanes of the wave, where a wait timed out.
template <int WORLD, int M, typename Args>
WAVE64_DEVICE bool exchange_low_latency(const RankBlock<Args>& block, const Bits128 (&own)[M],
                                        Bits128 (&all)[M][WORLD]) {
    constexpr int kLineOfAll = 16 * kRankLanes, kSource = kLowLatencyPacks * 2 * kLineOfAll;
    static_assert(M <= kLowLatencyPacks && kSource * kMaxRanks == kLowLatencyHalf);
    const int rank = block.args.rank, lane_at = lane_in_block() * 16;
    const Bits32 tag = block.round;
    const auto slot = [&](int source) { return block.slot(kLowLatencyAt, kLowLatencyHalf, source, kSource); };

    const int to = slot(rank);
#pragma unroll
    for (int i = 1; i < WORLD; i++) {
        if (!in_world<WORLD>(block, i)) break;
        const Shared peer(block.args.peers.at[i]);
#pragma unroll
        for (int m = 0; m < M; m++) {
            const Words words = Words::of(own[m]);
            peer.store(Words{{words.at[0], tag, words.at[1], tag}}.bits(), to + (2 * m) * kLineOfAll, lane_at);
            peer.store(Words{{words.at[2], tag, words.at[3], tag}}.bits(), to + (2 * m + 1) * kLineOfAll, lane_at);
        }
    }

    const int from = slot(0);
    Patience patience;
    for (;;) {
        look_again();
        Bits128 lines[WORLD][M][2];
#pragma unroll
        for (int source = 0; source < WORLD; source++)
            if (source != rank && in_world<WORLD>(block, source))
#pragma unroll
                for (int i = 0; i < 2 * M; i++)
                    lines[source][i / 2][i % 2] =
                        block.own.template load<Bits128>(from + source * kSource + i * kLineOfAll, lane_at);
        Bits32 missing = 0;
#pragma unroll
        for (int source = 0; source < WORLD; source++) {
            if (source != rank && in_world<WORLD>(block, source)) {
                Bits32 differs = 0;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const Words a = Words::of(lines[source][m][0]), b = Words::of(lines[source][m][1]);
                    differs |= (a.at[1] ^ tag) | (a.at[3] ^ tag) | (b.at[1] ^ tag) | (b.at[3] ^ tag);
                    all[m][source] = Words{{a.at[0], a.at[2], b.at[0], b.at[2]}}.bits();
                }
                missing |= differs;
            } else {
#pragma unroll
                for (int m = 0; m < M; m++) all[m][source] = own[m];
            }
        }
        if (!ballot(missing != 0)) return true;
        if (patience.ends(block)) {
            int late = rank;
#pragma unroll
            for (int source = 0; source < WORLD; source++)
                if (source != rank && in_world<WORLD>(block, source) &&
                    ballot(Words::of(lines[source][0][0]).at[1] != tag))
                    late = source;
            block.give_up(late);
            return false;
        }
    }
}

// Lines of 16 bytes that each lane has for every other rank, as many as fit into a slot.
template <int WORLD>
constexpr int kSlotLines = kSlotHalf / WORLD / (16 * kRankLanes);

template <int WORLD, typename Args>
WAVE64_DEVICE int line_at(const RankBlock<Args>& block, int region, int source, int line) {
    return block.slot(region, kSlotHalf, source, kSlotHalf / WORLD) + line * 16 * kRankLanes;
}

// all[line][rank] becomes that rank's own[line] of this lane, for `count` lines; the last lane of 8 gives and gets no
// more than their first 8 bytes. False, in all lanes of the wave, where a wait timed out.
template <int WORLD, int LINES, typename Args>
WAVE64_DEVICE bool exchange_low_128(const RankBlock<Args>& block, const Bits128 (&own)[LINES], int count,
                                    Bits128 (&all)[LINES][WORLD]) {
    static_assert(LINES <= kSlotLines<WORLD>);
    const int rank = block.args.rank, lane_at = lane_in_block() * 16;
    const Bits32 tag = block.round;
    const bool has_tag = lane_in_block() % 8 == 7;

#pragma unroll
    for (int i = 1; i < WORLD; i++) {
        if (!in_world<WORLD>(block, i)) break;
        const Shared peer(block.args.peers.at[i]);
#pragma unroll
        for (int line = 0; line < LINES; line++) {
            if (line >= count) break;
            Words words = Words::of(own[line]);
            if (has_tag) words.at[2] = words.at[3] = tag;
            peer.store(words.bits(), line_at<WORLD>(block, kLow128At, rank, line), lane_at);
        }
    }

    Patience patience;
    for (;;) {
        look_again();
#pragma unroll
        for (int source = 0; source < WORLD; source++)
#pragma unroll
            for (int line = 0; line < LINES; line++) {
                if (line >= count) break;
                if (source != rank && in_world<WORLD>(block, source))
                    all[line][source] =
                        block.own.template load<Bits128>(line_at<WORLD>(block, kLow128At, source, line), lane_at);
                else
                    all[line][source] = own[line];
            }
        int late = -1;
#pragma unroll
        for (int source = 0; source < WORLD; source++) {
            if (source == rank || !in_world<WORLD>(block, source)) continue;
            Bits32 differs = 0;
#pragma unroll
            for (int line = 0; line < LINES; line++) {
                if (line >= count) break;
                differs |= Words::of(all[line][source]).at[3] ^ tag;
            }
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
template <int WORLD, typename Args>
WAVE64_DEVICE void set_flags(const RankBlock<Args>& block, int use) {
    finish_stores();
    block_barrier();
    if (lane_in_block() == 0)
#pragma unroll
        for (int i = 1; i < WORLD; i++) {
            if (!in_world<WORLD>(block, i)) break;
            Shared(block.args.peers.at[i]).store(Bits32(block.round), block.flag(use) + block.args.rank * kLine);
        }
}

// Waits for the flags of all ranks. A wait that times out is told, and what follows is of no use.
template <int WORLD, typename Args>
WAVE64_DEVICE void wait_for_flags(const RankBlock<Args>& block, int use) {
    if (lane_in_block() < wave_size()) {
        const int source = lane_in_block();
        const bool is_peer = source < block.args.world && source != block.args.rank;
        Patience patience;
        for (;;) {
            look_again();
            bool missing = false;  // a peer may be a round ahead
            if (is_peer)
                missing = int(block.own.template load<Bits32>(block.flag(use), source * kLine) - block.round) < 0;
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

}  // namespace wave64
#endif
