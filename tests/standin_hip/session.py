"""The stand-in and hip/src/runtime.cpp, as a process without any package reaches them: ctypes alone."""

import ctypes
import functools
import importlib.util
from pathlib import Path
from types import ModuleType

OK, BAD_ARGUMENT, UNAVAILABLE, RUNTIME_ERROR = range(4)  # host.h, enum Status

DRIVER = Path(__file__).resolve().parents[2] / "pysrc" / "wave64" / "testing" / "emulator" / "driver.py"


def _loaded() -> ModuleType:
    """driver.py by itself: the package needs torch, and these processes have no package at all."""
    described = importlib.util.spec_from_file_location("standin_driver", DRIVER)
    assert described is not None
    assert described.loader is not None
    made = importlib.util.module_from_spec(described)
    described.loader.exec_module(made)
    return made


class Standin(_loaded().Driver):
    """A stand-in, opened; the runtime under test finds it as what the process holds."""

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """The nth call of `name` from now fails."""
        self.library.standin_fail(name.encode(), code, nth)

    def calls(self) -> list[str]:
        """What was called since this was last asked."""
        return self.library.standin_calls().decode().split()


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

    def allocate_shared(self, size: int) -> int:
        address = ctypes.c_void_p()
        self._check(self.library.probe_allocate_shared(ctypes.c_size_t(size), ctypes.byref(address)))
        return address.value or 0

    def free_shared(self, address: int) -> None:
        self._check(self.library.probe_free_shared(ctypes.c_void_p(address)))

    def export_shared(self, address: int) -> bytes:
        handle = ctypes.create_string_buffer(64)
        self._check(self.library.probe_export_shared(ctypes.c_void_p(address), handle))
        return handle.raw

    def open_shared(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        self._check(self.library.probe_open_shared(handle, ctypes.c_size_t(len(handle)), ctypes.byref(address)))
        return address.value or 0

    def close_shared(self, address: int) -> None:
        self._check(self.library.probe_close_shared(ctypes.c_void_p(address)))

    def can_access_peer(self, device: int, peer: int) -> bool:
        can = ctypes.c_bool()
        self._check(self.library.probe_can_access_peer(device, peer, ctypes.byref(can)))
        return can.value

    def allocate_mapped(self, size: int) -> tuple[int, int]:
        """Where the host finds it, and the device."""
        addresses = (ctypes.c_void_p * 2)()
        self._check(self.library.probe_allocate_mapped(ctypes.c_size_t(size), addresses))
        return addresses[0] or 0, addresses[1] or 0

    def free_mapped(self, host: int) -> None:
        self._check(self.library.probe_free_mapped(ctypes.c_void_p(host)))

    def load(self, op: str) -> None:
        self._check(self.library.probe_load(literal(op)))

    def launch(self, op="rms_norm", kernel="rms_norm_bf16", grid=(1, 1, 1), block=(64, 1, 1), lds_bytes=0,
               args=bytes(72), stream=0) -> None:
        shape = (ctypes.c_uint32 * 7)(*grid, *block, lds_bytes)
        self._check(self.library.probe_launch(literal(op), literal(kernel), shape, args, ctypes.c_size_t(len(args)),
                                              ctypes.c_void_p(stream)))
