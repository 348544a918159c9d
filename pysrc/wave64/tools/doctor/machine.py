"""What the rows of the doctor look at: files below a root, environment, groups and limits. Nothing else is read.

A test gives a recorded tree for `/` and what the process would have; the machine itself is `this_machine()`.
"""

from __future__ import annotations

import grp
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

OK, WARN, FAIL = "OK", "WARN", "FAIL"
LIMIT = 1 << 16  # bytes of a file that are read; sysfs files are small, and an odd one must not fill memory


@dataclass(frozen=True)
class Row:
    """One line of the table. `command` mends it; `now` says that it does so without a reboot or a new container."""

    name: str
    status: str
    found: str
    why: str = ""
    command: str = ""
    now: bool = False


class Gpu(NamedTuple):
    """A GPU of the kernel driver's topology."""

    node: int
    arch: str  # gfx942; "gfx0" where the node does not say
    kfd_id: int
    device: str  # its folder below /sys/class/drm
    integrated: bool


@dataclass(frozen=True)
class Machine:
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=dict)
    groups: frozenset[str] = frozenset()
    user: str = "root"
    memlock: int = -1  # bytes that may be locked; -1: any number
    open_files: int = 1 << 20
    shm_bytes: int | None = None  # of /dev/shm

    def read(self, path: str) -> str | None:
        """The text of a file without white space around it; None where it cannot be read."""
        try:
            with open(self.root / path.lstrip("/"), "rb") as file:
                return file.read(LIMIT).decode("utf-8", "replace").strip("\0 \t\r\n") or None
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        return _integer(self.read(path))

    def names(self, path: str) -> list[str]:
        """What is in a folder, numbers in their order."""
        try:
            return sorted(os.listdir(self.root / path.lstrip("/")), key=lambda n: (not n.isdigit(), len(n), n))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path.lstrip("/"))

    def usable(self, path: str) -> bool:
        """Whether a device may be read and written."""
        return os.access(self.root / path.lstrip("/"), os.R_OK | os.W_OK)

    def properties(self, path: str) -> dict[str, int]:
        """`name value` lines, as the topology of the kernel driver has them."""
        pairs = (line.split() for line in (self.read(path) or "").splitlines())
        return {pair[0]: value for pair in pairs if len(pair) == 2 and (value := _integer(pair[1])) is not None}

    def gpus(self) -> list[Gpu]:
        """AMD GPUs that the kernel driver serves, in its order, which is HIP's."""
        found = []
        for node in self.names(NODES):
            values = self.properties(f"{NODES}/{node}/properties")
            version = values.get("gfx_target_version", 0)
            if values.get("simd_count", 0) > 0 and node.isdigit():
                device = f"/sys/class/drm/renderD{values.get('drm_render_minor', 0)}/device"
                found.append(Gpu(int(node), gfx_name(version), self.number(f"{NODES}/{node}/gpu_id") or 0, device,
                                 values.get("cpu_cores_count", 0) > 0 or values.get("simd_count", 0) <= 8))
        return found

    def amd_devices(self) -> list[str]:
        """PCI addresses of AMD's display controllers and accelerators, with or without a driver."""
        folder = "/sys/bus/pci/devices"
        return [name for name in self.names(folder)
                if self.read(f"{folder}/{name}/vendor") == "0x1002"
                and (self.read(f"{folder}/{name}/class") or "")[:4] in ("0x03", "0x12")]

    def container(self) -> str | None:
        """What this runs in, or None on the host."""
        if self.exists("/.dockerenv"):
            return "Docker"
        if self.exists("/run/.containerenv"):
            return "Podman"
        return "Kubernetes" if "KUBERNETES_SERVICE_HOST" in self.environment else None


NODES = "/sys/class/kfd/kfd/topology/nodes"


def gfx_name(version: int) -> str:
    """90402 -> gfx942, 90010 -> gfx90a, 110000 -> gfx1100: major, minor and stepping, the last two in hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _integer(text: str | None) -> int | None:
    try:
        return int(text, 0) if text else None
    except ValueError:
        return None


def this_machine() -> Machine:
    def limit(which: int) -> int:
        soft = resource.getrlimit(which)[0]
        return -1 if soft == resource.RLIM_INFINITY else soft

    names = set()
    for number in {*os.getgroups(), os.getegid()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:  # a group of the host, in a container that has no name for it
            names.add(str(number))
    try:
        shm = os.statvfs("/dev/shm")
        shm_bytes: int | None = shm.f_blocks * shm.f_frsize
    except OSError:
        shm_bytes = None
    return Machine(environment=dict(os.environ), groups=frozenset(names), user=os.environ.get("USER", "$USER"),
                   memlock=limit(resource.RLIMIT_MEMLOCK), open_files=limit(resource.RLIMIT_NOFILE),
                   shm_bytes=shm_bytes)
