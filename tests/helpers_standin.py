"""Builds the stand-in for ROCm's runtime, and hip/src/runtime.cpp by itself: the system's compiler, or ziglang's."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wave64.backends import hip

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "standin_hip"
HIP = HERE.parent / "hip"
STANDIN = HIP / "standin"


def compiler() -> list[str]:
    """A C++ compiler as a command."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "c++"]


def compile_cpp(*arguments: object) -> None:
    command = [*compiler(), "-std=c++17", "-O0", "-fPIC", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="wave64-standin-")


@functools.cache
def standin_objects() -> tuple[Path, ...]:
    built = tuple(Path(folder().name, f"{name}.o") for name in ("standin_hip", "memory"))
    for made in built:
        compile_cpp("-Wall", "-Wextra", "-c", "-o", made, STANDIN / f"{made.stem}.cpp")
    return built


@functools.cache
def standin() -> Path:
    """The stand-in, built once."""
    return link_standin(Path(folder().name, "hip", "libamdhip64.so"))


def link_standin(library: Path, without: tuple[str, ...] = ()) -> Path:
    """A stand-in of that path that lacks the entry points in `without`."""
    library.parent.mkdir(parents=True, exist_ok=True)
    script = library.with_name(f"{library.name}.map")
    script.write_text("{ " + (f"local: {'; '.join(without)}; " if without else "") + "};\n")
    compile_cpp("-shared", f"-Wl,--version-script={script}", "-o", library, *standin_objects())
    return library


@functools.cache
def runtime() -> Path:
    """hip/src/runtime.cpp as a library of C functions (probe.cpp), next to code objects good and bad; built once."""
    built = Path(folder().name, "runtime")
    built.mkdir()
    compile_cpp("-shared", "-I", HIP / "include", "-I", HIP / "src", "-o", built / "runtime.so",
                HIP / "src" / "runtime.cpp", HIP / "src" / "shared_memory.cpp", SOURCES / "probe.cpp", "-ldl")
    for arch in ("gfx942", "gfx950"):
        objects = built / "code_objects" / arch
        objects.mkdir(parents=True)
        good = hip.code_object(arch, "rms_norm")

        def with_version(version: int, good=good) -> bytes:
            return good[:8] + bytes([version - 2]) + good[9:]

        for name, code in {"rms_norm": good, "twin": with_version(4), "newer": with_version(6),
                           "corrupt": good[:1000] + bytes(len(good) - 1000),
                           "foreign": hip.code_object("gfx90a", "rms_norm")}.items():
            (objects / f"{name}.co").write_bytes(code)
    return built / "runtime.so"


def run_without_packages(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    """A Python that starts at once: it has no site-packages."""
    return subprocess.run([sys.executable, "-S", *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **env})


def opened(*candidates: Path | str, **env: str) -> str:
    """The path of the library that the runtime opens in a new process, or the words of its error."""
    code = (f"import sys; sys.path.insert(0, {str(SOURCES)!r})\nfrom session import Failed, Runtime\n"
            f"try:\n    print(Runtime({str(runtime())!r}).open(*sys.argv[1:]))\nexcept Failed as e:\n    print(e)")
    done = run_without_packages("-c", code, *candidates, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
