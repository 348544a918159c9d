// What the ranks of a group exchange through: an arena of each rank's memory that all ranks map, and how kernels write
// to those of the others and wait in their own.
//
// The trick: data is pushed, and says itself that it has come. An arena belongs to blocks: block b of every rank uses
// block b's slots alone, and counts its rounds there, so graphs replay and no block waits for another. Slots alternate
// between two halves: round n writes where round n - 2 wrote, and a block that has received what its peers sent in
// round n - 1 knows that they have read what it sent in round n - 2. So nothing is ever acknowledged, reset or cleared;
// a block of more rounds than one has a barrier between them, so that this holds for all its lanes.
//
// Arenas are uncached memory (hipExtMallocWithFlags 0x3): another kind of memory keeps stale lines of a peer's.
#pragma once

#include "wave64/types.h"

namespace wave64 {

constexpr int kMaxRanks = 8;
constexpr int kRankBlocks = 128;  // of a launch, at most
constexpr int kRankLanes = 512;   // of a block, at most
constexpr int kLowLatencyBlocks = 64;
constexpr int kLowLatencyPacks = 2;  // of 16 bytes, that a lane sends at once
// Up to here operators without a choice of their own send tags.
constexpr int kLowLatencyBytes = 1 << 16;
// Of 16 packs that 8 lanes have in a pair of LL128's lines, all but one: tags take the rest.
constexpr int kLow128Packs = 15;

// Offsets in an arena, in bytes. A line of 128 bytes of its own for what different ranks or blocks write.
constexpr int kLine = 128;
constexpr int kBrokenAt = kRankBlocks * kLine;  // behind the counters of rounds: set when a wait timed out
constexpr int kFlagsAt = 1 << 16;               // [2 uses][block][source] lines
constexpr int kFlagsBytes = 2 * kRankBlocks * kMaxRanks * kLine;
constexpr int kLowLatencyAt = 1 << 20;  // [block][half][source][pack][2 lines of 16 bytes][lane]
constexpr int kLowLatencyHalf = kMaxRanks * kLowLatencyPacks * 2 * 16 * kRankLanes;
constexpr int kLow128At = kLowLatencyAt + 2 * kLowLatencyBlocks * kLowLatencyHalf;  // [block][half][source] lines
constexpr int kSlotHalf = 1 << 17;                                                  // split over the sources
constexpr int kDataAt = kLow128At + 2 * kRankBlocks * kSlotHalf;                    // [block][half][source] packs
constexpr int kArenaEnd = kDataAt + 2 * kRankBlocks * kSlotHalf;
// IPC shares memory in pieces of 2 MiB.
constexpr int kArenaBytes = (kArenaEnd + (2 << 20) - 1) >> 21 << 21;
static_assert(kBrokenAt + kLine <= kFlagsAt && kFlagsAt + kFlagsBytes <= kLowLatencyAt);

enum Protocol : int32_t {
    kLowLatency = 0,  // LL: 4 bytes of data and 4 of a tag, stored as one
    kLow128 = 1,      // LL128: 120 bytes of data and 8 of a tag, a line that a store of 8 lanes writes as one
    kOneShot = 2,     // all data to all ranks, then a flag
    kTwoShot = 3,     // each rank adds up its part, and sends the sums to all
    kTwoShotFp8 = 4,  // the same in codes: coded.h
    kTwoShotInt8 = 5,
    kTwoShotInt4 = 6
};

// As a status record names the operators.
enum RankOp : int32_t {
    kOpAllReduce = 1,
    kOpFusedAllReduceRmsNorm = 2,
    kOpAllGather = 3,
    kOpReduceScatter = 4,
    kOpFusedAllReduceRmsNormQuantFp8 = 5
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

// Whether ranks exchange on this architecture (plan_ranks): kernels that take long to compile, or need FP8, are left
// out on others.
#if defined(__gfx942__) || defined(__gfx950__) || defined(__CUDACC__)
#define WAVE64_EXCHANGES 1
#else
#define WAVE64_EXCHANGES 0
#endif

namespace wave64 {

// Memory that other devices write or read: loads and stores pass all caches, and 8 aligned bytes are never torn. `at`
// is the same in all lanes. A flag that is set says that what its block has stored is there.
#if defined(__HIP__)
class Shared {
#if defined(__gfx942__) || defined(__gfx950__)
    static constexpr int kSystem = 1 | 16;  // sc0 sc1: without sc1 a store stays in this die's cache
#else
    static constexpr int kSystem = 1;  // compiled, not launched: see plan_ranks
#endif
    __amdgpu_buffer_rsrc_t resource;

public:
    WAVE64_DEVICE explicit Shared(const void* base)
        : resource(__builtin_amdgcn_make_buffer_rsrc(const_cast<void*>(base), 0, kArenaBytes, 0x00027000)) {}
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at, int lane_at = 0) const {
        if constexpr (sizeof(Bits) == 4) return __builtin_amdgcn_raw_buffer_load_b32(resource, lane_at, at, kSystem);
        if constexpr (sizeof(Bits) == 16) return __builtin_amdgcn_raw_buffer_load_b128(resource, lane_at, at, kSystem);
    }
    template <typename Bits>
    WAVE64_DEVICE void store(Bits bits, int at, int lane_at = 0) const {
        if constexpr (sizeof(Bits) == 4) __builtin_amdgcn_raw_buffer_store_b32(bits, resource, lane_at, at, kSystem);
        if constexpr (sizeof(Bits) == 16) __builtin_amdgcn_raw_buffer_store_b128(bits, resource, lane_at, at, kSystem);
    }
    WAVE64_DEVICE Bits32 load_flag(int at, int lane_at = 0) const { return load<Bits32>(at, lane_at); }
    WAVE64_DEVICE void store_flag(Bits32 flag, int at) const { store(flag, at); }
};
// Waits until every rank sees this wave's stores; that they pass the caches spares writing those back. Without it, a
// flag that another wave sets overtakes them.
WAVE64_DEVICE void finish_stores() {
#if defined(__gfx942__) || defined(__gfx950__)
    asm volatile("" ::: "memory");
    __builtin_amdgcn_s_waitcnt(0x0f70);  // vmcnt(0)
    asm volatile("" ::: "memory");
#else
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "");
#endif
}
WAVE64_DEVICE void system_fence() { finish_stores(); }
// Loads after this point are not taken from before it.
WAVE64_DEVICE void look_again() { asm volatile("" ::: "memory"); }
WAVE64_DEVICE uint64_t steady_clock() { return __builtin_readsteadycounter(); }
WAVE64_DEVICE uint32_t load_counter(const uint32_t* at) { return load_uniform(reinterpret_cast<const int32_t*>(at)); }

#else
class Shared {
    char* base;

public:
    WAVE64_DEVICE explicit Shared(const void* base) : base(static_cast<char*>(const_cast<void*>(base))) {}
#if defined(WAVE64_CPU)
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at, int lane_at = 0) const {
        Bits bits;
        __builtin_memcpy(&bits, base + at + lane_at, sizeof bits);
        return bits;
    }
    template <typename Bits>
    WAVE64_DEVICE void store(Bits bits, int at, int lane_at = 0) const {
        __builtin_memcpy(base + at + lane_at, &bits, sizeof bits);
    }
    WAVE64_DEVICE Bits32 load_flag(int at, int lane_at = 0) const { return load<Bits32>(at, lane_at); }
    WAVE64_DEVICE void store_flag(Bits32 flag, int at) const { store(flag, at); }
#else
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at, int lane_at = 0) const {
        Bits bits;
        if constexpr (sizeof(Bits) == 4)
            asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(bits) : "l"(base + at + lane_at) : "memory");
        else
            asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                         : "l"(base + at + lane_at)
                         : "memory");
        return bits;
    }
    template <typename Bits>
    WAVE64_DEVICE void store(Bits bits, int at, int lane_at = 0) const {
        if constexpr (sizeof(Bits) == 4)
            asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(base + at + lane_at), "r"(bits) : "memory");
        else
            asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(base + at + lane_at), "r"(bits.x),
                         "r"(bits.y), "r"(bits.z), "r"(bits.w)
                         : "memory");
    }
    WAVE64_DEVICE Bits32 load_flag(int at, int lane_at = 0) const {
        Bits32 flag;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(flag) : "l"(base + at + lane_at) : "memory");
        return flag;
    }
    WAVE64_DEVICE void store_flag(Bits32 flag, int at) const {
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(base + at), "r"(flag) : "memory");
    }
#endif
};
#if defined(WAVE64_CPU)
WAVE64_DEVICE void finish_stores() {}
WAVE64_DEVICE void system_fence() {}
WAVE64_DEVICE void look_again() {}
WAVE64_DEVICE uint64_t steady_clock() { return 0; }
WAVE64_DEVICE uint32_t load_counter(const uint32_t* at) { return *at; }
#else
WAVE64_DEVICE void finish_stores() {}  // the flag's release is of all that its block has stored
WAVE64_DEVICE void system_fence() { __threadfence_system(); }
WAVE64_DEVICE void look_again() {}
WAVE64_DEVICE uint64_t steady_clock() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}
WAVE64_DEVICE uint32_t load_counter(const uint32_t* at) { return *static_cast<const volatile uint32_t*>(at); }
#endif
#endif

struct Words {
    Bits32 at[4];

    WAVE64_DEVICE static Words of(const Bits128& bits) { return __builtin_bit_cast(Words, bits); }
    WAVE64_DEVICE Bits128 bits() const { return __builtin_bit_cast(Bits128, *this); }
};

// This rank's block in the group: which round it is in, and what waits say when they time out.
template <typename Args>
struct RankBlock {
    const Args& args;
    const RankOp op;
    const Shared own;
    uint32_t round;
    int rank, world, lines;

    WAVE64_DEVICE RankBlock(const Args& args, RankOp op)
        : args(args),
          op(op),
          own(args.peers.at[0]),
          round(load_counter(counter())),
          rank(args.rank),
          world(args.world),
          lines(args.lines) {}

    // Of this block, in this launch.
    WAVE64_DEVICE int rounds() const { return args.rounds + (block_id() < args.longer); }

    // All lanes have read what came in the last round before any sends anew. The first round counts all of the launch:
    // all waves have read how many there were, and the store is done long before the kernel ends.
    WAVE64_DEVICE void next_round(bool is_first) {
        block_barrier();
        if (is_first && lane_in_block() == 0) *counter() = round + rounds();
        round++;
        forget_uniform(rank), forget_uniform(world), forget_uniform(lines);
    }

    WAVE64_DEVICE uint32_t* counter() const {
        return reinterpret_cast<uint32_t*>(static_cast<char*>(args.peers.at[0]) + block_id() * kLine);
    }
    // Where source's slots of this block and round begin.
    WAVE64_DEVICE int slot(int region, int half_bytes, int source, int source_bytes) const {
        return region + (block_id() * 2 + int(round & 1)) * half_bytes + source * source_bytes;
    }

    // Where the flags of this block are, a line for each source.
    WAVE64_DEVICE int flag(int use) const { return kFlagsAt + (use * kRankBlocks + block_id()) * kMaxRanks * kLine; }

    // Says once which rank was waited for in vain; later waits, in later launches too, then end at once.
    WAVE64_DEVICE void give_up(int rank) const {
        int* const broken = reinterpret_cast<int*>(static_cast<char*>(args.peers.at[0]) + kBrokenAt);
        if (lane_in_block() % wave_size() || atomic_swap_if(broken, 0, 1)) return;
        volatile int* const status = reinterpret_cast<volatile int*>(args.status);
        const int words[] = {int(op), int(round), block_id(), rank};
        for (int i = 0; i < 4; i++) status[i + 1] = words[i];
        system_fence();
        status[0] = 1;
    }
};

// Bounds a wait: the clock is read at every 64th look only.
class Patience {
    unsigned looks = 0;
    uint64_t since = 0;

public:
    template <typename Args>
    WAVE64_DEVICE bool ends(const RankBlock<Args>& block) {
        if (++looks % 64 || block.args.timeout == 0) return false;
        const uint64_t now = steady_clock();
        if (looks == 64) since = now;
        return now - since >= uint64_t(block.args.timeout) || block.own.load_flag(kBrokenAt);
    }
};

// Packs of 16 bytes of a tensor of `bytes` bytes: zeros behind its end. An odd end, and a tensor that does not begin at
// a multiple of 16 bytes, are accessed element by element; all elements are a multiple of T.
template <typename T = Bits16>
class Packs {
    static constexpr int kOf4 = 4 / sizeof(T), kBits = 8 * sizeof(T);
    Bounded memory;
    int bytes;
    bool aligned;

    WAVE64_DEVICE bool is_whole(int at) const { return aligned && (at + 16 <= bytes || at >= bytes); }

public:
    WAVE64_DEVICE Packs(const void* base, int bytes)
        : memory(base, bytes), bytes(bytes), aligned(reinterpret_cast<uint64_t>(base) % 16 == 0) {}
    WAVE64_DEVICE Bits128 load(int i) const {
        const int at = i * 16;
        if (is_whole(at)) return memory.template load<Bits128>(at);
        Words words{};
        for (int j = 0; j < 4 * kOf4; j++)
            words.at[j / kOf4] |= Bits32(memory.template load<T>(at + j * int(sizeof(T)))) << j % kOf4 * kBits;
        return words.bits();
    }
    WAVE64_DEVICE void store(int i, const Bits128& pack) const {
        const int at = i * 16;
        if (is_whole(at)) return memory.store(at, pack);
        const Words words = Words::of(pack);
        for (int j = 0; j < 4 * kOf4; j++)
            memory.store(at + j * int(sizeof(T)), T(words.at[j / kOf4] >> j % kOf4 * kBits));
    }
};

// a += x, b += y: one instruction on AMD, if it is told so.
WAVE64_DEVICE void add_pair(float& a, float& b, float x, float y) {
#if defined(__HIP__)
    using Pair = float __attribute__((ext_vector_type(2)));
    const Pair sum = Pair{a, b} + Pair{x, y};
    a = sum.x, b = sum.y;
#else
    a += x, b += y;
#endif
}

// The sum of a pack of every rank, in the order of the ranks, in fp32: the same bits on every rank.
template <typename T, int WORLD>
WAVE64_DEVICE void add_up(float (&sum)[16 / sizeof(T)], const Bits128 (&packs)[WORLD], int world) {
    constexpr int N = 16 / sizeof(T);
#pragma unroll
    for (int rank = 0; rank < WORLD; rank++) {
        if (WORLD == kMaxRanks && rank > 0 && rank >= world) break;
        const auto values = Pack<T, N>{packs[rank]}.values();
        for (int i = 0; i < N; i += 2) {
            const float a = values.at[i], b = values.at[i + 1];
            if (rank)
                add_pair(sum[i], sum[i + 1], a, b);
            else
                sum[i] = a, sum[i + 1] = b;
        }
    }
}
template <typename T, int WORLD>
WAVE64_DEVICE Bits128 sum_of(const Bits128 (&packs)[WORLD], int world) {
    float sum[16 / sizeof(T)];
    add_up<T>(sum, packs, world);
    return Pack<T, 16 / sizeof(T)>::rounded(sum).bits;
}
// Rounded once.
template <int WORLD>
WAVE64_DEVICE Bits128 sum_of(const Bits128 (&packs)[WORLD], int world, Dtype dtype) {
    if (dtype == kBf16) return sum_of<bf16>(packs, world);
    if (dtype == kFp16) return sum_of<fp16>(packs, world);
    return sum_of<float>(packs, world);
}

}  // namespace wave64

// The kernels of OP<WORLD>(args), for 2, 4 and any number of ranks.
#define WAVE64_RANK_KERNEL(OP, ARGS, MAX_LANES, WORLD) \
    WAVE64_KERNEL(MAX_LANES) OP##_##WORLD(wave64::ARGS args) { wave64::OP<WORLD>(args); }
#define WAVE64_RANK_KERNELS_OF(OP, ARGS, MAX_LANES) \
    WAVE64_RANK_KERNEL(OP, ARGS, MAX_LANES, 2)      \
    WAVE64_RANK_KERNEL(OP, ARGS, MAX_LANES, 4)      \
    WAVE64_RANK_KERNEL(OP, ARGS, MAX_LANES, 8)
#define WAVE64_RANK_KERNELS(OP, ARGS) WAVE64_RANK_KERNELS_OF(OP, ARGS, wave64::kRankLanes)

#else
#include "wave64/host.h"

namespace wave64 {

// Checks what every collective is given, and sets args.peers: the arenas from this rank's own on, which spreads what
// ranks send at the same time over all of them.
template <typename Args>
void plan_ranks(const Call& call, Args& args) {
    call.expect(call.device.is_nvidia() || call.device.arch == "gfx942" || call.device.arch == "gfx950", "device",
                "gfx942, gfx950 or an NVIDIA GPU, for development", call.device.arch);
    call.expect_range("world", args.world, 1, kMaxRanks);
    call.expect_range("rank", args.rank, 0, args.world - 1);
    call.expect_min("timeout", args.timeout, 0);
    call.expect_range("max_blocks", args.max_blocks, 1, kRankBlocks);
    call.expect(args.timeout == 0 || args.status, "status", "an address, with a timeout", "0");
    args.peers = {};
    for (int32_t i = 0; i < args.world; i++) {
        void* const arena = args.arenas.at[(args.rank + i) % args.world];
        call.expect(arena && reinterpret_cast<uintptr_t>(arena) % kLine == 0, "arenas",
                    "an address that 128 divides, of each rank", int64_t(reinterpret_cast<uintptr_t>(arena)));
        args.peers.at[i] = arena;
    }
}

// Sets args.rounds and longer for `total` of something, of which a block has `of_block` in a round.
template <typename Args>
void plan_rounds(Args& args, int64_t total, int64_t of_block) {
    args.rounds = int32_t(total / (args.grid * of_block));
    args.longer = int32_t(ceil_div(total % (args.grid * of_block), of_block));
}

// Sets args.block, lines, grid and rounds for `packs` packs of 16 bytes: first more blocks, then more lanes, then more
// lines at once. All ranks must come to the same, so nothing but the device's kind and the size may matter.
//     of_8       packs that 8 lanes have in a round with one unit of lines
//     max_units  of lines that a lane has at once
template <typename Args>
void plan_blocks(const Call& call, Args& args, int64_t packs, int64_t of_8, int64_t max_units, int64_t max_blocks,
                 int64_t max_lanes = kRankLanes) {
    max_blocks = std::min<int64_t>(max_blocks, args.max_blocks);
    const auto lanes = [&](int64_t units) {  // of each of the most blocks
        return round_up(ceil_div(ceil_div(packs, units * max_blocks) * 8, of_8), call.device.wave_size);
    };
    const int64_t units = std::min(max_units, ceil_div(lanes(1), max_lanes));
    const int64_t alone = round_up(ceil_div(packs * 8, of_8), call.device.wave_size);  // lanes of a single block
    args.block = int32_t(std::min({alone, std::max<int64_t>(lanes(units), max_lanes / 2), max_lanes}));
    args.lines = int32_t(units);
    args.grid = int32_t(std::min(ceil_div(packs, args.block / 8 * of_8 * units), max_blocks));
    plan_rounds(args, packs, args.block / 8 * of_8 * units);
}

// Lines of 16 bytes that a lane has for each rank in a slot.
inline int64_t slot_lines(int32_t world) {
    return kSlotHalf / (16 * kRankLanes) / (world == 2 ? 2 : world == 4 ? 4 : 8);
}

// What Python needs of the above: the runtime the size, tests the layout.
#define WAVE64_RANK_CONSTANTS                                                                                          \
    {"ARENA_BYTES", kArenaBytes}, {"MAX_RANKS", kMaxRanks}, {"LINE", kLine}, {"LANES", kRankLanes},                    \
        {"BROKEN_AT", kBrokenAt}, {"FLAGS_AT", kFlagsAt}, {"BLOCKS", kRankBlocks}, {"LL_AT", kLowLatencyAt},           \
        {"LL_HALF", kLowLatencyHalf}, {"LL_PACKS", kLowLatencyPacks}, {"LL128_AT", kLow128At}, {"DATA_AT", kDataAt}, { \
        "SLOT_HALF", kSlotHalf                                                                                         \
    }

// Kernels are compiled for 2, 4 and any number of ranks.
inline int world_kernel(int32_t world) { return world == 2 ? 0 : world == 4 ? 1 : 2; }
#define WAVE64_BY_WORLD(NAME) {NAME "_2", NAME "_4", NAME "_8"}

}  // namespace wave64
#endif
