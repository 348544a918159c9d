// What kernels may call, on an ordinary CPU: for tests without a GPU. Every lane is a fiber that src/lanes.cpp switches
// to; a block's lanes meet at barriers, a wave's also where they exchange values. amd.h has the same names.
//
// The source is compiled as if for one AMD architecture (its macros are given), so wave size and FP8 flavor are that
// architecture's.
#pragma once

#include "wave64/types.h"

#define WAVE64_DEVICE __attribute__((always_inline)) inline
#define WAVE64_LDS __attribute__((section("wave64_lds")))
#define WAVE64_KERNEL(MAX_LANES) extern "C" __attribute__((visibility("default"))) void

namespace wave64 {

// The lane that runs, and where it is.
struct Lane {
    int in_block, block, block_y, wave_size;
};
extern Lane running;

// Waits until every lane of the wave (of the block) that has not returned waits, too.
void meet_block();
// Returns the values of all lanes of the wave, 0 for lanes that have returned. `kind` is the operation: lanes of one
// wave that meet for different operations are an error.
const uint64_t* meet_wave(int kind, uint64_t mine);

WAVE64_DEVICE int wave_size() { return running.wave_size; }
WAVE64_DEVICE int lane_in_block() { return running.in_block; }
WAVE64_DEVICE int block_id() { return running.block; }
WAVE64_DEVICE int block_id_y() { return running.block_y; }
WAVE64_DEVICE float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
WAVE64_DEVICE float reciprocal(float x) { return 1 / x; }
WAVE64_DEVICE float exp2(float x) { return __builtin_exp2f(x); }
WAVE64_DEVICE float log2(float x) { return __builtin_log2f(x); }
WAVE64_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }
WAVE64_DEVICE float min(float a, float b) { return __builtin_fminf(a, b); }
WAVE64_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

WAVE64_DEVICE void block_barrier() { meet_block(); }
WAVE64_DEVICE void wave_barrier() { meet_wave(0, 0); }
WAVE64_DEVICE int from_lane(int x, int lane) { return int(meet_wave(1, unsigned(x))[lane % wave_size()]); }
WAVE64_DEVICE float from_lane(float x, int lane) {
    return __builtin_bit_cast(float, from_lane(__builtin_bit_cast(int, x), lane));
}
WAVE64_DEVICE uint64_t ballot(bool yes) {
    const uint64_t* all = meet_wave(2, yes);
    uint64_t bits = 0;
    for (int lane = 0; lane < wave_size(); lane++) bits |= all[lane] << lane;
    return bits;
}
WAVE64_DEVICE int atomic_add(int* at, int x) {
    const int before = *at;
    *at = before + x;
    return before;
}
WAVE64_DEVICE void atomic_add(uint64_t* at, uint64_t x) { *at += x; }
WAVE64_DEVICE int atomic_swap_if(int* at, int expected, int x) {
    const int before = *at;
    if (before == expected) *at = x;
    return before;
}

template <typename Bits>
WAVE64_DEVICE void forget(Bits&) {}

WAVE64_DEVICE int load_uniform(const int32_t* at) { return *at; }
WAVE64_DEVICE void keep_order() {}
WAVE64_DEVICE void wait_state() {}
template <typename Bits>
WAVE64_DEVICE Bits load_behind(const void* base, unsigned at) {
    Bits bits;
    __builtin_memcpy(&bits, static_cast<const char*>(base) + at, sizeof bits);
    return bits;
}
WAVE64_DEVICE Bits32 low_halves(Bits32 a, Bits32 b) { return (a & 0xffff) | b << 16; }
WAVE64_DEVICE Bits32 high_halves(Bits32 a, Bits32 b) { return a >> 16 | (b & 0xffff0000); }

WAVE64_DEVICE int count_bits(uint64_t mask) { return __builtin_popcountll(mask); }

WAVE64_DEVICE int bits_before(uint64_t mask) {
    return __builtin_popcountll(mask & ((uint64_t(1) << lane_in_block() % wave_size()) - 1));
}
template <int HALF, typename T>
WAVE64_DEVICE T from_other_half(T x) {
    return from_lane(x, (lane_in_block() % wave_size()) ^ HALF);
}

WAVE64_DEVICE float wave_sum(float x) {
    const uint64_t* all = meet_wave(3, __builtin_bit_cast(unsigned, x));
    float values[64];
    for (int lane = 0; lane < wave_size(); lane++) values[lane] = __builtin_bit_cast(float, unsigned(all[lane]));
    for (int step = 1; step < wave_size(); step *= 2)
        for (int lane = 0; lane < wave_size(); lane += 2 * step) values[lane] += values[lane + step];
    return values[0];
}
WAVE64_DEVICE float wave_max(float x) {
    const uint64_t* all = meet_wave(4, __builtin_bit_cast(unsigned, x));
    float most = x;
    for (int lane = 0; lane < wave_size(); lane++) most = max(most, __builtin_bit_cast(float, unsigned(all[lane])));
    return most;
}
WAVE64_DEVICE int wave_sum(int x) {
    const uint64_t* all = meet_wave(5, unsigned(x));
    int sum = 0;
    for (int lane = 0; lane < wave_size(); lane++) sum += int(unsigned(all[lane]));
    return sum;
}
WAVE64_DEVICE int wave_max(int x) {
    const uint64_t* all = meet_wave(6, unsigned(x));
    int most = x;
    for (int lane = 0; lane < wave_size(); lane++)
        if (int(unsigned(all[lane])) > most) most = int(unsigned(all[lane]));
    return most;
}

class Bounded {
    char* base;
    int bytes;

public:
    WAVE64_DEVICE Bounded(const void* base, int bytes)
        : base(static_cast<char*>(const_cast<void*>(base))), bytes(bytes) {}
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at, int behind = 0) const {
        Bits bits{};
        at += behind;
        if (at < bytes) __builtin_memcpy(&bits, base + at, min(int(sizeof bits), bytes - at));
        return bits;
    }
    template <typename Bits>
    WAVE64_DEVICE void store(int at, Bits bits) const {
        if (at < bytes) __builtin_memcpy(base + at, &bits, min(int(sizeof bits), bytes - at));
    }
};

// One number in FP8 of the flavor with this bias and largest number, rounded to nearest, ties to even, saturating.
inline unsigned fp8_bits(float x, int bias, float largest) {
    const unsigned sign = __builtin_signbit(x) ? 0x80 : 0;
    if (x != x) return bias == 8 ? 0x80 : 0x7f;
    const float size = min(__builtin_fabsf(x), largest);
    int exponent = int(__builtin_bit_cast(unsigned, size) >> 23) - 127;
    if (exponent < 1 - bias) exponent = 1 - bias;
    const int eighths = int(__builtin_rintf(__builtin_ldexpf(size, 3 - exponent)));  // 8 to 16 of a normal number
    const unsigned bits = eighths < 8 ? eighths : unsigned((exponent + bias - 1) * 8 + eighths);
    return bits == 0 && bias == 8 ? 0 : sign | bits;
}

inline float computed_fp8_value(unsigned bits, int bias) {
    if (bits == (bias == 8 ? 0x80u : 0x7fu) || (bias == 7 && bits == 0xff)) return __builtin_nanf("");
    const int exponent = (bits >> 3) & 15, eighths = bits & 7;
    const float size = exponent ? __builtin_ldexpf(float(8 + eighths), exponent - bias - 3)
                                : __builtin_ldexpf(float(eighths), -bias - 2);
    return bits & 0x80 ? -size : size;
}

// The same from a table, since matrix products ask for many.
inline float fp8_value(unsigned bits, int bias) {
    static float values[9][256];
    static bool known[9];
    if (!known[bias]) {
        for (unsigned each = 0; each < 256; each++) values[bias][each] = computed_fp8_value(each, bias);
        known[bias] = true;
    }
    return values[bias][bits];
}

}  // namespace wave64
