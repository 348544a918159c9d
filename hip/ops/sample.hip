// Draws a token per row: temperature, top_k, top_p, min_p, then inversion of the running sum.
//
// The trick: the first of two launches reads the logits, over all compute units, and leaves the peak of every 16 of
// them, and the largest logit and the mass of every chunk. The second, a block per row, gathers into a list the logits
// of the groups with the highest peaks. All that follows is one search over the list: the first key, in order, at which
// a running sum reaches a goal. It finds the k-th largest logit (counts by logit), the end of the nucleus (weights by
// logit) and the token (weights by id). Weights are summed as whole numbers, so no order of additions can show. Where
// the list does not hold all that is kept (a flat distribution), the row is searched instead; where all is kept, one
// wave finds the chunk and then the token.
// Bound by memory in the first launch, the logits once, and by latency in the second.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kPeakLanes = 256;  // of a block that finds peaks
constexpr int kHeld = 4;         // packs of a lane of these
constexpr int kLanes = 512;      // of a block that draws
constexpr int kGroup = 16;       // logits that a peak stands for
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr int kMany = 3500;     // groups to gather for a nucleus that is not small
constexpr int kGroups = 3584;   // groups there is room for
constexpr int kListed = 5376;   // and logits
constexpr int kListedBits = 13;  // of the number of these
constexpr int kBins = 256;
constexpr float kLargest = 0x1.fffffep127f, kNever = -__builtin_inff();
constexpr unsigned kLastRank = 0xff7fffff;  // of the smallest finite logit
static_assert(kGroups * kGroup <= 1 << 16 && kListed < 1 << kListedBits);

struct Lds {
    float logits[kListed];   // the list, in any order
    Bits16 places[kListed];  // where in the groups they are
    int groups[kGroups];
    uint64_t bins[kBins];  // all 0 between searches
    float maxima[kLanes / 32], minima[kLanes / 32];
    uint64_t sums[kLanes / 32];
    int num_groups, num_listed;
    struct {
        int bin;  // negative: none
        uint64_t before, here;  // sums of the bins before it, and its own
    } found;
};

// Places of logits in descending order: the larger one has the lower rank, equals have the same.
WAVE64_DEVICE unsigned rank_of(float x) {
    const unsigned bits = __builtin_bit_cast(unsigned, x + 0.0f);  // -0 becomes 0
    return bits >> 31 ? bits : 0x7fffffff - bits;
}
WAVE64_DEVICE float logit_of(unsigned rank) {
    return __builtin_bit_cast(float, rank >> 31 ? rank : 0x7fffffff - rank);
}

// A weight in units of 2^-36. Sums of up to 2^26 of them are exact, and below 2^63.
WAVE64_DEVICE uint64_t fixed(float weight) {
    const float high = float(unsigned(weight * 16));
    return uint64_t(unsigned(high)) << 32 | unsigned((weight * 16 - high) * 0x1p32f);
}

// The share of a sum, less than all of it.
WAVE64_DEVICE uint64_t share(uint64_t sum, float part) {
    const uint64_t scaled = unsigned(min(max(part, 0), 1 - 0x1p-24f) * 0x1p32f);
    return (sum >> 32) * scaled + ((sum & 0xffffffff) * scaled >> 32);
}

WAVE64_DEVICE uint64_t from_lane(uint64_t x, int lane) {
    return uint64_t(unsigned(from_lane(int(x >> 32), lane))) << 32 | unsigned(from_lane(int(x), lane));
}

// The sum of x over the wave's lanes up to this one.
WAVE64_DEVICE uint64_t running_sum(uint64_t x) {
    const int lane = lane_in_block() % wave_size();
    for (int step = 1; step < wave_size(); step *= 2) {
        const uint64_t below = from_lane(x, lane < step ? lane : lane - step);
        if (lane >= step) x += below;
    }
    return x;
}

// The sum over the block.
WAVE64_DEVICE uint64_t sum_of_all(uint64_t x, uint64_t* lds) {
    const int lane = lane_in_block() % wave_size();
    x = running_sum(x);
    if (lane == wave_size() - 1) lds[lane_in_block() / wave_size()] = x;
    block_barrier();
    uint64_t sum = 0;
    for (int wave = 0; wave < kLanes / wave_size(); wave++) sum += lds[wave];
    return sum;
}

// Among keys in [low, high], finds the first at which the running sum of their quantities, in the order of the keys,
// reaches a goal, and narrows [low, high] to it, or to the range of a bin whose sum may stay as it is. `each` calls its
// argument with key and quantity of everything that this lane has; `goal_of` makes a goal, at least 1, of the sum over
// all of them. False if the sum does not reach it. All lanes get the same.
template <typename Goal, typename Stay, typename Each>
WAVE64_DEVICE bool search(Lds& lds, unsigned& low, unsigned& high, Goal goal_of, Stay may_stay, Each each) {
    const int lane = lane_in_block();
    uint64_t goal = 0;
    for (;;) {
        const unsigned begin = low, span = high - low;
        const int shift = span < kBins ? 0 : 24 - __builtin_clz(span);
        unsigned bin = 0;
        uint64_t sum = 0;  // of neighbours in one bin, so that equal logits do not all wait for each other
        each([&](unsigned key, uint64_t quantity) {
            if (key - begin > span) return;
            if (const unsigned next = (key - begin) >> shift; next != bin) {
                if (sum) atomic_add(&lds.bins[bin], sum);
                bin = next;
                sum = 0;
            }
            sum += quantity;
        });
        if (sum) atomic_add(&lds.bins[bin], sum);
        block_barrier();
        if (lane < wave_size()) {
            const int own = kBins / wave_size();
            uint64_t running = 0;
            for (int i = 0; i < own; i++) running += lds.bins[lane * own + i];
            const uint64_t mine = running;
            running = running_sum(running);
            const uint64_t total = from_lane(running, wave_size() - 1);
            if (goal == 0) goal = goal_of(total);
            if (lane == 0) lds.found.bin = -1;
            wave_barrier();
            uint64_t before = running - mine;
            for (int i = 0; i < own; i++) {
                const uint64_t here = lds.bins[lane * own + i];
                lds.bins[lane * own + i] = 0;
                if (before < goal && goal <= before + here) {
                    lds.found.bin = lane * own + i;
                    lds.found.here = here;
                    lds.found.before = before;
                }
                before += here;
            }
            wave_barrier();
            goal -= lds.found.before;
        }
        block_barrier();
        const int found = lds.found.bin;
        if (found < 0) return false;
        low += unsigned(found) << shift;
        high = low + ((1u << shift) - 1) < high ? low + ((1u << shift) - 1) : high;
        if (shift == 0 || may_stay(lds.found.here)) return true;
    }
}

// A row of logits in packs that begin where 16 divides the address, `lead` logits before the row does.
template <typename T, int N>
class Logits {
    Row<T, N> packs;
    int lead, vocab;

public:
    int num_packs;

    WAVE64_DEVICE Logits(const T* row, int lead, int vocab)
        : packs(row - lead, (lead + vocab + N - 1) / N), lead(lead), vocab(vocab),
          num_packs((lead + vocab + N - 1) / N) {}
    WAVE64_DEVICE static Logits of(const SampleArgs& args, int64_t seq) {
        const T* row = static_cast<const T*>(args.logits) + seq * args.logits_stride;
        return Logits(row, int(reinterpret_cast<uint64_t>(row) / sizeof(T) % N), args.vocab_size);
    }
    WAVE64_DEVICE int first_id(int pack) const { return pack * N - lead; }
    WAVE64_DEVICE Pack<T, N> load(int pack) const { return packs.load(pack); }

    // The pack's logits: NaN, and what is not the row's, as -inf, and +inf as the largest number, so that differences
    // of two are never NaN.
    WAVE64_DEVICE void unpack(const Pack<T, N>& bits, int pack, float* x) const {
        const auto values = bits.values();
        for (int i = 0; i < N; i++) {
            const float logit = float(values.at[i]);
            x[i] = logit == logit ? min(logit, kLargest) : kNever;
        }
        const int id = first_id(pack);
        if (id < 0 || id + N > vocab)
            for (int i = 0; i < N; i++)
                if (id + i < 0 || id + i >= vocab) x[i] = kNever;
    }

    // Calls visit(logit, id) for what this lane takes of the row.
    template <typename Visit>
    WAVE64_DEVICE void for_each(Visit visit) const {
        constexpr int taken = 32 / N;  // packs at a time
        for (int first = lane_in_block(); first < num_packs; first += taken * kLanes) {
            Pack<T, N> held[taken];
#pragma unroll
            for (int i = 0; i < taken; i++) held[i] = load(first + i * kLanes);
#pragma unroll
            for (int i = 0; i < taken; i++) {
                const int pack = first + i * kLanes;
                float x[N];
                unpack(held[i], pack, x);
                if (pack < num_packs)
                    for (int j = 0; j < N; j++) visit(x[j], first_id(pack) + j);
            }
        }
    }
};

// What the first launch leaves of a row: peaks of groups, and of every chunk, which is what a wave reads, its largest
// logit and its mass relative to that.
struct Summary {
    float *peaks, *bests, *masses;

    WAVE64_DEVICE Summary(const SampleArgs& args, int64_t seq)
        : peaks(args.work + seq * args.work_stride), bests(peaks + args.groups), masses(bests + args.chunks) {}
};

// log2(e) / temperature, within what makes no NaN of any difference of logits.
WAVE64_DEVICE float scale_of(float temperature) { return 1.44269504f / min(max(temperature, 1e-30f), 1e36f); }

template <typename T, int N>
WAVE64_DEVICE void sample_peaks(const SampleArgs& args) {
    constexpr int group_lanes = kGroup / N;
    const int lane = lane_in_block() % wave_size();
    const int chunk = block_id() * (kPeakLanes / wave_size()) + lane_in_block() / wave_size();
    if (chunk >= args.chunks) return;
    for (int64_t seq = block_id_y(); seq < args.num_seqs; seq += args.grid) {
        const auto row = Logits<T, N>::of(args, seq);
        const Summary summary(args, seq);
        const float scale = scale_of(args.temperature[seq]);
        const int first = chunk * kHeld * wave_size() + lane;
        Pack<T, N> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = row.load(first + i * wave_size());
        float x[kHeld][N], best = kNever, mass = 0;
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int pack = first + i * wave_size();
            row.unpack(held[i], pack, x[i]);
            float peak = x[i][0];
            for (int j = 1; j < N; j++) peak = max(peak, x[i][j]);
            peak = max(peak, from_other_half<1>(peak));
            if (group_lanes > 2) peak = max(peak, from_other_half<2>(peak));
            if (lane % group_lanes == i % group_lanes) summary.peaks[pack / group_lanes] = peak;  // they take turns
            best = max(best, peak);
        }
        best = wave_max(best);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            for (int j = 0; j < N; j++) mass += exp2((x[i][j] - best) * scale);
        mass = wave_sum(mass);
        if (lane == 0) {
            summary.bests[chunk] = best;
            summary.masses[chunk] = best > kNever ? mass : 0;
        }
    }
}

// Where this lane's item goes that is to be appended to a list of `count` items. Whole waves call it, with how many
// items each lane has.
template <int MOST>
WAVE64_DEVICE int append(int& count, int items) {
    int before = 0;  // the sum of their numbers over the lanes before this one, bit by bit
    for (int bit = 0; MOST >> bit; bit++) before += bits_before(ballot(items >> bit & 1)) << bit;
    const int last = wave_size() - 1;
    int begin = 0;
    if (lane_in_block() % wave_size() == last && before + items > 0) begin = atomic_add(&count, before + items);
    return before + broadcast(begin, last);
}

// Lists all logits up to a rank, by way of the groups whose peaks are; false if there is no room for them.
template <typename T, int N>
WAVE64_DEVICE bool list_up_to(Lds& lds, unsigned rank, const Logits<T, N>& row, const float* peaks, int groups) {
    constexpr int group_packs = kGroup / N;
    const int lane = lane_in_block();
    for (int first = 0; first < groups; first += kLanes) {
        const bool chosen = first + lane < groups && rank_of(peaks[first + lane]) <= rank;
        const int at = append<1>(lds.num_groups, chosen);
        if (chosen && at < kGroups) lds.groups[at] = first + lane;
    }
    block_barrier();
    if (lds.num_groups > kGroups) return false;
    const int num_packs = lds.num_groups * group_packs;
    for (int first = 0; first < num_packs; first += group_packs * kLanes) {
        Pack<T, N> held[group_packs];
        int packs[group_packs];
#pragma unroll
        for (int i = 0; i < group_packs; i++) {
            const int at = first + i * kLanes + lane;
            packs[i] = at < num_packs ? lds.groups[at / group_packs] * group_packs + at % group_packs : row.num_packs;
            held[i] = row.load(packs[i]);
        }
        float x[group_packs][N];
        int count = 0;
#pragma unroll
        for (int i = 0; i < group_packs; i++) {
            row.unpack(held[i], packs[i], x[i]);
            for (int j = 0; j < N; j++) count += rank_of(x[i][j]) <= rank;
        }
        int to = append<kGroup>(lds.num_listed, count);
#pragma unroll
        for (int i = 0; i < group_packs; i++) {
            for (int j = 0; j < N; j++) {
                if (rank_of(x[i][j]) > rank) continue;
                if (to < kListed) {
                    lds.logits[to] = x[i][j];
                    lds.places[to] = Bits16((first + i * kLanes + lane) * N + j);
                }
                to++;
            }
        }
    }
    block_barrier();
    return lds.num_listed <= kListed;
}

// The token of a row of which all is kept, or the largest logit asked for. A wave does it.
template <typename T, int N>
WAVE64_DEVICE int draw_from_all(const Logits<T, N>& row, const Summary& summary, int chunks, bool greedy, float scale,
                                float uniform) {
    const int lane = lane_in_block() % wave_size();
    float best = kNever;
    for (int i = lane; i < chunks; i += wave_size()) best = max(best, summary.bests[i]);
    best = wave_max(best);
    if (best == kNever) return 0;
    const auto quantity = [&](float x) { return greedy ? uint64_t(x == best) : fixed(exp2((x - best) * scale)); };
    const auto chunk_quantity = [&](int chunk) {
        if (greedy) return quantity(summary.bests[chunk]);
        return fixed(summary.masses[chunk] * exp2((summary.bests[chunk] - best) * scale));
    };

    // The chunk: lanes have neighbouring ones, so that their sums are in order.
    const int own = (chunks + wave_size() - 1) / wave_size(), first_chunk = lane * own;
    uint64_t sum = 0;
    for (int i = first_chunk; i < first_chunk + own && i < chunks; i++) sum += chunk_quantity(i);
    uint64_t running = running_sum(sum), total = from_lane(running, wave_size() - 1);
    uint64_t goal = greedy ? 1 : share(total, uniform) + 1;
    int finder = int(__builtin_popcountll(ballot(running < goal))), chunk = first_chunk;
    uint64_t rest = goal - (running - sum);
    for (uint64_t part; lane == finder && (part = chunk_quantity(chunk)) < rest; chunk++) rest -= part;
    chunk = broadcast(chunk, finder);
    goal = from_lane(rest, finder);

    // The token, in the same way; lanes have neighbouring packs.
    Pack<T, N> held[kHeld];
    const int first = (chunk * wave_size() + lane) * kHeld;
#pragma unroll
    for (int i = 0; i < kHeld; i++) held[i] = row.load(first + i);
    float x[kHeld][N];
    sum = 0;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        row.unpack(held[i], first + i, x[i]);
        for (int j = 0; j < N; j++) sum += quantity(x[i][j]);
    }
    running = running_sum(sum);
    total = from_lane(running, wave_size() - 1);
    goal = goal < total ? goal : total;  // rounding may have made the mass more than its parts
    finder = int(__builtin_popcountll(ballot(running < goal)));
    uint64_t reached = running - sum;
    int token = -1;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        for (int j = 0; j < N; j++) {
            reached += quantity(x[i][j]);
            if (token < 0 && reached >= goal) token = row.first_id(first + i) + j;
        }
    }
    return broadcast(token, finder);
}

template <typename T, int N>
WAVE64_DEVICE void sample(const SampleArgs& args) {
    WAVE64_LDS static Lds lds;
    const int lane = lane_in_block();
    const int64_t seq = block_id();
    const auto row = Logits<T, N>::of(args, seq);
    const Summary summary(args, seq);
    const int vocab = args.vocab_size, top_k = args.top_k[seq];
    const float temperature = args.temperature[seq], top_p = args.top_p[seq], min_p = min(args.min_p[seq], 1);
    const float scale = scale_of(temperature), uniform = args.uniform[seq];
    const bool greedy = !(temperature > 0), by_count = top_k > 0 && top_k < vocab;
    if (greedy || !(by_count || top_p < 1 || min_p > 0)) {
        if (lane >= wave_size()) return;
        const int token = draw_from_all(row, summary, args.chunks, greedy, scale, uniform);
        if (lane == 0) args.out[seq] = token;
        return;
    }

    if (lane < kBins) lds.bins[lane] = 0;
    float most = kNever;
    for (int i = lane; i < args.chunks; i += kLanes) most = max(most, summary.bests[i]);
    const float best = block_max(most, lds.maxima, kLanes);
    if (best == kNever) {
        if (lane == 0) args.out[seq] = 0;
        return;
    }
    const auto weight_of = [&](float logit) { return exp2((logit - best) * scale); };
    uint64_t whole = 0;
    if (!by_count && top_p < 1) {
        for (int i = lane; i < args.chunks; i += kLanes) whole += fixed(summary.masses[i] * weight_of(summary.bests[i]));
        whole = sum_of_all(whole, lds.sums);
    }

    bool from_list;
    int count_bits;  // of quantities of weight: below them, how many; of the row there is no room for that
    unsigned last;   // rank of what top_k and top_p keep
    const auto each = [&](auto visit) {
        if (from_list)
            for (int i = lane; i < lds.num_listed; i += kLanes)
                visit(lds.logits[i], row.first_id(0) + lds.groups[lds.places[i] / kGroup] * kGroup + lds.places[i] % kGroup);
        else
            row.for_each(visit);
    };
    const auto quantity_of = [&](float weight) { return fixed(weight) << count_bits | (from_list && fixed(weight)); };
    const auto is_one = [&](uint64_t quantity) { return from_list && (quantity & ((1 << kListedBits) - 1)) == 1; };

    // So many of the largest logits are listed: k; else as many as there are chunks with a peak of their own, or many.
    const int few = args.chunks * 4 / 5;
    for (int aim = by_count ? top_k : few;; aim = aim < kMany && !by_count ? kMany : kMany + 1) {
        bool enough = true;
        from_list = aim <= kMany;
        if (from_list) {
            // Among the largest logits of the chunks are as many that are at least as large; peaks are needed for more.
            const float* const peaks = aim <= few ? summary.bests : summary.peaks;
            const int num_peaks = aim <= few ? args.chunks : args.groups;
            float least = best;
            for (int i = lane; i < num_peaks; i += kLanes) least = min(least, peaks[i]);
            if (lane == 0) lds.num_groups = lds.num_listed = 0;
            unsigned from = rank_of(best), to = rank_of(-block_max(-least, lds.minima, kLanes));
            to = to < kLastRank ? to : kLastRank;
            const bool found = search(
                lds, from, to, [&](uint64_t) { return uint64_t(aim); },
                [&](uint64_t count) { return count <= uint64_t(aim / 64); },
                [&](auto add) {
                    for (int i = lane; i < num_peaks; i += kLanes) add(rank_of(peaks[i]), 1);
                });
            if (!found) to = kLastRank;
            from_list = list_up_to(lds, to, row, summary.peaks, args.groups);
            // Enough: all there are, all that min_p keeps, or no list at all.
            enough = !found || !from_list || (!by_count && weight_of(logit_of(to)) < min_p);
        }
        count_bits = from_list ? kListedBits : 0;
        last = kLastRank;
        for (int by_mass = !by_count; by_mass < (top_p < 1 ? 2 : 1); by_mass++) {
            unsigned from = rank_of(best), to = last;
            const auto goal_of = [&](uint64_t sum) {
                if (!by_mass) return uint64_t(top_k);
                const uint64_t part = share(by_count ? sum >> count_bits : whole, top_p);
                return (part > 0 ? part : 1) << count_bits;
            };
            const bool found = search(lds, from, to, goal_of, is_one, [&](auto add) {
                each([&](float x, int) { add(rank_of(x), by_mass ? quantity_of(weight_of(x)) : 1); });
            });
            if (found) last = to;
            enough = enough || found;
            if (!enough) break;
        }
        if (enough) break;
    }

    unsigned low = 0, high = vocab - 1;
    const auto kept = [&](float x) { return rank_of(x) <= last && weight_of(x) >= min_p; };
    search(
        lds, low, high, [&](uint64_t sum) { return (share(sum >> count_bits, uniform) + 1) << count_bits; }, is_one,
        [&](auto add) {
            each([&](float x, int id) {
                if (kept(x)) add(unsigned(id), quantity_of(weight_of(x)));
            });
        });
    if (low == high && lane == 0) args.out[seq] = low;
    if (low < high) {  // it is the one there that is listed
        each([&](float x, int id) {
            if (unsigned(id) - low <= high - low && kept(x) && fixed(weight_of(x)) > 0) args.out[seq] = id;
        });
    }
}

}  // namespace wave64

#define SAMPLE(NAME, T, N)                                                                                      \
    WAVE64_KERNEL(wave64::kPeakLanes) NAME##_peaks(wave64::SampleArgs args) { wave64::sample_peaks<T, N>(args); } \
    WAVE64_KERNEL(wave64::kLanes) NAME(wave64::SampleArgs args) { wave64::sample<T, N>(args); }

SAMPLE(sample_bf16, wave64::bf16, 8)
SAMPLE(sample_fp16, wave64::fp16, 8)
SAMPLE(sample_fp32, float, 4)

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    int64_t per_pack;
    const char* peaks;
    const char* draw;
};
constexpr Kernels kKernels[] = {{8, "sample_bf16_peaks", "sample_bf16"},
                                {8, "sample_fp16_peaks", "sample_fp16"},
                                {4, "sample_fp32_peaks", "sample_fp32"}};
constexpr int64_t kMaxGrid = 65535;

}  // namespace
}  // namespace wave64

int32_t wave64_sample(const wave64::SampleArgs* caller_args, void* stream) {
    using namespace wave64;
    const auto refused = [](const char* argument, const char* expected, int64_t got) {
        return refuse("sample", argument, expected, got);
    };
    SampleArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refused("dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_seqs < 0 || args.num_seqs > 1 << 21) return refused("num_seqs", "0 to 2^21", args.num_seqs);
    if (args.vocab_size < 1 || args.vocab_size > 1 << 26)
        return refused("vocab_size", "1 to 2^26", args.vocab_size);
    if (args.num_seqs == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"logits", args.logits},
                                 {"temperature", args.temperature},
                                 {"top_k", args.top_k},
                                 {"top_p", args.top_p},
                                 {"min_p", args.min_p},
                                 {"uniform", args.uniform},
                                 {"out", args.out},
                                 {"work", args.work}})
        if (!pointer) return refused(name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const int64_t chunk = kHeld * device->wave_size * kernels.per_pack;
    args.chunks = int32_t(ceil_div(args.vocab_size + kernels.per_pack - 1, chunk));  // a row may begin within a pack
    args.groups = int32_t(args.chunks * chunk / kGroup);
    if (args.work_stride < args.groups + 2 * int64_t(args.chunks))
        return refused("work_stride", "room for the peaks", args.work_stride);
    args.grid = int32_t(std::min(args.num_seqs, kMaxGrid));

    const uint32_t waves = kPeakLanes / device->wave_size, blocks = uint32_t(ceil_div(args.chunks, waves));
    if (int32_t status = launch({"sample", kernels.peaks, {blocks, uint32_t(args.grid), 1}, {kPeakLanes, 1, 1}, 0},
                                &args, sizeof args, stream))
        return status;
    return launch({"sample", kernels.draw, {uint32_t(args.num_seqs), 1, 1}, {kLanes, 1, 1}, 0}, &args, sizeof args,
                  stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::SampleArgs, NAME)
static const bool registered = wave64::register_op<wave64::SampleArgs, wave64_sample>(
    "sample", {FIELD(logits), FIELD(temperature), FIELD(top_k), FIELD(top_p), FIELD(min_p), FIELD(uniform), FIELD(out),
               FIELD(work), FIELD(logits_stride), FIELD(work_stride), FIELD(num_seqs), FIELD(vocab_size), FIELD(dtype)});

#endif
