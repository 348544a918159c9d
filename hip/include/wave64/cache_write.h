// Writes to KV caches. What a token adds lies in two parts, keys and values or latents and rotated keys; the lanes take
// both as one row: the packs of the first part, then those of the second.
//
// The trick: the data of several tokens is loaded while their slots are.
// Bound by memory: the new values in, 16 bytes per lane and access, the same or half of it (FP8) out.
#pragma once

#include "wave64/rows.h"

namespace wave64 {
constexpr int kCacheRows = 4;  // that a lane holds
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/fp8.h"

namespace wave64 {

// New heads of `head` columns each, and the cache, whose slots hold their heads without gaps. In and Out are bits where
// values are only moved.
template <typename In, typename Out>
struct CachePart {
    const In* from;
    int64_t stride, head_stride;
    int head;
    Out* to;
    int64_t slot_stride;
    const float* scale;  // that of a head at head * scale_stride; null: 1
    int scale_stride;
};

// A divisor and its reciprocal.
struct Divisor {
    float value, inverse;
};

// What an FP8 cache divides by: scale[at], at least 2^-126 so that the reciprocal is finite, or 1.
WAVE64_DEVICE Divisor divisor_of(const float* scale, int at = 0) {
    const float given = scale ? scale[at] : 1, value = given < 0x1p-126f ? 0x1p-126f : given;
    return {value, 1 / value};
}

// x / by, rounded to nearest, in half the instructions of a division: a guess and its correction.
WAVE64_DEVICE float quotient(float x, const Divisor& by) {
    const float guess = x * by.inverse, better = fma(-fma(guess, by.value, -x), by.inverse, guess);
    return better == better ? better : guess;  // an infinite guess has no correction
}

// A pack as the cache stores it: its bits, or x / scale in FP8.
template <typename Bits, int N>
WAVE64_DEVICE Pack<Bits, N> stored(const Pack<Bits, N>& x, const Divisor&, Bits*) {
    return x;
}
#if WAVE64_HAS_FP8
template <typename T, int N>
WAVE64_DEVICE Pack<Bits8, N> stored(const Pack<T, N>& x, const Divisor& scale, Bits8*) {
    struct {
        Bits32 at[(N + 3) / 4];
    } words;
    const auto values = x.values();
    for (int i = 0; i < N; i += 4) {
        float q[4] = {};
        for (int j = 0; j < 4 && i + j < N; j++) q[j] = quotient(float(values.at[i + j]), scale);
        words.at[i / 4] = to_fp8(q[0], q[1], q[2], q[3]);
    }
    if constexpr (N == 1)
        return {Bits8(words.at[0])};
    else
        return {__builtin_bit_cast(typename Pack<Bits8, N>::Bits, words)};
}
#endif

template <int N, typename In, typename Out>
WAVE64_DEVICE void write_cache(const RowPartition& partition, int64_t num_tokens, const int64_t* slots, int first_packs,
                               const CachePart<In, Out>& first_part, const CachePart<In, Out>& second_part) {
    const LaneRows rows = lane_rows(partition);
    const bool is_first = rows.pack < first_packs;
    const CachePart<In, Out> part = is_first ? first_part : second_part;
    const unsigned column = (is_first ? rows.pack : rows.pack - first_packs) * N;
    const unsigned head = column / unsigned(part.head);
    const In* from = part.from + head * part.head_stride + (column - head * part.head);
    Out* to = part.to + column;

    for (int64_t first = rows.first; first < num_tokens; first += kCacheRows * rows.step) {
        int64_t slot[kCacheRows];
        Pack<In, N> x[kCacheRows];
#pragma unroll
        for (int i = 0; i < kCacheRows; i++) {
            const int64_t token = first + i * rows.step;
            if (token >= num_tokens) break;
            slot[i] = slots[token];
            x[i] = load_pack<In, N>(from + token * part.stride);
        }
        const Divisor scale = divisor_of(part.scale, head * part.scale_stride);  // here, so that no load waits
#pragma unroll
        for (int i = 0; i < kCacheRows; i++) {
            if (first + i * rows.step >= num_tokens) break;
            if (slot[i] >= 0) store_pack(to + slot[i] * part.slot_stride, stored(x[i], scale, to));
        }
    }
}

}  // namespace wave64

// The kernels of operator OP, whose template OP<In, Out, N>(args) calls write_cache.
#define WAVE64_CACHE_KERNEL(OP, NAME, ARGS, IN, OUT, N)                                 \
    WAVE64_KERNEL(512) OP##_##NAME(wave64::ARGS args) { wave64::OP<IN, OUT, N>(args); } \
    WAVE64_KERNEL(512) OP##_##NAME##_unaligned(wave64::ARGS args) { wave64::OP<IN, OUT, 1>(args); }
#define WAVE64_CACHE_COPIES(OP, ARGS)                                       \
    WAVE64_CACHE_KERNEL(OP, 16bit, ARGS, wave64::Bits16, wave64::Bits16, 8) \
    WAVE64_CACHE_KERNEL(OP, 32bit, ARGS, wave64::Bits32, wave64::Bits32, 4)
#define WAVE64_CACHE_FP8(OP, ARGS)                                               \
    WAVE64_CACHE_KERNEL(OP, fp8_from_bf16, ARGS, wave64::bf16, wave64::Bits8, 8) \
    WAVE64_CACHE_KERNEL(OP, fp8_from_fp16, ARGS, wave64::fp16, wave64::Bits8, 8) \
    WAVE64_CACHE_KERNEL(OP, fp8_from_fp32, ARGS, float, wave64::Bits8, 4)
#if WAVE64_HAS_FP8
#define WAVE64_CACHE_WRITE(OP, ARGS) WAVE64_CACHE_COPIES(OP, ARGS) WAVE64_CACHE_FP8(OP, ARGS)
#else
#define WAVE64_CACHE_WRITE(OP, ARGS) WAVE64_CACHE_COPIES(OP, ARGS)
#endif

#else
namespace wave64 {

struct CacheKernels {
    const char* copy[2];  // aligned, unaligned
    const char* to_fp8[2];
};

#define WAVE64_CACHE_NAMES(OP, COPY, TO_FP8) {{OP COPY, OP COPY "_unaligned"}, {OP TO_FP8, OP TO_FP8 "_unaligned"}}
// By dtype.
#define WAVE64_CACHE_KERNELS(OP)                                                                               \
    {WAVE64_CACHE_NAMES(#OP, "_16bit", "_fp8_from_bf16"), WAVE64_CACHE_NAMES(#OP, "_16bit", "_fp8_from_fp16"), \
     WAVE64_CACHE_NAMES(#OP, "_32bit", "_fp8_from_fp32")}

// Launches the kernel of a row of `row` new values, in packs of 16 bytes where the rows are aligned to them.
template <typename Args>
void launch_cache_write(const Call& call, const CacheKernels (&kernels)[3], bool aligned, int64_t row, Args& args) {
    const char* const* names = args.cache_dtype == kFp8 ? kernels[args.dtype].to_fp8 : kernels[args.dtype].copy;
    const int64_t packs = aligned ? row * element_bytes(args.dtype) / 16 : row;
    launch_over_rows(call, names[!aligned], args.num_tokens, packs, kCacheRows, args);
}

}  // namespace wave64
#endif
