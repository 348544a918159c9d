"""Every row of the doctor's table in both states, its commands, and trees of files that were cut off."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_commands import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_doctor import CHANGES, GIB, SETTINGS, SOFTWARE, gpu_files, host, machine, save

import wave64.tools.doctor
from wave64.tools.doctor import exchange
from wave64.tools.doctor.gpus import gpu_rows, link_rows
from wave64.tools.doctor.host import HARMFUL, RUN, host_rows
from wave64.tools.doctor.machine import FAIL, OK, WARN, Machine, Row
from wave64.tools.doctor.software import Software, software_rows

#: Rows that have one state, and why.
TELLS = {"python", "ROCm", "amdsmi"}  # they say what is there; others judge it
GOOD = {"environment"}  # OK where none of the variables has a row
BAD = {"integrated GPU", "/dev/dri", "HIP_FORCE_DEV_KERNARG", "NCCL_MIN_NCHANNELS", *HARMFUL}  # no row where it is well
SOFTWARES = [dict(), dict(rocm=None, cuda="12.8"), dict(sees_gpu=False), dict(triton=None), dict(triton="3.7.1"),
             dict(runtime=None, runtime_error="libamdhip64.so is not found"), dict(kernel="wrong results"),
             dict(build_error="no extension"), dict(built={})]
ARCHS = [["gfx942"] * 2, ["gfx1151"], ["gfx1036", "gfx1100"], ["gfx90a"], []]


class Closed(Machine):
    """A machine whose devices may not be opened."""

    def usable(self, path: str) -> bool:
        return False


def all_of(box: Machine, software: Software = SOFTWARE) -> list[Row]:
    return [*gpu_rows(box), *software_rows(box, software), *host_rows(box), *link_rows(box)]


def told(root: Path) -> Iterator[tuple[str, Row]]:
    """(what was changed, row) for each tree that the tests of single faults have, with three GPUs."""
    for name, (files, process, _) in CHANGES.items():
        kept = {path: content for path, content in (host() | gpu_files(["gfx942"] * 3) | files).items()
                if content is not None and not path.startswith(tuple(f"/sys/class/kfd/kfd/topology/nodes/{i}/"
                                                                     for i in range(4, 9)))}
        box = machine(root / str(len(list(root.iterdir()))), kept, **process)
        yield from ((name, row) for row in all_of(box))
    for number, archs in enumerate(ARCHS):
        box = machine(root / f"archs{number}", host() | gpu_files(archs, linked=archs != ["gfx1151"]))
        yield from ((str(archs), row) for row in all_of(box))
    box = machine(root / "soft", gpu_files(["gfx942"]))
    for change in SOFTWARES:
        yield from ((str(change), row) for row in software_rows(box, SOFTWARE._replace(**change)))
    for number, archs in enumerate((["gfx942"], [])):  # devices that are closed, or absent with their GPU
        box = machine(root / f"closed{number}", host() | (gpu_files(archs) if archs else {}))
        yield from ((f"closed {archs}", row) for row in host_rows(Closed(box.root, SETTINGS, frozenset(), "ann")))
    without = {path: content for path, content in (host() | gpu_files(["gfx942"])).items() if "/dev/dri" not in path}
    yield from (("no render node", row) for row in host_rows(machine(root / "nodri", without)))
    yield from (("unlinked", row) for row in link_rows(machine(root / "unlinked", gpu_files(["gfx942"] * 2, False))))
    for found in ({0: (True, 9.0), 1: (True, 9.0)}, {0: (True, 9.0)}):
        yield "exchange", exchange.verdict(2, found, 5)


def named_in_the_source() -> set[str]:
    """The first argument of every Row(...) in the doctor's files, and the names that are computed."""
    found = set()
    for file in Path(wave64.tools.doctor.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Row":
                (name, *_) = node.args
                found |= {name.value} if isinstance(name, ast.Constant) else set()
    return found | {"kernel command line", *HARMFUL}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[tuple[str, Row]]:
    return list(told(tmp_path_factory.mktemp("rows")))


def test_every_row_is_seen_in_both_states(rows):
    well = {row.name for _, row in rows if row.status == OK}
    ill = {row.name for _, row in rows if row.status != OK}
    names = named_in_the_source()
    assert len(names) > 35
    assert names - well == BAD
    assert names - ill == TELLS | GOOD
    assert (well | ill) == names


def test_what_is_not_ok_says_what_why_and_the_command(rows):
    for change, row in rows:
        assert row.found, (change, row)
        assert row.status in (OK, WARN, FAIL)
        assert row.status == OK or (row.why and row.command), (change, row)
        assert not row.now or row.command.startswith("sudo "), row


def test_commands_of_ours_are_taken_by_their_parsers(rows, monkeypatch):
    ours = {row.command for _, row in rows if row.command.startswith("python")}
    assert any("setup_rocm.py install --archs" in command for command in ours)
    for command in ours:
        check(command.partition(",")[0], monkeypatch)


def test_in_a_container_each_command_is_its_starters(tmp_path):
    """Nothing inside mends what the container was started with."""
    files = host() | gpu_files(["gfx942"] * 2) | {"/.dockerenv": "", "/proc/self/status": "Seccomp:\t2"}
    box = Closed(machine(tmp_path, files).root, SETTINGS, frozenset(), "ann", memlock=65536, open_files=1024,
                 shm_bytes=64 << 20)
    found = {row.name: row for row in host_rows(box) if row.status != OK}
    assert {"/dev/kfd, /dev/dri", "groups", "/dev/shm", "locked memory", "open files", "container"} == set(found)
    assert all(RUN in found[name].command for name in ("/dev/kfd, /dev/dri", "groups", "/dev/shm", "container"))
    assert [found[name].command for name in ("locked memory", "open files")] == [
        "--ulimit memlock=-1", "--ulimit nofile=1048576"]
    assert not any(row.now for row in found.values())
    assert found["/dev/shm"].found == "0.06 GiB"
    assert found["groups"].status == FAIL  # the devices are closed because of it
    opened = Machine(box.root, SETTINGS, frozenset(), "ann")
    assert [row.status for row in host_rows(opened) if row.name == "groups"] == [WARN]
    root = Machine(box.root, SETTINGS, frozenset(), "root")  # who needs no group
    assert [(row.status, row.found) for row in host_rows(root) if row.name == "groups"] == [(OK, "root")]


def test_a_small_gpu_is_an_integrated_one_though_its_node_has_no_processor(tmp_path):
    files = gpu_files(["gfx1100", "gfx1036"])
    name = "/sys/class/kfd/kfd/topology/nodes/2/properties"
    files[name] = str(files[name]).replace("cpu_cores_count 16", "cpu_cores_count 0")
    box = machine(tmp_path, host() | files)
    assert [gpu.integrated for gpu in box.gpus()] == [False, True]
    assert ("integrated GPU", WARN) in {(row.name, row.status) for row in gpu_rows(box)}


TREE = host() | gpu_files(["gfx942"] * 2)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.dictionaries(st.sampled_from(sorted(TREE)), st.integers(0, 60), max_size=12))
def test_files_that_are_cut_off_make_rows_and_no_exception(cuts, tmp_path_factory):
    """As a file of sysfs that is read while a driver unloads: any prefix of it."""
    root = tmp_path_factory.mktemp("cut")
    save(root, {path: str(content).encode()[:cuts.get(path, 10**6)] for path, content in TREE.items()})
    for row in all_of(Machine(root, SETTINGS, frozenset(), "ann", shm_bytes=GIB)):
        assert row.found
        assert row.status == OK or row.command, row
