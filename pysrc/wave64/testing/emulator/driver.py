"""The stand-in for HIP's runtime (hip/standin), as Python reaches it: ctypes alone, so that tests load this file
without the package. Every call that HIP has is made with HIP's arguments, and an error is raised in HIP's words."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

KEPT = 10  # of what callbacks raised


class HipError(RuntimeError):
    """A call that HIP refuses; `code` is its hipError_t."""

    def __init__(self, what: str, code: int, words: str):
        super().__init__(f"{what}: {words}")
        self.code = code


class _Launch(ctypes.Structure):
    """StandinLaunch of standin_hip.h."""

    _fields_ = [("kernel", ctypes.c_char_p), ("code_object", ctypes.c_void_p), ("code_object_size", ctypes.c_size_t),
                ("args", ctypes.c_void_p), ("args_size", ctypes.c_size_t), ("stream", ctypes.c_void_p),
                ("device", ctypes.c_int32), ("is_captured", ctypes.c_int32), ("grid", ctypes.c_uint32 * 3),
                ("block", ctypes.c_uint32 * 3), ("lds_bytes", ctypes.c_uint32)]


def _given(argument):
    """ctypes would cut an address to 32 bits."""
    return ctypes.c_void_p(argument) if isinstance(argument, int) else argument


class Driver:
    """A stand-in, opened. What runtime.cpp opens is the same library, with the same state."""

    LAUNCH_FAILURE = 719

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.standin_calls.restype = self.library.hipGetErrorString.restype = ctypes.c_char_p
        self.library.standin_allocation.restype = ctypes.c_size_t
        self.errors: list[Exception] = []  # what callbacks raised

    def __call__(self, name: str, *arguments) -> None:
        """The entry point `name`; raises HipError where it fails."""
        if code := getattr(self.library, name)(*map(_given, arguments)):
            self.library.hipGetLastError()
            words = self.library.hipGetErrorString(code)
            raise HipError(name, code, words.decode() if words else f"error {code}")

    def get(self, name: str, *arguments) -> int:
        """A number that an entry point writes to its last argument."""
        number = ctypes.c_int()
        self(name, *arguments, ctypes.byref(number))
        return number.value

    def new_handle(self, name: str, *arguments) -> int:
        """A handle that an entry point writes to its first argument."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def new_stream(self) -> int:
        return self.new_handle("hipStreamCreateWithFlags", 0)

    def new_graph(self, stream: int) -> int:
        """Ends the stream's capture; a handle of its graph."""
        handle = ctypes.c_void_p()
        self("hipStreamEndCapture", stream, ctypes.byref(handle))
        return handle.value or 0

    def allocation(self, address: int) -> tuple[int, int] | None:
        """(begin, bytes) of the runtime's memory that an address lies in; None: it is no such memory's."""
        begin = ctypes.c_void_p()
        size = self.library.standin_allocation(ctypes.c_void_p(address), ctypes.byref(begin))
        return (begin.value or 0, size) if size else None

    def on_launch(self, run: Callable) -> None:
        """`run` is given every launch: kernel, code_object (bytes), args (bytes), stream, device, is_captured, grid,
        block and lds_bytes. What it raises is kept in `errors`, and the launch fails with its words."""
        def made(pointer) -> int:
            given = pointer.contents
            launch = SimpleNamespace(
                kernel=given.kernel.decode(), code_object=ctypes.string_at(given.code_object, given.code_object_size),
                args=ctypes.string_at(given.args, given.args_size), stream=given.stream or 0, device=given.device,
                is_captured=bool(given.is_captured), grid=tuple(given.grid), block=tuple(given.block),
                lds_bytes=given.lds_bytes)
            try:
                run(launch)
            except Exception as e:  # ctypes would print it and go on
                self.errors.append(e)
                del self.errors[:-KEPT]
                self.library.standin_failure_text(f"{type(e).__name__}: {e}".encode())
                return self.LAUNCH_FAILURE
            return 0

        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))(made)
        self.library.standin_on_launch(self._callback)
