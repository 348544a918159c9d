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

// Both quotients are rounded to nearest, as on every backend.
WAVE64_DEVICE Scale scale_of(float amax) {
    amax = max(amax, kMinAmax);
    return {amax / kFp8Max, kBelowFp8Max / amax};
}

// The scale of a block's numbers, from the amax of each lane's.
WAVE64_DEVICE Scale scale_of_block(float amax, int* lds, int block) {
    return scale_of(__builtin_bit_cast(float, block_max(__builtin_bit_cast(int, amax), lds, block)));
}

// The largest magnitude of a pack's numbers; NaN is skipped.
template <typename T, int N>
WAVE64_DEVICE float amax_of(const Pack<T, N>& x) {
    const auto values = x.values();
    float amax = 0;
    for (int i = 0; i < N; i++) amax = max(amax, __builtin_fabsf(float(values.at[i])));
    return amax;
}

// A pack's numbers times `inverse`, in FP8. IN_RANGE: no product exceeds the limit; else those that do are clamped.
template <bool IN_RANGE = true, typename T, int N>
WAVE64_DEVICE Pack<Bits8, N> quantized(const Pack<T, N>& x, float inverse) {
    constexpr int words = (N + 3) / 4;
    const auto values = x.values();
    struct {
        Bits32 at[words];
    } q;
    for (int word = 0; word < words; word++) {
        float product[4] = {};
        for (int i = 0; i < 4 && 4 * word + i < N; i++) product[i] = float(values.at[4 * word + i]) * inverse;
        q.at[word] = IN_RANGE ? to_fp8_in_range(product[0], product[1], product[2], product[3])
                              : to_fp8(product[0], product[1], product[2], product[3]);
    }
    if constexpr (N < 4)
        return {typename Pack<Bits8, N>::Bits(q.at[0])};
    else
        return {__builtin_bit_cast(typename Pack<Bits8, N>::Bits, q)};
}

}  // namespace wave64
#endif
