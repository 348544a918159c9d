// The runtime: opens HIP by name (CUDA where there is no HIP, for development), reads device properties, loads code
// objects, launches, or records launches instead of making them.
//
// HIP is neither linked nor included. The few entry points below have the same signatures in both drivers, except those
// for device properties. They do not change: HIP keeps old layouts under old symbol names, CUDA under suffixes.
#include "runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace wave64 {

namespace {

thread_local std::string error_text;

struct Recording {
    Device device;
    std::vector<RecordedLaunch> launches;
};
thread_local std::optional<Recording> recording;

struct Driver {
    const char* name;
    std::string library;  // its path
    void* handle;
    bool is_hip;
    int (*init)(unsigned);
    int (*count)(int*);
    int (*current)(int*);
    int (*load)(void** module, const void* image);
    int (*function)(void** function, void* module, const char* name);
    int (*exchange_capture_mode)(int* mode);
    int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned lds,
                  void* stream, void** args, void** extra);
    int (*properties)(void* properties, int device);          // HIP
    int (*attribute)(int* value, int attribute, int device);  // CUDA
    const char* (*hip_error)(int);
    int (*last_error)();  // HIP
    int (*cuda_error)(int, const char**);

    std::string words(int code) const {
        const char* text = nullptr;
        if (is_hip)
            text = hip_error(code);
        else
            cuda_error(code, &text);
        return text ? text : "error " + std::to_string(code);
    }
};

// A library whose file name begins with `stem` and that the process has loaded, or null. A ROCm torch brings its own
// copy of the runtime; a second copy would not know its streams and memory.
void* already_loaded(const char* stem) {
    struct Search {
        const char* stem;
        std::string path;
    } search{stem, ""};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& search = *static_cast<Search*>(data);
            const char* slash = std::strrchr(info->dlpi_name, '/');
            if (std::strncmp(slash ? slash + 1 : info->dlpi_name, search.stem, std::strlen(search.stem)) != 0) return 0;
            search.path = info->dlpi_name;
            return 1;
        },
        &search);
    return search.path.empty() ? nullptr : dlopen(search.path.c_str(), RTLD_NOW);
}

std::string path_of(void* library, const char* fallback) {
    link_map* map = nullptr;
    return dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map->l_name[0] ? map->l_name : fallback;
}

// Finds a driver's entry points, those that have a name in its library, or fails with the names of all that are missing
// and what they need.
int32_t find_all(const Driver& driver, void* library, std::initializer_list<EntryPoint> entry_points,
                 const char* needed) {
    std::string missing;
    for (const auto& [hip, cuda, address] : entry_points) {
        const char* const symbol = driver.is_hip ? hip : cuda;
        if (!*symbol) continue;
        void* const found = dlsym(library, symbol);
        if (!found) missing += std::string(missing.empty() ? "" : ", ") + symbol;
        std::memcpy(address, &found, sizeof found);
    }
    return missing.empty() ? int32_t(kOk)
                           : fail(kUnavailable, "%s lacks %s%s", driver.library.c_str(), missing.c_str(), needed);
}

int32_t use_library(Driver& driver, void* library, bool is_hip) {
    driver.name = is_hip ? "HIP" : "CUDA", driver.is_hip = is_hip, driver.handle = library;
    driver.library = path_of(library, is_hip ? "libamdhip64.so" : "libcuda.so.1");
    return find_all(
        driver, library,
        {{"hipInit", "cuInit", &driver.init},
         {"hipGetDeviceCount", "cuDeviceGetCount", &driver.count},
         {"hipGetDevice", "cuCtxGetDevice", &driver.current},
         {"hipModuleLoadData", "cuModuleLoadData", &driver.load},
         {"hipModuleGetFunction", "cuModuleGetFunction", &driver.function},
         {"hipThreadExchangeStreamCaptureMode", "cuThreadExchangeStreamCaptureMode", &driver.exchange_capture_mode},
         {"hipModuleLaunchKernel", "cuLaunchKernel", &driver.launch},
         {"hipGetDevicePropertiesR0600", "", &driver.properties},
         {"", "cuDeviceGetAttribute", &driver.attribute},
         {"hipGetErrorString", "", &driver.hip_error},
         {"hipGetLastError", "", &driver.last_error},
         {"", "cuGetErrorString", &driver.cuda_error}},
        is_hip ? "; ROCm 6.0 or later is needed" : "");
}

// The runtime that the process has loaded, else the first candidate that can be opened: never a second one. Where
// torch's devices take no part, the one that is named serves, whatever is loaded.
int32_t open_driver(Driver& driver, const std::vector<std::string>& candidates, bool is_named) {
    if (is_named) {
        if (void* hip = dlopen(candidates[0].c_str(), RTLD_NOW)) return use_library(driver, hip, true);
        return fail(kUnavailable, "%s", dlerror());
    }
    if (void* hip = already_loaded("libamdhip64")) return use_library(driver, hip, true);
    std::string broken;
    if (!already_loaded("libcuda.so"))
        for (const std::string& candidate : candidates) {
            if (void* hip = dlopen(candidate.c_str(), RTLD_NOW)) return use_library(driver, hip, true);
            if (broken.empty() && candidate[0] == '/') broken = std::string(" (") + dlerror() + ")";
        }
    if (void* cuda = dlopen("libcuda.so.1", RTLD_NOW)) return use_library(driver, cuda, false);
    return fail(kUnavailable, "no libamdhip64.so (ROCm's runtime) can be opened on this machine%s", broken.c_str());
}

struct Opened {
    Driver driver{};
    int32_t status;
    std::string text;
};

// Opened once, by the first caller; a failure is kept with its message and returned to every caller.
int32_t driver(const Driver** out, const std::vector<std::string>& candidates = {"libamdhip64.so"},
               bool is_named = false) {
    static const Opened opened = [&candidates, is_named] {
        Opened opened;
        opened.status = open_driver(opened.driver, candidates, is_named);
        if (opened.status == kOk)
            if (int code = opened.driver.init(0)) {
                if (opened.driver.is_hip) opened.driver.last_error();
                opened.status = fail(kUnavailable, "%s finds no usable GPU: %s", opened.driver.name,
                                     opened.driver.words(code).c_str());
            }
        opened.text = error_text;
        return opened;
    }();
    *out = &opened.driver;
    return opened.status == kOk ? kOk : fail(opened.status, "%s", opened.text.c_str());
}

int32_t check(const Driver& driver, const char* what, int code) {
    if (code == 0) return kOk;
    if (driver.is_hip) driver.last_error();  // reported here; else torch would take it for an error of its own
    return fail(kRuntimeError, "%s: %s: %s", driver.name, what, driver.words(code).c_str());
}

int32_t read_hip_device(const Driver& driver, int index, Device& device) {
    // Offsets in the structure that hipGetDevicePropertiesR0600 fills: the symbol's name fixes them (ROCm 6.0 on).
    constexpr size_t kLdsBytes = 296, kWaveSize = 308, kComputeUnits = 388, kArchName = 1160, kSize = 1472;
    alignas(8) char properties[2 * kSize] = {};
    if (int32_t status = check(driver, "reading device properties", driver.properties(properties, index)))
        return status;
    size_t lds_bytes;
    int wave_size, compute_units;
    std::memcpy(&lds_bytes, properties + kLdsBytes, sizeof lds_bytes);
    std::memcpy(&wave_size, properties + kWaveSize, sizeof wave_size);
    std::memcpy(&compute_units, properties + kComputeUnits, sizeof compute_units);
    const std::string name = properties + kArchName;  // gfx942:sramecc+:xnack-
    device = {name.substr(0, name.find(':')), compute_units, wave_size, int(lds_bytes)};
    return kOk;
}

int32_t read_cuda_device(const Driver& driver, int index, Device& device) {
    constexpr int kWaveSize = 10, kComputeUnits = 16, kMajor = 75, kMinor = 76, kLdsBytes = 97;
    int major, minor;
    for (auto [attribute, value] : {std::pair<int, int*>{kMajor, &major},
                                    {kMinor, &minor},
                                    {kWaveSize, &device.wave_size},
                                    {kComputeUnits, &device.compute_units},
                                    {kLdsBytes, &device.lds_bytes}})
        if (int32_t status = check(driver, "reading device properties", driver.attribute(value, attribute, index)))
            return status;
    device.arch = "sm_" + std::to_string(10 * major + minor);
    return kOk;
}

std::mutex devices_mutex, functions_mutex;

// Names are literals, so their addresses identify them; but equal literals of two ops may be one.
struct FunctionKey {
    int device;
    const char *op, *kernel;
    bool operator==(const FunctionKey& other) const {
        return device == other.device && op == other.op && kernel == other.kernel;
    }
};
struct FunctionHash {
    size_t operator()(const FunctionKey& key) const {
        const std::hash<const void*> hash;
        return hash(key.op) * 31 ^ hash(key.kernel) ^ size_t(key.device);
    }
};
std::unordered_map<FunctionKey, void*, FunctionHash> functions;
std::map<std::pair<int, std::string>, void*> modules;

std::string code_object_path(const Device& device, const char* op) {
    return code_object_folder() + "/" + device.arch + "/" + op + ".co";
}

int32_t no_code_object(const Device& device, const char* op) {
    return fail(kUnavailable, "%s: no code object for %s: %s cannot be read", op, device.arch.c_str(),
                code_object_path(device, op).c_str());
}

// Loading is forbidden while a stream captures, unless this thread relaxes the capture mode.
template <typename Body>
int32_t with_relaxed_capture(const Driver& driver, Body&& body) {
    int mode = 2;
    const int relaxed = driver.exchange_capture_mode(&mode);
    if (int32_t status = check(driver, "relaxing the stream capture mode", relaxed)) return status;
    const int32_t status = body();
    const int restored = driver.exchange_capture_mode(&mode);
    return status ? status : check(driver, "restoring the stream capture mode", restored);
}

int32_t load_module(const Driver& driver, const Device& device, int index, const char* op, void*& module) {
    void*& kept = modules[{index, op}];
    if (!kept) {
        std::ifstream file(code_object_path(device, op), std::ios::binary);
        if (!file) return no_code_object(device, op);
        const std::string image{std::istreambuf_iterator<char>(file), {}};
        const std::string what = std::string("loading the code object of ") + op + " for " + device.arch;
        if (int32_t status = check(driver, what.c_str(), driver.load(&kept, image.data()))) return status;
    }
    module = kept;
    return kOk;
}

int32_t load_function(const Driver& driver, int index, const Launch& launch, void*& function) {
    std::lock_guard lock(functions_mutex);
    const FunctionKey key{index, launch.op, launch.kernel};
    if (auto found = functions.find(key); found != functions.end()) {
        function = found->second;
        return kOk;
    }
    const Device* device;
    if (int32_t status = device_at(index, &device)) return status;
    return with_relaxed_capture(driver, [&] {
        void* module;
        if (int32_t status = load_module(driver, *device, index, launch.op, module)) return status;
        const int code = driver.function(&function, module, launch.kernel);
        if (int32_t status = check(driver, launch.kernel, code)) return status;
        functions[key] = function;
        return int32_t(kOk);
    });
}

}  // namespace

int32_t fail(int32_t status, const char* format, ...) {
    char text[1024];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof text, format, values);
    va_end(values);
    error_text = text;
    return status;
}

const char* last_error() { return error_text.c_str(); }

int32_t open_runtime(const std::vector<std::string>& candidates, bool is_named, std::string* path) {
    const Driver* opened;
    if (int32_t status = driver(&opened, candidates, is_named)) return status;
    *path = opened->library;
    return kOk;
}

int32_t find_entry_points(std::initializer_list<EntryPoint> entry_points, bool* is_hip) {
    const Driver* opened;
    if (int32_t status = driver(&opened)) return status;
    *is_hip = opened->is_hip;
    return find_all(*opened, opened->handle, entry_points, "");
}

int32_t check_code(const char* what, int code) {
    const Driver* opened;
    if (int32_t status = driver(&opened)) return status;
    return check(*opened, what, code);
}

int32_t load(const char* op) {
    const Driver* opened;
    const Device* device;
    int index;
    if (int32_t status = driver(&opened)) return status;
    if (int32_t status = check(*opened, "asking for the current device", opened->current(&index))) return status;
    if (int32_t status = device_at(index, &device)) return status;
    std::lock_guard lock(functions_mutex);
    return with_relaxed_capture(*opened, [&] {
        void* module;
        return load_module(*opened, *device, index, op, module);
    });
}

int32_t device_count(int* count) {
    const Driver* opened;
    if (int32_t status = driver(&opened)) return status;
    return check(*opened, "counting devices", opened->count(count));
}

int32_t device_at(int index, const Device** device) {
    static std::map<int, std::unique_ptr<Device>> devices;
    const Driver* opened;
    if (int32_t status = driver(&opened)) return status;
    std::lock_guard lock(devices_mutex);
    std::unique_ptr<Device>& kept = devices[index];
    if (!kept) {
        Device read;
        const auto reader = opened->is_hip ? read_hip_device : read_cuda_device;
        if (int32_t status = reader(*opened, index, read)) return status;
        kept = std::make_unique<Device>(read);
    }
    *device = kept.get();
    return kOk;
}

int32_t current_device(const Device** device) {
    if (recording) {
        *device = &recording->device;
        return kOk;
    }
    const Driver* opened;
    int index;
    if (int32_t status = driver(&opened)) return status;
    if (int32_t status = check(*opened, "asking for the current device", opened->current(&index))) return status;
    return device_at(index, device);
}

std::string code_object_folder() {
    static const std::string folder = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&code_object_folder), &info);
        const std::string self = info.dli_fname;
        return self.substr(0, self.rfind('/') + 1) + "code_objects";
    }();
    return folder;
}

int32_t record_begin(const Device& device) {
    if (recording) return fail(kBadArgument, "record: this thread already records; end that recording first");
    recording = Recording{device, {}};
    return kOk;
}

bool recording_active() { return recording.has_value(); }

std::vector<RecordedLaunch> record_take() {
    return recording ? std::exchange(recording->launches, {}) : std::vector<RecordedLaunch>{};
}

void record_end() { recording.reset(); }

int32_t launch(const Launch& launch, const void* args, size_t args_size, void* stream) {
    const auto& [gx, gy, gz] = launch.grid;
    const auto& [bx, by, bz] = launch.block;
    if (recording) {
        recording->launches.push_back({launch.op,
                                       launch.kernel,
                                       code_object_path(recording->device, launch.op),
                                       {gx, gy, gz},
                                       {bx, by, bz},
                                       launch.lds_bytes,
                                       std::string(static_cast<const char*>(args), args_size)});
        return kOk;
    }
    const Driver* opened;
    int index;
    void* function;
    if (int32_t status = driver(&opened)) return status;
    if (int32_t status = check(*opened, "asking for the current device", opened->current(&index))) return status;
    if (int32_t status = load_function(*opened, index, launch, function)) return status;
    void* parameters[] = {const_cast<void*>(args)};
    return check(*opened, launch.kernel,
                 opened->launch(function, gx, gy, gz, bx, by, bz, launch.lds_bytes, stream, parameters, nullptr));
}

std::vector<Op>& ops() {
    static std::vector<Op> all;
    return all;
}

}  // namespace wave64
