"""Compiles HIP sources with the clang of PyPI's ziglang, each once: tests, tools and processes side by side find what
another has built.

What is built lies in `~/.cache/wave64`, named by a hash of the compiler's version, its command and every file that it
may read, wherever these lie. A file unused for two weeks is removed.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KEPT_S = 14 * 24 * 3600

Step = Sequence[str | Path]


class CompileError(RuntimeError):
    """A source that does not compile; the message is the compiler's."""


@functools.cache
def compiler() -> str:
    """The version of the compiler: part of the name of all that it builds."""
    return importlib.metadata.version("ziglang")


def zig(*arguments: str | Path, cwd: Path) -> None:
    """`python -m ziglang <arguments>` in the folder `cwd`; raises CompileError with what the compiler said."""
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise CompileError(done.stderr)


def folder() -> Path:
    found = Path.home() / ".cache" / "wave64"
    found.mkdir(parents=True, exist_ok=True)
    return found


def build(suffix: str, cwd: Path, inputs: Sequence[Path], make: Callable[[Path], Sequence[Step]]) -> Path:
    """The file that compiling gives, from the cache where it is there.

    suffix  of its name, such as ".so"
    cwd     where the compiler runs; what lies below it is best named relative to it, for then it may lie anywhere
    inputs  the files that are read, and folders, of which every file may be
    make    given a folder to work in: the compiler's steps, arguments of `zig`; the last writes made<suffix> there
    Raises CompileError where a step fails; nothing is kept then.
    """
    digest = hashlib.sha256(repr((compiler(), [[str(word) for word in step] for step in make(Path("."))])).encode())
    for file in (f for path in inputs for f in (sorted(path.rglob("*")) if path.is_dir() else [path])):
        if file.is_file():
            digest.update(f"\0{file.name}\0".encode())
            digest.update(file.read_bytes())
    found = folder() / f"{digest.hexdigest()[:32]}{suffix}"
    with _lock(found):
        if found.exists():
            os.utime(found)
            return found
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            for step in make(Path(work)):
                zig(*step, cwd=cwd)
            os.replace(Path(work, f"made{suffix}"), found)
        _forget_old()
    return found


@contextlib.contextmanager
def _lock(file: Path):
    """One process builds a file, the others wait; a killed one's lock is gone with it."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_old() -> None:
    for file in folder().iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            if file.is_file() and time.time() - file.stat().st_mtime > KEPT_S:
                file.unlink()


# ---- what is built of hip/

#: Device code is freestanding: see cmake/code_objects.cmake, whose commands these are.
DEVICE = ("clang", "-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-nogpulib", "-nogpuinc",
          "-fuse-cuid=none", "-O3", "-std=c++17", "-Iinclude", "-c", "-emit-llvm")


def code_object(hip: Path, op: str, arch: str, *flags: str) -> Path:
    """ops/<op>.hip of the folder `hip`, for `arch`, as the package's build makes it; flags: more for the first step."""
    return _machine_code(hip, op, arch, ".co", flags)


def assembly(hip: Path, op: str, arch: str) -> str:
    """The text of ops/<op>.hip's machine code for `arch`, with the compiler's remarks on registers."""
    return _machine_code(hip, op, arch, ".s", ()).read_text()


def _machine_code(hip: Path, op: str, arch: str, suffix: str, flags: Sequence[str]) -> Path:
    def steps(work: Path) -> list[Step]:
        bitcode = work / "made.bc"
        backend = ["clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-nogpulib", "-O3"]
        first = [*DEVICE, f"--offload-arch={arch}", *flags, "-o", bitcode, f"ops/{op}.hip"]
        if suffix == ".s":
            return [first, [*backend, "-S", "-o", work / "made.s", bitcode]]
        return [first, [*backend, "-c", "-o", work / "made.o", bitcode],
                ["ld.lld", "-shared", "-o", work / "made.co", work / "made.o"]]

    return build(suffix, hip, [hip / "include", hip / "ops" / f"{op}.hip"], steps)
