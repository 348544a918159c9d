"""The hip backend: an operator's file in hip_ops/ allocates the outputs and calls `launch` with the fields of the
operator's struct by name; the C++ launcher checks them, plans the grid and launches.

    launch("rms_norm", x=x, weight=weight, out=out, x_stride=x.stride(0), ..., dtype=x.dtype)

`reason` says whether the backend can serve. `record` keeps launches instead of making them, on CPU tensors and without
a GPU: so the emulator runs the real host code and the real code objects. `arguments` reads a recorded launch.
"""

import contextlib
import functools
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.backends import hip_library
from wave64.op import NotSupported

#: None, or why wave64._hip cannot be imported.
extension_error: str | None = None
try:
    from wave64 import _hip as _extension  # pyright: ignore[reportAttributeAccessIssue]  # the build makes it
except ImportError as e:
    _extension = None
    extension_error = f"the extension wave64._hip is not built ({e}): python3 setup_rocm.py install"

_hip: Any = _extension

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def connect(**instead) -> None:
    """Tells the extension how to ask torch for addresses, devices and streams; `instead` replaces some of it (see
    _hip.connect), for a runtime that torch knows nothing of."""
    _hip.connect(**dict(
        tensor=Tensor, data_ptr=Tensor.data_ptr, get_device=Tensor.get_device,
        current_device=getattr(torch._C, "_cuda_getDevice", None),  # absent where torch is built without GPU support
        current_stream=getattr(torch._C, "_cuda_getCurrentRawStream", None),
        exchange_device=getattr(torch._C, "_cuda_exchangeDevice", None),
        dtypes={torch.bfloat16: _hip.BF16, torch.float16: _hip.FP16, torch.float32: _hip.FP32,
                **dict.fromkeys(FP8, _hip.FP8)}) | instead)


launch = cast(Any, None)  # where the extension is not built
if _hip is not None:
    connect()
    #: launch(op, tensor=None, /, **fields): the fields of the op's struct by name, tensors as tensors or None, dtypes
    #: as torch's. Launches on the device of `tensor`, or of the first field that is one, and on its current stream.
    #: Raises TypeError for a field that is unknown, missing or of another type, ValueError for one that the op refuses.
    launch = _hip.launch


def code_objects() -> dict[str, list[str]]:
    """Architecture -> operators that have code objects for it."""
    folder = Path(_hip.code_object_folder())
    return {arch.name: sorted(path.stem for path in arch.glob("*.co"))
            for arch in sorted(folder.glob("*/"), key=lambda path: path.name)}


def code_object(arch: str, op: str) -> bytes:
    """The bytes of hip/ops/<op>.hip's code object for `arch`."""
    return Path(_hip.code_object_folder(), arch, f"{op}.co").read_bytes()


def hashes() -> dict[str, str]:
    """<arch>/<op>.co -> SHA-256, in hexadecimal: equal where a build is reproduced. Empty without the extension."""
    return {f"{arch}/{op}.co": hashlib.sha256(code_object(arch, op)).hexdigest()
            for arch, names in (code_objects() if _hip else {}).items() for op in names}


def missing_code_objects() -> str:
    """The build's note about architectures it could not compile for; empty if it compiled for all."""
    return _note("missing.txt")


def compilers() -> str:
    """The build's note about the compiler of each architecture, and why others that it found were not used."""
    return _note("compilers.txt")


def _note(name: str) -> str:
    note = Path(_hip.code_object_folder(), name)
    return note.read_text().strip() if note.exists() else ""


@functools.cache
def runtime() -> str:
    """Opens the GPU runtime, unless it is open, and returns the path of its library. Raises _hip.Unavailable if no
    runtime can be opened. A child forked afterwards cannot use it, so this is called only when it is needed."""
    return _hip.open_runtime(hip_library.candidates())


def standin() -> str:
    """The stand-in for HIP's runtime that emulated devices have, next to the extension. Raises NotSupported without."""
    path = Path(_hip.code_object_folder()).parent / "libstandin_hip.so" if _hip is not None else None
    if path is None or not path.exists():
        raise NotSupported(f"emulate: {extension_error or f'{path} is not built: python3 setup_rocm.py install'}")
    return str(path)


@functools.cache
def open_standin() -> str:
    """Opens the stand-in as this process's HIP, unless a runtime is open; the path of the one that is."""
    return _hip.open_runtime([standin()], is_named=True)


def emulated_reason(arch: str) -> str | None:
    """None if this backend can serve the emulated device in use, else the reason."""
    try:
        return extension_error or _code_objects_reason(arch)
    except RuntimeError as e:
        return str(e)


@functools.cache
def reason(device_type: str) -> str | None:
    """None if this backend can serve tensors of `device_type` on this machine, else the reason."""
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


@contextlib.contextmanager
def record(arch: str) -> Iterator[list]:
    """This thread's launches inside the block are planned for `arch` and appended to the list, not made. A launch has
    op, kernel, code_object (a path), grid (in blocks), block (in lanes), lds_bytes, args (the bytes of the op's struct)
    and tensors ({field: tensor}, all that it may touch), which it keeps alive.
    """
    launches: list = []
    with platform.target(arch) as row:
        _hip.record_begin(_hip.Device(row.name, row.compute_units or 1, row.wave_size, row.lds_bytes), launches)
        try:
            yield launches
        finally:
            _hip.record_end()


def arguments(launch) -> dict[str, Any]:
    """The caller's fields of a recorded launch's struct, by name; addresses for tensors, 0 for None, a tuple of 8 for
    several pointers."""
    read = {name: struct.unpack_from(kind, launch.args, offset) for name, kind, offset in _hip.fields()[launch.op]}
    return {name: values[0] if len(values) == 1 else values for name, values in read.items()}


def constants(op: str) -> Any:
    """The constants that hip/ops/<op>.hip exports, as attributes; None without the extension."""
    return getattr(_hip, op, None)


def bind(op, supports, absent=None):
    """Registers the decorated function as backend hip of `op`, if the extension is built and has the operator."""
    return op.backend("hip", supports=supports, absent=absent) if hasattr(_hip, op.name) else lambda run: run


def floats_only(x: Tensor, *args, **kwargs) -> str | None:
    """`supports` of operators whose arguments all have the dtype of the first."""
    return None if x.dtype in FLOATS else f"dtype {x.dtype}"


def other_fp8(dtype: torch.dtype) -> str | None:
    """None, or that `dtype` is FP8 of a flavor that the architecture does not convert."""
    arch, flavor = platform.arch(), str(dtype).removeprefix("torch.float8_")
    if arch is None or dtype not in FP8 or arch.fp8 == flavor:
        return None
    return f"{flavor} on {arch.name}, whose kernels have {arch.fp8 or 'no FP8'}"


def no_product(dtype: torch.dtype) -> str | None:
    """None, or that the matrix instructions are not used for `dtype`."""
    return None if dtype in (torch.bfloat16, torch.float16) else f"multiplies bf16 and fp16, not {dtype}"


def unaligned(*tensors: Tensor) -> str | None:
    """None, or that a row of one of them, at any index but the last, does not begin at a multiple of 16 bytes."""
    for tensor in tensors:
        if any(at % 16 for at in (tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:-1]))):
            return "reads 16 bytes at a time, and rows do not begin at multiples of 16 bytes"
    return None


def no_fp8(arch: Arch) -> str | None:
    """`absent` of operators whose kernels exist only for architectures that convert FP8."""
    return f"{arch.name} has no FP8 conversion" if arch.fp8 is None else None


def no_matrix(arch: Arch) -> str | None:
    """`absent` of operators whose kernels exist only for architectures whose matrix instructions they know."""
    return f"knows no matrix instructions of {arch.name}" if arch.matrix is None else None
