// The runtime as the Python module sees it. See runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "wave64/host.h"

namespace wave64 {

// Opens the GPU runtime: the HIP or, for development, CUDA that the process has loaded, else the first of `candidates`
// (paths, or names for the loader) that can be opened, else CUDA's. is_named: the one candidate, whatever is loaded,
// for devices that torch does not have. The first call decides; `path` is the library's.
int32_t open_runtime(const std::vector<std::string>& candidates, bool is_named, std::string* path);

// Loads an op's code object for the current device, as its first launch would.
int32_t load(const char* op);

int32_t device_count(int* count);
int32_t device_at(int index, const Device** device);

// An entry point that not every caller needs: its name in HIP and in CUDA, and the address of the pointer that gets it.
struct EntryPoint {
    const char *hip, *cuda;
    void* address;
};
// Finds them in the runtime, or fails with the names of all that it lacks; is_hip: whether the runtime is HIP.
int32_t find_entry_points(std::initializer_list<EntryPoint> entry_points, bool* is_hip);
// kOk, or that the runtime refused `what`, in its own words.
int32_t check_code(const char* what, int code);

// Memory of the current device that other processes of this host can map (hip/src/shared_memory.cpp): uncached, zeroed,
// complete when the call returns. A handle is 64 bytes.
int32_t allocate_shared(size_t bytes, void** address);
int32_t free_shared(void* address);
int32_t export_shared(void* address, std::string* handle);
int32_t open_shared(const std::string& handle, void** address);
int32_t close_shared(void* address);
// Whether device `device` can reach memory of `peer`.
int32_t can_access_peer(int device, int peer, bool* can);
// Memory of the host, zeroed, that kernels can write to: where the host and where the device finds it.
int32_t allocate_mapped(size_t bytes, void** host, void** device);
int32_t free_mapped(void* host);

// The folder of <arch>/<op>.co: next to this module, wherever it was installed.
std::string code_object_folder();

struct RecordedLaunch {
    std::string op, kernel, code_object;
    std::vector<uint32_t> grid, block;
    uint32_t lds_bytes;
    std::string args;
};

// From here on launches of this thread are kept, planned for `device`, instead of made.
int32_t record_begin(const Device& device);
bool recording_active();
// The launches since the last call.
std::vector<RecordedLaunch> record_take();
void record_end();

}  // namespace wave64
