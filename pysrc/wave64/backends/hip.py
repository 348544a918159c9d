"""The hip backend. An operator's file in hip_ops/ makes a tensor an address, sizes and strides and calls `launch`; the
C++ launcher of the op does the rest.

`reason` says whether it can serve. `record` keeps launches instead of making them, on CPU tensors and without a GPU:
that is how the emulator runs the real host code and the real code objects. `arguments` reads a kept launch.
"""

import contextlib
import functools
import hashlib
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wave64 import platform
from wave64.backends import hip_library

#: None, or why wave64._hip cannot be imported.
extension_error: str | None = None
try:
    from wave64 import _hip
except ImportError as e:
    _hip = None
    extension_error = f"the extension wave64._hip is not built ({e}): python3 setup_rocm.py install"

#: abi.h, enum Dtype
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float8_e4m3fn: 3, torch.float8_e4m3fnuz: 3}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def code_objects() -> dict[str, list[str]]:
    """Architecture -> operators there are code objects for."""
    folder = Path(_hip.code_object_folder())
    return {arch.name: sorted(path.stem for path in arch.glob("*.co"))
            for arch in sorted(folder.glob("*/"), key=lambda path: path.name)}


def code_object(arch: str, op: str) -> bytes:
    """What was built of hip/ops/<op>.hip for `arch`."""
    return Path(_hip.code_object_folder(), arch, f"{op}.co").read_bytes()


def hashes() -> dict[str, str]:
    """<arch>/<op>.co -> SHA-256, in hexadecimal: equal where a build is reproduced. Empty without the extension."""
    return {f"{arch}/{op}.co": hashlib.sha256(code_object(arch, op)).hexdigest()
            for arch, names in (code_objects() if _hip else {}).items() for op in names}


def missing_code_objects() -> str:
    """What the build noted about architectures it could not compile for; empty where there is nothing to note."""
    return _note("missing.txt")


def compilers() -> str:
    """What the build noted about the compiler of each architecture, and why others that it found did not serve."""
    return _note("compilers.txt")


def _note(name: str) -> str:
    note = Path(_hip.code_object_folder(), name)
    return note.read_text().strip() if note.exists() else ""


@functools.cache
def runtime() -> str:
    """Opens the GPU runtime, unless it is open, and gives the path of its library. Raises _hip.Unavailable where there
    is none. A process that forks afterwards cannot use it in the child, so this is called when it is needed."""
    return _hip.open_runtime(hip_library.candidates())


@functools.cache
def reason(device_type: str) -> str | None:
    """None if this backend can serve tensors of `device_type` on this machine, else why not."""
    if extension_error:
        return extension_error
    if device_type == "cpu" and torch.version.hip is None and torch.version.cuda is None:
        return f"serves GPU tensors only, and torch {torch.__version__} is built without GPU support"
    try:
        runtime()
        if _hip.device_count() == 0:
            return "no GPU is visible"
        if device_type == "cpu":
            return "serves GPU tensors only"
        return _code_objects_reason(_hip.device(0).arch)
    except RuntimeError as e:
        return str(e)


def _code_objects_reason(arch: str) -> str | None:
    """None if there are code objects for `arch` and the runtime takes them."""
    built = code_objects()
    if arch not in built:
        note = missing_code_objects()
        return f"no code objects for {arch}; built are {', '.join(built) or 'none'}" + (f" ({note})" if note else "")
    if arch.startswith("gfx"):  # CUDA, for development, loads only into a context, which torch makes later
        _hip.load(min(built[arch], key=lambda op: len(code_object(arch, op))))
    return None


class Launches(list):
    """Recorded launches, and the workspaces that they point at."""

    def __init__(self):
        self.workspaces: list[Tensor] = []


_recording = threading.local()


@contextlib.contextmanager
def record(arch: str) -> Iterator[Launches]:
    """This thread's launches inside the block are planned for `arch` and kept, not made; the list it gives is filled
    when the block ends. A launch has op, kernel, code_object (a path), grid (in blocks), block (in lanes), lds_bytes
    and args (the bytes of the op's struct).
    """
    _recording.launches = launches = Launches()
    with platform.target(arch) as row:
        _hip.record_begin(_hip.Device(row.name, row.compute_units or 1, row.wave_size, row.lds_bytes))
        try:
            yield launches
        finally:
            launches += _hip.record_end()


def arguments(launch) -> dict[str, int | float]:
    """The caller's fields of a recorded launch's argument struct, by name."""
    return {name: struct.unpack_from(kind, launch.args, offset)[0]
            for name, kind, offset in _hip.fields()[launch.op]}


def launch(op: str, tensor: Tensor, *args) -> None:
    """Calls an operator of `_hip` for the device that holds `tensor`, on that device's current stream."""
    function, index = getattr(_hip, op), tensor.get_device()
    if index < 0:
        if not _hip.recording():
            raise ValueError(f"hip: expected GPU tensors outside of record(), got one on {tensor.device}")
        function(*args, 0)
    elif index == torch._C._cuda_getDevice():
        function(*args, torch._C._cuda_getCurrentRawStream(index))
    else:
        with torch.cuda.device(index):
            function(*args, torch._C._cuda_getCurrentRawStream(index))


def workspace(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for what only the launches of one call use; recorded launches keep it alive."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _hip.recording():
        _recording.launches.workspaces.append(tensor)
    return tensor


def bind(op, supports):
    """Registers the decorated function as backend hip of `op`, if the extension is there and has the operator."""
    return op.backend("hip", supports=supports) if hasattr(_hip, op.name) else lambda run: run


def floats_only(x: Tensor, *args, **kwargs) -> str | None:
    """`supports` of operators whose first argument says the dtype of all."""
    return None if x.dtype in FLOATS else f"dtype {x.dtype}"


def other_fp8(dtype: torch.dtype) -> str | None:
    """None, or that `dtype` is FP8 of a flavour that the architecture does not convert."""
    arch, flavour = platform.arch(), str(dtype).removeprefix("torch.float8_")
    if arch is None or DTYPES.get(dtype) != 3 or arch.fp8 == flavour:
        return None
    return f"{flavour} on {arch.name}, whose kernels have {arch.fp8 or 'no FP8'}"


def fp8_only(*args, **kwargs) -> str | None:
    """`supports` of operators whose kernels are there only where the architecture converts FP8."""
    arch = platform.arch()
    return f"{arch.name} has no FP8 conversion" if arch and arch.fp8 is None else None
