"""Rows of the GPUs: driver, architecture, memory, partition, clocks, errors, links; all from sysfs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from wave64.arch import ARCHS, HIP_TARGETS
from wave64.tools.doctor.machine import FAIL, NODES, OK, WARN, Gpu, Machine, Row

XGMI, GIB = 11, 1 << 30  # the topology's number of the kind of link
INSTINCT = ("gfx90a", "gfx942", "gfx950")


def gpu_rows(machine: Machine) -> Iterator[Row]:
    gpus = machine.gpus()
    yield from driver(machine, gpus)
    if not gpus:
        return
    yield from architectures(gpus)
    yield memory(machine, gpus)
    for check in (partitions, power, levels, errors):
        yield from check(machine, [gpu for gpu in gpus if gpu.arch in INSTINCT])


def driver(machine: Machine, gpus: list[Gpu]) -> Iterator[Row]:
    version = machine.read("/sys/module/amdgpu/version") or (
        "the kernel's own" if machine.exists("/sys/module/amdgpu") else None)
    rocm = machine.read("/opt/rocm/.info/version")
    if version is None and not machine.amd_devices():
        nvidia = machine.exists("/proc/driver/nvidia/version")
        yield Row("driver", OK, "NVIDIA's: for development of wave64 alone" if nvidia else
                  "no GPU: kernels run on the CPU and on the emulator")
    elif version is None:
        yield Row("driver", FAIL, "amdgpu is not loaded", "no GPU can be used", "sudo modprobe amdgpu")
    elif not gpus:
        yield Row("driver", FAIL, f"amdgpu {version}, which serves no GPU", "HIP finds no GPU",
                  "sudo dmesg | grep -i -e amdgpu -e kfd")
    else:
        yield Row("driver", OK, f"amdgpu {version}")
    if gpus:
        yield Row("ROCm", OK, rocm or "not in /opt/rocm: torch brings its own libraries")
        firmware = sorted({found for gpu in gpus if (found := machine.read(f"{gpu.device}/fw_version/mec_fw_version"))})
        numbers = [int(each, 16) for each in firmware if re.fullmatch(r"0x[0-9a-f]{1,8}", each)]
        if any(number & 0xFFFF < 177 for number in numbers) and any(g.arch == "gfx942" for g in gpus) and \
                machine.environment.get("HSA_NO_SCRATCH_RECLAIM") != "1":
            yield Row("firmware", WARN, f"MEC {', '.join(firmware)}", "below 177 reclaiming scratch stalls a GPU",
                      "export HSA_NO_SCRATCH_RECLAIM=1")
        else:
            yield Row("firmware", OK, f"MEC {', '.join(firmware)}" if firmware else "not shown by this driver")


def architectures(gpus: list[Gpu]) -> Iterator[Row]:
    count = {arch: sum(gpu.arch == arch for gpu in gpus) for arch in sorted({gpu.arch for gpu in gpus})}
    shown = ", ".join(f"{number} x {arch}" + (f" ({ARCHS[arch].product})" if arch in ARCHS else "")
                      for arch, number in count.items())
    without = [arch for arch in count if arch not in HIP_TARGETS]
    own = {gpu.arch for gpu in gpus if not gpu.integrated}
    if without and own & set(without) or without and not own:
        yield Row("architecture", WARN, f"{shown}; no code objects for {', '.join(without)}",
                  "operators run on portable kernels, without HIP's",
                  f"use one of {', '.join(HIP_TARGETS)} (HIP_VISIBLE_DEVICES), or go on with backend triton")
    else:
        yield Row("architecture", OK, shown)
    numbers = [str(i) for i, gpu in enumerate(gpus) if not gpu.integrated]
    if 0 < len(numbers) < len(gpus):
        yield Row("integrated GPU", WARN, "one is among the devices", "it may be device 0 or be given a rank",
                  f"export HIP_VISIBLE_DEVICES={','.join(numbers)}")


def memory(machine: Machine, gpus: list[Gpu]) -> Row:
    used, total, foreign = [], [], set()
    for number, gpu in enumerate(gpus):
        have, taken = (machine.number(f"{gpu.device}/mem_info_vram_{what}") for what in ("total", "used"))
        if have and taken is not None:
            total.append(have)
            if taken > have // 20:
                used.append(f"GPU {number}: {taken / GIB:.1f} of {have / GIB:.0f} GiB in use")
    for pid in machine.names("/sys/class/kfd/kfd/proc"):
        held = sum(machine.number(f"/sys/class/kfd/kfd/proc/{pid}/vram_{gpu.kfd_id}") or 0 for gpu in gpus)
        if held and pid.isdigit():
            foreign.add(f"{pid} ({machine.read(f'/proc/{pid}/comm') or 'another container'}: {held / GIB:.1f} GiB)")
    if used:
        return Row("GPU memory", WARN, "; ".join(used), "the KV pool is what is left of it: processes "
                   + (", ".join(sorted(foreign)) or "unknown"), "end what is left over: rocm-smi --showpids")
    return Row("GPU memory", OK, f"{sum(total) / GIB:.0f} GiB, free" if total else "not shown by this driver")


def partitions(machine: Machine, gpus: list[Gpu]) -> Iterator[Row]:
    modes = sorted({(machine.read(f"{gpu.device}/current_compute_partition") or "?",
                     machine.read(f"{gpu.device}/current_memory_partition") or "?") for gpu in gpus})
    shown = ", ".join(f"{compute}/{memory}" for compute, memory in modes)
    if any(compute not in ("SPX", "?") or memory not in ("NPS1", "?") for compute, memory in modes):
        yield Row("partition", WARN, shown,
                  "each partition is a GPU with a part of memory and caches: `--tp` counts them",
                  "sudo amd-smi set --memory-partition NPS1 && sudo amd-smi set --compute-partition SPX")
    elif gpus:
        yield Row("partition", OK, shown if modes != [("?", "?")] else "not shown by this driver")


def power(machine: Machine, gpus: list[Gpu]) -> Iterator[Row]:
    low = []
    for number, gpu in enumerate(gpus):
        for monitor in machine.names(f"{gpu.device}/hwmon"):
            cap, normal = (machine.number(f"{gpu.device}/hwmon/{monitor}/power1_cap{name}")
                           for name in ("", "_default"))
            if cap and normal and cap < normal:
                low.append(f"GPU {number}: {cap // 10**6} of {normal // 10**6} W")
    if low:
        yield Row("power cap", WARN, "; ".join(low), "clocks fall under load", "sudo amd-smi reset --power-cap")
    elif gpus:
        yield Row("power cap", OK, "the default")


def levels(machine: Machine, gpus: list[Gpu]) -> Iterator[Row]:
    forced = [f"GPU {number}: {level}" for number, gpu in enumerate(gpus) if (level := machine.read(
        f"{gpu.device}/power_dpm_force_performance_level")) not in (None, "auto", "high", "perf_determinism")]
    if forced:
        yield Row("clocks", WARN, "; ".join(forced), "clocks do not follow the load",
                  "sudo rocm-smi --setperflevel auto")
    elif gpus:
        yield Row("clocks", OK, "follow the load")


def errors(machine: Machine, gpus: list[Gpu]) -> Iterator[Row]:
    bad, seen = [], False
    for number, gpu in enumerate(gpus):
        for name in machine.names(f"{gpu.device}/ras"):
            counts = re.findall(r"^(ue|ce):\s*(\d+)", machine.read(f"{gpu.device}/ras/{name}") or "", re.MULTILINE)
            seen = seen or bool(counts)
            bad += [f"GPU {number}: {count} in {name.removesuffix('_err_count')}" for kind, count in counts
                    if kind == "ue" and int(count)]
    if bad:
        yield Row("ECC", FAIL, f"uncorrectable errors: {'; '.join(bad)}", "results of this GPU cannot be trusted",
                  "sudo amd-smi reset --gpureset -g N, and have the module replaced if they come back")
    elif gpus:
        yield Row("ECC", OK, "no uncorrectable error" if seen else "not shown by this driver")


def link_rows(machine: Machine) -> Iterator[Row]:
    """`--multi`: between the GPUs of this host, and to others."""
    gpus = [gpu for gpu in machine.gpus() if not gpu.integrated]
    nodes = {gpu.node: number for number, gpu in enumerate(gpus)}
    linked = set()
    for gpu in gpus:
        folder = f"{NODES}/{gpu.node}/io_links"
        for name in machine.names(folder):
            values = machine.properties(f"{folder}/{name}/properties")
            if values.get("type") == XGMI and values.get("node_to") in nodes:
                linked.add((gpu.node, values["node_to"]))
    missing = [f"{nodes[a]}-{nodes[b]}" for a in nodes for b in nodes if a < b and not {(a, b), (b, a)} & linked]
    if len(gpus) < 2:
        yield Row("xGMI links", OK, f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}: no links")
    elif missing:
        some = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        expected = all(gpu.arch in INSTINCT for gpu in gpus)
        yield Row("xGMI links", WARN if not linked or not expected else FAIL, f"none between {some}",
                  "these GPUs exchange over PCIe" + ("" if not expected else ": a link is down, or partitions are on"),
                  "amd-smi topology" if expected else "--disable-custom-all-reduce where all-reduces are slow")
    else:
        yield Row("xGMI links", OK, f"all {len(gpus) * (len(gpus) - 1) // 2} pairs")
    yield from _rdma(machine)


def _rdma(machine: Machine) -> Iterator[Row]:
    folder = "/sys/class/infiniband"
    devices = machine.names(folder)
    ethernet = [name for name in devices if any(
        machine.read(f"{folder}/{name}/ports/{port}/link_layer") == "Ethernet"
        for port in machine.names(f"{folder}/{name}/ports"))]
    down = [f"{name}/{port}" for name in devices for port in machine.names(f"{folder}/{name}/ports")
            if "ACTIVE" not in (machine.read(f"{folder}/{name}/ports/{port}/state") or "ACTIVE")]
    if down:
        yield Row("RDMA", WARN, f"not active: {', '.join(down)}", "several hosts exchange over fewer links", "ibstat")
    elif ethernet and "NCCL_IB_GID_INDEX" not in machine.environment:
        yield Row("RDMA", WARN, f"RoCE on {', '.join(ethernet)}; NCCL_IB_GID_INDEX is not set",
                  "index 0 is RoCE v1, which switches do not route",
                  "export NCCL_IB_GID_INDEX=3 (show_gids lists them)")
    else:
        yield Row("RDMA", OK, ", ".join(devices) or "no device: one host alone")
