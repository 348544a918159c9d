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
// Two numbers of a 16-bit dtype.
template <typename T>
WAVE64_DEVICE Bits32 rounded_pair(float a, float b, T) {
    struct {
        T a, b;
    } pair{T(a), T(b)};
    return __builtin_bit_cast(Bits32, pair);
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
#endif

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
    WAVE64_DEVICE static Pack of(const Values& values) { return {__builtin_bit_cast(Bits, values)}; }
    WAVE64_DEVICE static Pack rounded(const float (&x)[N]) {
        if constexpr (sizeof(T) == 2 && N % 2 == 0) {
            struct {
                Bits32 at[N / 2];
            } pairs;
            for (int i = 0; i < N; i += 2) pairs.at[i / 2] = rounded_pair(x[i], x[i + 1], T());
            return {__builtin_bit_cast(Bits, pairs)};
        } else {
            Values values;
            for (int i = 0; i < N; i++) values.at[i] = T(x[i]);
            return of(values);
        }
    }
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
template <int N>
WAVE64_DEVICE void run_max(int (&x)[N], int lanes) {
    const auto larger = [](int& a, int b) { a = a > b ? a : b; };
    if (lanes > 1)
        for (int& each : x) larger(each, from_other_half<1>(each));
    if (lanes > 2)
        for (int& each : x) larger(each, from_other_half<2>(each));
    if (lanes > 4)
        for (int& each : x) larger(each, from_other_half<4>(each));
    if (lanes > 8)
        for (int& each : x) larger(each, from_other_half<8>(each));
    if (lanes > 16)
        for (int& each : x) larger(each, from_other_half<16>(each));
    if (lanes > 32)
        for (int& each : x) larger(each, from_other_half<32>(each));
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
