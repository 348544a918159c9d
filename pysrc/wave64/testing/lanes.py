"""Runs HIP kernels on a CPU, every lane a fiber: the launches are planned and recorded by the real host code, and the
device section of hip/ops/<op>.hip, compiled for this CPU, executes them on the CPU tensors that they point at.

    with lanes.on_cpu("gfx942"):
        out = OPS["rms_norm"].backends["hip"].run(x, weight)
    # out is there when the block ends

It shows what the source means, barriers included (hip/src/lanes.cpp says what is stricter than hardware), not what a
GPU's compiler makes of it. Needs the repository's hip/ folder and the package ziglang.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

from wave64.arch import lookup
from wave64.backends import hip
from wave64.testing import built

#: what the compiler of each architecture defines, as far as kernels look at it
MACROS = {"gfx90a": ("__GFX9__",), "gfx942": ("__GFX9__", "__gfx942__"), "gfx950": ("__GFX9__", "__gfx950__"),
          "gfx1100": ("__GFX11__",), "gfx1201": ("__GFX12__",), "gfx1250": ("__GFX12__", "__gfx1250__")}


@functools.cache
def sources() -> Path:
    """The repository's hip/ folder: around this file where the package is installed editable, else around the working
    directory."""
    here = Path.cwd()
    for root in (Path(__file__).resolve().parents[3], here, *here.parents):
        if (root / "hip" / "src" / "lanes.cpp").is_file():
            return root / "hip"
    raise FileNotFoundError(f"hip/src/lanes.cpp: expected in a folder around {here}; work inside the repository")


def build(source: Path, arch: str) -> ctypes.CDLL:
    """A shared library of a device section and lanes.cpp, as if for `arch`. It is for the oldest CPU of this machine's
    kind, so that every machine runs the same code. Raises CompileError where it does not compile, or calls what neither
    it nor the C library has."""
    hip = sources()
    if source.is_relative_to(hip):
        source = source.relative_to(hip)
    # as C, so that no C++ library is built first, which takes a minute
    flags = ["cc", "-std=c++17", "-O0", "-mcpu=baseline", "-fno-sanitize=undefined", "-shared", "-Wl,-z,defs",
             "-fno-exceptions", "-fno-rtti", "-fPIC", "-fvisibility=hidden", "-DWAVE64_CPU",
             *(f"-D{macro}" for macro in MACROS[arch]), "-Iinclude", "-x", "c++", source, "src/lanes.cpp"]
    inputs = [hip / "include", hip / "src" / "lanes.cpp", hip / source]
    try:
        return ctypes.CDLL(str(built.build(".so", hip, inputs, lambda work: [[*flags, "-o", work / "made.so"]])))
    except built.CompileError as e:
        raise built.CompileError(f"{source.stem}: its device section does not build for a CPU\n{e}") from None


@functools.cache
def library(op: str, arch: str) -> ctypes.CDLL:
    """hip/ops/<op>.hip, its device section compiled for this CPU as if for `arch`."""
    loaded = build(sources() / "ops" / f"{op}.hip", arch)
    loaded.wave64_run.restype = ctypes.c_char_p
    return loaded


def execute(launch, arch: str) -> None:
    """Makes a recorded launch, here and now. Raises RuntimeError where its lanes do not meet as they must."""
    code = library(launch.op, arch)
    kernel = ctypes.cast(getattr(code, launch.kernel), ctypes.c_void_p)
    wrong = code.wave64_run(kernel, (ctypes.c_uint32 * 3)(*launch.grid), ctypes.c_uint32(launch.block[0]),
                            lookup(arch).wave_size, launch.args, ctypes.c_size_t(len(launch.args)))
    if wrong:
        raise RuntimeError(f"{launch.kernel}: {wrong.decode()}")


@contextlib.contextmanager
def on_cpu(arch: str) -> Iterator[None]:
    """Inside, hip operators take CPU tensors; their launches are made, in order, when the block ends."""
    with hip.record(arch) as launches:
        yield
    for launch in launches:
        execute(launch, arch)
