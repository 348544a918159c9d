"""Where ROCm's runtime is looked for: every shape of folder that an installation has, in order."""

import sys
from pathlib import Path

import pytest
from helpers_standin import link_standin, opened

from wave64.backends import hip_library


@pytest.fixture(autouse=True)
def _no_system(monkeypatch):
    monkeypatch.setattr(hip_library, "by_loader", list)


def create(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_the_order_of_candidates(tmp_path, monkeypatch):
    site, opt, name = tmp_path / "site", tmp_path / "opt", "libamdhip64.so"
    sdk = tmp_path / "sdk"
    create(sdk, name)
    (site / "rocm_sdk.py").parent.mkdir()
    (site / "rocm_sdk.py").write_text(
        f"from pathlib import Path\ndef find_libraries(name):\n    return [Path({str(sdk)!r}, f'lib{{name}}.so')]\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(hip_library, "by_loader", lambda: [Path("/usr/lib/libamdhip64.so.7")])
    expected = [str(sdk / name), *create(site / "_rocm_sdk_core" / "lib", f"{name}.7"),
                *create(site / "torch/lib", name),
                *create(tmp_path / "hip/lib", name), *create(tmp_path / "rocm/lib", name),
                *create(tmp_path / "loader", name), "/usr/lib/libamdhip64.so.7", *create(opt / "rocm/lib", name),
                *create(opt / "rocm/core-7.10/lib", f"{name}.7"), *create(opt / "rocm/core-7.9/lib", f"{name}.7"),
                *create(opt / "rocm-6.10.0/lib", name), *create(opt / "rocm-6.4.1/lib", name)]
    environ = {"HIP_PATH": str(tmp_path / "hip"), "ROCM_PATH": str(tmp_path / "rocm"),
               "LD_LIBRARY_PATH": f":{tmp_path / 'loader'}"}
    try:
        assert hip_library.candidates([site], environ, opt) == expected
    finally:
        sys.modules.pop("rocm_sdk", None)


@pytest.mark.parametrize("broken", ["raise RuntimeError('no device')", "find_libraries = None"])
def test_a_rocm_sdk_that_fails_leaves_the_other_candidates(broken, tmp_path, monkeypatch):
    (tmp_path / "rocm_sdk.py").write_text(broken + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = create(tmp_path / "_rocm_sdk_core_7" / "lib", "libamdhip64.so.7")
    try:
        assert hip_library.candidates([tmp_path], {}, tmp_path / "opt") == expected
    finally:
        sys.modules.pop("rocm_sdk", None)


@pytest.mark.parametrize(("files", "expected"), [
    (["libamdhip64.so.7"], ["libamdhip64.so.7"]),
    (["libamdhip64.so.8"], ["libamdhip64.so.8"]),
    (["libamdhip64.so.7", "libamdhip64.so.10", "libamdhip64.so.6"],
     ["libamdhip64.so.10", "libamdhip64.so.7", "libamdhip64.so.6"]),
    (["libamdhip64.so.5", "libamdhip64.so.6"], ["libamdhip64.so.6", "libamdhip64.so.5"]),
    (["libamdhip64.so.5"], ["libamdhip64.so.5"])])
def test_versioned_names(files, expected, tmp_path):
    create(tmp_path / "rocm" / "lib", *files)
    found = hip_library.candidates([], {}, tmp_path)
    assert [Path(path).name for path in found] == expected


def test_names_of_one_file_count_once_and_an_old_one_behind_a_link_stands_last(tmp_path):
    old, new = tmp_path / "rocm" / "lib", tmp_path / "rocm-6.4.0" / "lib"
    for folder, full in ((old, "libamdhip64.so.5.7.31921"), (new, "libamdhip64.so.6.4.43482")):
        create(folder, full)
        (folder / full[:16]).symlink_to(full)
        (folder / "libamdhip64.so").symlink_to(full[:16])
    assert hip_library.candidates([], {}, tmp_path) == [f"{new}/libamdhip64.so", f"{old}/libamdhip64.so"]


def test_ldconfig_is_read(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hip_library.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": (
        "2 libs found in cache `/etc/ld.so.cache'\n"
        "\tlibamdhip64.so.7 (libc6,x86-64) => /opt/rocm/lib/libamdhip64.so.7\n"
        "\tlibc.so.6 (libc6,x86-64, OS ABI: Linux 3.2.0) => /lib/libc.so.6\n")})())
    assert hip_library.by_loader() == [Path("/opt/rocm/lib/libamdhip64.so.7")]


@pytest.mark.parametrize("where", ["site/_rocm_sdk_core/lib/libamdhip64.so.7", "site/torch/lib/libamdhip64.so",
                                   "opt/rocm/lib/libamdhip64.so.8", "opt/rocm/core-8.1/lib/libamdhip64.so.8",
                                   "opt/rocm-6.0.2/lib/libamdhip64.so.6"])
def test_a_runtime_is_opened_in_each_shape(where, tmp_path):
    library = link_standin(tmp_path / where)
    found = hip_library.candidates([tmp_path / "site"], {}, tmp_path / "opt")
    assert opened(*found) == str(library)


def test_the_older_runtime_alone_is_told_as_too_old(tmp_path):
    library = link_standin(tmp_path / "rocm/lib/libamdhip64.so.5", without=("hipGetDevicePropertiesR0600",))
    found = hip_library.candidates([], {}, tmp_path)
    assert opened(*found) == (
        f"{library} lacks hipGetDevicePropertiesR0600; ROCm 6.0 or later is needed")


def test_what_the_process_holds_is_reused(tmp_path):
    held, other = (link_standin(tmp_path / name / "libamdhip64.so") for name in ("held", "other"))
    assert opened(other, LD_PRELOAD=str(held)) == str(held)
