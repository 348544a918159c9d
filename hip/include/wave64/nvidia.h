// What kernels may call, on nvcc's builtins: for development on NVIDIA only. amd.h has the same names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "wave64/types.h"

#define WAVE64_DEVICE __device__ __forceinline__
#define WAVE64_LDS __shared__
#define WAVE64_KERNEL(MAX_LANES) extern "C" __global__ __launch_bounds__(MAX_LANES) void

namespace wave64 {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using Bits64 = uint2;
using Bits128 = uint4;

WAVE64_DEVICE int wave_size() { return 32; }
WAVE64_DEVICE int lane_in_block() { return threadIdx.x; }
WAVE64_DEVICE int block_id() { return blockIdx.x; }
WAVE64_DEVICE int block_id_y() { return blockIdx.y; }
WAVE64_DEVICE float rsqrt(float x) {
    asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
WAVE64_DEVICE float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
WAVE64_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
WAVE64_DEVICE float log2(float x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
WAVE64_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
WAVE64_DEVICE float min(float a, float b) { return ::fminf(a, b); }
WAVE64_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }

struct Floats2 {
    float x, y;
};
WAVE64_DEVICE Floats2 operator+(Floats2 a, Floats2 b) { return {a.x + b.x, a.y + b.y}; }
WAVE64_DEVICE Floats2 operator*(Floats2 a, Floats2 b) { return {a.x * b.x, a.y * b.y}; }
WAVE64_DEVICE Floats2 fma(Floats2 a, Floats2 b, Floats2 c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)}; }

// Two numbers of a 16-bit dtype, in one instruction: converted one by one they take four times as long each.
WAVE64_DEVICE Bits32 rounded_pair(float a, float b, bf16) {
    Bits32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}
WAVE64_DEVICE Bits32 rounded_pair(float a, float b, fp16) {
    Bits32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}

WAVE64_DEVICE void block_barrier() { __syncthreads(); }

WAVE64_DEVICE void wave_barrier() { __syncwarp(); }
WAVE64_DEVICE int from_lane(int x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
WAVE64_DEVICE float from_lane(float x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
WAVE64_DEVICE uint64_t ballot(bool yes) { return __ballot_sync(0xffffffff, yes); }
WAVE64_DEVICE int atomic_add(int* at, int x) { return atomicAdd(at, x); }
// In LDS only halves are added without a loop; the sum is whole when all who add to it have.
WAVE64_DEVICE void atomic_add(uint64_t* at, uint64_t x) {
    unsigned* const halves = reinterpret_cast<unsigned*>(at);
    const unsigned low = unsigned(x), carry = atomicAdd(halves, low) + low < low, high = unsigned(x >> 32) + carry;
    if (high) atomicAdd(halves + 1, high);
}
WAVE64_DEVICE int atomic_swap_if(int* at, int expected, int x) { return atomicCAS(at, expected, x); }

WAVE64_DEVICE void forget(Bits8& bits) {
    Bits16 wide = bits;
    asm volatile("" : "+h"(wide));
    bits = Bits8(wide);
}
WAVE64_DEVICE void forget(Bits16& bits) { asm volatile("" : "+h"(bits)); }
WAVE64_DEVICE void forget(Bits32& bits) { asm volatile("" : "+r"(bits)); }
WAVE64_DEVICE void forget(Bits64& bits) { asm volatile("" : "+r"(bits.x), "+r"(bits.y)); }
WAVE64_DEVICE void forget(Bits128& bits) { asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)); }

WAVE64_DEVICE int load_uniform(const int32_t* at) { return __ldg(at); }
WAVE64_DEVICE void keep_order() { __syncwarp(); }  // which the assembler does not move loads of global memory across
template <typename Bits>
WAVE64_DEVICE Bits load_behind(const void* base, unsigned at) {
    return *reinterpret_cast<const Bits*>(static_cast<const char*>(base) + at);
}
WAVE64_DEVICE Bits32 low_halves(Bits32 a, Bits32 b) { return __byte_perm(a, b, 0x5410); }
WAVE64_DEVICE Bits32 high_halves(Bits32 a, Bits32 b) { return __byte_perm(a, b, 0x7632); }

WAVE64_DEVICE int count_bits(uint64_t mask) { return __popcll(mask); }
WAVE64_DEVICE int bits_before(uint64_t mask) { return __popc(unsigned(mask) & ((1u << threadIdx.x % 32) - 1)); }
template <int HALF, typename T>
WAVE64_DEVICE T from_other_half(T x) {
    return __shfl_xor_sync(0xffffffff, x, HALF);
}

WAVE64_DEVICE float wave_sum(float x) {
    for (int mask = 1; mask < wave_size(); mask *= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
    return x;
}

WAVE64_DEVICE float wave_max(float x) {
    for (int mask = 1; mask < wave_size(); mask *= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, mask));
    return x;
}
WAVE64_DEVICE int wave_sum(int x) { return __reduce_add_sync(0xffffffff, x); }
WAVE64_DEVICE int wave_max(int x) { return __reduce_max_sync(0xffffffff, x); }

class Bounded {
    char* base;
    int bytes;

public:
    WAVE64_DEVICE Bounded(const void* base, int bytes)
        : base(static_cast<char*>(const_cast<void*>(base))), bytes(bytes) {}
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at, int behind = 0) const {
        at += behind;
        return at < bytes ? *reinterpret_cast<const Bits*>(base + at) : Bits{};
    }
    template <typename Bits>
    WAVE64_DEVICE void store(int at, Bits bits) const {
        if (at < bytes) *reinterpret_cast<Bits*>(base + at) = bits;
    }
};

}  // namespace wave64
