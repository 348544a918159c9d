// What the stand-in's files share: its error codes, its state, and how an entry point begins. See standin_hip.h.
#pragma once

#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "code_object.h"
#include "standin_hip.h"

namespace standin {

enum Error {  // hipError_t
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kInvalidConfiguration = 9,
    kInvalidDeviceFunction = 98,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidHandle = 400,
    kIllegalState = 401,
    kNotFound = 500,
    kLaunchOutOfResources = 701,
    kLaunchFailure = 719,
    kCaptureUnsupported = 900,
    kCaptureImplicit = 906,
    kCapturedEvent = 907,
};

struct Device {
    std::string arch, full_name;  // gfx942, gfx942:sramecc+:xnack-
    unsigned machine;             // EF_AMDGPU_MACH
    int compute_units, wave_size;
    size_t lds_bytes;
};

struct Module {
    int device;
    CodeObject code;
};

struct Function {
    Module* module;
    const Kernel* kernel;
};

struct Stream {
    int device;
    int capture_mode = -1;  // of a capture that is going on
};

struct Event {
    bool is_captured = false;
};

// Memory that hipExtMallocWithFlags, hipHostMalloc or hipIpcOpenMemHandle gave.
struct Allocation {
    enum Kind { kDevice, kHost, kOpened } kind;
    size_t bytes;
    int file;  // what another process maps; -1: nothing that one could
};

struct State {
    std::mutex mutex;
    std::vector<Device> devices;
    pid_t initialized_in = 0;
    bool capturing = false;
    unsigned newest_version = 5;
    std::string calls, told;
    std::map<std::string, std::pair<int, int>> failures;  // entry point -> (calls to come until then, code)
    std::vector<std::unique_ptr<Module>> modules;
    std::set<std::unique_ptr<Function>> functions;
    std::map<void*, Stream> streams;  // without the default stream, which is null
    std::map<void*, Event> events;
    std::set<void*> graphs;
    std::map<uintptr_t, Allocation> allocations;  // by where they begin
    std::string device_names;
    int (*on_launch)(const StandinLaunch*) = nullptr;
};

State& state();
extern thread_local int last_error, current_device, capture_mode;

int result(int code);

// Why this call fails at once, or kSuccess. What needs no initialization says so.
int enter(const char* name, const std::string& details = "", bool needs_init = true);

bool is_capturing();

#define ENTRY(NAME, ...)                             \
    std::lock_guard<std::mutex> lock(state().mutex); \
    if (const int code = enter(NAME, ##__VA_ARGS__)) return result(code)

}  // namespace standin
