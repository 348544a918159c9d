"""Which compiler makes the code objects: CMake asks every clang it finds for the real thing, per architecture."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("HIP_CLANG_PATH", "HIP_PATH", "ROCM_PATH")
UNKNOWN_BUILTIN = "ops/rms_norm.hip:9:9: error: use of undeclared identifier '__builtin_amdgcn_wavefrontsize'"
DEBIAN = sorted(Path("/usr/lib").glob("llvm-*/bin/clang"), key=lambda clang: int(clang.parts[3].removeprefix("llvm-")))


def choose(tmp_path: Path, *archs: str, settings: tuple[str, ...] = (),
           **env: Path) -> tuple[list[str], dict[str, str]]:
    """What cmake/device_compilers.cmake finds, by name in order, and whom it chooses for `archs`, in words. ziglang is
    one that compiles nothing and succeeds at it."""
    ziglang = tmp_path / "ziglang"
    ziglang.mkdir(exist_ok=True)
    (ziglang / "__main__.py").write_text("import sys\nprint('0.17.1' if 'version' in sys.argv else 'clang version 22')")
    project = tmp_path / "project"
    project.mkdir(exist_ok=True)
    if not (project / "hip").exists():
        (project / "hip").symlink_to(ROOT / "hip")
    (project / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.20)
        project(choice LANGUAGES NONE)
        set(hip_ops {ROOT}/hip/ops/rms_norm.hip)
        include({ROOT}/cmake/device_compilers.cmake)
        set(n 0)
        while(n LESS device_compilers)
            message("found: ${{device_name_${{n}}}}")
            math(EXPR n "${{n}} + 1")
        endwhile()
        foreach(arch {' '.join(archs)})
            choose_device_compiler(${{arch}} compiler words)
            message("chosen: ${{arch}}: ${{compiler}}: ${{words}}")
        endforeach()""")
    done = subprocess.run(
        [sys.executable, "-m", "cmake", "-S", project, "-B", tmp_path / "build",
         f"-DPython_EXECUTABLE={sys.executable}", f"-DWAVE64_ROCM_ROOT={tmp_path}/opt", *settings],
        capture_output=True, text=True, env={**{k: v for k, v in os.environ.items() if k not in VARIABLES},
                                             **{k: str(v) for k, v in env.items()}, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    return ([line.removeprefix("found: ") for line in lines if line.startswith("found: ")],
            dict(line.removeprefix("chosen: ").split(": ", 1) for line in lines if line.startswith("chosen: ")))


def clang(folder: Path, refuses: str = "nothing", version: str = "17.0.0", lld: bool = True) -> Path:
    """A clang as a ROCm has it, which fails at commands that match `refuses` and makes nothing of others."""
    folder.mkdir(parents=True)
    script = (f"#!/bin/sh\ncase \"$*\" in\n--version) echo 'AMD clang version {version} (roc-6.0.0)'; exit;;\n"
              f"*{refuses}*) echo \"{UNKNOWN_BUILTIN}\" >&2; exit 1;;\nesac\n")
    for name, text in [("clang", script), ("ld.lld", "#!/bin/sh\n")]:
        if name == "clang" or lld:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755 | stat.S_IXUSR)
    return folder / "clang"


def test_every_folder_of_a_rocm_is_searched_in_order(tmp_path):
    opt = tmp_path / "opt"
    folders = [tmp_path / "direct", tmp_path / "hip" / "llvm" / "bin", tmp_path / "rocm" / "lib" / "llvm" / "bin",
               opt / "rocm" / "llvm" / "bin", opt / "rocm" / "core-7.13" / "lib" / "llvm" / "bin",
               opt / "rocm" / "core-7.9" / "lib" / "llvm" / "bin", opt / "rocm-6.10.0" / "llvm" / "bin",
               opt / "rocm-6.4.1" / "llvm" / "bin"]
    for folder in folders:
        clang(folder)
    (opt / "rocm-6.0.0").symlink_to(opt / "rocm-6.4.1")  # a second name of the same is no second compiler
    found, _ = choose(tmp_path, HIP_CLANG_PATH=tmp_path / "direct", HIP_PATH=tmp_path / "hip",
                      ROCM_PATH=tmp_path / "rocm")
    assert found[:-1] == [f"{folder}/clang (clang version 17.0.0)" for folder in folders]
    assert found[-1].startswith("ziglang ")


def test_a_clang_that_cannot_is_passed_over_for_that_architecture_and_in_words(tmp_path):
    old = clang(tmp_path / "rocm" / "llvm" / "bin", refuses="gfx950")
    _, chosen = choose(tmp_path, "gfx942", "gfx950", ROCM_PATH=tmp_path / "rocm")
    assert chosen["gfx942"] == f"0: {old} (clang version 17.0.0)"
    assert chosen["gfx950"].startswith("1: ziglang ")
    assert chosen["gfx950"].endswith(f"; not {old} (clang version 17.0.0): " + UNKNOWN_BUILTIN.split(": ", 1)[1])


def test_a_clang_whose_code_generator_fails_is_passed_over(tmp_path):
    clang(tmp_path / "rocm" / "llvm" / "bin", refuses="-mcpu=gfx942*paged_attention")
    _, chosen = choose(tmp_path, "gfx942", ROCM_PATH=tmp_path / "rocm")
    assert chosen["gfx942"].startswith("1: ziglang ")


def test_a_clang_without_its_linker_is_passed_over(tmp_path):
    clang(tmp_path / "rocm" / "llvm" / "bin", lld=False)
    _, chosen = choose(tmp_path, "gfx942", ROCM_PATH=tmp_path / "rocm")
    assert chosen["gfx942"].startswith("1: ziglang ")
    assert "ld.lld" not in chosen["gfx942"].split(";")[0]
    assert "no such file" in chosen["gfx942"].lower()


def test_a_clang_asked_for_by_name_is_the_only_one(tmp_path):
    named, other = clang(tmp_path / "mine", refuses="gfx950"), clang(tmp_path / "rocm" / "llvm" / "bin")
    found, chosen = choose(tmp_path, "gfx950", settings=(f"-DWAVE64_CLANG={named}",), ROCM_PATH=other.parents[2])
    assert found == [f"{named} (clang version 17.0.0)"]
    assert chosen["gfx950"] == (f": no compiler when wave64 was built; not {named} (clang version 17.0.0): "
                                + UNKNOWN_BUILTIN.split(": ", 1)[1])


@pytest.mark.skipif(not DEBIAN, reason="needs a clang of Debian or Ubuntu (apt install clang-15 lld-15)")
def test_the_oldest_clang_of_the_distribution_serves_or_says_why_not(tmp_path):
    oldest = DEBIAN[0]
    (tmp_path / "rocm").mkdir()
    (tmp_path / "rocm" / "llvm").symlink_to(oldest.parents[1])
    found, chosen = choose(tmp_path, "gfx90a", "gfx1250", ROCM_PATH=tmp_path / "rocm")
    assert len(found) == 2
    for arch, words in chosen.items():
        number, words = words.split(": ", 1)
        assert number in "01", arch
        assert ("; not " in words and "error: " in words) == (number == "1"), words
    assert chosen["gfx1250"].startswith("1: ziglang ")
