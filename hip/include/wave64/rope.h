// RoPE: a pair (a, b) of columns becomes (a c - b s, b c + a s), in fp32, rounded once. Half of the rotated columns is
// cut into packs; a lane rotates the N pairs of one pack, so lanes exchange nothing.
#pragma once

#include "wave64/rows.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// The low word of a token's position, int64 or int32: no cache of angles has 2^32 rows. So one load serves both widths.
WAVE64_DEVICE Bits32 position_of(const void* positions, int64_t token, int64_t stride, int position_bytes) {
    return static_cast<const Bits32*>(positions)[token * stride * (position_bytes / 4)];
}

// The cosines and sines of N pairs.
template <int N>
struct Angles {
    float cos[N], sin[N];
};

template <typename T, int N>
WAVE64_DEVICE Angles<N> load_angles_of(const void* angles, int64_t at, int half) {
    // 8 numbers of fp32 are two packs.
    constexpr int n = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    Angles<N> wide;
    for (int i = 0; i < N; i += n) {
        const auto cos = load_pack<T, n>(static_cast<const T*>(angles) + at + i).values();
        const auto sin = load_pack<T, n>(static_cast<const T*>(angles) + at + half + i).values();
        for (int j = 0; j < n; j++) wide.cos[i + j] = float(cos.at[j]), wide.sin[i + j] = float(sin.at[j]);
    }
    return wide;
}

// Those of pack `pack` in the row of `position`; a row is `half` cosines, then as many sines.
template <int N>
WAVE64_DEVICE Angles<N> load_angles(const void* angles, int dtype, int64_t position, int half, int pack) {
    const int64_t at = position * 2 * half + pack * N;
    if (dtype == kBf16) return load_angles_of<bf16, N>(angles, at, half);
    if (dtype == kFp16) return load_angles_of<fp16, N>(angles, at, half);
    return load_angles_of<float, N>(angles, at, half);
}

// The two packs of a head that hold the pairs of pack `pack`. is_neox: the second numbers are `half` columns behind the
// first; else first and second alternate, and the two packs are neighbors.
template <typename T, int N>
struct Pairs {
    Pack<T, N> low, high;

    WAVE64_DEVICE static int low_at(bool is_neox, int pack) { return is_neox ? pack * N : 2 * pack * N; }
    WAVE64_DEVICE static int high_at(bool is_neox, int half, int pack) {
        return low_at(is_neox, pack) + (is_neox ? half : N);
    }
    WAVE64_DEVICE static Pairs load(const T* head, bool is_neox, int half, int pack) {
        return {load_pack<T, N>(head + low_at(is_neox, pack)), load_pack<T, N>(head + high_at(is_neox, half, pack))};
    }
    WAVE64_DEVICE void store(T* head, bool is_neox, int half, int pack) const {
        store_pack(head + low_at(is_neox, pack), low);
        store_pack(head + high_at(is_neox, half, pack), high);
    }

    WAVE64_DEVICE Pairs rotated(bool is_neox, const Angles<N>& angles) const {
        return is_neox ? rotated<true>(angles) : rotated<false>(angles);
    }

private:
    template <bool IS_NEOX>
    WAVE64_DEVICE Pairs rotated(const Angles<N>& angles) const {
        struct Both {
            typename Pack<T, N>::Values low, high;
        };
        struct Flat {
            T at[2 * N];
        };
        const auto x = __builtin_bit_cast(Flat, Both{low.values(), high.values()});
        float y[2][N];
        for (int i = 0; i < N; i++) {
            const int first = IS_NEOX ? i : 2 * i, second = IS_NEOX ? i + N : 2 * i + 1;
            const float a = float(x.at[first]), b = float(x.at[second]);
            // one fma each, spelled out, so that every kernel that rotates gives the same bits
            y[first / N][first % N] = fma(-b, angles.sin[i], a * angles.cos[i]);
            y[second / N][second % N] = fma(b, angles.cos[i], a * angles.sin[i]);
        }
        return {Pack<T, N>::rounded(y[0]), Pack<T, N>::rounded(y[1])};
    }
};

}  // namespace wave64
#endif
