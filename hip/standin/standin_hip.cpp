#include "standin_hip.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "properties.h"
#include "state.h"

namespace standin {

State& state() {
    static State state;
    return state;
}

thread_local int last_error = kSuccess, current_device = 0, capture_mode = 0;
thread_local std::string failure_text;
constexpr size_t kMaxCalls = 1 << 20;  // bytes of calls that are kept, should no one ask for them

int result(int code) {
    if (code) last_error = code;
    return code;
}

int enter(const char* name, const std::string& details, bool needs_init) {
    State& s = state();
    if (s.calls.size() > kMaxCalls) s.calls.clear();
    s.calls += (s.calls.empty() ? "" : " ") + std::string(name) + details;
    if (const auto found = s.failures.find(name); found != s.failures.end() && --found->second.first == 0) {
        const int code = found->second.second;
        s.failures.erase(found);
        return code;
    }
    return needs_init && s.initialized_in != getpid() ? kNotInitialized : kSuccess;
}

bool is_capturing() {
    for (const auto& [handle, stream] : state().streams)
        if (stream.capture_mode >= 0) return true;
    return state().capturing;
}

// Null, where the default stream is meant, or no stream is; a handle of HIP's is an address of ours that is its alone.
Stream* find_stream(void* handle) {
    const auto found = state().streams.find(handle);
    return found == state().streams.end() ? nullptr : &found->second;
}

void* new_handle() { return ::operator new(1); }

const std::map<std::string, Device>& known_devices() {
    static const std::map<std::string, Device> known{
        {"gfx90a", {"gfx90a", "gfx90a:sramecc+:xnack-", 0x3F, 104, 64, 64 << 10}},
        {"gfx942", {"gfx942", "gfx942:sramecc+:xnack-", 0x4C, 304, 64, 64 << 10}},
        {"gfx950", {"gfx950", "gfx950:sramecc+:xnack-", 0x4F, 256, 64, 160 << 10}},
        {"gfx1036", {"gfx1036", "gfx1036", 0x45, 1, 32, 64 << 10}},
        {"gfx1201", {"gfx1201", "gfx1201", 0x4E, 64, 32, 64 << 10}}};
    return known;
}

// Every word has a value of its own, so that a reader at a wrong offset finds no value of another's.
template <typename P>
void fill(P& properties, const Device& device, unsigned mark) {
    for (size_t i = 0; i < sizeof properties / 4; i++) reinterpret_cast<uint32_t*>(&properties)[i] = mark + uint32_t(i);
    std::snprintf(properties.name, sizeof properties.name, "stand-in for %s", device.arch.c_str());
    std::snprintf(properties.gcnArchName, sizeof properties.gcnArchName, "%s", device.full_name.c_str());
    properties.totalGlobalMem = size_t(192) << 30;
    properties.sharedMemPerBlock = device.lds_bytes;
    properties.warpSize = device.wave_size;
    properties.multiProcessorCount = device.compute_units;
}

int check_launch(const Function& function, const uint32_t* grid, const uint32_t* block, uint32_t lds_bytes) {
    const Device& device = state().devices[current_device];
    if (function.module->device != current_device) return kInvalidDeviceFunction;
    uint64_t lanes = 1;
    for (int i = 0; i < 3; i++) {
        if (!grid[i] || !block[i]) return kInvalidConfiguration;
        if (uint64_t(grid[i]) * block[i] >= uint64_t(1) << 32) return kInvalidConfiguration;
        lanes *= block[i];
    }
    if (lanes > 1024) return kInvalidConfiguration;
    if (lanes > function.kernel->max_block) return kLaunchFailure;
    if (function.kernel->lds_bytes + lds_bytes > device.lds_bytes) return kLaunchOutOfResources;
    return kSuccess;
}

// The caller's part of the kernarg segment, from one pointer per argument or, as HIP_LAUNCH_PARAM says, whole.
int gather(const Kernel& kernel, void** parameters, void** extra, std::string& segment) {
    size_t size = 0;
    for (const Argument& argument : kernel.arguments) size = std::max(size, argument.offset + argument.size);
    segment.assign(size, '\0');
    if (parameters) {
        if (extra) return kInvalidValue;
        for (size_t i = 0; i < kernel.arguments.size(); i++)
            std::memcpy(&segment[kernel.arguments[i].offset], parameters[i], kernel.arguments[i].size);
        return kSuccess;
    }
    if (!extra) return kernel.arguments.empty() ? kSuccess : kInvalidValue;
    const auto tag = [&](int i) { return reinterpret_cast<uintptr_t>(extra[i]); };
    if (tag(0) != 1 || tag(2) != 2 || tag(4) != 3 || *static_cast<size_t*>(extra[3]) != size) return kInvalidValue;
    std::memcpy(&segment[0], extra[1], size);
    return kSuccess;
}

}  // namespace standin

using namespace standin;

extern "C" {

// ---- errors

const char* hipGetErrorString(int code) {
    switch (code) {
        case kSuccess:
            return "no error";
        case kInvalidValue:
            return "invalid argument";
        case kOutOfMemory:
            return "out of memory";
        case kNotInitialized:
            return "initialization error";
        case kInvalidConfiguration:
            return "invalid configuration argument";
        case kInvalidDeviceFunction:
            return "invalid device function";
        case kNoDevice:
            return "no ROCm-capable device is detected";
        case kInvalidDevice:
            return "invalid device ordinal";
        case kInvalidImage:
            return "device kernel image is invalid";
        case kNoBinaryForGpu:
            return "no kernel image is available for execution on the device";
        case kInvalidHandle:
            return "invalid resource handle";
        case kNotFound:
            return "named symbol not found";
        case kLaunchOutOfResources:
            return "out of resources";
        case kLaunchFailure:
            return failure_text.empty() ? "unspecified launch failure" : failure_text.c_str();
        case kInvalidContext:
            return "invalid device context";
        case kIllegalState:
            return "the operation cannot be performed in the present state";
        case kCaptureImplicit:
            return "operation would make the legacy stream depend on a capturing blocking stream";
        case kCapturedEvent:
            return "operation not permitted on an event last recorded in a capturing stream";
        case kCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        default:
            return nullptr;
    }
}

int hipGetLastError() {
    const int code = last_error;
    last_error = kSuccess;
    return code;
}

// ---- devices

int hipInit(unsigned flags) {
    std::lock_guard<std::mutex> lock(state().mutex);
    if (const int code = enter("hipInit", "", false)) return result(code);
    if (flags) return result(kInvalidValue);
    State& s = state();
    if (s.initialized_in && s.initialized_in != getpid()) return result(kNotInitialized);  // what a fork leaves behind
    s.initialized_in = getpid();
    const char* names = std::getenv("STANDIN_HIP");
    std::istringstream all(!s.device_names.empty() ? s.device_names : names ? names : "gfx942");
    s.devices.clear();
    for (std::string name; std::getline(all, name, ',');) s.devices.push_back(known_devices().at(name));
    return result(s.devices.empty() ? kNoDevice : kSuccess);
}

int hipGetDeviceCount(int* count) {
    ENTRY("hipGetDeviceCount");
    *count = int(state().devices.size());
    return kSuccess;
}

int hipGetDevice(int* device) {
    ENTRY("hipGetDevice");
    *device = current_device;
    return kSuccess;
}

int hipSetDevice(int device) {
    ENTRY("hipSetDevice", ":" + std::to_string(device));
    if (device < 0 || device >= int(state().devices.size())) return result(kInvalidDevice);
    current_device = device;
    return kSuccess;
}

int hipGetDevicePropertiesR0600(void* properties, int device) {
    ENTRY("hipGetDevicePropertiesR0600", ":" + std::to_string(device));
    if (device < 0 || device >= int(state().devices.size())) return result(kInvalidDevice);
    fill(*static_cast<Properties*>(properties), state().devices[device], 0x5A000000);
    return kSuccess;
}

int hipGetDeviceProperties(void* properties, int device) {
    ENTRY("hipGetDeviceProperties", ":" + std::to_string(device));
    if (device < 0 || device >= int(state().devices.size())) return result(kInvalidDevice);
    fill(*static_cast<OldProperties*>(properties), state().devices[device], 0x6A000000);
    return kSuccess;
}

// ---- streams

int hipThreadExchangeStreamCaptureMode(int* mode) {
    ENTRY("hipThreadExchangeStreamCaptureMode", ":" + std::to_string(*mode));
    if (*mode < 0 || *mode > 2) return result(kInvalidValue);
    std::swap(*mode, capture_mode);
    return kSuccess;
}

int hipStreamCreateWithFlags(void** stream, unsigned flags) {
    ENTRY("hipStreamCreateWithFlags", ":" + std::to_string(flags));
    if (flags > 1) return result(kInvalidValue);
    *stream = new_handle();
    state().streams[*stream] = Stream{current_device};
    return kSuccess;
}

int hipStreamDestroy(void* stream) {
    ENTRY("hipStreamDestroy");
    if (!state().streams.erase(stream)) return result(kInvalidHandle);
    ::operator delete(stream);
    return kSuccess;
}

int hipStreamSynchronize(void* stream) {
    ENTRY("hipStreamSynchronize");
    const Stream* const found = find_stream(stream);
    if (stream && !found) return result(kInvalidHandle);
    return found && found->capture_mode >= 0 ? result(kCaptureUnsupported) : kSuccess;
}

int hipDeviceSynchronize() {
    ENTRY("hipDeviceSynchronize");
    return is_capturing() ? result(kCaptureUnsupported) : kSuccess;
}

int hipStreamBeginCapture(void* stream, int mode) {
    ENTRY("hipStreamBeginCapture", ":" + std::to_string(mode));
    if (mode < 0 || mode > 2) return result(kInvalidValue);
    Stream* const found = find_stream(stream);
    if (!found) return result(stream ? kInvalidHandle : kCaptureUnsupported);
    if (found->capture_mode >= 0) return result(kIllegalState);
    found->capture_mode = mode;
    return kSuccess;
}

int hipStreamEndCapture(void* stream, void** graph) {
    ENTRY("hipStreamEndCapture");
    Stream* const found = find_stream(stream);
    if (!found) return result(kInvalidHandle);
    if (found->capture_mode < 0) return result(kIllegalState);
    found->capture_mode = -1;
    for (auto& [handle, event] : state().events) event.is_captured = false;
    *graph = new_handle();
    state().graphs.insert(*graph);
    return kSuccess;
}

int hipStreamIsCapturing(void* stream, int* status) {
    ENTRY("hipStreamIsCapturing");
    const Stream* const found = find_stream(stream);
    if (stream && !found) return result(kInvalidHandle);
    *status = found && found->capture_mode >= 0;
    return kSuccess;
}

int hipGraphDestroy(void* graph) {
    ENTRY("hipGraphDestroy");
    if (!state().graphs.erase(graph)) return result(kInvalidHandle);
    ::operator delete(graph);
    return kSuccess;
}

// ---- events

int hipEventCreateWithFlags(void** event, unsigned flags) {
    ENTRY("hipEventCreateWithFlags", ":" + std::to_string(flags));
    *event = new_handle();
    state().events[*event] = Event{};
    return kSuccess;
}

int hipEventDestroy(void* event) {
    ENTRY("hipEventDestroy");
    if (!state().events.erase(event)) return result(kInvalidHandle);
    ::operator delete(event);
    return kSuccess;
}

int hipEventRecord(void* event, void* stream) {
    ENTRY("hipEventRecord");
    const auto found = state().events.find(event);
    const Stream* const on = find_stream(stream);
    if (found == state().events.end() || (stream && !on)) return result(kInvalidHandle);
    found->second.is_captured = on && on->capture_mode >= 0;
    return kSuccess;
}

int hipEventSynchronize(void* event) {
    ENTRY("hipEventSynchronize");
    const auto found = state().events.find(event);
    if (found == state().events.end()) return result(kInvalidHandle);
    return found->second.is_captured ? result(kCapturedEvent) : kSuccess;
}

int hipStreamWaitEvent(void* stream, void* event, unsigned flags) {
    ENTRY("hipStreamWaitEvent", ":" + std::to_string(flags));
    if (flags) return result(kInvalidValue);
    if (!state().events.count(event) || (stream && !find_stream(stream))) return result(kInvalidHandle);
    return kSuccess;
}

// ---- modules

int hipModuleLoadData(void** module, const void* image) {
    ENTRY("hipModuleLoadData", ":" + std::to_string(current_device));
    State& s = state();
    if (is_capturing() && capture_mode != 2) return result(kCaptureUnsupported);
    try {
        auto loaded = std::make_unique<Module>(Module{current_device, CodeObject(image)});
        const Device& device = s.devices[current_device];
        if (loaded->code.machine != device.machine || loaded->code.version > s.newest_version)
            return result(kNoBinaryForGpu);
        s.modules.push_back(std::move(loaded));
    } catch (const std::exception&) {
        return result(kInvalidImage);
    }
    *module = s.modules.back().get();
    return kSuccess;
}

int hipModuleGetFunction(void** function, void* module, const char* name) {
    ENTRY("hipModuleGetFunction", std::string(":") + name);
    State& s = state();
    for (const auto& known : s.modules)
        if (known.get() == module) {
            const auto found = known->code.kernels.find(name);
            if (found == known->code.kernels.end()) return result(kNotFound);
            *function =
                s.functions.insert(std::make_unique<Function>(Function{known.get(), &found->second})).first->get();
            return kSuccess;
        }
    return result(kInvalidHandle);
}

// ---- launches

int hipModuleLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned lds_bytes, void* stream, void** parameters, void** extra) {
    StandinLaunch launch{"", nullptr, 0, nullptr, 0, stream, current_device, 0, {gx, gy, gz}, {bx, by, bz}, lds_bytes};
    std::string segment;
    int (*callback)(const StandinLaunch*);
    {
        ENTRY("hipModuleLaunchKernel");
        State& s = state();
        const Function* function = nullptr;
        for (const auto& known : s.functions)
            if (known.get() == handle) function = known.get();
        if (!function) return result(kInvalidHandle);
        Stream* const on = find_stream(stream);
        if (stream && (!on || on->device != current_device)) return result(kInvalidHandle);
        if (!stream && capture_mode != 2)  // the default stream waits for all others
            for (const auto& [other, capturing] : s.streams)
                if (capturing.capture_mode >= 0) return result(kCaptureImplicit);
        if (const int code = check_launch(*function, launch.grid, launch.block, lds_bytes)) return result(code);
        if (const int code = gather(*function->kernel, parameters, extra, segment)) return result(code);
        launch.kernel = function->kernel->name.c_str();
        launch.code_object = function->module->code.bytes.data();
        launch.code_object_size = function->module->code.bytes.size();
        launch.args = segment.data(), launch.args_size = segment.size();
        launch.is_captured = on && on->capture_mode >= 0;
        failure_text.clear();
        callback = s.on_launch;
    }
    return callback ? result(callback(&launch)) : kSuccess;
}

// ---- what HIP has not

void standin_devices(const char* names) { state().device_names = names; }
void standin_failure_text(const char* text) { failure_text = std::string("unspecified launch failure: ") + text; }
void standin_on_launch(int (*callback)(const StandinLaunch*)) { state().on_launch = callback; }
void standin_fail(const char* name, int code, int nth) { state().failures[name] = {nth, code}; }
void standin_capture(int active) { state().capturing = active; }
void standin_newest_code_object(int version) { state().newest_version = unsigned(version); }
int standin_last_error() { return last_error; }
int standin_capture_mode() { return capture_mode; }
const char* standin_calls() {
    state().told = std::move(state().calls);
    state().calls.clear();
    return state().told.c_str();
}
}
