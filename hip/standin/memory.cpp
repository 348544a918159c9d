// Memory of the stand-in's devices. What other processes may map lies in files without a name, which end with the last
// process that has them: a handle says which process and which file.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>

#include "state.h"

using namespace standin;

namespace {

constexpr size_t kPage = 2 << 20;  // what HIP exports in, and at most 2 GiB at once
constexpr size_t kMaxExport = size_t(2) << 30;

struct Handle {  // hipIpcMemHandle_t
    pid_t process;
    int file;
    size_t bytes;
    char reserved[64 - sizeof(pid_t) - sizeof(int) - sizeof(size_t)];
};
static_assert(sizeof(Handle) == 64);

// The address of all of a file's bytes, which stay when the file is closed; null: out of memory.
void* map_file(int file, size_t bytes) {
    void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return at == MAP_FAILED ? nullptr : at;
}

void* keep(Allocation::Kind kind, void* at, size_t bytes, int file) {
    state().allocations[reinterpret_cast<uintptr_t>(at)] = Allocation{kind, bytes, file};
    return at;
}

int allocate(Allocation::Kind kind, void** address, size_t bytes) {
    if (!address) return kInvalidValue;
    *address = nullptr;
    if (!bytes) return kSuccess;
    const int file = memfd_create("stand-in memory", MFD_CLOEXEC);
    void* const at = file >= 0 && ftruncate(file, off_t(bytes)) == 0 ? map_file(file, bytes) : nullptr;
    if (!at) {
        if (file >= 0) close(file);
        return kOutOfMemory;
    }
    std::memset(at, 0xFF, bytes);  // never written: NaN in every format
    *address = keep(kind, at, bytes, file);
    return kSuccess;
}

int release(Allocation::Kind kind, void* address) {
    if (!address && kind != Allocation::kOpened) return kSuccess;
    const auto found = state().allocations.find(reinterpret_cast<uintptr_t>(address));
    if (found == state().allocations.end() || found->second.kind != kind) return kInvalidValue;
    munmap(address, found->second.bytes);
    if (found->second.file >= 0) close(found->second.file);
    state().allocations.erase(found);
    return kSuccess;
}

// The allocation that an address lies in, or end().
std::map<uintptr_t, Allocation>::iterator holding(const void* address) {
    auto& all = state().allocations;
    auto next = all.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (next == all.begin()) return all.end();
    const auto found = std::prev(next);
    return reinterpret_cast<uintptr_t>(address) < found->first + found->second.bytes ? found : all.end();
}

}  // namespace

extern "C" {

int hipExtMallocWithFlags(void** address, size_t bytes, unsigned flags) {
    ENTRY("hipExtMallocWithFlags", ":" + std::to_string(flags));
    if (flags > 3) return result(kInvalidValue);
    if (flags == 2 && bytes != 8) return result(kInvalidValue);  // memory for a signal
    return result(allocate(Allocation::kDevice, address, bytes));
}

int hipFree(void* address) {
    ENTRY("hipFree");
    return result(release(Allocation::kDevice, address));
}

int hipMemset(void* address, int value, size_t bytes) {
    ENTRY("hipMemset");
    const auto found = holding(address);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    if (found == state().allocations.end() || begin + bytes > found->first + found->second.bytes)
        return result(kInvalidValue);
    if (is_capturing() && capture_mode != 2) return result(kCaptureUnsupported);
    std::memset(address, value, bytes);
    return kSuccess;
}

int hipHostMalloc(void** address, size_t bytes, unsigned flags) {
    ENTRY("hipHostMalloc", ":" + std::to_string(flags));
    return result(allocate(Allocation::kHost, address, bytes));
}

int hipHostFree(void* address) {
    ENTRY("hipHostFree");
    return result(release(Allocation::kHost, address));
}

int hipHostGetDevicePointer(void** device, void* host, unsigned flags) {
    ENTRY("hipHostGetDevicePointer");
    const auto found = holding(host);
    if (flags || found == state().allocations.end() || found->second.kind != Allocation::kHost)
        return result(kInvalidValue);
    *device = host;
    return kSuccess;
}

int hipDeviceCanAccessPeer(int* can, int device, int peer) {
    ENTRY("hipDeviceCanAccessPeer", ":" + std::to_string(device) + ":" + std::to_string(peer));
    const int count = int(state().devices.size());
    if (device < 0 || device >= count || peer < 0 || peer >= count) return result(kInvalidDevice);
    *can = device != peer;
    return kSuccess;
}

int hipIpcGetMemHandle(void* handle, void* address) {
    ENTRY("hipIpcGetMemHandle");
    const auto found = state().allocations.find(reinterpret_cast<uintptr_t>(address));
    if (found == state().allocations.end() || found->second.kind != Allocation::kDevice) return result(kInvalidValue);
    const Allocation& kept = found->second;
    if (kept.bytes % kPage || kept.bytes > kMaxExport) return result(kInvalidValue);
    const Handle made{getpid(), kept.file, kept.bytes, {}};
    std::memcpy(handle, &made, sizeof made);
    return kSuccess;
}

int hipIpcOpenMemHandle(void** address, Handle handle, unsigned flags) {
    ENTRY("hipIpcOpenMemHandle");
    if (flags != 1) return result(kInvalidValue);
    if (handle.process == getpid()) return result(kInvalidContext);  // its own
    const std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
    const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat about;
    if (file < 0) return result(kInvalidValue);  // the process is gone
    const bool fits = fstat(file, &about) == 0 && size_t(about.st_size) == handle.bytes;
    void* const at = fits ? map_file(file, handle.bytes) : nullptr;
    close(file);
    if (!at) return result(kInvalidValue);
    *address = keep(Allocation::kOpened, at, handle.bytes, -1);
    return kSuccess;
}

int hipIpcCloseMemHandle(void* address) {
    ENTRY("hipIpcCloseMemHandle");
    return result(release(Allocation::kOpened, address));
}

// ---- what HIP has not

size_t standin_allocation(const void* address, void** begin) {
    std::lock_guard<std::mutex> lock(state().mutex);
    const auto found = holding(address);
    if (found == state().allocations.end()) return 0;
    *begin = reinterpret_cast<void*>(found->first);
    return found->second.bytes;
}
}
