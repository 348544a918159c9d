"""The stand-in and hip/src/runtime.cpp, as a process without any package reaches them: ctypes alone."""

import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace

OK, BAD_ARGUMENT, UNAVAILABLE, RUNTIME_ERROR = range(4)  # host.h, enum Status


class _Launch(ctypes.Structure):
    """StandinLaunch of standin_hip.h."""

    _fields_ = [("kernel", ctypes.c_char_p), ("code_object", ctypes.c_void_p), ("code_object_size", ctypes.c_size_t),
                ("args", ctypes.c_void_p), ("args_size", ctypes.c_size_t), ("stream", ctypes.c_void_p),
                ("device", ctypes.c_int32), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
                ("lds_bytes", ctypes.c_uint32)]


class Standin:
    """A stand-in, opened; the runtime under test finds it as what the process holds."""

    LAUNCH_FAILURE = 719

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.standin_calls.restype = ctypes.c_char_p

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """The nth call of `name` from now fails."""
        self.library.standin_fail(name.encode(), code, nth)

    def calls(self) -> list[str]:
        """What was called since this was last asked."""
        return self.library.standin_calls().decode().split()

    def on_launch(self, run: Callable) -> None:
        """`run` is given every launch: kernel, code_object (bytes), args (bytes), stream, device, grid, block and
        lds_bytes. What it raises is kept in `errors`, and the launch fails."""
        self.errors: list[Exception] = []

        def made(pointer) -> int:
            told = pointer.contents
            launch = SimpleNamespace(
                kernel=told.kernel.decode(), code_object=ctypes.string_at(told.code_object, told.code_object_size),
                args=ctypes.string_at(told.args, told.args_size), stream=told.stream or 0, device=told.device,
                grid=tuple(told.grid), block=tuple(told.block), lds_bytes=told.lds_bytes)
            try:
                run(launch)
            except Exception as e:  # ctypes would print it and go on
                self.errors.append(e)
                return self.LAUNCH_FAILURE
            return 0

        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))(made)
        self.library.standin_on_launch(self._callback)


class Failed(Exception):
    """`status` and the words of a call of the runtime that failed."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


@functools.cache
def literal(text: str) -> ctypes.Array:
    """The same text at one address, as a literal of a program lies."""
    return ctypes.create_string_buffer(text.encode())


class Runtime:
    """hip/src/runtime.cpp with probe.cpp."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.probe_error.restype = self.library.probe_path.restype = ctypes.c_char_p

    def _check(self, status: int) -> None:
        if status:
            raise Failed(status, self.library.probe_error().decode())

    def open(self, *candidates: str) -> str:
        paths = (ctypes.c_char_p * len(candidates))(*map(str.encode, candidates))
        self._check(self.library.probe_open(paths, len(candidates)))
        return self.library.probe_path().decode()

    def count(self) -> int:
        number = ctypes.c_int()
        self._check(self.library.probe_count(ctypes.byref(number)))
        return number.value

    def device(self, index: int | None = None) -> tuple[str, int, int, int]:
        """Architecture, compute units, wave size and LDS bytes; of the current device without an index."""
        arch, numbers = ctypes.create_string_buffer(256), (ctypes.c_int * 3)()
        self._check(self.library.probe_device(-1 if index is None else index, arch, numbers))
        return (arch.value.decode(), *numbers)

    def load(self, op: str) -> None:
        self._check(self.library.probe_load(literal(op)))

    def launch(self, op="rms_norm", kernel="rms_norm_bf16", grid=(1, 1, 1), block=(64, 1, 1), lds_bytes=0,
               args=bytes(72), stream=0) -> None:
        shape = (ctypes.c_uint32 * 7)(*grid, *block, lds_bytes)
        self._check(self.library.probe_launch(literal(op), literal(kernel), shape, args, ctypes.c_size_t(len(args)),
                                              ctypes.c_void_p(stream)))
