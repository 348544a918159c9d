// Draws a token per row: temperature, top_k, top_p, min_p, then inversion of the running sum.
//
// The trick: a block reads its row once and lists the few logits that can matter, those above a cut that the row's
// first tile suggests. All that follows is one search, over the list: the first key, in order, at which a running sum
// reaches a goal. It finds the k-th largest logit (counts by logit), the end of the nucleus (weights by logit) and the
// token (weights by id). Weights are summed as whole numbers, so the order of additions, and with it the cut, cannot
// show. Where the list turns out not to hold all that is kept, the row is searched instead.
// Bound by memory: the logits once. One row takes as long as a compute unit needs to read it.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kLanes = 1024;
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr int kTaken = 16;       // logits that a lane takes at a time
constexpr int kListed = 4992;    // logits there is room for in the list
constexpr float kAimed = 3600;   // and how many the cut is meant to leave there, for a nucleus of unknown size
constexpr int kBinBits = 10;     // a search has a bin per lane
constexpr float kLargest = 0x1.fffffep127f;
constexpr unsigned kFirstRank = 0x00800000, kLastRank = 0xff7fffff;  // of the largest and the smallest finite logit
static_assert(kLanes == 1 << kBinBits);

struct Lds {
    float logits[kListed];  // the list, in any order
    int ids[kListed];
    uint64_t bins[kLanes];  // all 0 between searches
    uint64_t totals[kLanes / 32];
    float maxima[kLanes / 32];
    float masses[kLanes / 32];
    int listed;
    struct {
        int bin;
        uint64_t before, here;
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

// A weight, at most 2^26 of them, in units of 2^-36: sums of these are exact and below 2^63.
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

struct Sums {
    uint64_t running, total;
};

// The same over the block, and over all of it.
WAVE64_DEVICE Sums running_sums(uint64_t x, uint64_t* totals) {
    const int lane = lane_in_block() % wave_size(), wave = lane_in_block() / wave_size();
    const int num_waves = kLanes / wave_size();
    x = running_sum(x);
    if (lane == wave_size() - 1) totals[wave] = x;
    block_barrier();
    const uint64_t waves = running_sum(lane < num_waves ? totals[lane] : 0);
    const uint64_t before = from_lane(waves, wave > 0 ? wave - 1 : 0);
    return {wave > 0 ? x + before : x, from_lane(waves, num_waves - 1)};
}

// Among keys in [low, high], finds the first at which the running sum of their quantities, in the order of the keys,
// reaches a goal, and narrows [low, high] to it, or to a range that holds no more than `slack`. `each` calls its
// argument with key and quantity of everything that this lane has; `goal_of` makes a goal, at least 1, of the sum over
// all of them. False if the sum does not reach it. All lanes get the same.
template <typename Each, typename Goal>
WAVE64_DEVICE bool search(Lds& lds, unsigned& low, unsigned& high, uint64_t slack, Goal goal_of, Each each) {
    const int lane = lane_in_block();
    uint64_t goal = 0;
    for (;;) {
        const unsigned begin = low, span = high - low;
        int shift = 0;
        while (span >> shift >= kLanes) shift++;
        each([&](unsigned key, uint64_t quantity) {
            if (key - begin <= span && quantity) atomic_add(&lds.bins[(key - begin) >> shift], quantity);
        });
        block_barrier();
        const uint64_t here = lds.bins[lane];
        lds.bins[lane] = 0;
        const Sums sums = running_sums(here, lds.totals);
        if (goal == 0) goal = goal_of(sums.total);
        if (sums.total < goal) return false;
        if (sums.running >= goal && sums.running - here < goal) {
            lds.found.bin = lane;
            lds.found.before = sums.running - here;
            lds.found.here = here;
        }
        block_barrier();
        low += unsigned(lds.found.bin) << shift;
        high = low + ((1u << shift) - 1) < high ? low + ((1u << shift) - 1) : high;
        goal -= lds.found.before;
        if (shift == 0 || lds.found.here <= slack) return true;
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
        for (int i = 0; i < N; i++) x[i] = min(max(float(values.at[i]), -__builtin_inff()), kLargest);
        const int id = first_id(pack);
        if (id < 0 || id + N > vocab)
            for (int i = 0; i < N; i++)
                if (id + i < 0 || id + i >= vocab) x[i] = -__builtin_inff();
    }

    // Calls visit(logit, id) for the logits of the packs [begin, end) that this lane shares out to itself.
    template <typename Visit>
    WAVE64_DEVICE void for_each(int begin, int end, Visit visit) const {
        constexpr int packs_taken = kTaken / N;
        for (int first = begin + lane_in_block(); first < end; first += packs_taken * kLanes) {
            Pack<T, N> taken[packs_taken];
#pragma unroll
            for (int i = 0; i < packs_taken; i++) taken[i] = load(first + i * kLanes);
#pragma unroll
            for (int i = 0; i < packs_taken; i++) {
                const int pack = first + i * kLanes;
                float x[N];
                unpack(taken[i], pack, x);
                if (pack < end)
                    for (int j = 0; j < N; j++) visit(x[j], first_id(pack) + j);
            }
        }
    }
};

// Appends to the list what of a lane's packs lies above the cut. Whole waves call it.
template <int N>
WAVE64_DEVICE void list_above(Lds& lds, float cut, const float* logits, const int* first_ids) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kTaken; i++) count += logits[i] > cut;
    if (ballot(count > 0) == 0) return;
    int at = 0;  // how many the lanes before this one have: the sum of their counts, bit by bit
    for (int bit = 0; kTaken >> bit; bit++) at += bits_before(ballot(count >> bit & 1)) << bit;
    const int last_lane = wave_size() - 1;
    int begin = 0;
    if (lane_in_block() % wave_size() == last_lane) begin = atomic_add(&lds.listed, at + count);
    at += broadcast(begin, last_lane);
#pragma unroll
    for (int i = 0; i < kTaken; i++) {
        if (!(logits[i] > cut)) continue;
        if (at < kListed) {
            lds.logits[at] = logits[i];
            lds.ids[at] = first_ids[i / N] + i % N;
        }
        at++;
    }
}

template <typename T, int N>
WAVE64_DEVICE void sample(const SampleArgs& args) {
    WAVE64_LDS static Lds lds;
    const int lane = lane_in_block(), wave = lane / wave_size(), num_waves = kLanes / wave_size();
    const int64_t seq = block_id();
    const auto row = Logits<T, N>::of(args, seq);
    const int vocab = args.vocab_size, top_k = args.top_k[seq];
    const float temperature = args.temperature[seq], top_p = args.top_p[seq], min_p = min(args.min_p[seq], 1);
    const bool greedy = !(temperature > 0), by_count = top_k > 0 && top_k < vocab;
    const bool filtered = !greedy && (by_count || top_p < 1 || min_p > 0);
    const bool weighed = !greedy && !by_count && (top_p < 1 || !filtered);
    // Between these, no difference of logits but an infinite one makes a NaN.
    const float scale = 1.44269504f / min(max(temperature, 1e-30f), 1e36f);
    lds.bins[lane] = 0;
    if (lane == 0) lds.listed = 0;
    block_barrier();

    // Every wave reads a stretch of the row; the packs of a tile lie spread over it, so that the first one is a sample.
    constexpr int held = kTaken / N;
    const int tiles = (row.num_packs + held * kLanes - 1) / (held * kLanes), stretch = tiles * held * wave_size();
    const int first = wave * stretch + lane % wave_size();
    float cut = filtered && (!by_count || top_k < kListed) ? -__builtin_inff() : __builtin_inff();
    float most = -__builtin_inff(), mass = 0;  // of this lane; mass is relative to most
    Pack<T, N> next[held];  // of the tile to come
#pragma unroll
    for (int i = 0; i < held; i++) next[i] = row.load(first + i * tiles * wave_size());
    for (int tile = 0; tile < tiles; tile++) {
        float x[kTaken], peak = -__builtin_inff();
        int ids[held];
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int pack = first + (i * tiles + tile) * wave_size();
            row.unpack(next[i], pack, x + i * N);
            ids[i] = row.first_id(pack);
            if (tile + 1 < tiles) next[i] = row.load(pack + wave_size());
        }
#pragma unroll
        for (int i = 0; i < kTaken; i++) peak = max(peak, x[i]);

        if (tile == 0 && cut < 0 && vocab > kListed) {
            // The cut leaves `aim` of all logits if the share of lanes with one above it is that of a random sample.
            const float aim = by_count ? __builtin_sqrtf(float(top_k) * kListed) : kAimed;
            const float none = exp2(kTaken * log2(1 - aim / float(vocab)));
            const int rank = int(float(vocab) / float(tiles * kTaken) * (1 - none)) + 1;
            unsigned low = kFirstRank, high = kLastRank;
            if (search(lds, low, high, rank / 8, [&](uint64_t) { return uint64_t(rank); },
                       [&](auto add) { add(rank_of(peak), 1); }))
                cut = logit_of(high);
        }
        if (peak > most) {
            mass *= exp2((most - peak) * scale);
            most = peak;
        }
        if (weighed && most > -__builtin_inff())
            for (int i = 0; i < kTaken; i++) mass += exp2((x[i] - most) * scale);
        if (cut < __builtin_inff()) list_above<N>(lds, cut, x, ids);
    }

    const float best = block_max(most, lds.maxima, kLanes);
    const auto weight_of = [&](float logit) { return exp2((logit - best) * scale); };
    if (best == -__builtin_inff()) {
        if (lane == 0) args.out[seq] = 0;
        return;
    }
    // A stretch's part of the whole: its mass, or whether the largest logit is there.
    const float wave_mass = wave_sum(most > -__builtin_inff() ? mass * weight_of(most) : 0);
    const bool here = ballot(most == best) != 0;
    if (lane % wave_size() == 0) lds.masses[wave] = greedy ? float(here) : wave_mass;
    block_barrier();
    uint64_t whole = 0;
    for (int i = 0; i < num_waves; i++) whole += fixed(lds.masses[i]);

    int begin = 0, end = row.num_packs;  // where the token is, if not in the list
    bool from_list = false;
    unsigned last = kLastRank;  // the rank of the least logit that top_k and top_p keep
    uint64_t goal = 0;
    const auto each = [&](auto visit) {
        if (from_list)
            for (int i = lane; i < lds.listed; i += kLanes) visit(lds.logits[i], lds.ids[i]);
        else
            row.for_each(begin, end, visit);
    };
    if (filtered) {
        const bool complete = cut == -__builtin_inff();
        const bool narrow = !by_count && weight_of(cut) < min_p;
        from_list = lds.listed <= kListed && cut < __builtin_inff();
        for (;; from_list = false) {
            bool enough = !from_list || complete || narrow;
            last = kLastRank;
            for (int by_mass = !by_count; by_mass < (top_p < 1 ? 2 : 1); by_mass++) {
                unsigned low = rank_of(best), high = last;
                const auto goal_of = [&](uint64_t sum) {
                    if (!by_mass) return uint64_t(top_k);
                    const uint64_t part = share(by_count ? sum : whole, top_p);
                    return part > 0 ? part : 1;
                };
                const bool found = search(lds, low, high, !by_mass, goal_of, [&](auto add) {
                    each([&](float x, int) { add(rank_of(x), by_mass ? fixed(weight_of(x)) : 1); });
                });
                if (found) last = high;
                enough = enough || found;
                if (!enough) break;
            }
            if (enough) break;
        }
    } else {
        goal = greedy ? 1 : share(whole, args.uniform[seq]) + 1;
        int stretch_of = 0;
        for (; stretch_of < num_waves - 1; stretch_of++) {
            const uint64_t part = fixed(lds.masses[stretch_of]);
            if (part >= goal) break;
            goal -= part;
        }
        begin = stretch_of * stretch;
        end = begin + stretch < end ? begin + stretch : end;
    }

    unsigned low = 0, high = vocab - 1;
    search(
        lds, low, high, 0,
        [&](uint64_t sum) {
            const uint64_t wanted = filtered ? share(sum, args.uniform[seq]) + 1 : goal;
            return wanted < sum ? wanted : sum;
        },
        [&](auto add) {
            each([&](float x, int id) {
                const float weight = greedy ? float(x == best) : weight_of(x);
                if (rank_of(x) <= last && weight >= min_p) add(unsigned(id), fixed(weight));
            });
        });
    if (lane == 0) args.out[seq] = low;
}

}  // namespace wave64

#define SAMPLE(NAME, T, N) \
    WAVE64_KERNEL(wave64::kLanes) NAME(wave64::SampleArgs args) { wave64::sample<T, N>(args); }

SAMPLE(sample_bf16, wave64::bf16, 8)
SAMPLE(sample_fp16, wave64::fp16, 8)
SAMPLE(sample_fp32, float, 4)

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr const char* kKernels[] = {"sample_bf16", "sample_fp16", "sample_fp32"};

}  // namespace
}  // namespace wave64

int32_t wave64_sample(const wave64::SampleArgs* args, void* stream) {
    using namespace wave64;
    if (args->dtype < kBf16 || args->dtype > kFp32)
        return refuse("sample", "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args->dtype);
    if (args->num_seqs < 0 || args->num_seqs > 1 << 21)
        return refuse("sample", "num_seqs", "0 to 2^21", args->num_seqs);
    if (args->vocab_size < 1 || args->vocab_size > 1 << 26)
        return refuse("sample", "vocab_size", "1 to 2^26", args->vocab_size);
    if (args->num_seqs == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"logits", args->logits},
                                 {"temperature", args->temperature},
                                 {"top_k", args->top_k},
                                 {"top_p", args->top_p},
                                 {"min_p", args->min_p},
                                 {"uniform", args->uniform},
                                 {"out", args->out}})
        if (!pointer) return refuse("sample", name, "an address", 0);
    const uint32_t grid = uint32_t(args->num_seqs);
    return launch({"sample", kKernels[args->dtype], {grid, 1, 1}, {kLanes, 1, 1}, 0}, args, sizeof *args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::SampleArgs, NAME)
static const bool registered = wave64::register_op<wave64::SampleArgs, wave64_sample>(
    "sample", {FIELD(logits), FIELD(temperature), FIELD(top_k), FIELD(top_p), FIELD(min_p), FIELD(uniform), FIELD(out),
               FIELD(logits_stride), FIELD(num_seqs), FIELD(vocab_size), FIELD(dtype)});

#endif
