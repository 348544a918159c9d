// Memory that the ranks of a group share, by the runtime's own calls: device memory that other processes map by a
// handle, and records of the host that kernels write to. The entry points are found when they are first needed.
#include <array>
#include <cstring>

#include "runtime.h"

namespace wave64 {

namespace {

struct Handle {  // hipIpcMemHandle_t and CUipcMemHandle, which are passed by value
    std::array<char, 64> bytes;
};

struct Calls {
    bool is_hip;
    int (*allocate_hip)(void** address, size_t bytes, unsigned flags);
    int (*allocate_cuda)(void** address, size_t bytes);
    int (*free)(void* address);
    int (*set_hip)(void* address, int value, size_t bytes);
    int (*set_cuda)(void* address, unsigned char value, size_t bytes);
    int (*synchronize)();
    int (*export_handle)(Handle* handle, void* address);
    int (*open)(void** address, Handle handle, unsigned flags);
    int (*close)(void* address);
    int (*can_access)(int* can, int device, int peer);
    int (*allocate_host)(void** address, size_t bytes, unsigned flags);
    int (*device_pointer)(void** device, void* host, unsigned flags);
    int (*free_host)(void* address);
};

int32_t find(Calls& calls) {
    return find_entry_points({{"hipExtMallocWithFlags", "cuMemAlloc_v2", &calls.allocate_hip},
                              {"hipFree", "cuMemFree_v2", &calls.free},
                              {"hipMemset", "cuMemsetD8_v2", &calls.set_hip},
                              {"hipDeviceSynchronize", "cuCtxSynchronize", &calls.synchronize},
                              {"hipIpcGetMemHandle", "cuIpcGetMemHandle", &calls.export_handle},
                              {"hipIpcOpenMemHandle", "cuIpcOpenMemHandle_v2", &calls.open},
                              {"hipIpcCloseMemHandle", "cuIpcCloseMemHandle", &calls.close},
                              {"hipDeviceCanAccessPeer", "cuDeviceCanAccessPeer", &calls.can_access},
                              {"hipHostMalloc", "cuMemHostAlloc", &calls.allocate_host},
                              {"hipHostGetDevicePointer", "cuMemHostGetDevicePointer_v2", &calls.device_pointer},
                              {"hipHostFree", "cuMemFreeHost", &calls.free_host}},
                             &calls.is_hip);
}

// Runs `body` with the runtime's calls, where it has all of them.
template <typename Body>
int32_t with_calls(Body&& body) {
    Calls calls{};
    if (int32_t status = find(calls)) return status;
    // two of them take other arguments in CUDA
    std::memcpy(&calls.allocate_cuda, &calls.allocate_hip, sizeof calls.allocate_cuda);
    std::memcpy(&calls.set_cuda, &calls.set_hip, sizeof calls.set_cuda);
    return body(calls);
}

}  // namespace

int32_t allocate_shared(size_t bytes, void** address) {
    return with_calls([&](const Calls& calls) {
        // 0x3, not 0x1: fine-grained memory is cached by the peers that map it, and what they find there goes stale
        constexpr unsigned kUncached = 0x3;
        const int made =
            calls.is_hip ? calls.allocate_hip(address, bytes, kUncached) : calls.allocate_cuda(address, bytes);
        if (int32_t status = check_code("allocating memory that peers can map", made)) return status;
        const int set = calls.is_hip ? calls.set_hip(*address, 0, bytes) : calls.set_cuda(*address, 0, bytes);
        int32_t status = check_code("zeroing memory that peers can map", set);
        if (!status) status = check_code("zeroing memory that peers can map", calls.synchronize());
        if (status) calls.free(*address);
        return status;
    });
}

int32_t free_shared(void* address) {
    return with_calls(
        [&](const Calls& calls) { return check_code("freeing memory that peers can map", calls.free(address)); });
}

int32_t export_shared(void* address, std::string* handle) {
    return with_calls([&](const Calls& calls) {
        Handle made{};
        const int32_t status = check_code("exporting memory to peers", calls.export_handle(&made, address));
        handle->assign(made.bytes.data(), made.bytes.size());
        return status;
    });
}

int32_t open_shared(const std::string& handle, void** address) {
    Handle given{};
    if (handle.size() != given.bytes.size())
        return fail(kBadArgument, "handle: expected %zu bytes, got %zu", given.bytes.size(), handle.size());
    std::memcpy(given.bytes.data(), handle.data(), handle.size());
    return with_calls([&](const Calls& calls) {
        constexpr unsigned kEnablePeerAccess = 1;
        return check_code("mapping memory of a peer", calls.open(address, given, kEnablePeerAccess));
    });
}

int32_t close_shared(void* address) {
    return with_calls(
        [&](const Calls& calls) { return check_code("unmapping memory of a peer", calls.close(address)); });
}

int32_t can_access_peer(int device, int peer, bool* can) {
    return with_calls([&](const Calls& calls) {
        int answer = 0;
        const int32_t status = check_code("asking for peer access", calls.can_access(&answer, device, peer));
        *can = answer != 0;
        return status;
    });
}

int32_t allocate_mapped(size_t bytes, void** host, void** device) {
    return with_calls([&](const Calls& calls) {
        constexpr unsigned kPortable = 1, kMapped = 2, kCoherent = 0x40000000;  // the last is HIP's alone
        const unsigned flags = kPortable | kMapped | (calls.is_hip ? kCoherent : 0);
        const char* const what = "allocating memory of the host that kernels can write to";
        if (int32_t status = check_code(what, calls.allocate_host(host, bytes, flags))) return status;
        std::memset(*host, 0, bytes);
        const int32_t status = check_code(what, calls.device_pointer(device, *host, 0));
        if (status) calls.free_host(*host);
        return status;
    });
}

int32_t free_mapped(void* host) {
    return with_calls(
        [&](const Calls& calls) { return check_code("freeing memory of the host", calls.free_host(host)); });
}

}  // namespace wave64
