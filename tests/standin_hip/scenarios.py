"""What the runtime does with HIP, a function each: `python -S scenarios.py NAME STANDIN RUNTIME`, a process each, since
a process opens one HIP. tests/test_standin_hip.py runs them; next to RUNTIME lie the code objects that they load."""

import ctypes
import os
import sys

from session import RUNTIME_ERROR, UNAVAILABLE, Failed, Runtime, Standin

SCENARIOS = {}


def scenario(devices="gfx942"):
    def declare(function):
        SCENARIOS[function.__name__] = function, devices
        return function

    return declare


def refused(call, *args, **kwargs) -> Failed:
    try:
        call(*args, **kwargs)
    except Failed as e:
        return e
    raise AssertionError("expected an error")


def loads(hip: Standin) -> list[str]:
    return [call for call in hip.calls() if call.startswith(("hipModuleLoadData", "hipModuleGetFunction"))]


@scenario("gfx942,gfx950,gfx1201")
def properties_are_read_where_hip_puts_them(hip, runtime):
    assert runtime.count() == 3
    assert runtime.device(0) == ("gfx942", 304, 64, 65536)
    assert runtime.device(1) == ("gfx950", 256, 64, 160 * 1024)
    assert runtime.device(2) == ("gfx1201", 64, 32, 65536)
    hip.calls()
    assert runtime.device(1) == ("gfx950", 256, 64, 160 * 1024)
    assert hip.calls() == []  # kept


@scenario()
def a_launch_hands_on_every_number(hip, runtime):
    made = []
    hip.on_launch(made.append)
    args = bytes(range(100, 172))
    runtime.count()
    stream = hip.new_stream()
    runtime.launch(grid=(3, 5, 7), block=(4, 8, 16), lds_bytes=288, args=args, stream=stream)
    launch, = made
    assert (launch.kernel, launch.grid, launch.block, launch.lds_bytes) == ("rms_norm_bf16", (3, 5, 7), (4, 8, 16), 288)
    assert (launch.args, launch.stream, launch.device) == (args, stream, 0)


@scenario("gfx942,gfx950")
def a_function_belongs_to_a_device(hip, runtime):
    made, devices = [], runtime.count()
    assert devices == 2
    hip.on_launch(made.append)
    for device in (0, 1, 0, 1):
        assert hip.library.hipSetDevice(device) == 0
        assert runtime.device()[0] == ("gfx942", "gfx950")[device]
        runtime.launch()
    assert [launch.device for launch in made] == [0, 1, 0, 1]
    assert [launch.code_object[48] for launch in made] == [0x4C, 0x4F, 0x4C, 0x4F]  # e_flags
    assert loads(hip) == ["hipModuleLoadData:0", "hipModuleGetFunction:rms_norm_bf16",
                          "hipModuleLoadData:1", "hipModuleGetFunction:rms_norm_bf16"]  # once each


@scenario()
def a_function_belongs_to_an_operator(hip, runtime):
    made = []
    hip.on_launch(made.append)
    runtime.launch("rms_norm")
    runtime.launch("twin")  # has a kernel of the same name
    assert made[0].code_object != made[1].code_object
    assert loads(hip) == 2 * ["hipModuleLoadData:0", "hipModuleGetFunction:rms_norm_bf16"]
    runtime.launch("rms_norm", "rms_norm_fp16")  # another of a module that is there
    assert loads(hip) == ["hipModuleGetFunction:rms_norm_fp16"]


@scenario()
def code_objects_are_loaded_under_capture_and_the_mode_restored(hip, runtime):
    exchange = "hipThreadExchangeStreamCaptureMode"
    runtime.device(0)
    hip.library.standin_capture(1)
    for mode, kernel in enumerate(("rms_norm_bf16", "rms_norm_fp16", "rms_norm_fp32")):
        set_mode = ctypes.c_int(mode)
        assert hip.library.hipThreadExchangeStreamCaptureMode(ctypes.byref(set_mode)) == 0
        hip.calls()
        runtime.launch(kernel=kernel)
        load = ["hipModuleLoadData:0"] if mode == 0 else []
        assert hip.calls() == ["hipGetDevice", f"{exchange}:2", *load, f"hipModuleGetFunction:{kernel}",
                               f"{exchange}:{mode}", "hipModuleLaunchKernel"]
        assert hip.library.standin_capture_mode() == mode
        for op, name in (("corrupt", "rms_norm_bf16"), ("rms_norm", "no_such"), ("absent", "rms_norm_bf16")):
            refused(runtime.launch, op, name)
            assert hip.library.standin_capture_mode() == mode, op
        runtime.load("twin")
        assert hip.library.standin_capture_mode() == mode


@scenario()
def every_call_that_fails_is_told_in_words(hip, runtime):
    hip.library.standin_newest_code_object(6)
    for call, nth, act, words in (
            ("hipGetDeviceCount", 1, runtime.count, "counting devices"),
            ("hipGetDevicePropertiesR0600", 1, lambda: runtime.device(0), "reading device properties"),
            ("hipGetDevice", 1, runtime.device, "asking for the current device"),
            ("hipGetDevice", 1, runtime.launch, "asking for the current device"),
            ("hipGetDevice", 1, lambda: runtime.load("rms_norm"), "asking for the current device"),
            ("hipThreadExchangeStreamCaptureMode", 1, lambda: runtime.launch(kernel="rms_norm_fp16"),
             "relaxing the stream capture mode"),
            ("hipModuleLoadData", 1, lambda: runtime.launch("twin"), "loading the code object of twin for gfx942"),
            ("hipModuleLoadData", 1, lambda: runtime.load("newer"), "loading the code object of newer for gfx942"),
            ("hipModuleGetFunction", 1, lambda: runtime.launch(kernel="rms_norm_bf16_unaligned"),
             "rms_norm_bf16_unaligned"),
            ("hipThreadExchangeStreamCaptureMode", 2, lambda: runtime.launch(kernel="rms_norm_fp32"),
             "restoring the stream capture mode"),
            ("hipModuleLaunchKernel", 1, runtime.launch, "rms_norm_bf16")):
        hip.fail(call, 2, nth)
        error = refused(act)
        assert (str(error), error.status) == (f"HIP: {words}: out of memory", RUNTIME_ERROR), (call, str(error))
        assert hip.library.standin_last_error() == 0, call  # torch's next call would find it
        act()  # as if nothing had been
    hip.fail("hipGetDeviceCount", 12345)
    assert str(refused(runtime.count)) == "HIP: counting devices: error 12345"


@scenario()
def what_hip_refuses_is_told_in_words(hip, runtime):
    hip.on_launch(lambda launch: None)
    for words, change in (
            ("HIP: rms_norm_bf16: invalid configuration argument", dict(block=(32, 32, 2))),
            ("HIP: rms_norm_bf16: invalid configuration argument", dict(grid=(0, 1, 1))),
            ("HIP: rms_norm_bf16: out of resources", dict(lds_bytes=65537)),
            ("HIP: no_such: named symbol not found", dict(kernel="no_such")),
            ("HIP: loading the code object of corrupt for gfx942: device kernel image is invalid",
             dict(op="corrupt")),
            ("HIP: loading the code object of foreign for gfx942: no kernel image is available for execution on the "
             "device", dict(op="foreign")),
            ("HIP: loading the code object of newer for gfx942: no kernel image is available for execution on the "
             "device", dict(op="newer"))):
        error = refused(runtime.launch, **change)
        assert (str(error), error.status) == (words, RUNTIME_ERROR), (change, str(error))
    error = refused(runtime.launch, "absent")
    assert error.status == UNAVAILABLE
    assert str(error).startswith("absent: no code object for gfx942: ")
    assert str(error).endswith("code_objects/gfx942/absent.co cannot be read")
    hip.library.standin_newest_code_object(6)
    runtime.launch("newer")  # a ROCm that knows version 6


@scenario("")
def no_device_is_told_and_kept(hip, runtime):
    for _ in range(2):
        error = refused(runtime.count)
        assert str(error) == "HIP finds no usable GPU: no ROCm-capable device is detected"
        assert error.status == UNAVAILABLE
    assert hip.calls() == ["hipInit"]
    assert hip.library.standin_last_error() == 0


@scenario()
def a_child_that_was_forked_before_the_first_use_has_hip(hip, runtime):
    def child_count() -> int:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            os._exit(runtime.count())
        except Failed:
            os._exit(99)

    assert hip.calls() == []
    assert child_count() == 1
    assert runtime.count() == 1
    assert child_count() == 99  # as with HIP: what is initialized does not survive


PAGE = 2 << 20  # what memory is exported in


@scenario("gfx942,gfx950")
def processes_share_memory_by_handles(hip, runtime):
    (theirs, ours), (back, forth) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        status = 1
        try:
            os.close(ours)  # so that the end of the other process is seen
            assert runtime.count() == 2
            address = runtime.open_shared(os.read(theirs, 64))
            assert ctypes.string_at(address, 5) == b"\0hand"
            ctypes.memmove(address + PAGE, b"back", 4)
            os.write(forth, b"!")
            os.read(theirs, 1)
            runtime.close_shared(address)
            assert str(refused(runtime.close_shared, address)) == "HIP: unmapping memory of a peer: invalid argument"
            status = 0
        finally:
            os._exit(status)
    runtime.count()
    address = runtime.allocate_shared(2 * PAGE)
    assert ctypes.string_at(address, 2 * PAGE) == bytes(2 * PAGE)
    assert "hipExtMallocWithFlags:3" in hip.calls()  # uncached, which is not fine-grained
    ctypes.memmove(address + 1, b"hand", 4)
    handle = runtime.export_shared(address)
    os.write(ours, handle)
    assert os.read(back, 1) == b"!"
    assert ctypes.string_at(address + PAGE, 4) == b"back"
    os.write(ours, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hip.allocation(address + 2 * PAGE - 1) == (address, 2 * PAGE)
    runtime.free_shared(address)
    assert hip.allocation(address) is None


@scenario("gfx942,gfx942")
def memory_that_cannot_be_shared_is_refused_in_words(hip, runtime):
    runtime.count()
    address, small = runtime.allocate_shared(PAGE), runtime.allocate_shared(4096)
    for words, call, *arguments in (
            ("HIP: mapping memory of a peer: invalid device context", runtime.open_shared,
             runtime.export_shared(address)),  # a process's own
            ("HIP: exporting memory to peers: invalid argument", runtime.export_shared, small),
            ("HIP: exporting memory to peers: invalid argument", runtime.export_shared, address + 64),
            ("HIP: asking for peer access: invalid device ordinal", runtime.can_access_peer, 0, 2),
            ("HIP: freeing memory that peers can map: invalid argument", runtime.free_shared, address + 64),
            ("handle: expected 64 bytes, got 3", runtime.open_shared, b"abc")):
        assert str(refused(call, *arguments)) == words
    assert runtime.can_access_peer(0, 1)
    for entry_point, what, call, argument in (
            ("hipExtMallocWithFlags", "allocating memory that peers can map", runtime.allocate_shared, PAGE),
            ("hipMemset", "zeroing memory that peers can map", runtime.allocate_shared, PAGE),
            ("hipDeviceSynchronize", "zeroing memory that peers can map", runtime.allocate_shared, PAGE),
            ("hipIpcGetMemHandle", "exporting memory to peers", runtime.export_shared, address),
            ("hipHostMalloc", "allocating memory of the host that kernels can write to", runtime.allocate_mapped, 64),
            ("hipHostGetDevicePointer", "allocating memory of the host that kernels can write to",
             runtime.allocate_mapped, 64)):
        hip.fail(entry_point, 2)
        assert str(refused(call, argument)) == f"HIP: {what}: out of memory"
    hip.calls()
    host, device = runtime.allocate_mapped(64)
    assert (host, ctypes.string_at(device, 64)) == (device, bytes(64))
    runtime.free_mapped(host)


if __name__ == "__main__":
    name, standin, library = sys.argv[1:]
    function, os.environ["STANDIN_HIP"] = SCENARIOS[name]
    function(Standin(standin), Runtime(library))
