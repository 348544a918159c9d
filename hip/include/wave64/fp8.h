// FP8 as the architecture's instructions convert it: e4m3fnuz (at most 240) on gfx942, e4m3fn (448) on gfx950, gfx12
// and NVIDIA. WAVE64_HAS_FP8 is 0 for architectures without (gfx90a, gfx11): kernels that need FP8 are left out there.
#pragma once

#include "wave64/device.h"

#if defined(__HIP__) || defined(WAVE64_CPU)
#if defined(__gfx942__) || defined(__gfx950__) || defined(__GFX12__)
#define WAVE64_HAS_FP8 1
#else
#define WAVE64_HAS_FP8 0
#endif
#else
#define WAVE64_HAS_FP8 1
#endif

#if WAVE64_HAS_FP8
namespace wave64 {

#if defined(__gfx942__)
constexpr float kFp8Max = 240;
#else
constexpr float kFp8Max = 448;
#endif

// The smallest scale with a finite reciprocal: smaller ones are raised to it, so that 0 times the reciprocal is 0.
constexpr float kMinScale = 0x1p-126f;

// Four numbers within the range, rounded to nearest even. NaN stays NaN.
WAVE64_DEVICE Bits32 to_fp8_in_range(float a, float b, float c, float d) {
#if defined(WAVE64_CPU)
    constexpr int bias = kFp8Max == 240 ? 8 : 7;
    return fp8_bits(a, bias, kFp8Max) | fp8_bits(b, bias, kFp8Max) << 8 | fp8_bits(c, bias, kFp8Max) << 16 |
           fp8_bits(d, bias, kFp8Max) << 24;
#elif defined(__HIP__)
    // Into a's register: of another's half, which is replaced next, something would have to be written first.
    const int low = __builtin_amdgcn_cvt_pk_fp8_f32(a, b, __builtin_bit_cast(int, a), false);
    return __builtin_amdgcn_cvt_pk_fp8_f32(c, d, low, true);
#else
    const auto pair = [](float x, float y) {
        return Bits32(__nv_cvt_float2_to_fp8x2(float2{x, y}, __NV_SATFINITE, __NV_E4M3));
    };
    return pair(a, b) | pair(c, d) << 16;
#endif
}

// Any four numbers; those beyond the range are clamped to it.
WAVE64_DEVICE Bits32 to_fp8(float a, float b, float c, float d) {
#if defined(__HIP__)
    // The instruction makes NaN of numbers out of range, so they are clamped first; that would make -kFp8Max of a NaN.
    const auto inside = [](float x) { return x != x ? x : __builtin_amdgcn_fmed3f(x, kFp8Max, -kFp8Max); };
    return to_fp8_in_range(inside(a), inside(b), inside(c), inside(d));
#else
    return to_fp8_in_range(a, b, c, d);
#endif
}

struct Float4 {
    float at[4];
};

// The four numbers in a word, the lowest byte first.
WAVE64_DEVICE Float4 from_fp8(Bits32 word) {
#if defined(WAVE64_CPU)
    constexpr int bias = kFp8Max == 240 ? 8 : 7;
    return {{fp8_value(word & 255, bias), fp8_value(word >> 8 & 255, bias), fp8_value(word >> 16 & 255, bias),
             fp8_value(word >> 24, bias)}};
#elif defined(__HIP__)
    const auto low = __builtin_amdgcn_cvt_pk_f32_fp8(word, false), high = __builtin_amdgcn_cvt_pk_f32_fp8(word, true);
    return {{low[0], low[1], high[0], high[1]}};
#else
    const auto pair = [](Bits32 bits) {
        return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(bits), __NV_E4M3)));
    };
    const float2 low = pair(word & 0xffff), high = pair(word >> 16);
    return {{low.x, low.y, high.x, high.y}};
#endif
}

}  // namespace wave64
#endif
