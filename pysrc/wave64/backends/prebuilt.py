"""Triton kernels that were compiled ahead, by `python -m wave64 prebuild`: a folder that Triton looks into before its
own cache.

The folder holds, under kernels/, what Triton's cache holds, by the same keys, which cover Triton's version, the
architecture, a kernel's source, what it is specialized on and its options: what does not fit is never found. And
`manifest.json`, which says in words what it was made for. Nothing in it names the place where it was made, so it can be
copied, as a tar too, and be read only. What is not in it is compiled, into Triton's cache, with a line in the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Literal

import triton
from tqdm import tqdm
from triton import knobs
from triton.runtime.cache import FileCacheManager, triton_key
from triton.runtime.jit import JITFunction

from wave64 import triton_ops, tuning
from wave64.backends import import_triton_kernels

log = logging.getLogger("wave64")

MANIFEST, KERNELS, LOCK = "manifest.json", "kernels", ".lock"
#: Where `prebuild` writes and a server looks, a folder for each architecture.
DEFAULT = Path.home() / ".cache" / "wave64" / "prebuilt"
WORDS = {"arch": "the architecture", "triton": "Triton", "compiler": "the build of Triton",
         "environment": "Triton's variables of the environment", "sources": "the sources of wave64's kernels"}


class PrebuiltError(ValueError):
    """A folder or tar that holds no prebuilt kernels; the message names it."""


def digest_of_sources() -> str:
    """Of all that wave64's kernels and their launches are made of."""
    digest = hashlib.sha256()
    folders = [Path(triton_ops.__path__[0]), tuning.FOLDER]
    for file in sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def made_for(arch: str) -> dict[str, Any]:
    """What kernels compiled here and now, for `arch`, are for."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return {"arch": arch, "triton": triton.__version__,
            "compiler": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
            "environment": dict(get_cache_invalidating_env_vars()), "sources": digest_of_sources()[:16]}


def mismatch(manifest: dict[str, Any], arch: str) -> str | None:
    """None, or what the kernels were made for and is otherwise here, in one line."""
    here = made_for(arch)
    for name, words in WORDS.items():
        if manifest.get(name) != here[name]:
            shown = [str(each.get(name)) or "none" for each in (manifest, here)]
            return f"{words}: made for {shown[0]}, this is {shown[1]}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises PrebuiltError where the folder has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise PrebuiltError(f"{folder}: expected a folder or a tar that `python -m wave64 prebuild` has written, got "
                            f"one without a readable {MANIFEST} ({type(error).__name__})") from None
    if not isinstance(manifest, dict):
        raise PrebuiltError(f"{folder / MANIFEST}: expected an object, got {type(manifest).__name__}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=MANIFEST, delete=False) as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
    os.chmod(file.name, 0o644)
    os.replace(file.name, folder / MANIFEST)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time inside; a process that ends, however, holds it no longer."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pack(folder: Path, tar: Path) -> None:
    """Write the folder as a tar, compressed as its name says; whole or not at all."""
    partial = tar.with_name(f"{tar.name}.{os.getpid()}.partial")
    gz, xz = tar.suffix in (".gz", ".tgz"), tar.suffix == ".xz"
    mode: Literal["w:gz", "w:xz", "w"] = "w:gz" if gz else "w:xz" if xz else "w"
    try:
        with tarfile.open(partial, mode) as archive:
            for name in (MANIFEST, KERNELS):
                archive.add(folder / name, name)
        os.replace(partial, tar)
    finally:
        partial.unlink(missing_ok=True)


def unpacked(path: Path, into: Path | None = None) -> Path:
    """The folder itself, or that to which a tar's content was unpacked, once, next to those of other tars.

    Raises PrebuiltError for what is neither.
    """
    if path.is_dir():
        return path
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise PrebuiltError(f"{path}: {error.strerror}") from None
    parent = into or DEFAULT / "unpacked"
    folder = parent / digest
    with locked(parent):
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(dir=parent, prefix=f"{digest}."))
        try:
            with tarfile.open(path) as archive:
                safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(partial, **safely)
            read_manifest(partial)
            os.chmod(partial, 0o755)
            os.replace(partial, folder)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise PrebuiltError(f"{path}: expected a tar of `python -m wave64 prebuild`'s: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


class Reader:
    """What the kernels of this process came from: names of kernels, each as often as it was asked for."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.is_serving = False  # whether requests wait for what is compiled now
        self.prebuilt: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()

    def summary(self) -> str:
        """What the log says once a server has started."""
        made = f"{self.compiled.total()} compiled"
        if self.compiled:
            made += f" ({', '.join(self.compiled)})"
        own = f", {self.cached.total()} from Triton's cache" if self.cached else ""
        return f"Triton kernels of the start: {self.prebuilt.total()} prebuilt{own}, {made}"


_reader = Reader(None)


class Manager(FileCacheManager):
    """Triton's cache manager; Triton makes one for each key."""

    def __init__(self, key: str, override: bool = False, dump: bool = False):
        super().__init__(key, override, dump)
        self._plain = not (override or dump)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a compiled kernel, by name; None: there are none yet."""
        if not self._plain:
            return super().get_group(filename)
        name = filename.removesuffix(".json")
        if found := _prebuilt_files(self.key, filename):
            _reader.prebuilt[name] += 1
            return found
        if found := super().get_group(filename):
            _reader.cached[name] += 1
        return found

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        if self._plain:
            name = filename.removesuffix(".json")
            _reader.compiled[name] += 1
            if _reader.folder is not None:
                log.warning("compiled %s, which %s has not: python -m wave64 prebuild makes it with these flags", name,
                            _reader.folder)
            elif _reader.is_serving:
                log.warning("compiled %s, for which requests waited; Triton's cache keeps it, and for AMD GPUs python "
                            "-m wave64 prebuild makes it ahead", name)
        return super().put_group(filename, group)


def _prebuilt_files(key: str, filename: str) -> dict[str, str] | None:
    """Of the group that Triton wrote as the last of a kernel's files, the files where they lie now."""
    if _reader.folder is None:
        return None
    folder = _reader.folder / KERNELS / key
    try:
        names = json.loads((folder / f"__grp__{filename}").read_text())["child_paths"]
    except (OSError, ValueError, KeyError):
        return None
    files = {name: str(folder / name) for name in names}
    return files if all(map(os.path.exists, files.values())) else None


@contextlib.contextmanager
def reading(path: str | None, arch: str, is_first: bool = True) -> Iterator[Reader]:
    """Inside, Triton looks into the prebuilt kernels at `path`, None: those for `arch` in the default folder, if there
    are any. What does not fit is said in one line, and not used. is_first: whether this process says so.

    Raises PrebuiltError for a path that holds none.
    """
    global _reader
    say = log.info if is_first else log.debug
    folder = DEFAULT / arch if path is None else unpacked(Path(path).expanduser())
    if path is None and not (folder / MANIFEST).exists():
        folder = None
    if folder is not None and (why := mismatch(read_manifest(folder), arch)):
        (log.warning if is_first else log.debug)("prebuilt kernels at %s are not used: %s", folder, why)
        folder = None
    if folder is not None:
        say("prebuilt Triton kernels at %s: %d", folder, len(list((folder / KERNELS).glob("*/*.hsaco"))))
    settle_keys()
    before, _reader = _reader, Reader(folder)
    manager = knobs.cache.manager_class
    knobs.cache.manager_class = Manager
    try:
        yield _reader
    finally:
        knobs.cache.manager_class = manager
        _reader = before


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, Triton's cache is the folder's, of which it keeps what a launch needs and no more."""
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder / KERNELS)
        knobs.cache.manager_class = None
        knobs.compilation.store_binary_only = True
        yield


def settle_keys() -> dict[str, str]:
    """Has Triton hash all functions of wave64's kernels, in one order. Triton 3.6 leaves out of a function's hash the
    constants of those functions that it calls and that have no hash yet: the key of a kernel would depend on what a
    process has launched before it, and what one compiled another would not find. Returns the hashes by module and
    name."""
    import_triton_kernels()
    return {f"{module}.{name}": function.cache_key  # computed at the first look
            for module in sorted(sys.modules) if module.startswith(f"{triton_ops.__name__}.")
            for name, function in sorted(vars(sys.modules[module]).items()) if isinstance(function, JITFunction)}


def compile_all(makers: dict[str, Callable[[], Any]], folder: Path, jobs: int) -> list[str]:
    """Compile kernels into the folder, each by calling what makes it in one of so many processes, with a bar on a
    terminal; a line for each that does not compile."""
    failures = []
    settle_keys()
    _makers.update(makers)
    with locked(folder), writing(folder), _processes(max(1, min(jobs, len(makers)))) as pool:
        for key, wrong in tqdm(pool.imap_unordered(_make, makers), total=len(makers), unit="kernel", desc="compiling",
                               disable=not sys.stderr.isatty()):
            if wrong is not None:
                failures.append(f"{key.split(' ')[0]}: {wrong}")
    _makers.clear()
    return failures


def _processes(number: int) -> Pool:
    try:
        return multiprocessing.get_context("fork").Pool(number)
    except OSError as error:
        raise PrebuiltError(
            f"/dev/shm: expected shared memory for the locks of {number} processes, got {error.strerror}. Mount it "
            "(mount -t tmpfs tmpfs /dev/shm), or give a container --ipc=host") from error


def _make(key: str) -> tuple[str, str | None]:
    """In a process that was forked with the makers; what went wrong."""
    try:
        _makers[key]()
    except Exception as error:  # the others are compiled all the same
        return key, f"{type(error).__name__}: {error}"
    return key, None


_makers: dict[str, Callable[[], Any]] = {}
