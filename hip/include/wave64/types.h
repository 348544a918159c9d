// What kernels, launchers and Python share: fixed-width integers, dtype codes, and a divisor that kernels divide by.
//
// Read by three compilers: the host's, clang for AMD and, for development, nvcc. So: no torch, no HIP, and no standard
// library on the device side. An op's own struct, the kernel's only argument, stands in its .hip file: fixed-width
// fields, pointers to device memory, strides in elements. The caller's fields come first, in the order in which the
// host section lists them; the others are set by the launcher.
#pragma once

#if defined(__HIP__) || defined(__CUDACC__) || defined(WAVE64_CPU)
#define WAVE64_DEVICE_CODE 1
using int32_t = __INT32_TYPE__;
using int64_t = __INT64_TYPE__;
using uint32_t = __UINT32_TYPE__;
using uint64_t = __UINT64_TYPE__;
#else
#include <cstdint>
#endif

namespace wave64 {

// kFp8 is the architecture's own flavor: e4m3fnuz on gfx942, e4m3fn elsewhere (fp8.h). Python reads the codes from
// wave64._hip.
enum Dtype : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2, kFp8 = 3 };

// Where each rank of a group has something, by rank; those that the group lacks are null.
struct Addresses {
    void* at[8];
};

// A divisor of integers below 2^31: n / d is n * factor >> shift, since a GPU has no integer division (Granlund and
// Montgomery 1994).
struct IntDivider {
    uint32_t factor;
    int32_t shift;
};

}  // namespace wave64
