// The runtime as the Python module sees it. See runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "wave64/host.h"

namespace wave64 {

// Opens the GPU runtime: the HIP or, for development, CUDA that the process has loaded, else the first of `candidates`
// (paths, or names for the loader) that can be opened, else CUDA's. is_named: the one candidate, whatever is loaded, for
// devices that torch does not have. The first call decides; `path` is the library's.
int32_t open_runtime(const std::vector<std::string>& candidates, bool is_named, std::string* path);

// Loads an op's code object for the current device, as its first launch would.
int32_t load(const char* op);

int32_t device_count(int* count);
int32_t device_at(int index, const Device** device);

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
