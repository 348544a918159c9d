// The C ABI of the HIP operators: per op one plain struct, which is the kernel's only argument, and one launcher.
//
// Read by three compilers: the host's, clang for AMD and, for development, nvcc. So: fixed-width fields, no pointers to
// anything but device memory, no torch, no HIP, no standard library on the device side.
// Strides are in elements. Fields after "set by the launcher" are not the caller's.
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

// kFp8 is the architecture's own flavour: e4m3fnuz on gfx942, e4m3fn elsewhere (fp8.h).
enum Dtype : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2, kFp8 = 3 };

// What a launcher returns; the words are in wave64_error().
enum Status : int32_t {
    kOk = 0,
    kBadArgument = 1,  // the caller's mistake; nothing was launched
    kUnavailable = 2,  // no runtime, no GPU, or no code object for it
    kRuntimeError = 3  // HIP refused
};

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, in fp32, rounded once. out may be x.
struct RmsNormArgs {
    const void* x;       // [num_tokens, hidden], rows x_stride apart
    const void* weight;  // [hidden]
    void* out;           // [num_tokens, hidden], rows out_stride apart
    int64_t x_stride;
    int64_t out_stride;
    int64_t num_tokens;
    int32_t hidden;
    float eps;
    int32_t dtype;  // of x, weight and out
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks
};

}  // namespace wave64

#ifndef WAVE64_DEVICE_CODE
extern "C" {

// The words for this thread's last status that was not kOk.
const char* wave64_error();

int32_t wave64_rms_norm(const wave64::RmsNormArgs* args, void* stream);
}
#endif
