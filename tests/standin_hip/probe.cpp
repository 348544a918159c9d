// hip/src/runtime.cpp as C functions that ctypes can call, launches with every number of their own included. It is
// built with that file alone, next to a folder of code objects that the test chooses.
#include <cstring>

#include "runtime.h"

namespace {
wave64::Launch made(const char* op, const char* kernel, const uint32_t* shape) {
    return {op, kernel, {shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shape[6]};
}
std::string kept;
}  // namespace

extern "C" {
int probe_open(const char* const* candidates, int count) {
    return wave64::open_runtime({candidates, candidates + count}, false, &kept);
}
const char* probe_path() { return kept.c_str(); }
int probe_count(int* count) { return wave64::device_count(count); }
int probe_load(const char* op) { return wave64::load(op); }
// shape: grid, block, bytes of LDS. The addresses of `op` and `kernel` must stay theirs.
int probe_launch(const char* op, const char* kernel, const uint32_t* shape, const void* args, size_t size,
                 void* stream) {
    return wave64::launch(made(op, kernel, shape), args, size, stream);
}
int probe_device(int index, char* arch, int* numbers) {
    const wave64::Device* device;
    if (int status = index < 0 ? wave64::current_device(&device) : wave64::device_at(index, &device)) return status;
    std::strcpy(arch, device->arch.c_str());
    numbers[0] = device->compute_units, numbers[1] = device->wave_size, numbers[2] = device->lds_bytes;
    return 0;
}
const char* probe_error() { return wave64::last_error(); }
}
