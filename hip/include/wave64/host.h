// What an op's host section uses: checks whose errors name op and field, the device it plans for, launches, and the
// op's entry in the module. It sees no GPU runtime: hip/src/runtime.cpp opens that when something is first launched.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "wave64/types.h"

namespace wave64 {

enum Status : int32_t {
    kOk = 0,
    kBadArgument = 1,  // the caller's mistake; nothing was launched
    kUnavailable = 2,  // no runtime, no GPU, or no code object for it
    kRuntimeError = 3  // HIP refused
};

// Keeps the message (printf's format) for last_error() on this thread and returns `status`.
__attribute__((format(printf, 2, 3))) int32_t fail(int32_t status, const char* format, ...);

// The message of this thread's last status that was not kOk.
const char* last_error();

struct Device {
    std::string arch;  // gfx942, sm_90: also the folder of its code objects
    int compute_units;
    int wave_size;
    int lds_bytes;

    bool is_nvidia() const { return arch.rfind("sm_", 0) == 0; }
};

// The device launches go to: the recorded one inside a recording, else the runtime's current device.
int32_t current_device(const Device** device);

struct Launch {
    const char* op;      // the code object
    const char* kernel;  // the function in it
    uint32_t grid[3];    // blocks
    uint32_t block[3];   // lanes
    uint32_t lds_bytes;  // on top of what the kernel declares itself
};

int32_t launch(const Launch& launch, const void* args, size_t args_size, void* stream);

// Thrown in a launcher; the message is in last_error().
struct Failed {
    int32_t status;
};

struct Grid {
    int64_t x, y = 1;
};

// One call of an op: what its launcher checks, plans and launches with.
class Call {
    const char* op;
    void* stream;

public:
    const Device& device;

    Call(const char* op, const Device& device, void* stream) : op(op), stream(stream), device(device) {}

    // Refuses the call unless the condition holds: "rms_norm: hidden: expected 0 to 2^28, got -1".
    void expect(bool holds, const char* field, const std::string& expected, const std::string& got) const {
        if (holds) return;
        throw Failed{fail(kBadArgument, "%s: %s: expected %s, got %s", op, field, expected.c_str(), got.c_str())};
    }
    void expect(bool holds, const char* field, const char* expected, int64_t got) const {
        if (!holds) expect(false, field, std::string(expected), std::to_string(got));
    }
    void expect_min(const char* field, int64_t got, int64_t min) const {
        if (got < min) expect(false, field, "at least " + std::to_string(min), std::to_string(got));
    }
    void expect_range(const char* field, int64_t got, int64_t min, int64_t max) const {
        if (got >= min && got <= max) return;
        const int log2 = 63 - __builtin_clzll(uint64_t(max));
        const bool is_power = log2 > 10 && max == int64_t(1) << log2;
        expect(false, field,
               std::to_string(min) + " to " + (is_power ? "2^" + std::to_string(log2) : std::to_string(max)),
               std::to_string(got));
    }
    // One of the dtypes that kernels calculate in.
    void expect_float(const char* field, Dtype got) const {
        if (got < kBf16 || got > kFp32) expect(false, field, "bf16, fp16 or fp32", name_of(got));
    }
    // The dtype of what is written to a cache: that of the new values, or FP8.
    void expect_cache_dtype(Dtype got, Dtype dtype) const {
        if (got != dtype && got != kFp8) expect(false, "cache_dtype", name_of(dtype) + " or fp8", name_of(got));
    }
    void expect_tensors(std::initializer_list<std::pair<const char*, const void*>> tensors) const {
        for (auto [field, address] : tensors)
            if (!address) expect(false, field, "a tensor", "None");
    }
    static std::string name_of(Dtype dtype) {
        constexpr const char* names[] = {"bf16", "fp16", "fp32", "fp8"};
        return dtype >= kBf16 && dtype <= kFp8 ? names[dtype] : std::to_string(dtype);
    }

    template <typename Args>
    void launch(const char* kernel, Grid grid, int64_t lanes, const Args& args) const {
        const Launch one = {op, kernel, {uint32_t(grid.x), uint32_t(grid.y), 1}, {uint32_t(lanes), 1, 1}, 0};
        if (int32_t status = wave64::launch(one, &args, sizeof args, stream)) throw Failed{status};
    }
};

// A field of an op's struct that the caller sets. kind is Python's struct code: P pointer, q int64, i int32, f float;
// A is an array of pointers, Addresses.
struct Field {
    const char* name;
    char kind;
    bool is_dtype;
    size_t offset, size, alignment;
};

template <typename T>
constexpr char kind_of() {
    if constexpr (std::is_pointer_v<T>) return 'P';
    if constexpr (std::is_same_v<T, Addresses>) return 'A';
    if constexpr (std::is_same_v<T, int64_t>) return 'q';
    if constexpr (std::is_same_v<T, int32_t> || std::is_same_v<T, Dtype>) return 'i';
    if constexpr (std::is_same_v<T, float>) return 'f';
}

// Whether the fields are listed in the struct's order, none left out, from its beginning.
template <size_t N>
constexpr bool in_order(const Field (&fields)[N]) {
    size_t end = 0;
    for (const Field& field : fields) {
        if (field.offset != (end + field.alignment - 1) / field.alignment * field.alignment) return false;
        end = field.offset + field.size;
    }
    return true;
}

struct Constant {
    const char* name;
    int64_t value;
};

// An op as the module offers it. Each .hip file registers its own at load, so that no list of ops is kept anywhere.
struct Op {
    const char* name;
    size_t args_size;
    std::vector<Field> fields;
    std::vector<Constant> constants;  // which its adapter needs, too
    int32_t (*run)(const void* args, void* stream);
};

std::vector<Op>& ops();

template <const char* NAME, typename Args, void (*RUN)(Args, const Call&)>
int32_t run_op(const void* args, void* stream) {
    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    try {
        RUN(*static_cast<const Args*>(args), Call(NAME, *device, stream));
    } catch (const Failed& failed) {
        return failed.status;
    }
    return kOk;
}

// WAVE64_FIELDS(Args, a, b, ...): a Field for each name.
#define WAVE64_EXPAND(...) WAVE64_EXPAND_3(WAVE64_EXPAND_3(WAVE64_EXPAND_3(WAVE64_EXPAND_3(__VA_ARGS__))))
#define WAVE64_EXPAND_3(...) WAVE64_EXPAND_2(WAVE64_EXPAND_2(WAVE64_EXPAND_2(WAVE64_EXPAND_2(__VA_ARGS__))))
#define WAVE64_EXPAND_2(...) WAVE64_EXPAND_1(WAVE64_EXPAND_1(WAVE64_EXPAND_1(WAVE64_EXPAND_1(__VA_ARGS__))))
#define WAVE64_EXPAND_1(...) __VA_ARGS__
#define WAVE64_PARENTHESES ()
#define WAVE64_FIELDS_AGAIN() WAVE64_NEXT_FIELD
#define WAVE64_NEXT_FIELD(ARGS, NAME, ...)                             \
    wave64::Field{#NAME,                                               \
                  wave64::kind_of<decltype(ARGS::NAME)>(),             \
                  std::is_same_v<decltype(ARGS::NAME), wave64::Dtype>, \
                  offsetof(ARGS, NAME),                                \
                  sizeof ARGS::NAME,                                   \
                  alignof(decltype(ARGS::NAME))} __VA_OPT__(,          \
                                                            WAVE64_FIELDS_AGAIN WAVE64_PARENTHESES(ARGS, __VA_ARGS__))
#define WAVE64_FIELDS(ARGS, ...) WAVE64_EXPAND(WAVE64_NEXT_FIELD(ARGS, __VA_ARGS__))

// Registers the launcher void OP(ARGS, const Call&) of this namespace; then the fields of ARGS that the caller sets, in
// the struct's order.
#define WAVE64_OP(OP, ARGS, ...) WAVE64_OP_AND_CONSTANTS(OP, ARGS, ({}), __VA_ARGS__)
// With constants in parentheses, ({{"MAX_EXPERTS", kMaxExperts}}), that Python finds as wave64._hip.OP.MAX_EXPERTS.
#define WAVE64_OP_AND_CONSTANTS(OP, ARGS, CONSTANTS, ...)                                                 \
    constexpr char OP##_name[] = #OP;                                                                     \
    constexpr wave64::Field OP##_fields[] = {WAVE64_FIELDS(ARGS, __VA_ARGS__)};                           \
    static_assert(wave64::in_order(OP##_fields), #OP ": list the caller's fields in the struct's order"); \
    static_assert(std::is_trivially_copyable_v<ARGS> && std::is_standard_layout_v<ARGS>);                 \
    [[maybe_unused]] const bool OP##_registered =                                                         \
        (wave64::ops().push_back({OP##_name,                                                              \
                                  sizeof(ARGS),                                                           \
                                  {std::begin(OP##_fields), std::end(OP##_fields)},                       \
                                  WAVE64_EXPAND_1 CONSTANTS,                                              \
                                  &wave64::run_op<OP##_name, ARGS, OP>}),                                 \
         true);

// The kernels of an op by dtype, as WAVE64_KERNELS (device.h) makes them, for rows of packs of 16 bytes and for others.
struct KernelPair {
    const char *aligned, *unaligned;

    const char* of(bool is_aligned) const { return is_aligned ? aligned : unaligned; }
};
using KernelPairs = KernelPair[3];
#define WAVE64_KERNEL_PAIRS(OP) \
    {{#OP "_bf16", #OP "_bf16_unaligned"}, {#OP "_fp16", #OP "_fp16_unaligned"}, {#OP "_fp32", #OP "_fp32_unaligned"}}

constexpr int64_t kMaxGridY = 65535;

inline int64_t element_bytes(Dtype dtype) { return dtype == kFp8 ? 1 : dtype == kFp32 ? 4 : 2; }

inline void expect_matrix_dtype(const Call& call, Dtype dtype) {
    call.expect(dtype == kBf16 || dtype == kFp16, "dtype", std::string("bf16 or fp16"), Call::name_of(dtype));
}

// Of a sequence's pages, up to 2^30 keys.
inline void expect_capacity(const Call& call, int32_t max_pages, int32_t page_size) {
    call.expect(max_pages >= 0 && max_pages <= (1 << 30) / page_size, "max_pages", "a capacity of at most 2^30 keys",
                max_pages);
}

// A key of a sequence is addressed by 32 bits from its page's first.
inline void expect_row_stride(const Call& call, const char* name, int64_t stride) {
    call.expect_range(name, stride, 0, (1 << 26) - 1);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `d` as kernels divide by it: 1 to 2^31.
inline IntDivider divider(uint32_t d) {
    const int32_t bits = d > 1 ? 32 - __builtin_clz(d - 1) : 0;  // log2 of d, rounded up
    return {uint32_t((uint64_t(1) << (31 + bits)) / d + 1), 31 + bits};
}

// Whether 16 divides all of these: addresses, and sizes and strides in bytes.
inline bool is_16_aligned(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> steps) {
    uint64_t bits = 0;
    for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
    for (int64_t step : steps) bits |= uint64_t(step);
    return bits % 16 == 0;
}

}  // namespace wave64
