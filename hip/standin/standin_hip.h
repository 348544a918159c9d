// A stand-in for ROCm's libamdhip64.so: HIP's entry points, layouts, error codes and refusals, on a machine without a
// GPU. Emulated devices run on it (wave64.emulate, --device gfx942), and so do the tests of runtime.cpp.
//
// It is a shared library and opened as HIP's runtime is, so that the code under test is the code that ships. A launch
// is checked as the runtime and the hardware would check it (grid, block, LDS, argument bytes, stream, the device that
// the function was loaded for) and handed, with a copy of its argument segment, to a callback, which runs it on the
// emulator or, where its stream captures, keeps it. "Device memory" is the process's own. Launches are done when they
// return, so streams and events order nothing: they are there to refuse what HIP refuses. Memory that the runtime is
// asked for can be exported to other processes, whose devices then share it.
//
//   properties.h     layouts of the two hipDeviceProp_t
//   code_object.h    what a loader reads from a code object
//   state.h          error codes, state, and how an entry point begins
//   standin_hip.cpp  the entry points by area: errors, devices, streams, events, modules, launches
//   memory.cpp       those of memory, of handles by which processes share it, and of access between devices
//
// To grow it (streams that order): state goes into `State`, an entry point begins with
// ENTRY(name), which counts the call, refuses where HIP was not initialized in this process (a fork's child) and makes
// the failure that a test asked for; every error goes through `result`, which keeps it for hipGetLastError.
//
// Devices are named by standin_devices, or by STANDIN_HIP in the environment, "gfx942,gfx950"; one gfx942 without
// either.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct StandinLaunch {
    const char* kernel;
    const void* code_object;  // its bytes
    size_t code_object_size;
    const void* args;  // what the caller gave of the kernarg segment
    size_t args_size;
    void* stream;
    int32_t device, is_captured;
    uint32_t grid[3], block[3], lds_bytes;
};

// Given every launch that passed the checks; its result is hipModuleLaunchKernel's.
void standin_on_launch(int (*callback)(const StandinLaunch*));

// From hipInit on these are the devices: names of architectures, separated by commas.
void standin_devices(const char* names);

// What hipGetErrorString says, on this thread, of the next launch whose callback fails: HIP's words, then these.
void standin_failure_text(const char* text);

// The bytes of the allocation that an address lies in, and where it begins; 0: of none.
size_t standin_allocation(const void* address, void** begin);

// ---- for tests only

// The nth call from now of entry point `name` (1: the next) fails with `code`.
void standin_fail(const char* name, int code, int nth);

// The calls since the last time this was asked, "hipInit hipGetDevice ...", with what matters of their arguments.
const char* standin_calls();

// Whether a stream of this process captures; code objects that are newer than `version` are not known.
void standin_capture(int active);
void standin_newest_code_object(int version);

// What is left for hipGetLastError to give, and this thread's capture mode.
int standin_last_error();
int standin_capture_mode();
}
