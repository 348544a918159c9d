// How a block gets what the same block of the other ranks has: the protocols of the collectives.
//
// LL    8 bytes are 4 of data and 4 of a tag, the block's round: who finds the tag has the data. One trip, twice the
//       bytes.
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

}  // namespace wave64
#endif
