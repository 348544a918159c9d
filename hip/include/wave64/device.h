// The device names that kernels use, on clang's own builtins for AMD (no HIP headers, no device libraries) and on
// nvcc's for NVIDIA, which is for development only. Lane, wave, block and lds mean the same on both; the wave size does
// not.
#pragma once

#include "wave64/abi.h"

#if defined(__HIP__)

#define WAVE64_DEVICE __attribute__((device, always_inline)) inline
#define WAVE64_LDS __attribute__((shared))
// A kernel whose blocks have at most MAX_LANES lanes: the bound decides how many registers a lane may use.
#define WAVE64_KERNEL(MAX_LANES) \
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, MAX_LANES), visibility("protected"))) void

namespace wave64 {

using bf16 = __bf16;
using fp16 = _Float16;
using Bits16 = unsigned short;
using Bits32 = unsigned;
using Bits128 = unsigned __attribute__((ext_vector_type(4)));

WAVE64_DEVICE int wave_size() { return __builtin_amdgcn_wavefrontsize(); }
WAVE64_DEVICE int lane_in_block() { return __builtin_amdgcn_workitem_id_x(); }
WAVE64_DEVICE int block_id() { return __builtin_amdgcn_workgroup_id_x(); }
WAVE64_DEVICE float rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }

WAVE64_DEVICE void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// Tells the compiler nothing about a value it knew: what is computed from it stays after this point.
template <typename Bits>
WAVE64_DEVICE void forget(Bits& bits) {
    asm volatile("" : "+v"(bits));
}

template <int CONTROL>
WAVE64_DEVICE float moved_in_row(float x) {
    return __builtin_bit_cast(float,
                              __builtin_amdgcn_update_dpp(0, __builtin_bit_cast(int, x), CONTROL, 0xf, 0xf, true));
}

// The sum over the wave's lanes, in every lane. Within 16 lanes the exchange rides on the addition (DPP); the sums of
// the 16s, equal in all their lanes, are then read as scalars. All lanes of the wave must be active.
WAVE64_DEVICE float wave_sum(float x) {
    x += moved_in_row<0xB1>(x);   // from lane ^ 1
    x += moved_in_row<0x4E>(x);   // from lane ^ 2
    x += moved_in_row<0x141>(x);  // from the other quad of 8: mirrored
    x += moved_in_row<0x140>(x);  // from the other half of 16: mirrored
    float sum = 0;
    for (int lane = 0; lane < wave_size(); lane += 16)
        sum += __builtin_bit_cast(float, __builtin_amdgcn_readlane(__builtin_bit_cast(int, x), lane));
    return sum;
}

// Memory whose end the hardware knows (a buffer resource): what lies past it reads as zero and is not written, so no
// lane branches. `base` must be the same in all lanes; `at` counts bytes.
class Bounded {
    __amdgpu_buffer_rsrc_t resource;

public:
    WAVE64_DEVICE Bounded(const void* base, int bytes) {
#if defined(__GFX9__)
        constexpr int kind = 0x00027000;
#else  // RDNA also wants to know how bounds are checked: by byte offset
        constexpr int kind = 0x31027000;
#endif
        resource = __builtin_amdgcn_make_buffer_rsrc(const_cast<void*>(base), 0, bytes, kind);
    }
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at) const {
        if constexpr (sizeof(Bits) == 2) return __builtin_amdgcn_raw_buffer_load_b16(resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 4) return __builtin_amdgcn_raw_buffer_load_b32(resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 16) return __builtin_amdgcn_raw_buffer_load_b128(resource, at, 0, 0);
    }
    template <typename Bits>
    WAVE64_DEVICE void store(int at, Bits bits) const {
        if constexpr (sizeof(Bits) == 2) __builtin_amdgcn_raw_buffer_store_b16(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 4) __builtin_amdgcn_raw_buffer_store_b32(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 16) __builtin_amdgcn_raw_buffer_store_b128(bits, resource, at, 0, 0);
    }
};

}  // namespace wave64

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WAVE64_DEVICE __device__ __forceinline__
#define WAVE64_LDS __shared__
#define WAVE64_KERNEL(MAX_LANES) extern "C" __global__ __launch_bounds__(MAX_LANES) void

namespace wave64 {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using Bits16 = unsigned short;
using Bits32 = unsigned;
using Bits128 = uint4;

WAVE64_DEVICE int wave_size() { return 32; }
WAVE64_DEVICE int lane_in_block() { return threadIdx.x; }
WAVE64_DEVICE int block_id() { return blockIdx.x; }
WAVE64_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
WAVE64_DEVICE void block_barrier() { __syncthreads(); }

WAVE64_DEVICE void forget(Bits16& bits) { asm volatile("" : "+h"(bits)); }
WAVE64_DEVICE void forget(Bits32& bits) { asm volatile("" : "+r"(bits)); }
WAVE64_DEVICE void forget(Bits128& bits) { asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)); }

WAVE64_DEVICE float wave_sum(float x) {
    for (int mask = 1; mask < wave_size(); mask *= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
    return x;
}

class Bounded {
    char* base;
    int bytes;

public:
    WAVE64_DEVICE Bounded(const void* base, int bytes)
        : base(static_cast<char*>(const_cast<void*>(base))), bytes(bytes) {}
    template <typename Bits>
    WAVE64_DEVICE Bits load(int at) const {
        return at < bytes ? *reinterpret_cast<const Bits*>(base + at) : Bits{};
    }
    template <typename Bits>
    WAVE64_DEVICE void store(int at, Bits bits) const {
        if (at < bytes) *reinterpret_cast<Bits*>(base + at) = bits;
    }
};

}  // namespace wave64

#endif

namespace wave64 {

template <int BYTES>
struct BitsOf;
template <>
struct BitsOf<2> {
    using type = Bits16;
};
template <>
struct BitsOf<4> {
    using type = Bits32;
};
template <>
struct BitsOf<16> {
    using type = Bits128;
};

// N values that move as one memory access. It stays bits until it is used: a load converted at once is a load waited
// for.
template <typename T, int N>
struct Pack {
    using Bits = typename BitsOf<sizeof(T) * N>::type;
    struct Values {
        T at[N];
    };
    Bits bits;

    WAVE64_DEVICE Values values() const { return __builtin_bit_cast(Values, bits); }
    WAVE64_DEVICE static Pack of(const Values& values) { return {__builtin_bit_cast(Bits, values)}; }
};

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

// The sum over the block's lanes, in every lane; `lds` holds a float per wave and may be read until the next barrier.
WAVE64_DEVICE float block_sum(float x, float* lds, int block) {
    x = wave_sum(x);
    const int num_waves = block / wave_size(), lane = lane_in_block() % wave_size();
    if (num_waves == 1) return x;
    if (lane == 0) lds[lane_in_block() / wave_size()] = x;
    block_barrier();
    return wave_sum(lane < num_waves ? lds[lane] : 0);
}

}  // namespace wave64
