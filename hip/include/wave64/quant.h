// FP8 with scales, as pysrc/wave64/quant.py defines it: scale = amax / limit, and numbers are multiplied by
// inverse = below / amax, where below is the next fp32 number to limit towards 0, so that no product exceeds the limit.
#pragma once

#include "wave64/fp8.h"

#if WAVE64_HAS_FP8
namespace wave64 {

constexpr float kMinAmax = 1e-10f;
constexpr float kBelowFp8Max = kFp8Max == 240 ? 240 - 0x1p-16f : 448 - 0x1p-15f;

struct Scale {
    float scale, inverse;
};

// Both quotients are rounded to nearest, as on every backend: that by a constant is a guess and its correction, in half
// the instructions of a division. tests/ops/test_quantizers.py holds it to that.
WAVE64_DEVICE Scale scale_of(float amax) {
    const int bits = __builtin_bit_cast(int, amax), least = __builtin_bit_cast(int, kMinAmax);
    amax = __builtin_bit_cast(float, bits > least ? bits : least);  // magnitudes are in the order of their bits
    const float guess = amax * (1 / kFp8Max), better = fma(fma(-guess, kFp8Max, amax), 1 / kFp8Max, guess);
    return {better == better ? better : guess, kBelowFp8Max / amax};  // an infinite guess has no correction
}

// The scale of a block's numbers, from the amax of each lane's.
WAVE64_DEVICE Scale scale_of_block(float amax, int* lds, int block) {
    return scale_of(__builtin_bit_cast(float, block_max(__builtin_bit_cast(int, amax), lds, block)));
}

// The largest magnitude of a pack's numbers; NaN is skipped.
template <typename T, int N>
WAVE64_DEVICE float amax_of(const Pack<T, N>& x) {
    return x.numbers().amax();
}

// Numbers times `inverse`, in FP8. IN_RANGE: no product exceeds the limit; else those that do are clamped.
template <bool IN_RANGE = true, int N>
WAVE64_DEVICE Pack<Bits8, N> quantized(Numbers<N> x, float inverse) {
    constexpr int words = (N + 3) / 4;
    x *= inverse;
    struct {
        Bits32 at[words];
    } q;
    for (int word = 0; word < words; word++) {
        float four[4] = {};
        for (int i = 0; i < 4 && 4 * word + i < N; i++) four[i] = x.at[4 * word + i];
        q.at[word] =
            IN_RANGE ? to_fp8_in_range(four[0], four[1], four[2], four[3]) : to_fp8(four[0], four[1], four[2], four[3]);
    }
    if constexpr (N < 4)
        return {typename Pack<Bits8, N>::Bits(q.at[0])};
    else
        return {__builtin_bit_cast(typename Pack<Bits8, N>::Bits, q)};
}
template <bool IN_RANGE = true, typename T, int N>
WAVE64_DEVICE Pack<Bits8, N> quantized(const Pack<T, N>& x, float inverse) {
    return quantized<IN_RANGE>(x.numbers(), inverse);
}

}  // namespace wave64
#endif
