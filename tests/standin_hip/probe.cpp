// hip/src/runtime.cpp as C functions that ctypes can call, launches with every number of their own included. It is
// built with that file and shared_memory.cpp alone, next to a folder of code objects that the test chooses.
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
int probe_allocate_shared(size_t bytes, void** address) { return wave64::allocate_shared(bytes, address); }
int probe_free_shared(void* address) { return wave64::free_shared(address); }
int probe_export_shared(void* address, char* handle) {
    std::string made;
    const int status = wave64::export_shared(address, &made);
    if (!status) std::memcpy(handle, made.data(), made.size());
    return status;
}
int probe_open_shared(const char* handle, size_t size, void** address) {
    return wave64::open_shared({handle, size}, address);
}
int probe_close_shared(void* address) { return wave64::close_shared(address); }
int probe_can_access_peer(int device, int peer, bool* can) { return wave64::can_access_peer(device, peer, can); }
int probe_allocate_mapped(size_t bytes, void** addresses) {
    return wave64::allocate_mapped(bytes, addresses, addresses + 1);
}
int probe_free_mapped(void* host) { return wave64::free_mapped(host); }
const char* probe_error() { return wave64::last_error(); }
}
