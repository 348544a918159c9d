"""Where ROCm's runtime, libamdhip64.so, may be on this machine, in the order in which to look.

A runtime that a ROCm torch has loaded is not searched for: wave64._hip takes that first. ROCm's wheels keep the library
in folders of their own, some under its versioned name only.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NAME = "libamdhip64.so"
OLDEST = 6  # the first ROCm with the entry points that wave64 calls


def version(library: Path) -> int:
    """The major version in the file's name or its link target; a large number if neither has one."""
    found = re.search(r"\.so\.(\d+)", os.path.realpath(library))
    return int(found[1]) if found else sys.maxsize


def in_folder(folder: Path) -> list[Path]:
    """The runtimes in `folder`, the unversioned name first, then the newest; a second name of a file counts once."""
    files = sorted(folder.glob(f"{NAME}*"), key=lambda file: (file.name != NAME, -version(file), file.name))
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1]


def by_rocm_sdk() -> list[Path]:
    """The runtimes that the package rocm finds, if it is installed."""
    if importlib.util.find_spec("rocm_sdk") is None:
        return []
    try:
        import rocm_sdk  # pyright: ignore[reportMissingImports]  # only on machines with AMD GPUs

        return [Path(path) for path in rocm_sdk.find_libraries("amdhip64")]
    except Exception:  # another package's code: whatever it raises, the other folders remain
        return []


def by_loader() -> list[Path]:
    """The dynamic loader's cache: the lines of `ldconfig -p`."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig", "ldconfig"):
        try:
            told = subprocess.run([program, "-p"], capture_output=True, text=True).stdout
        except OSError:
            continue
        return [Path(path) for path in re.findall(rf"{re.escape(NAME)}\S* .*=> (\S+)", told)]
    return []


def newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)], reverse=True)


def installed(site: list[Path], environ: Mapping[str, str], opt: Path) -> Iterator[Path]:
    """Every runtime found, in order: those of torch and of pip before the system's."""
    yield from by_rocm_sdk()
    for folder in site:
        for core in sorted(folder.glob("_rocm_sdk_core*")):
            yield from in_folder(core / "lib")
    for folder in site:
        yield from in_folder(folder / "torch" / "lib")
    for variable in ("HIP_PATH", "ROCM_PATH"):
        if environ.get(variable):
            yield from in_folder(Path(environ[variable], "lib"))
    for folder in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder:
            yield from in_folder(Path(folder))
    yield from by_loader()
    for rocm in (opt / "rocm", *newest_first((opt / "rocm").glob("core-*")), *newest_first(opt.glob("rocm-*"))):
        yield from in_folder(rocm / "lib")


def candidates(site: list[Path] | None = None, environ: Mapping[str, str] | None = None,
               opt: Path = Path("/opt")) -> list[str]:
    """Paths to try in order; runtimes that are too old come last, so that they are reported if there is no other.

    site     folders that hold packages; None: those of this Python
    environ  None: this process's
    opt      where ROCm's packages install themselves
    """
    site = [Path(folder) for folder in sys.path if folder] if site is None else site
    found = dict.fromkeys(map(str, installed(site, os.environ if environ is None else environ, opt)))
    return sorted(found, key=lambda path: version(Path(path)) < OLDEST)
