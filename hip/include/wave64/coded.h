// Numbers that go over the links in fewer bits than they have in memory: codes of 8 or 4 bits, and a scale for each
// block of 32 consecutive elements.
//
// A block is one lane's: no lane asks another for the largest magnitude. Its scale is amax / the largest code, rounded
// up to 8 bits of fraction, so that a code times its scale is exact in fp32: the bits depend on no compiler's choice to
// fuse. A block with a NaN or an infinity has NaN as its scale: all 32 become NaN, and no other block does.
#pragma once

#include "wave64/exchange.h"

namespace wave64 {
constexpr int kCoded = 32;        // elements of a block
constexpr int kCodedLanes = 192;  // of a workgroup, at most
// Blocks that a lane has for each rank in a round, by the ranks that a kernel is for.
template <int WORLD>
constexpr int kCodedBlocks = 8 / WORLD;
// Ranks whose blocks a lane has in registers at once.
template <int WORLD>
constexpr int kCodedRanks = WORLD < 8 ? WORLD : 2;
}  // namespace wave64

#if defined(WAVE64_DEVICE_CODE) && WAVE64_EXCHANGES
#include "wave64/fp8.h"

namespace wave64 {

// x is added to 1.5 * 2^23, which rounds it to an integer, to nearest even: the lowest bits are that, as two's
// complement.
WAVE64_DEVICE Bits32 rounded_bits(float x, float inverse) {
    return __builtin_bit_cast(Bits32, fma(x, inverse, 0x1.8p23f));
}

template <int BITS>
struct IntCodes {
    static constexpr int kInWord = 32 / BITS, kWords = kCoded / kInWord;
    static constexpr float kLimit = (1 << (BITS - 1)) - 1;

    WAVE64_DEVICE static Bits32 word(const float* x, float inverse) {
        Bits32 word = 0;
        for (int i = 0; i < kInWord; i++) word |= (rounded_bits(x[i], inverse) & ((1 << BITS) - 1)) << BITS * i;
        return word;
    }
    WAVE64_DEVICE static float code(Bits32 word, int i) {
        return float(int(word << (32 - BITS - BITS * i)) >> (32 - BITS));
    }
};

struct Fp8Codes {
    static constexpr int kWords = 8, kInWord = 4;
    static constexpr float kLimit = kFp8Max;

    WAVE64_DEVICE static Bits32 word(const float* x, float inverse) {
        return to_fp8_in_range(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse);
    }
    WAVE64_DEVICE static float code(Bits32 word, int i) { return from_fp8(word).at[i]; }
};

// A block as it is sent.
template <typename Codes>
struct Coded {
    Bits32 words[Codes::kWords];
    Bits32 scale;  // of fp32

    WAVE64_DEVICE static Coded of(const float (&x)[kCoded]) {
        constexpr Bits32 kInfinity = 0x7f800000, kNaN = 0x7fc00000, kSmallest = 0x00800000;
        Bits32 amax = 0;  // the order of magnitudes is that of their bits, NaN last
        for (float each : x) {
            const Bits32 size = __builtin_bit_cast(Bits32, each) & 0x7fffffff;
            amax = amax > size ? amax : size;
        }
        const Bits32 quotient = __builtin_bit_cast(Bits32, __builtin_bit_cast(float, amax) * (1 / Codes::kLimit));
        const Bits32 rounded = (quotient + 0xffff) & 0xffff0000;
        const Bits32 scale = rounded > kSmallest ? rounded : kSmallest;
        // a little less than 1 / scale: no product exceeds the limit
        const float inverse = (1 - 0x1p-21f) / __builtin_bit_cast(float, scale);
        Coded made;
        made.scale = amax < kInfinity ? scale : kNaN;
        for (int i = 0; i < Codes::kWords; i++) made.words[i] = Codes::word(&x[i * Codes::kInWord], inverse);
        return made;
    }

    // sum += the numbers.
    WAVE64_DEVICE void add_to(float (&sum)[kCoded]) const {
        for (int i = 0; i < kCoded; i++)
            sum[i] = fma(Codes::code(words[i / Codes::kInWord], i % Codes::kInWord), __builtin_bit_cast(float, scale),
                         sum[i]);
    }
};

// Block i of a tensor of 16-bit numbers; zeros behind its end.
struct Block16 {
    static constexpr int kPacks = kCoded / 8;
    Bits128 packs[kPacks];

    WAVE64_DEVICE static Block16 load(const Packs<>& x, int i) {
        Block16 block;
        for (int pack = 0; pack < kPacks; pack++) block.packs[pack] = x.load(i * kPacks + pack);
        return block;
    }
    WAVE64_DEVICE void store(const Packs<>& out, int i) const {
        for (int pack = 0; pack < kPacks; pack++) out.store(i * kPacks + pack, packs[pack]);
    }
    template <typename T>
    WAVE64_DEVICE void numbers(float (&x)[kCoded]) const {
        for (int pack = 0; pack < kPacks; pack++) {
            const auto values = Pack<T, 8>{packs[pack]}.values();
            for (int j = 0; j < 8; j++) x[pack * 8 + j] = float(values.at[j]);
        }
    }
    template <typename T>
    WAVE64_DEVICE static Block16 rounded(const float (&x)[kCoded]) {
        Block16 block;
        for (int pack = 0; pack < kPacks; pack++) {
            float values[8];
            for (int j = 0; j < 8; j++) values[j] = x[pack * 8 + j];
            block.packs[pack] = Pack<T, 8>::rounded(values).bits;
        }
        return block;
    }
};

// Where a source's codes of one of the two uses of its slot in a round are, and its scales behind them.
template <int WORLD, typename Codes>
class CodedSlot {
    static constexpr int kLines = Codes::kWords / 4, kLineOfLanes = 16 * kCodedLanes;
    static constexpr int kScalesAt = kCodedBlocks<WORLD> * kLines * kLineOfLanes, kUse = kSlotHalf / WORLD / 2;
    static_assert(kScalesAt + kCodedBlocks<WORLD> * 4 * kCodedLanes <= kUse);
    const int base;

public:
    template <typename Args>
    WAVE64_DEVICE CodedSlot(const RankBlock<Args>& block, int use, int source)
        : base(block.slot(kDataAt, kSlotHalf, source, kSlotHalf / WORLD) + use * kUse) {}

    // A lane's block i.
    WAVE64_DEVICE void store(const Shared& arena, int i, const Coded<Codes>& coded) const {
        for (int line = 0; line < kLines; line++) {
            const Bits32* const words = &coded.words[4 * line];
            arena.store(Words{{words[0], words[1], words[2], words[3]}}.bits(),
                        base + (i * kLines + line) * kLineOfLanes, lane_in_block() * 16);
        }
        arena.store(coded.scale, base + kScalesAt + i * 4 * kCodedLanes, lane_in_block() * 4);
    }
    WAVE64_DEVICE Coded<Codes> load(const Shared& arena, int i) const {
        Coded<Codes> coded;
        for (int line = 0; line < kLines; line++) {
            const Words words = Words::of(
                arena.template load<Bits128>(base + (i * kLines + line) * kLineOfLanes, lane_in_block() * 16));
            for (int j = 0; j < 4; j++) coded.words[4 * line + j] = words.at[j];
        }
        coded.scale = arena.template load<Bits32>(base + kScalesAt + i * 4 * kCodedLanes, lane_in_block() * 4);
        return coded;
    }
};

// A lane's block i of the ranks from `first` on.
template <int WORLD, typename Codes, typename Args>
WAVE64_DEVICE void receive_coded(const RankBlock<Args>& block, int use, int i, int first,
                                 Coded<Codes> (&some)[kCodedRanks<WORLD>]) {
#pragma unroll
    for (int j = 0; j < kCodedRanks<WORLD>; j++)
        if (in_world<WORLD>(block, first + j))
            some[j] = CodedSlot<WORLD, Codes>(block, use, first + j).load(block.own, i);
}

}  // namespace wave64
#endif
