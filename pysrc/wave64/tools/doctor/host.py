"""Rows of the host: kernel, devices, limits, container, environment. Each function: a machine -> its rows.

AMD's advice is that of its MI300X system and workload tuning guides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from wave64.tools.doctor.machine import FAIL, OK, WARN, Machine, Row

BOOT = ("pci=realloc=off", "iommu=pt")
GIB = 1 << 30
RUN = ("docker run --device /dev/kfd --device /dev/dri --group-add video --group-add render --ipc host --network host "
       "--cap-add SYS_PTRACE --security-opt seccomp=unconfined --ulimit memlock=-1 --ulimit nofile=1048576 IMAGE")

#: Variable -> (values that are fine, why others are not, what to do). An unset variable is looked at in `advice`.
HARMFUL = {
    "HSA_OVERRIDE_GFX_VERSION": ((), "kernels of another architecture run: wrong results or faults",
                                 "unset HSA_OVERRIDE_GFX_VERSION"),
    "HIP_LAUNCH_BLOCKING": (("0",), "each launch waits for its end", "unset HIP_LAUNCH_BLOCKING"),
    "CUDA_LAUNCH_BLOCKING": (("0",), "each launch waits for its end", "unset CUDA_LAUNCH_BLOCKING"),
    "AMD_SERIALIZE_KERNEL": (("0",), "each launch waits for its end", "unset AMD_SERIALIZE_KERNEL"),
    "AMD_SERIALIZE_COPY": (("0",), "each copy waits for its end", "unset AMD_SERIALIZE_COPY"),
    "HSA_ENABLE_SDMA": (("1",), "copies take compute units", "unset HSA_ENABLE_SDMA"),
    "NCCL_P2P_DISABLE": (("0",), "ranks exchange through host memory", "unset NCCL_P2P_DISABLE"),
    "NCCL_SHM_DISABLE": (("0",), "ranks exchange through sockets", "unset NCCL_SHM_DISABLE"),
    "NCCL_DEBUG": (("WARN", "VERSION"), "RCCL writes a log line for each call", "export NCCL_DEBUG=WARN"),
    "GPU_MAX_HW_QUEUES": (("2", "3", "4", "5", "6", "7", "8"), "streams share one hardware queue: copies and "
                          "collectives do not overlap", "unset GPU_MAX_HW_QUEUES"),
}


def host_rows(machine: Machine) -> Iterator[Row]:
    amd = bool(machine.gpus() or machine.amd_devices())
    yield from (*command_line(machine, amd), numa_balancing(machine), *devices(machine, amd), *limits(machine, amd),
                governor(machine), huge_pages(machine), *container(machine), *environment(machine), *visible(machine))


def command_line(machine: Machine, amd: bool) -> Iterator[Row]:
    running, name = (machine.read("/proc/cmdline") or "").split(), "kernel command line"
    if not amd:
        yield Row(name, OK, "no AMD GPU that wants pci=realloc=off iommu=pt")
        return
    missing = [word for word in BOOT if word not in running]
    grub = machine.read("/etc/default/grub")
    configured = [word for word in BOOT if any(
        word in line for line in (grub or "").splitlines() if line.strip().startswith("GRUB_CMDLINE_LINUX"))]
    command = (f"sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{' '.join(w for w in BOOT if w not in configured)} /' "
               "/etc/default/grub && sudo update-grub && sudo reboot")
    if missing and len(configured) == len(BOOT):
        yield Row(name, WARN, f"{' '.join(missing)} is in GRUB's file, not in the running kernel",
                  "peer-to-peer transfers hang or are slow without", "sudo update-grub && sudo reboot")
    elif missing:
        yield Row(name, WARN, f"without {' '.join(missing)}", "peer-to-peer transfers hang or are slow without",
                  command)
    elif grub is not None and len(configured) < len(BOOT):
        yield Row(name, WARN, "right now, but GRUB's file lacks them", "they are gone after the next boot",
                  command.removesuffix(" && sudo reboot"))
    else:
        yield Row(name, OK, " ".join(BOOT))


def numa_balancing(machine: Machine) -> Row:
    on = machine.number("/proc/sys/kernel/numa_balancing")
    if on:
        return Row("NUMA balancing", WARN, "on", "pages move while a GPU reads them: stalls, with several GPUs hangs",
                   "sudo sh -c 'echo 0 > /proc/sys/kernel/numa_balancing'", now=True)
    return Row("NUMA balancing", OK, "off" if on == 0 else "not in this kernel")


def devices(machine: Machine, amd: bool) -> Iterator[Row]:
    join = f"sudo usermod -a -G video,render {machine.user} && newgrp render"
    if machine.container():
        join = f"start the container with its devices and groups: {RUN}"
    if not machine.exists("/dev/kfd"):
        if not amd:
            yield Row("/dev/kfd", OK, "no AMD GPU")
            return
        yield Row("/dev/kfd", FAIL, "missing, though there is an AMD GPU", "HIP finds no GPU",
                  join if machine.container() else "sudo modprobe amdgpu; where that fails: install AMD's driver "
                  "(amdgpu-dkms) for this kernel")
        return
    nodes = ["/dev/kfd", *(f"/dev/dri/{n}" for n in machine.names("/dev/dri") if n.startswith("renderD"))]
    closed = [node for node in nodes if not machine.usable(node)]
    if len(nodes) == 1:
        yield Row("/dev/dri", FAIL, "no render node", "HIP finds no GPU", join)
    elif closed:
        yield Row("/dev/kfd, /dev/dri", FAIL, f"no access to {', '.join(closed)}", "HIP finds no GPU", join)
    else:
        yield Row("/dev/kfd, /dev/dri", OK, f"{len(nodes) - 1} render node{'s' * (len(nodes) > 2)}")
    missing = [group for group in ("video", "render") if group not in machine.groups]
    if missing and machine.user != "root":
        yield Row("groups", WARN if not closed else FAIL, f"{machine.user} is not in {' and '.join(missing)}",
                  "the devices belong to these groups", join)
    else:
        yield Row("groups", OK, "root" if machine.user == "root" else "video and render")


def limits(machine: Machine, amd: bool) -> Iterator[Row]:
    several, inside = len(machine.gpus()) > 1, machine.container()
    if machine.shm_bytes is None:
        yield Row("/dev/shm", FAIL if several else WARN, "missing", "ranks of one host exchange through it",
                  f"--ipc host or --shm-size 32g: {RUN}" if inside else "sudo mount -t tmpfs tmpfs /dev/shm")
    elif machine.shm_bytes < 8 * GIB and amd:
        status = FAIL if several and machine.shm_bytes < GIB else WARN
        yield Row("/dev/shm", status, f"{machine.shm_bytes / GIB:.2f} GiB", "RCCL needs it for every rank: bus errors",
                  f"--ipc host or --shm-size 32g: {RUN}" if inside else "sudo mount -o remount,size=32G /dev/shm",
                  now=not inside)
    else:
        yield Row("/dev/shm", OK, f"{machine.shm_bytes / GIB:.1f} GiB")
    if machine.memlock != -1 and amd:
        yield Row("locked memory", WARN, f"at most {machine.memlock // 1024} KiB",
                  "RDMA and pinned memory fail behind it", "--ulimit memlock=-1" if inside else
                  "ulimit -l unlimited (for good: a memlock line in /etc/security/limits.conf)")
    else:
        yield Row("locked memory", OK, "unlimited" if machine.memlock == -1 else f"{machine.memlock // 1024} KiB")
    if 0 <= machine.open_files < 65536:
        yield Row("open files", WARN, f"at most {machine.open_files}", "a connection and a shard take one each",
                  "--ulimit nofile=1048576" if inside else "ulimit -n 1048576")
    else:
        yield Row("open files", OK, "unlimited" if machine.open_files < 0 else f"{machine.open_files}")


def governor(machine: Machine) -> Row:
    found = machine.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if found in (None, "performance"):
        return Row("CPU governor", OK, found or "the hypervisor's or firmware's")
    return Row("CPU governor", WARN, str(found), "launches come late from a core that sleeps",
               "sudo cpupower frequency-set -g performance", now=True)


def huge_pages(machine: Machine) -> Row:
    found = machine.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = found.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Row("transparent huge pages", WARN, "never", "weights are loaded through 4 KiB pages",
                   "sudo sh -c 'echo madvise > /sys/kernel/mm/transparent_hugepage/enabled'", now=True)
    return Row("transparent huge pages", OK, chosen or "not in this kernel")


def container(machine: Machine) -> Iterator[Row]:
    kind = machine.container()
    if kind is None:
        yield Row("container", OK, "none")
        return
    filtered = [line for line in (machine.read("/proc/self/status") or "").splitlines() if line == "Seccomp:\t2"]
    if filtered:
        yield Row("container", WARN, f"{kind}, with system calls filtered",
                  "mapping another rank's memory and moving pages are refused", RUN)
    else:
        yield Row("container", OK, kind)


def environment(machine: Machine) -> Iterator[Row]:
    rows = [Row(name, WARN, f"{name}={value}", why, command)
            for name, (fine, why, command) in HARMFUL.items()
            if (value := machine.environment.get(name)) not in (None, "", *fine)]
    if any(gpu.arch == "gfx942" for gpu in machine.gpus()):
        if machine.environment.get("HIP_FORCE_DEV_KERNARG") != "1":
            rows.append(Row("HIP_FORCE_DEV_KERNARG", WARN, "not set",
                            "arguments of launches lie in host memory: 2 to 3 us a launch",
                            "export HIP_FORCE_DEV_KERNARG=1"))
        if len(machine.gpus()) > 1 and "NCCL_MIN_NCHANNELS" not in machine.environment:
            rows.append(Row("NCCL_MIN_NCHANNELS", WARN, "not set", "RCCL uses few channels for large messages",
                            "export NCCL_MIN_NCHANNELS=112"))
    yield from rows or [Row("environment", OK, "no variable that harms")]


#: An entry of a variable that says which GPUs are visible.
DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


def visible(machine: Machine) -> Iterator[Row]:
    names = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    given = {name: value for name in names if (value := machine.environment.get(name)) is not None}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    hip, cuda = given.get("HIP_VISIBLE_DEVICES"), given.get("CUDA_VISIBLE_DEVICES")
    if hip is not None and cuda is not None and hip != cuda:
        yield Row("visible devices", WARN, shown,
                  "torch for ROCm reads both: which GPUs it sees depends on its version", "unset CUDA_VISIBLE_DEVICES")
    elif "ROCR_VISIBLE_DEVICES" in given and (hip or cuda):
        yield Row("visible devices", WARN, shown, "HIP counts among those that ROCr leaves: numbers that are twice "
                  "restricted name other GPUs", "unset ROCR_VISIBLE_DEVICES")
    elif any(value.strip() in ("", "-1") for value in given.values()):
        yield Row("visible devices", FAIL if machine.gpus() else OK, shown, "no GPU is visible",
                  f"unset {' '.join(given)}")
    elif odd := [entry for value in given.values() for entry in value.split(",")
                 if not DEVICE.fullmatch(entry.strip())]:
        yield Row("visible devices", FAIL if machine.gpus() else WARN, shown,
                  f"the runtime reads up to the first entry that is no number of a GPU, here {odd[0]!r}: those behind "
                  "are not visible", f"unset {' '.join(given)}")
    else:
        yield Row("visible devices", OK, shown or "all")
