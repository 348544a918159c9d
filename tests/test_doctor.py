"""The doctor's rows over trees of files in the shape that the kernel documents, made here: each row in both states."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wave64.arch import ARCHS
from wave64.tools.doctor import cli, exchange
from wave64.tools.doctor.gpus import gpu_rows, link_rows
from wave64.tools.doctor.host import HARMFUL, host_rows
from wave64.tools.doctor.machine import FAIL, OK, WARN, Machine, gfx_name
from wave64.tools.doctor.software import Software, run_kernel, software_rows, this_software

GIB = 1 << 30
FIRST = "/sys/class/drm/renderD128/device"
VERSIONS = {"gfx90a": 90010, "gfx942": 90402, "gfx950": 90500, "gfx1100": 110000, "gfx1036": 100306, "gfx1151": 110501}
SOFTWARE = Software("3.12.3 on Linux 6.8", "2.9.1+rocm6.4", "6.4.43482", None, True, "3.6.0",
                    "/opt/rocm/lib/libamdhip64.so.6: HIP 6.4.43482", "",
                    {"gfx942": ["rms_norm"], "gfx90a": ["rms_norm"]}, "", "right", "26.0.2")
SETTINGS = {"HIP_FORCE_DEV_KERNARG": "1", "NCCL_MIN_NCHANNELS": "112"}


def save(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())


def host(**changes: str) -> dict[str, object]:
    files: dict[str, object] = {
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro pci=realloc=off iommu=pt quiet",
        "/etc/default/grub": '# GRUB_CMDLINE_LINUX="iommu=off"\nGRUB_CMDLINE_LINUX="pci=realloc=off iommu=pt"',
        "/proc/sys/kernel/numa_balancing": 0,
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never", "/proc/self/status": "Seccomp:\t0"}
    return files | {"/" + name.replace("__", "/"): value for name, value in changes.items()}


def gpu_files(archs: list[str], linked: bool = True, cards: bool = True) -> dict[str, object]:
    """A node of a CPU and one of each GPU; `cards`: what AMD's driver shows of an Instinct."""
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    files: dict[str, object] = {
        f"{nodes}/0/properties": "cpu_cores_count 96\nsimd_count 0\ngfx_target_version 0", "/dev/kfd": "",
        "/sys/module/amdgpu/version": "6.12.12", "/opt/rocm/.info/version": "6.4.1-83"}
    for i, arch in enumerate(archs):
        integrated = arch == "gfx1036"
        minor, device = 128 + i, f"/sys/class/drm/renderD{128 + i}/device"
        files |= {
            f"/dev/dri/renderD{minor}": "", f"{nodes}/{i + 1}/gpu_id": 5000 + i,
            f"{nodes}/{i + 1}/properties": f"cpu_cores_count {16 * integrated}\n"
            f"simd_count {4 if integrated else 1216}\ngfx_target_version {VERSIONS[arch]}\ndrm_render_minor {minor}",
            f"/sys/bus/pci/devices/0000:{i + 5:02x}:00.0/vendor": "0x1002",
            f"/sys/bus/pci/devices/0000:{i + 5:02x}:00.0/class": "0x120000",
            f"{device}/mem_info_vram_total": 192 * GIB, f"{device}/mem_info_vram_used": 300 << 20}
        if cards:
            files |= {f"{device}/current_compute_partition": "SPX", f"{device}/current_memory_partition": "NPS1",
                      f"{device}/fw_version/mec_fw_version": "0x000000b9",
                      f"{device}/ras/umc_err_count": "ue: 0\nce: 3",
                      f"{device}/hwmon/hwmon{i}/power1_cap": 750_000_000, f"{device}/pp_dpm_sclk": "0: 132Mhz *",
                      f"{device}/hwmon/hwmon{i}/power1_cap_default": 750_000_000,
                      f"{device}/power_dpm_force_performance_level": "auto"}
        for other in range(len(archs) if linked else 0):
            if other != i:
                files[f"{nodes}/{i + 1}/io_links/{other}/properties"] = f"type 11\nnode_to {other + 1}"
    return files


def machine(tmp_path: Path, files: dict[str, object], **changes) -> Machine:
    save(tmp_path, files)
    settings = dict(root=tmp_path, environment=dict(SETTINGS), groups=frozenset({"video", "render"}), user="ann",
                    shm_bytes=64 * GIB)
    return Machine(**(settings | changes))


def rows_of(machine: Machine, software: Software = SOFTWARE) -> dict[str, str]:
    """Row -> status; the wording is looked at where it matters."""
    rows = [*gpu_rows(machine), *software_rows(machine, software), *host_rows(machine), *link_rows(machine)]
    for row in rows:
        assert row.status in (OK, WARN, FAIL)
        assert row.found
        assert row.status == OK or (row.why and row.command), row
    return {row.name: row.status for row in rows}


def without_ok(rows: dict[str, str]) -> dict[str, str]:
    return {name: status for name, status in rows.items() if status != OK}


def test_a_good_box_of_eight_mi300x_has_nothing_to_mend(tmp_path):
    good = machine(tmp_path, host() | gpu_files(["gfx942"] * 8))
    assert without_ok(rows_of(good)) == {}
    assert [gpu.arch for gpu in good.gpus()] == ["gfx942"] * 8


#: What is changed of the good box, and the rows that change with it.
CHANGES = {
    "boot": ({"/proc/cmdline": "ro quiet", "/etc/default/grub": 'GRUB_CMDLINE_LINUX=""'}, {},
             {"kernel command line": WARN}),
    "boot, in GRUB only": ({"/proc/cmdline": "ro quiet"}, {}, {"kernel command line": WARN}),
    "boot, not in GRUB": ({"/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet"'}, {}, {"kernel command line": WARN}),
    "boot, in a comment of GRUB": ({"/etc/default/grub": '#GRUB_CMDLINE_LINUX="pci=realloc=off iommu=pt"'}, {},
                                   {"kernel command line": WARN}),
    "numa": ({"/proc/sys/kernel/numa_balancing": 1}, {}, {"NUMA balancing": WARN}),
    "governor": ({"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave"}, {}, {"CPU governor": WARN}),
    "pages": ({"/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}, {},
              {"transparent huge pages": WARN}),
    "kfd": ({"/dev/kfd": None}, {}, {"/dev/kfd": FAIL}),
    "groups": ({}, {"groups": frozenset({"video"})}, {"groups": WARN}),
    "shm": ({}, {"shm_bytes": 64 << 20}, {"/dev/shm": FAIL}),
    "some shm": ({}, {"shm_bytes": 4 * GIB}, {"/dev/shm": WARN}),
    "no shm": ({}, {"shm_bytes": None}, {"/dev/shm": FAIL}),
    "memlock": ({}, {"memlock": 65536}, {"locked memory": WARN}),
    "files": ({}, {"open_files": 1024}, {"open files": WARN}),
    "driver": ({"/sys/module/amdgpu/version": None}, {}, {"driver": FAIL}),
    "firmware": ({f"/sys/class/drm/renderD{128 + i}/device/fw_version/mec_fw_version": "0x000000a0" for i in range(8)},
                 {}, {"firmware": WARN}),
    "memory": ({"/sys/class/drm/renderD130/device/mem_info_vram_used": 90 * GIB,
                "/sys/class/kfd/kfd/proc/4711/vram_5002": 90 * GIB, "/proc/4711/comm": "python"}, {},
               {"GPU memory": WARN}),
    "partition": ({f"{FIRST}/current_compute_partition": "CPX"}, {}, {"partition": WARN}),
    "memory partition": ({f"{FIRST}/current_memory_partition": "NPS4"}, {}, {"partition": WARN}),
    "power": ({f"{FIRST}/hwmon/hwmon0/power1_cap": 550_000_000}, {}, {"power cap": WARN}),
    "clocks": ({f"{FIRST}/power_dpm_force_performance_level": "low"}, {}, {"clocks": WARN}),
    "ecc": ({f"{FIRST}/ras/umc_err_count": "ue: 2\nce: 0"}, {}, {"ECC": FAIL}),
    "links": ({f"/sys/class/kfd/kfd/topology/nodes/{a}/io_links/{b - 1}/properties": "type 2\nnode_to 0"
               for a, b in ((1, 8), (8, 1))}, {}, {"xGMI links": FAIL}),
    "container": ({"/.dockerenv": "", "/proc/self/status": "Name:\tpython\nSeccomp:\t2"}, {}, {"container": WARN}),
    "container, unfiltered": ({"/.dockerenv": ""}, {}, {}),
    "roce": ({"/sys/class/infiniband/mlx5_0/ports/1/link_layer": "Ethernet",
              "/sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE"}, {}, {"RDMA": WARN}),
    "roce, index": ({"/sys/class/infiniband/mlx5_0/ports/1/link_layer": "Ethernet"},
                    {"environment": SETTINGS | {"NCCL_IB_GID_INDEX": "3"}}, {}),
    "rdma down": ({"/sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN"}, {}, {"RDMA": WARN}),
    "kernarg": ({}, {"environment": {"NCCL_MIN_NCHANNELS": "112"}}, {"HIP_FORCE_DEV_KERNARG": WARN}),
    "channels": ({}, {"environment": {"HIP_FORCE_DEV_KERNARG": "1"}}, {"NCCL_MIN_NCHANNELS": WARN}),
    "visible": ({}, {"environment": SETTINGS | {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "2,3"}},
                {"visible devices": WARN}),
    "visible twice": ({}, {"environment": SETTINGS | {"HIP_VISIBLE_DEVICES": "4", "ROCR_VISIBLE_DEVICES": "4"}},
                      {"visible devices": WARN}),
    "visible, the same": ({}, {"environment": SETTINGS | dict(HIP_VISIBLE_DEVICES="0", CUDA_VISIBLE_DEVICES="0")}, {}),
    "no number visible": ({}, {"environment": SETTINGS | {"HIP_VISIBLE_DEVICES": "0,first,2"}},
                          {"visible devices": FAIL}),
    "visible by name": ({}, {"environment": SETTINGS | {"HIP_VISIBLE_DEVICES": "GPU-5a3c0f21, 1"}}, {}),
    "none visible": ({}, {"environment": SETTINGS | {"HIP_VISIBLE_DEVICES": ""}}, {"visible devices": FAIL}),
} | {name: ({}, {"environment": SETTINGS | {name: "9"}}, {name: WARN}) for name in HARMFUL}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_says_what_one_fault_of_the_box_is(change, tmp_path):
    files, process, wanted = CHANGES[change]
    whole = host() | gpu_files(["gfx942"] * 8) | files
    box = machine(tmp_path, {path: content for path, content in whole.items() if content is not None}, **process)
    assert without_ok(rows_of(box)) == wanted


@pytest.mark.parametrize(("change", "wanted"), [
    (dict(rocm=None, cuda="12.8", torch="2.9.1+cu128"), {"torch": FAIL}), (dict(sees_gpu=False), {"torch": FAIL}),
    (dict(triton=None), {"triton": WARN}), (dict(triton="3.7.1"), {"triton": WARN}),
    (dict(triton="3.60.0"), {"triton": WARN}),
    (dict(runtime=None, runtime_error="libamdhip64.so is not found"), {"HIP runtime": FAIL}),
    (dict(built={"gfx90a": ["rms_norm"]}), {"code objects": WARN}),
    (dict(build_error="no extension"), {"code objects": FAIL}),
    (dict(kernel="wrong results"), {"a kernel": FAIL}), (dict(kernel=None, amdsmi=None), {})])
def test_a_row_says_what_one_fault_of_the_software_is(change, wanted, tmp_path):
    good = machine(tmp_path, host() | gpu_files(["gfx942"]))
    assert without_ok(rows_of(good, SOFTWARE._replace(**change))) == wanted


@pytest.mark.parametrize(("archs", "more", "wanted"), [
    (["gfx90a"] * 8, {}, {}), (["gfx950"] * 8, {}, {"code objects": WARN}),
    (["gfx1100"] * 2, {"linked": False, "cards": False}, {"code objects": WARN, "xGMI links": WARN}),
    (["gfx1151"], {"cards": False}, {"architecture": WARN, "code objects": WARN}),
    (["gfx1036", "gfx1100"], {"cards": False}, {"integrated GPU": WARN, "code objects": WARN}),
    (["gfx942", "gfx1036"], {"cards": False}, {"integrated GPU": WARN})], ids=str)
def test_other_machines(archs, more, wanted, tmp_path):
    assert without_ok(rows_of(machine(tmp_path, host() | gpu_files(archs, **more), environment=SETTINGS))) == wanted


def test_machines_without_an_amd_gpu_have_nothing_to_mend(tmp_path):
    cpu = SOFTWARE._replace(rocm=None, torch="2.13.0+cpu", sees_gpu=False, runtime=None,
                            runtime_error="no libamdhip64.so", kernel=None)
    plain = machine(tmp_path / "cpu", {"/proc/cmdline": "quiet"}, environment={}, groups=frozenset(), memlock=65536)
    assert without_ok(rows_of(plain, cpu)) == {}
    nvidia = machine(tmp_path / "nvidia", {"/proc/driver/nvidia/version": "580"}, environment={})
    assert without_ok(rows_of(nvidia, cpu._replace(cuda="13.0", sees_gpu=True, kernel="right", triton="3.6.0"))) == {}
    assert any("NVIDIA" in row.found for row in gpu_rows(nvidia))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every device")
def test_a_device_without_access_is_named(tmp_path):
    box = machine(tmp_path, host() | gpu_files(["gfx942"]))
    (tmp_path / "dev/dri/renderD128").chmod(0)
    row = next(row for row in host_rows(box) if row.name.startswith("/dev/kfd"))
    assert (row.status, row.found) == (FAIL, "no access to /dev/dri/renderD128")


def test_names_of_architectures_come_from_the_drivers_numbers():
    assert {arch: gfx_name(number) for arch, number in VERSIONS.items()} == {arch: arch for arch in VERSIONS}
    assert gfx_name(120501) == "gfx1251"
    assert {"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1250"} <= set(ARCHS)


PATHS = sorted(host() | gpu_files(["gfx942"] * 2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.dictionaries(st.sampled_from(PATHS), st.one_of(
    st.none(), st.binary(max_size=40), st.integers(-(2**70), 2**70).map(lambda n: str(n).encode()),
    st.sampled_from([b"simd_count", b"type 11\nnode_to x", b"ue: " + b"9" * 30, b"0x", b"\xff\xfe"])), max_size=8))
def test_odd_files_make_rows_and_never_an_exception(damage, tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    files = host() | gpu_files(["gfx942"] * 2) | damage
    rows_of(machine(root, {path: content for path, content in files.items() if content is not None}))


def test_the_table_shows_what_is_to_be_done_and_json_holds_all(tmp_path, capsys, monkeypatch):
    bad = machine(tmp_path, host(proc__sys__kernel__numa_balancing="1") | gpu_files(["gfx942"]), shm_bytes=1 << 20)
    rows = list(host_rows(bad))
    text = "\n".join(cli.shown(rows, color=False))
    assert "WARN NUMA balancing            on\n" in text
    assert "-> sudo sh -c 'echo 0 > /proc/sys/kernel/numa_balancing'" in text
    count = {status: sum(row.status == status for row in rows) for status in (OK, WARN, FAIL)}
    assert count[WARN] == 2
    assert text.endswith(f"{count[OK]} OK, 2 WARN, 0 FAIL")
    monkeypatch.setattr(cli, "all_rows", lambda multi: rows)
    assert cli.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert len(said["rows"]) == len(rows)
    monkeypatch.setattr(cli, "all_rows", lambda multi: [replace(rows[0], status=FAIL)])
    assert cli.main([]) == 1
    capsys.readouterr()
    assert cli.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_fix_asks_before_each_command_and_runs_no_other(tmp_path, capsys):
    files = host(proc__sys__kernel__numa_balancing="1", proc__cmdline="ro") | gpu_files(["gfx942"])
    files["/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"] = "powersave"
    rows = list(host_rows(machine(tmp_path, files)))
    ran: list[str] = []
    answers = iter(["y", "no"])
    assert cli.fix(rows, lambda question: next(answers), lambda command: ran.append(command) or 0) == 0
    assert ran == ["sudo sh -c 'echo 0 > /proc/sys/kernel/numa_balancing'"]  # a boot option is not of them
    assert cli.fix(rows, lambda question: "yes", lambda command: 3) == 2
    assert "the command ended with status 3" in capsys.readouterr().out

    def closed(question: str) -> str:
        raise EOFError

    assert cli.fix(rows, closed, lambda command: ran.append(command) or 0) == 0
    assert len(ran) == 1


def test_this_machine_can_be_looked_at(capsys):
    software = this_software()
    assert software.torch
    assert software.runtime or software.runtime_error
    status = cli.main(["--multi"])
    said = capsys.readouterr().out
    assert status == ("0 FAIL" not in said.splitlines()[-1])
    assert all(name in said for name in ("torch", "triton", "code objects", "/dev/shm", "all-reduce", "xGMI links"))


@pytest.mark.parametrize(("found", "status", "words"), [
    ({0: (True, 90.0), 1: (True, 120.0)}, OK, "2 GPUs, 1 MiB in 120 us"),
    ({0: (True, 9e4), 1: (True, 1.0)}, WARN, "90000"),
    ({0: (True, 90.0)}, FAIL, "no answer of GPU 1 within 5 s"),
    ({0: (True, 1.0), 1: (False, 1.0)}, FAIL, "wrong sums on GPU 1"),
    ({0: ("OSError: closed", 0.0)}, FAIL, "rank 0: OSError: closed")])
def test_what_an_exchange_gave_is_judged(found, status, words):
    row = exchange.verdict(2, found, 5)
    assert row.status == status
    assert words in row.found


@pytest.mark.slow
def test_two_processes_really_exchange():
    (row,) = exchange.exchange_rows(2, "gloo", limit_s=100)
    assert row.found.startswith("2 GPUs, 1 MiB in "), row


def test_without_a_gpu_no_kernel_is_tried():
    assert run_kernel() in (None, "right")
