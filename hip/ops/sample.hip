// Draws a token per row: temperature, top_k, top_p, min_p, then inversion of the running sum.
//
// The trick: the first of two launches reads the logits, over all compute units, and leaves the maximum of every 16
// logits, and the largest logit and the mass of every chunk. The second, a block per row, lists the logits of the
// groups with the highest maxima. All that follows is one search over the list: the first key, in order, at which a
// running sum reaches a goal. It finds the k-th largest logit (counts by logit), the end of the nucleus (weights by
// logit) and the token (weights by id). Weights are summed as integers, so the order of additions does not matter. If
// the list does not hold all tokens that are kept (a flat distribution), the row is searched instead; if all are kept,
// one wave finds the chunk and then the token. Bound by memory in the first launch, the logits once, and by latency in
// the second.
#include "wave64/types.h"

namespace wave64 {

// A token per row: the first at which the running sum of the kept weights exceeds uniform times their total.
struct SampleArgs {
    const void* logits;        // [num_seqs, vocab_size]
    const float* temperature;  // [num_seqs], as all below; at most 0: the largest logit
    const int32_t* top_k;      // at most 0: all
    const float* top_p;        // at least 1: all
    const float* min_p;        // at most 0: all
    const float* uniform;      // in [0, 1)
    int64_t* out;
    float* work;  // [num_seqs, work_stride] to work in; vocab_size / WORK_LOGITS + MIN_WORK of each row are enough
    int64_t logits_stride;
    int64_t work_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    Dtype dtype;  // of logits
    // set by the launcher
    int32_t chunks;  // of a row: what a wave of the first launch reads
    int32_t groups;  // of a row, each with a maximum
    int32_t grid;    // blocks of the first launch from sequence to sequence; its other dimension goes along a row
};

constexpr int kPeakLanes = 256;  // of a block that finds maxima
constexpr int kHeld = 4;         // packs of a lane of these
constexpr int kLanes = 512;      // of a block that draws
constexpr int kGroup = 16;       // logits of a maximum

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/search.h"

namespace wave64 {

constexpr int kMany = 3500;      // groups to gather for a nucleus that is not small
constexpr int kGroups = 3584;    // capacity for groups
constexpr int kListed = 5312;    // capacity for logits
constexpr int kListedBits = 13;  // of a count of these
constexpr float kLargest = 0x1.fffffep127f, kNever = -__builtin_inff();
static_assert(kGroups * kGroup <= 1 << 16 && kListed < 1 << kListedBits);

struct Lds {
    float logits[kListed];      // the list, in any order
    Bits16 positions[kListed];  // of each in the groups
    int groups[kGroups];
    Bins bins;
    float maxima[kLanes / 32], minima[kLanes / 32];
    uint64_t sums[kLanes / 32];
    int num_groups, num_listed;
};

// A row of logits in packs that begin where 16 divides the address, `lead` logits before the row does. Of the last pack
// the words of 4 bytes are loaded that the row reaches into. Half a word more is of no harm; a load of its own for it
// would cost the draw 14 more spilled scalar registers.
template <typename T, int N>
class Logits {
    Bounded memory;
    int lead, vocab;

public:
    int num_packs;

    WAVE64_DEVICE Logits(const T* row, int lead, int vocab)
        : memory(row - lead, ((lead + vocab) * int(sizeof(T)) + 3) & ~3),
          lead(lead),
          vocab(vocab),
          num_packs((lead + vocab + N - 1) / N) {}
    WAVE64_DEVICE static Logits of(const SampleArgs& args, int64_t seq) {
        const T* row = static_cast<const T*>(args.logits) + seq * args.logits_stride;
        return Logits(row, int(reinterpret_cast<uint64_t>(row) / sizeof(T) % N), args.vocab_size);
    }
    WAVE64_DEVICE int first_id(int pack) const { return pack * N - lead; }
    WAVE64_DEVICE Pack<T, N> load(int pack) const {
        return {memory.template load<typename Pack<T, N>::Bits>(pack * 16)};
    }

    // The pack's logits: NaN and elements outside the row as -inf, +inf as the largest number, so that the difference
    // of two is never NaN.
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

    // Calls visit(logit, id) for the logits of this lane.
    template <typename Visit>
    WAVE64_DEVICE void for_each(Visit visit) const {
        constexpr int taken = 16 / N;  // packs at a time
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

// What the first launch leaves of a row: the maximum of each group, and of each chunk, which one wave reads, its
// largest logit and its mass relative to that.
struct Summary {
    float *peaks, *bests, *masses;

    WAVE64_DEVICE Summary(const SampleArgs& args, int64_t seq)
        : peaks(args.work + seq * args.work_stride), bests(peaks + args.groups), masses(bests + args.chunks) {}
};

// log2(e) / temperature, clamped so that no difference of logits becomes NaN.
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
            if (lane % group_lanes == i % group_lanes)
                summary.peaks[pack / group_lanes] = peak;  // a lane of the group writes each
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

// Appends `items` items per lane to a list of `count`, and returns the index of this lane's first. Whole waves call it.
template <int MAX_ITEMS>
WAVE64_DEVICE int append(int& count, int items) {
    unsigned before = 0;  // the items of the lanes before this one, summed bit by bit
    for (int bit = 0; MAX_ITEMS >> bit; bit++) {
        before += bits_before(ballot(items >> bit & 1)) << bit;
        forget(before);  // one ballot at a time: each takes two of the few scalar registers left
    }
    const int last = wave_size() - 1;
    int begin = 0;
    if (lane_in_block() % wave_size() == last && before + items > 0) begin = atomic_add(&count, int(before) + items);
    return int(before) + broadcast(begin, last);
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

// Lists all logits up to a rank, from the groups whose maxima are; false if they exceed the capacity.
template <typename T, int N>
WAVE64_DEVICE bool list_up_to(Lds& lds, unsigned rank, const Logits<T, N>& row, const float* peaks, int groups) {
    constexpr int group_packs = kGroup / N;
    const int lane = lane_in_block();
    for (int first = 0; first < groups; first += kGroup * kLanes) {
        unsigned chosen = 0;  // a bit each: flags would take two scalar registers each
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            const int group = first + i * kLanes + lane;
            chosen |= unsigned(rank_of(group < groups ? peaks[group] : kNever) <= rank) << i;
        }
        forget(chosen);
        int to = append<kGroup>(lds.num_groups, __builtin_popcount(chosen));
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            if (!(chosen >> i & 1)) continue;
            if (to < kGroups) lds.groups[to] = first + i * kLanes + lane;
            to++;
        }
    }
    block_barrier();
    const int num_groups = uniform(lds.num_groups);
    if (num_groups > kGroups) return false;
    const int num_packs = num_groups * group_packs;
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
        unsigned chosen = 0;
#pragma unroll
        for (int i = 0; i < group_packs; i++) {
            row.unpack(held[i], packs[i], x[i]);
            for (int j = 0; j < N; j++) chosen |= unsigned(rank_of(x[i][j]) <= rank) << (i * N + j);
        }
        forget(chosen);
        int to = append<kGroup>(lds.num_listed, __builtin_popcount(chosen));
#pragma unroll
        for (int i = 0; i < group_packs; i++) {
            for (int j = 0; j < N; j++) {
                if (!(chosen >> (i * N + j) & 1)) continue;
                if (to < kListed) {
                    lds.logits[to] = x[i][j];
                    lds.positions[to] = Bits16((first + i * kLanes + lane) * N + j);
                }
                to++;
            }
        }
    }
    block_barrier();
    return uniform(lds.num_listed) <= kListed;
}

// The token of a row whose logits are all kept, or the largest one (greedy). Called by one wave.
template <typename T, int N>
WAVE64_DEVICE int draw_from_all(const Logits<T, N>& row, const Summary& summary, int chunks, bool greedy, float scale,
                                float uniform) {
    const int lane = lane_in_block() % wave_size();
    float best = kNever;
    for (int i = lane; i < chunks; i += wave_size()) best = max(best, summary.bests[i]);
    best = wave_max(best);
    if (best == kNever) return 0;
    const auto chunk_quantity = [&](int chunk) {
        if (chunk >= chunks) return uint64_t(0);
        const float chunk_best = summary.bests[chunk];
        return greedy ? uint64_t(chunk_best == best) : fixed(summary.masses[chunk] * exp2((chunk_best - best) * scale));
    };

    // The chunk, and the fraction of it before the token: a lane has neighboring chunks, so that the lanes' sums are in
    // order.
    const int own = (chunks + wave_size() - 1) / wave_size();
    uint64_t sum = 0;
#pragma unroll 8
    for (int i = 0; i < own; i++) sum += chunk_quantity(lane * own + i);
    uint64_t running = running_sum(sum),
             goal = fraction_of(from_lane(running, wave_size() - 1), greedy ? 0 : uniform) + 1;
    int finder = __builtin_popcountll(ballot(running < goal)), chunk = -1;
    uint64_t reached = running - sum;
    float before = 0;
#pragma unroll 8
    for (int i = 0; i < own; i++) {
        const uint64_t here = chunk_quantity(lane * own + i);
        if (chunk < 0 && reached + here >= goal) {
            chunk = lane * own + i;
            before = float(goal - 1 - reached) / float(here);
        }
        reached += here;
    }
    chunk = broadcast(chunk, finder);
    before = greedy ? 0 : broadcast(before, finder);

    // The token, by weights relative to the chunk's largest logit; a lane has neighboring packs.
    const float chunk_best = summary.bests[chunk];
    const auto quantity = [&](float x) {
        return greedy ? uint64_t(x == chunk_best) : fixed(exp2((x - chunk_best) * scale));
    };
    const int first = (chunk * wave_size() + lane) * kHeld;
    Pack<T, N> held[kHeld];
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
    goal = fraction_of(from_lane(running, wave_size() - 1), before) + 1;
    finder = __builtin_popcountll(ballot(running < goal));
    reached = running - sum;
    int token = row.first_id(first);
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        for (int j = 0; j < N; j++) {
            reached += quantity(x[i][j]);
            token += reached < goal;
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
    float largest = kNever;
    for (int i = lane; i < args.chunks; i += kLanes) largest = max(largest, summary.bests[i]);
    if (greedy || !(by_count || top_p < 1 || min_p > 0)) {
        if (lane >= wave_size()) return;
        const int token = draw_from_all(row, summary, args.chunks, greedy, scale, uniform);
        if (lane == 0) args.out[seq] = token;
        return;
    }

    clear(lds.bins, kLanes);
    const float best = block_max(largest, lds.maxima, kLanes);
    if (best == kNever) {
        if (lane == 0) args.out[seq] = 0;
        return;
    }
    const auto weight_of = [&](float logit) { return exp2((logit - best) * scale); };
    uint64_t whole = 0;
    if (!by_count && top_p < 1) {
        for (int i = lane; i < args.chunks; i += kLanes)
            whole += fixed(summary.masses[i] * weight_of(summary.bests[i]));
        whole = sum_of_all(whole, lds.sums);
    }

    bool from_list;
    int count_bits;  // low bits of a quantity that count its logits; 0 for the whole row, whose count does not fit
    unsigned last;   // rank of what top_k and top_p keep
    const int first_id = row.first_id(0);
    const auto each = [&](auto visit) {
        if (from_list)
            for (int i = lane; i < lds.num_listed; i += kLanes)
                visit(lds.logits[i],
                      first_id + lds.groups[lds.positions[i] / kGroup] * kGroup + lds.positions[i] % kGroup);
        else
            row.for_each(visit);
    };
    const auto quantity_of = [&](float weight) { return fixed(weight) << count_bits | (from_list && fixed(weight)); };
    const auto is_one = [&](uint64_t quantity) { return from_list && (quantity & ((1 << kListedBits) - 1)) == 1; };

    // How many of the largest logits to list: top_k; else a few, since most chunks have one of these; else many.
    const int few = args.chunks * 4 / 5 + 1;
    for (int aim = by_count ? top_k : few;; aim = aim < kMany && !by_count ? kMany : kMany + 1) {
        bool enough = true;
        from_list = aim <= kMany;
        if (from_list) {
            // The chunks' largest logits bound few logits; for more, the groups' maxima are needed.
            const float* const peaks = aim <= few ? summary.bests : summary.peaks;
            const int num_peaks = aim <= few ? args.chunks : args.groups;
            float lowest = best;
            for (int i = lane; i < num_peaks; i += kLanes) lowest = min(lowest, peaks[i]);
            block_barrier();  // the last round's counts are read until here
            if (lane == 0) lds.num_groups = lds.num_listed = 0;
            unsigned from = rank_of(best), to = rank_of(-block_max(-lowest, lds.minima, kLanes));
            to = to < kLastRank ? to : kLastRank;
            const int spare = aim / 8 + 4 < kGroups - aim ? aim / 8 + 4 : kGroups - aim;
            const bool found = search(
                lds.bins, from, to, [&](uint64_t) { return uint64_t(aim); },
                [&](uint64_t count) { return count <= uint64_t(spare); },
                [&](auto add) {
                    for (int i = lane; i < num_peaks; i += kLanes) add(rank_of(peaks[i]), 1);
                });
            if (!found) to = kLastRank;
            from_list = list_up_to(lds, to, row, summary.peaks, args.groups);
            // Enough: all logits, all that min_p keeps, or no list at all.
            enough = !found || !from_list || (!by_count && weight_of(number_of_rank(to)) < min_p);
        }
        count_bits = from_list ? kListedBits : 0;
        last = kLastRank;
        for (int by_mass = !by_count; by_mass < (top_p < 1 ? 2 : 1); by_mass++) {
            unsigned from = rank_of(best), to = last;
            const auto goal_of = [&](uint64_t sum) {
                if (!by_mass) return uint64_t(top_k);
                const uint64_t mass = sum >> count_bits, part = fraction_of(by_count ? mass : whole, top_p);
                if (part > mass) return sum + 1;
                return (part > 0 ? part : 1) << count_bits;
            };
            const bool found = search(lds.bins, from, to, goal_of, is_one, [&](auto add) {
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
        lds.bins, low, high, [&](uint64_t sum) { return (fraction_of(sum >> count_bits, uniform) + 1) << count_bits; },
        is_one,
        [&](auto add) {
            each([&](float x, int id) {
                if (kept(x)) add(unsigned(id), quantity_of(weight_of(x)));
            });
        });
    if (low == high && lane == 0) args.out[seq] = low;
    if (low < high) {  // the listed one in the range
        for (int i = lane; i < lds.num_listed; i += kLanes) {
            const float x = lds.logits[i];
            const int id = first_id + lds.groups[lds.positions[i] / kGroup] * kGroup + lds.positions[i] % kGroup;
            if (unsigned(id) - low <= high - low && kept(x) && fixed(weight_of(x)) > 0) args.out[seq] = id;
        }
    }
}

}  // namespace wave64

#define SAMPLE(NAME, T, N)                                                                                        \
    WAVE64_KERNEL(wave64::kPeakLanes) NAME##_peaks(wave64::SampleArgs args) { wave64::sample_peaks<T, N>(args); } \
    WAVE64_KERNEL(wave64::kLanes) NAME(wave64::SampleArgs args) { wave64::sample<T, N>(args); }

SAMPLE(sample_bf16, wave64::bf16, 8)
SAMPLE(sample_fp16, wave64::fp16, 8)
SAMPLE(sample_fp32, float, 4)

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    const char *peaks, *draw;
};
constexpr Kernels kKernels[] = {
    {"sample_bf16_peaks", "sample_bf16"}, {"sample_fp16_peaks", "sample_fp16"}, {"sample_fp32_peaks", "sample_fp32"}};
// Of `work`: a maximum of 16 logits and, for a chunk of at least 512, two numbers; and the last chunk and groups.
constexpr int kWorkLogits = 8, kMinWork = 512;

void sample(SampleArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_range("num_seqs", args.num_seqs, 0, 1 << 21);
    call.expect_range("vocab_size", args.vocab_size, 1, 1 << 26);
    if (args.num_seqs == 0) return;
    call.expect_tensors({{"logits", args.logits},
                         {"temperature", args.temperature},
                         {"top_k", args.top_k},
                         {"top_p", args.top_p},
                         {"min_p", args.min_p},
                         {"uniform", args.uniform},
                         {"out", args.out},
                         {"work", args.work}});

    const int64_t wave_size = call.device.wave_size, per_pack = 16 / element_bytes(args.dtype);
    const int64_t chunk = kHeld * wave_size * per_pack;
    args.chunks = int32_t(ceil_div(args.vocab_size + per_pack - 1, chunk));  // a row may begin within a pack
    args.groups = int32_t(args.chunks * chunk / kGroup);
    call.expect(args.work_stride >= args.groups + 2 * int64_t(args.chunks), "work_stride",
                "a maximum of each 16 logits and two numbers of each chunk", args.work_stride);
    args.grid = int32_t(std::min(args.num_seqs, kMaxGridY));
    const auto& [peaks, draw] = kKernels[args.dtype];
    call.launch(peaks, {ceil_div(args.chunks, kPeakLanes / wave_size), args.grid}, kPeakLanes, args);
    call.launch(draw, {args.num_seqs}, kLanes, args);
}

WAVE64_OP_AND_CONSTANTS(sample, SampleArgs, ({{"WORK_LOGITS", kWorkLogits}, {"MIN_WORK", kMinWork}}), logits,
                        temperature, top_k, top_p, min_p, uniform, out, work, logits_stride, work_stride, num_seqs,
                        vocab_size, dtype)

}  // namespace
}  // namespace wave64
#endif
