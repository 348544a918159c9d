// What an op's host section uses: errors in words, the device it plans for, the launch, and the op's entry in the
// module. It sees no GPU runtime: hip/src/runtime.cpp opens that by name when something is first launched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "wave64/abi.h"

namespace wave64 {

// Keeps the words (printf's format) for wave64_error() on this thread and returns `status`.
__attribute__((format(printf, 2, 3))) int32_t fail(int32_t status, const char* format, ...);

// A refused argument: "rms_norm: hidden: expected at least 0, got -1".
int32_t refuse(const char* op, const char* argument, const char* expected, int64_t got);

struct Device {
    std::string arch;  // gfx942, sm_90: also the folder of its code objects
    int compute_units;
    int wave_size;
    int lds_bytes;
};

// The device launches go to: the recorded one inside a recording, else the runtime's current device.
int32_t current_device(const Device** device);

struct Launch {
    const char* op;      // the code object
    const char* kernel;  // the function in it
    uint32_t grid[3];    // blocks
    uint32_t block[3];   // lanes
    uint32_t lds_bytes;  // beside what the kernel declares itself
};

int32_t launch(const Launch& launch, const void* args, size_t args_size, void* stream);

// A field of an op's struct that the caller sets. kind is Python's struct code: P pointer, q int64, i int32, f float.
struct Field {
    const char* name;
    char kind;
    size_t offset;
};

template <typename T>
constexpr char kind_of() {
    if constexpr (std::is_pointer_v<T>) return 'P';
    if constexpr (std::is_same_v<T, int64_t>) return 'q';
    if constexpr (std::is_same_v<T, int32_t>) return 'i';
    if constexpr (std::is_same_v<T, float>) return 'f';
}

#define WAVE64_FIELD(ARGS, NAME) \
    wave64::Field { #NAME, wave64::kind_of<decltype(ARGS::NAME)>(), offsetof(ARGS, NAME) }

// An op as the module offers it. Each .hip file registers its own at load, so that no list of ops is kept anywhere.
struct Op {
    const char* name;
    size_t args_size;
    std::vector<Field> fields;
    int32_t (*run)(const void* args, void* stream);
};

std::vector<Op>& ops();

template <typename Args, int32_t (*RUN)(const Args*, void*)>
bool register_op(const char* name, std::initializer_list<Field> fields) {
    static_assert(std::is_trivially_copyable_v<Args> && std::is_standard_layout_v<Args>);
    ops().push_back({name, sizeof(Args), fields,
                     [](const void* args, void* stream) { return RUN(static_cast<const Args*>(args), stream); }});
    return true;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// `d` as kernels divide by it: 1 to 2^31.
inline IntDivider divider(uint32_t d) {
    const int32_t bits = d > 1 ? 32 - __builtin_clz(d - 1) : 0;  // of what is rounded up to a power of two
    return {uint32_t((uint64_t(1) << (31 + bits)) / d + 1), 31 + bits};
}

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether 16 divides all of these: addresses, and sizes and strides in bytes.
inline bool is_16_aligned(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> steps) {
    uint64_t bits = 0;
    for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
    for (int64_t step : steps) bits |= uint64_t(step);
    return bits % 16 == 0;
}

}  // namespace wave64
