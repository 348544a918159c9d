// What kernels may call, on clang's builtins for AMD: no HIP headers, no device libraries. nvidia.h has the same names.
#pragma once

#include "wave64/types.h"

#define WAVE64_DEVICE __attribute__((device, always_inline)) inline
#define WAVE64_LDS __attribute__((shared))
// A kernel whose blocks have at most MAX_LANES lanes: the bound decides how many registers a lane may use.
#define WAVE64_KERNEL(MAX_LANES) \
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, MAX_LANES), visibility("protected"))) void

namespace wave64 {

WAVE64_DEVICE int wave_size() { return __builtin_amdgcn_wavefrontsize(); }
WAVE64_DEVICE int lane_in_block() { return __builtin_amdgcn_workitem_id_x(); }
WAVE64_DEVICE int block_id() { return __builtin_amdgcn_workgroup_id_x(); }
WAVE64_DEVICE int block_id_y() { return __builtin_amdgcn_workgroup_id_y(); }
WAVE64_DEVICE float rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }
WAVE64_DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }  // within one unit in the last place
WAVE64_DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }       // denormal results are 0
WAVE64_DEVICE float log2(float x) { return __builtin_amdgcn_logf(x); }
WAVE64_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }  // of a number and NaN, the number
WAVE64_DEVICE float min(float a, float b) { return __builtin_fminf(a, b); }
WAVE64_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }  // a * b + c, rounded once
// The largest of a, |b| and |c|; NaN is skipped. The compiler takes magnitudes before it unpacks them, one by one.
WAVE64_DEVICE float max_magnitude(float a, float b, float c) {
    asm("v_max3_f32 %0, %0, |%1|, |%2|" : "+v"(a) : "v"(b), "v"(c));
    return a;
}

WAVE64_DEVICE void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// Orders a wave's own accesses to LDS, for what its lanes exchange without the other waves.
WAVE64_DEVICE void wave_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// x of another lane of the wave.
WAVE64_DEVICE int from_lane(int x, int lane) { return __builtin_amdgcn_ds_bpermute(lane * 4, x); }
WAVE64_DEVICE float from_lane(float x, int lane) {
    return __builtin_bit_cast(float, from_lane(__builtin_bit_cast(int, x), lane));
}

// A bit per lane of the wave: set where `yes` holds.
WAVE64_DEVICE uint64_t ballot(bool yes) {
#if defined(__GFX9__)
    return __builtin_amdgcn_ballot_w64(yes);
#else
    return __builtin_amdgcn_ballot_w32(yes);
#endif
}

// Adds to a number in LDS or in device memory that other lanes of this GPU also add to; returns the value before.
WAVE64_DEVICE int atomic_add(int* at, int x) {
    return __hip_atomic_fetch_add(at, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
WAVE64_DEVICE void atomic_add(uint64_t* at, uint64_t x) {
    __hip_atomic_fetch_add(at, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
// Replaces `expected` by x; returns the value before.
WAVE64_DEVICE int atomic_swap_if(int* at, int expected, int x) {
    __hip_atomic_compare_exchange_strong(at, &expected, x, __ATOMIC_RELAXED, __ATOMIC_RELAXED,
                                         __HIP_MEMORY_SCOPE_AGENT);
    return expected;
}

// Hides a value from the compiler, so that what is computed from it stays after this point.
template <typename Bits>
WAVE64_DEVICE void forget(Bits& bits) {
    asm volatile("" : "+v"(bits));
}

// x of one lane of the wave, the same one for all.
WAVE64_DEVICE int broadcast(int x, int lane) { return __builtin_amdgcn_readlane(x, lane); }
WAVE64_DEVICE float broadcast(float x, int lane) {
    return __builtin_bit_cast(float, broadcast(__builtin_bit_cast(int, x), lane));
}

// x, which is the same in all lanes, where the compiler cannot know it.
WAVE64_DEVICE int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }

// The number at an address that is the same in all lanes, in memory that the kernel does not write.
WAVE64_DEVICE int load_uniform(const int32_t* at) {
    return *reinterpret_cast<const __attribute__((address_space(4))) int32_t*>(reinterpret_cast<uint64_t>(at));
}

// Keeps an address that is the same in all lanes in scalar registers: offsets are added to it in the instruction.
WAVE64_DEVICE void keep_uniform(const char*& address) { asm("" : "+s"(address)); }

// The same, not known to be what it was: what is computed from it is not kept over a loop, in scalar registers that
// would be spilled.
template <typename T>
WAVE64_DEVICE void forget_uniform(T& x) {
    asm volatile("" : "+s"(x));
}

// Instructions before this point are issued before those after it.
WAVE64_DEVICE void keep_order() { __builtin_amdgcn_sched_barrier(0); }

// A wait state that the compiler does not count. At the end of a loop whose first instructions use what its last ones
// multiplied: there LLVM counts both branches that end a block, though the second is not executed where the first is
// taken, and inserts one wait state too few.
WAVE64_DEVICE void wait_state() { asm volatile("s_nop 0"); }

// Loads from `at` bytes after `base`, which is the same in all lanes.
template <typename Bits>
WAVE64_DEVICE Bits load_behind(const void* base, unsigned at) {
    using Byte = const __attribute__((address_space(1))) char;
    using Place = const __attribute__((address_space(1))) Bits;
    return *reinterpret_cast<Place*>(reinterpret_cast<Byte*>(uint64_t(base)) + at);
}

// The low 16 bits of a, then those of b; and the high ones.
WAVE64_DEVICE Bits32 low_halves(Bits32 a, Bits32 b) { return __builtin_amdgcn_perm(b, a, 0x05040100); }
WAVE64_DEVICE Bits32 high_halves(Bits32 a, Bits32 b) { return __builtin_amdgcn_perm(b, a, 0x07060302); }

WAVE64_DEVICE int count_bits(uint64_t mask) { return __builtin_popcountll(mask); }

// How many of the mask's bits belong to lanes before this one.
WAVE64_DEVICE int bits_before(uint64_t mask) {
    return __builtin_amdgcn_mbcnt_hi(unsigned(mask >> 32), __builtin_amdgcn_mbcnt_lo(unsigned(mask), 0));
}

template <int CONTROL, typename T>
WAVE64_DEVICE T moved_in_row(T x) {
    return __builtin_bit_cast(T, __builtin_amdgcn_update_dpp(0, __builtin_bit_cast(int, x), CONTROL, 0xf, 0xf, true));
}

// x of some lane in the other half of each run of 2 * HALF lanes: all lanes of a half must have the same x.
template <int HALF, typename T>
WAVE64_DEVICE T from_other_half(T x) {
    if constexpr (HALF == 1) return moved_in_row<0xB1>(x);   // from lane ^ 1
    if constexpr (HALF == 2) return moved_in_row<0x4E>(x);   // from lane ^ 2
    if constexpr (HALF == 4) return moved_in_row<0x141>(x);  // from the other quad of 8: mirrored
    if constexpr (HALF == 8) return moved_in_row<0x140>(x);  // from the other half of 16: mirrored
    if constexpr (HALF > 8) return from_lane(x, (lane_in_block() % wave_size()) ^ HALF);
}

// All lanes' x reduced by `join`, in every lane. Within 16 lanes the exchange is part of the instruction (DPP); the
// results of the 16s, equal in all their lanes, are then read as scalars. All lanes of the wave must be active.
template <typename T, typename Join>
WAVE64_DEVICE T joined(T x, Join join) {
    x = join(x, from_other_half<1>(x));
    x = join(x, from_other_half<2>(x));
    x = join(x, from_other_half<4>(x));
    x = join(x, from_other_half<8>(x));
    T all = broadcast(x, 0);
    for (int lane = 16; lane < wave_size(); lane += 16) all = join(all, broadcast(x, lane));
    return all;
}

// The sum or the maximum over the wave's lanes, in every lane.
WAVE64_DEVICE float wave_sum(float x) {
    return joined(x, [](float a, float b) { return a + b; });
}
WAVE64_DEVICE int wave_sum(int x) {
    return joined(x, [](int a, int b) { return a + b; });
}
WAVE64_DEVICE float wave_max(float x) {
    return joined(x, [](float a, float b) { return max(a, b); });
}
WAVE64_DEVICE int wave_max(int x) {
    return joined(x, [](int a, int b) { return a > b ? a : b; });
}

// wave_max where `none` is the minimum and usually all lanes but one have it: then that lane's x is broadcast.
WAVE64_DEVICE int wave_max_of_rare(int x, int none) {
    const uint64_t some = ballot(x != none);
    return some & (some - 1) ? wave_max(x) : broadcast(x, __builtin_ctzll(some | uint64_t(1) << 63) % wave_size());
}

// Memory whose end the hardware knows (a buffer resource): loads past it return zero and stores are dropped, word by
// word of 4 bytes, so no lane branches. `base` must be the same in all lanes; `at` counts bytes, and so does `behind`,
// which is the same in all lanes and added in the instruction.
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
    WAVE64_DEVICE Bits load(int at, int behind = 0) const {
        if constexpr (sizeof(Bits) == 1) return __builtin_amdgcn_raw_buffer_load_b8(resource, at, behind, 0);
        if constexpr (sizeof(Bits) == 2) return __builtin_amdgcn_raw_buffer_load_b16(resource, at, behind, 0);
        if constexpr (sizeof(Bits) == 4) return __builtin_amdgcn_raw_buffer_load_b32(resource, at, behind, 0);
        if constexpr (sizeof(Bits) == 8) return __builtin_amdgcn_raw_buffer_load_b64(resource, at, behind, 0);
        if constexpr (sizeof(Bits) == 16) return __builtin_amdgcn_raw_buffer_load_b128(resource, at, behind, 0);
    }
    template <typename Bits>
    WAVE64_DEVICE void store(int at, Bits bits) const {
        if constexpr (sizeof(Bits) == 1) __builtin_amdgcn_raw_buffer_store_b8(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 2) __builtin_amdgcn_raw_buffer_store_b16(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 4) __builtin_amdgcn_raw_buffer_store_b32(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 8) __builtin_amdgcn_raw_buffer_store_b64(bits, resource, at, 0, 0);
        if constexpr (sizeof(Bits) == 16) __builtin_amdgcn_raw_buffer_store_b128(bits, resource, at, 0, 0);
    }
};

}  // namespace wave64
