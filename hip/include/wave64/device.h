// The device names that kernels use. Lane, wave, block and lds mean the same on AMD (amd.h), on NVIDIA (nvidia.h, for
// development only) and on a CPU (cpu.h, for tests); the wave size differs.
#pragma once

#include "wave64/types.h"

namespace wave64 {
using Bits8 = unsigned char;
using Bits16 = unsigned short;
using Bits32 = unsigned;
#if defined(__HIP__) || defined(WAVE64_CPU)
using bf16 = __bf16;
using fp16 = _Float16;
using Floats2 = float __attribute__((ext_vector_type(2)));
using Bits64 = unsigned __attribute__((ext_vector_type(2)));
using Bits128 = unsigned __attribute__((ext_vector_type(4)));
#endif
}  // namespace wave64

#if defined(WAVE64_CPU)
#include "wave64/cpu.h"
#elif defined(__HIP__)
#include "wave64/amd.h"
#else
#include "wave64/nvidia.h"
#endif

namespace wave64 {

#if defined(__HIP__) || defined(WAVE64_CPU)
WAVE64_DEVICE Floats2 fma(Floats2 a, Floats2 b, Floats2 c) { return __builtin_elementwise_fma(a, b, c); }

// Two numbers of a 16-bit dtype.
template <typename T>
WAVE64_DEVICE Bits32 rounded_pair(float a, float b, T) {
    struct {
        T a, b;
    } pair{T(a), T(b)};
    return __builtin_bit_cast(Bits32, pair);
}
#endif
#if defined(__gfx950__) || defined(__gfx1250__)
// In one instruction, if it is told so, and if what looks at the halves cannot make a conversion of its own of each.
WAVE64_DEVICE Bits32 rounded_pair(float a, float b, bf16) {
    using Pair = bf16 __attribute__((ext_vector_type(2)));
    Bits32 pair = __builtin_bit_cast(Bits32, __builtin_convertvector(Floats2{a, b}, Pair));
    asm("" : "+v"(pair));
    return pair;
}
#endif
// The same of numbers that were computed from T's alone: a NaN among them has zeros behind T's bits, as its operand had
// or as hardware makes one, so that half a unit more does not carry it into the sign.
template <typename T>
WAVE64_DEVICE Bits32 rounded_pair_of_same(float a, float b, T) {
    return rounded_pair(a, b, T());
}
#if defined(__HIP__) && !defined(__gfx950__) && !defined(__gfx1250__)
// To nearest even, without an instruction for it: in half of what it takes to ask for NaN, too.
WAVE64_DEVICE Bits32 rounded_pair_of_same(float a, float b, bf16) {
    const auto rounded = [](float x) {
        const Bits32 bits = __builtin_bit_cast(Bits32, x);
        return bits + (bits >> 16 & 1) + 0x7fff;
    };
    return high_halves(rounded(a), rounded(b));
}
#endif

#if !defined(__HIP__)
// Without scalar registers of a wave, what amd.h has for them is nothing special.
WAVE64_DEVICE int uniform(int x) { return x; }
WAVE64_DEVICE void keep_uniform(const char*&) {}
template <typename T>
WAVE64_DEVICE void forget_uniform(T&) {}
WAVE64_DEVICE int broadcast(int x, int lane) { return from_lane(x, lane); }
WAVE64_DEVICE float broadcast(float x, int lane) { return from_lane(x, lane); }
WAVE64_DEVICE int wave_max_of_rare(int x, int) { return wave_max(x); }
WAVE64_DEVICE float max_magnitude(float a, float b, float c) {
    return max(a, max(__builtin_fabsf(b), __builtin_fabsf(c)));
}
#endif

WAVE64_DEVICE Floats2 both(float x) { return {x, x}; }

// N numbers in fp32, computed with two at a time: one instruction on AMD, if it is told so.
template <int N>
struct Numbers {
    float at[N];

    template <typename Do>
    WAVE64_DEVICE void each(const Numbers& other, Do&& join) {
        if constexpr (N % 2 == 0)
            for (int i = 0; i < N; i += 2) {
                const Floats2 pair = join(Floats2{at[i], at[i + 1]}, Floats2{other.at[i], other.at[i + 1]});
                at[i] = pair.x, at[i + 1] = pair.y;
            }
        else
            for (int i = 0; i < N; i++) at[i] = join(Floats2{at[i], 0}, Floats2{other.at[i], 0}).x;
    }
    WAVE64_DEVICE void operator+=(const Numbers& other) {
        each(other, [](const Floats2& a, const Floats2& b) { return a + b; });
    }
    WAVE64_DEVICE void operator*=(const Numbers& other) {
        each(other, [](const Floats2& a, const Floats2& b) { return a * b; });
    }
    WAVE64_DEVICE void operator*=(float x) {
        each(*this, [x](const Floats2& a, const Floats2&) { return a * both(x); });
    }
    // The largest magnitude; NaN is skipped.
    WAVE64_DEVICE float amax() const {
        float amax = 0;
        for (int i = 0; i < N; i += 2) amax = max_magnitude(amax, at[i], at[i + (N > 1)]);
        return amax;
    }
    // Adds the squares to a pair of sums.
    WAVE64_DEVICE void add_squares(Floats2& sums) const {
        if constexpr (N % 2 == 0)
            for (int i = 0; i < N; i += 2) sums = fma(Floats2{at[i], at[i + 1]}, Floats2{at[i], at[i + 1]}, sums);
        else
            for (float x : at) sums.x = fma(x, x, sums.x);
    }
};

template <int BYTES>
struct BitsOf;
template <>
struct BitsOf<1> {
    using type = Bits8;
};
template <>
struct BitsOf<2> {
    using type = Bits16;
};
template <>
struct BitsOf<4> {
    using type = Bits32;
};
template <>
struct BitsOf<8> {
    using type = Bits64;
};
template <>
struct BitsOf<16> {
    using type = Bits128;
};

// N values that one memory access moves. They stay bits until they are used: to convert a load at once would be to
// wait for it.
template <typename T, int N>
struct Pack {
    using Bits = typename BitsOf<sizeof(T) * N>::type;
    struct Values {
        T at[N];
    };
    Bits bits;

    WAVE64_DEVICE Values values() const { return __builtin_bit_cast(Values, bits); }
    WAVE64_DEVICE Numbers<N> numbers() const {
        const Values values = this->values();
        Numbers<N> numbers;
        for (int i = 0; i < N; i++) numbers.at[i] = float(values.at[i]);
        return numbers;
    }
    WAVE64_DEVICE static Pack of(const Values& values) { return {__builtin_bit_cast(Bits, values)}; }
    // SAME: of numbers that were computed from T's alone.
    template <bool SAME = false>
    WAVE64_DEVICE static Pack rounded(const float (&x)[N]) {
        if constexpr (sizeof(T) == 2 && N % 2 == 0) {
            struct {
                Bits32 at[N / 2];
            } pairs;
            for (int i = 0; i < N; i += 2)
                pairs.at[i / 2] = SAME ? rounded_pair_of_same(x[i], x[i + 1], T()) : rounded_pair(x[i], x[i + 1], T());
            return {__builtin_bit_cast(Bits, pairs)};
        } else {
            Values values;
            for (int i = 0; i < N; i++) values.at[i] = T(x[i]);
            return of(values);
        }
    }
    WAVE64_DEVICE static Pack rounded_of_same(const float (&x)[N]) { return rounded<true>(x); }
};

// n / d for n below 2^31.
WAVE64_DEVICE unsigned operator/(unsigned n, const IntDivider& d) {
    return unsigned(uint64_t(n) * d.factor >> d.shift);
}

// A row of num_packs packs. Past the end it reads zeros and swallows writes. N * sizeof(T) must divide its address.
template <typename T, int N>
class Row {
    Bounded memory;

public:
    WAVE64_DEVICE Row(const void* base, int num_packs) : memory(base, num_packs * int(sizeof(T)) * N) {}
    WAVE64_DEVICE Pack<T, N> load(int i) const {
        return {memory.template load<typename Pack<T, N>::Bits>(i * int(sizeof(T)) * N)};
    }
    WAVE64_DEVICE void store(int i, const Pack<T, N>& pack) const { memory.store(i * int(sizeof(T)) * N, pack.bits); }
};

// The maximum over each run of `lanes` lanes, a power of two, in every lane of the run, for N numbers at once.
template <int HALF = 1, int N>
WAVE64_DEVICE void run_max(int (&x)[N], int lanes) {
    forget_uniform(lanes);  // compared here: the results of comparisons would be kept in vector registers
    if (lanes <= HALF) return;
    for (int& each : x) {
        const int other = from_other_half<HALF>(each);
        each = each > other ? each : other;
    }
    if constexpr (HALF < 32) run_max<2 * HALF>(x, lanes);
}
WAVE64_DEVICE int run_max(int x, int lanes) {
    int one[] = {x};
    run_max(one, lanes);
    return one[0];
}

// The sum over the block's lanes, in every lane; `lds` holds a float per wave and may be read until the next barrier.
WAVE64_DEVICE float block_sum(float x, float* lds, int block) {
    x = wave_sum(x);
    const int num_waves = block / wave_size(), lane = lane_in_block() % wave_size();
    if (num_waves == 1) return x;
    if (lane == 0) lds[lane_in_block() / wave_size()] = x;
    block_barrier();
    return wave_sum(lane < num_waves ? lds[lane] : 0);
}

// The maximum over the block's lanes, in every lane; `lds` as for block_sum. For magnitudes pass the bits, which are in
// the same order: some hardware compares integers over a wave in one instruction.
template <typename T>
WAVE64_DEVICE T block_max(T x, T* lds, int block) {
    x = wave_max(x);
    const int num_waves = block / wave_size(), lane = lane_in_block() % wave_size();
    if (num_waves == 1) return x;
    if (lane == 0) lds[lane_in_block() / wave_size()] = x;
    block_barrier();
    return wave_max(lane < num_waves ? lds[lane] : lds[0]);
}

}  // namespace wave64

// The kernels of an op, OP<T, N>(args), by dtype: with packs of 16 bytes, and with packs of one element for rows that
// do not begin at multiples of 16 bytes. host.h has their names in the same order.
#define WAVE64_KERNEL_OF(NAME, MAX_LANES, OP, ARGS, T, N) \
    WAVE64_KERNEL(MAX_LANES) NAME(wave64::ARGS args) { wave64::OP<T, N>(args); }
#define WAVE64_KERNELS(OP, MAX_LANES, ARGS)                                     \
    WAVE64_KERNEL_OF(OP##_bf16, MAX_LANES, OP, ARGS, wave64::bf16, 8)           \
    WAVE64_KERNEL_OF(OP##_fp16, MAX_LANES, OP, ARGS, wave64::fp16, 8)           \
    WAVE64_KERNEL_OF(OP##_fp32, MAX_LANES, OP, ARGS, float, 4)                  \
    WAVE64_KERNEL_OF(OP##_bf16_unaligned, MAX_LANES, OP, ARGS, wave64::bf16, 1) \
    WAVE64_KERNEL_OF(OP##_fp16_unaligned, MAX_LANES, OP, ARGS, wave64::fp16, 1) \
    WAVE64_KERNEL_OF(OP##_fp32_unaligned, MAX_LANES, OP, ARGS, float, 1)
