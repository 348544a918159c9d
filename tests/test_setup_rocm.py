"""The front door's decisions: which torch, if any, and what it says when it will not choose."""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("setup_rocm", ROOT / "setup_rocm.py")
setup_rocm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(setup_rocm)

NO_CHOICE = Namespace(torch=None, cpu=False)


@pytest.fixture
def machine(monkeypatch):
    """A machine without torch, of which the test tells GPUs and package index; installing anything fails the test."""
    def describe(amd=(), nvidia=(), index=()):
        monkeypatch.setattr(setup_rocm, "torch_of", lambda python: None)
        monkeypatch.setattr(setup_rocm, "amd_gpus", lambda: list(amd))
        monkeypatch.setattr(setup_rocm, "nvidia_gpus", lambda: list(nvidia))
        monkeypatch.setattr(setup_rocm, "planned", lambda python, names: [{"metadata": {"name": n}} for n in index])
        monkeypatch.setattr(setup_rocm, "run", lambda title, command: pytest.fail(f"would run {command}"))
    return describe


def test_an_installed_torch_stays(monkeypatch, capsys):
    monkeypatch.setattr(setup_rocm, "run", lambda title, command: pytest.fail(f"would run {command}"))
    setup_rocm.ensure_torch(sys.executable, Namespace(torch="torch==1.0", cpu=True))
    assert "is installed and stays as it is" in capsys.readouterr().out


def test_no_gpu_and_an_index_of_cuda_builds_is_refused(machine):
    machine(index=["torch", "sympy", "nvidia-cublas", "nvidia-nccl-cu13", "cuda-toolkit"])
    with pytest.raises(SystemExit, match=r"(?s)would bring 3 CUDA packages \(nvidia-cublas, .*--torch"):
        setup_rocm.ensure_torch("python", NO_CHOICE)


def test_an_amd_gpu_without_torch_is_not_guessed_for(machine):
    machine(amd=["gfx942", "gfx942"], index=["torch"])
    with pytest.raises(SystemExit, match=r"(?s)AMD GPUs \(gfx942\).* --torch"):
        setup_rocm.ensure_torch("python", NO_CHOICE)


@pytest.mark.parametrize(("version", "arch"), [(90402, "gfx942"), (90010, "gfx90a"), (110001, "gfx1101"), (0, None)])
def test_architectures_are_read_from_the_kernel_driver(tmp_path, version, arch):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\nvendor_id 4098\n")
    assert setup_rocm.amd_gpus(tmp_path) == ([arch] if arch else [])


def test_installed_torch_and_triton_are_pinned(tmp_path):
    with setup_rocm.constraints(sys.executable) as arguments:
        pinned = Path(arguments[1]).read_text().split()
    version = importlib.metadata.version("torch")
    assert f"torch=={version}" in pinned


@pytest.fixture
def environment_of_others(monkeypatch):
    """An environment somebody else filled: what it has, and what pip would install there."""
    def describe(have, plan, inside=True):
        monkeypatch.setattr(setup_rocm, "installed", lambda python: dict(have))
        monkeypatch.setattr(setup_rocm, "in_environment", lambda: inside)
        monkeypatch.setattr(setup_rocm, "planned", lambda python, arguments, title: [
            {"metadata": {"name": name, "version": version}} for name, version in plan.items()])
    return describe


def test_what_an_environment_has_is_not_changed_unasked(environment_of_others):
    environment_of_others({"transformers": "4.57.1", "uvicorn": "0.30"}, {"Transformers": "5.1", "msgspec": "0.20"})
    with pytest.raises(SystemExit, match=r"(?s)transformers 4\.57\.1 -> 5\.1\n.*--upgrade") as refused:
        setup_rocm.may_change("python", ["transformers>=5"], upgrade=False)
    assert "msgspec" not in str(refused.value), "what is new changes nothing"
    assert setup_rocm.may_change("python", ["transformers>=5"], upgrade=True) == ("transformers",)


def test_an_environment_of_our_own_is_brought_up_to_date(environment_of_others):
    environment_of_others({"transformers": "4.57.1"}, {"transformers": "5.1"}, inside=False)
    assert setup_rocm.may_change("python", ["transformers>=5"], upgrade=False) == ("transformers",)


def test_all_that_stays_is_pinned_and_checked(environment_of_others, monkeypatch):
    environment_of_others({"transformers": "4.57.1", "numpy": "2.0", "wave64": "0.1", "apt-xapian": "0.4ubuntu1"}, {})
    keeping = setup_rocm.constraints("python", but=("transformers",))
    assert Path(keeping.__enter__()[1]).read_text() == "numpy==2.0\n"
    environment_of_others({"transformers": "5.1", "numpy": "2.4", "wave64": "0.2", "apt-xapian": "0.4ubuntu1"}, {})
    with pytest.raises(SystemExit, match=r"numpy was 2\.0 and is 2\.4 now"):
        keeping.__exit__(None, None, None)


@pytest.mark.parametrize("inside", [False, True])
def test_what_one_command_has_built_serves_the_next(environment_of_others, monkeypatch, inside):
    """In .venv, demo and test build by the same tools; into an environment of others demo puts no build tools."""
    environment_of_others({}, {}, inside)
    built = []
    for name in ("require_writable", "require_pip", "ensure_torch", "ensure_triton"):
        monkeypatch.setattr(setup_rocm, name, lambda *args: None)
    monkeypatch.setattr(setup_rocm, "environment", lambda: "python")
    monkeypatch.setattr(setup_rocm, "is_editable", lambda python: False)
    monkeypatch.setattr(setup_rocm, "run", lambda title, command: built.append(command))
    args = Namespace(archs=[], upgrade=False)
    setup_rocm.install(args, "serve,demo")
    setup_rocm.install(args, "serve,test", develops=True)
    wave64 = [[word for word in command if "constraints" not in word][:-1] for command in built if "-v" in command]
    assert (wave64[0] == wave64[1]) is not inside
    tools = [command for command in built if command[-1] == setup_rocm.build_requirements()[-1]]
    assert len(tools) == (1 if inside else 2)


def test_requirements_are_read_from_pyproject():
    listed = setup_rocm.requirements("serve,demo")
    assert {"fastapi", "openai"} <= set(listed)
    assert not any("[" in name or name.startswith(("torch", "triton")) for name in listed)


EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition(
    "[project.optional-dependencies]")[2].partition("[project.scripts]")[0], re.MULTILINE)  # fmt: skip


def test_every_extra_is_resolved():
    assert {"cpu", "serve", "demo", "bench", "emulator", "test", "clients", "docs", "lint"} == {*EXTRAS}


@pytest.mark.long
@pytest.mark.parametrize("extras", ["serve", ",".join(extra for extra in EXTRAS if extra != "cpu")])
def test_no_extra_brings_a_torch_or_a_triton(extras, tmp_path):
    """What pip would install into an empty environment, for users and for all together. [cpu] alone names both."""
    report = tmp_path / "report.json"
    subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report",
                    report, *setup_rocm.requirements(extras)], check=True)  # fmt: skip
    brought = {each["metadata"]["name"].lower() for each in json.loads(report.read_text())["install"]}
    assert len(brought) >= len(setup_rocm.requirements(extras)) // 2
    assert not {name for name in brought if re.search("torch|triton|nvidia|cuda|rocm", name)}


def test_an_interrupted_environment_is_completed(tmp_path, monkeypatch):
    """As a Ctrl-C leaves it: a Python, and no pip."""
    venv.create(tmp_path / ".venv", with_pip=False)
    (tmp_path / ".venv" / "mine").touch()
    made = []
    monkeypatch.setattr(setup_rocm, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_rocm, "in_environment", lambda: False)
    monkeypatch.setattr(setup_rocm, "run", lambda title, command: made.append(command))
    assert setup_rocm.environment() == str(tmp_path / ".venv" / "bin" / "python")
    assert made[0][1:3] == ["-m", "venv"]
    assert (tmp_path / ".venv" / "mine").exists()


def test_a_clone_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "build").touch()  # as root, permissions refuse nothing: a file where a folder is needed does
    monkeypatch.setattr(setup_rocm, "ROOT", tmp_path)
    monkeypatch.setattr(setup_rocm, "LOGS", tmp_path / "build" / "logs")
    with pytest.raises(SystemExit, match=r"cannot write to .*build.*must belong to you"):
        setup_rocm.require_writable()


@pytest.mark.parametrize("compiler", [None, "g++"])
def test_without_a_compiler_zigs_is_used(monkeypatch, compiler):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup_rocm.shutil, "which", lambda name: compiler if name == compiler else None)
    settings = setup_rocm.build_settings("/env/bin/python", Namespace(archs=["-Cx"]))
    assert any("CMAKE_CXX_COMPILER=/env/bin/python;-m;ziglang;c++" in s for s in settings) is (compiler is None)
    assert settings[0] == "-Cx"
    assert all(each.startswith("--config-settings=") for each in settings[1:])  # pip of Debian 12 knows no -C


@pytest.mark.parametrize("multiarch", ["x86_64-linux-gnu", ""])
def test_headers_that_debian_splits_are_found(tmp_path, monkeypatch, multiarch):
    part = tmp_path / "usr" / multiarch / "python3.11"
    part.mkdir(parents=True)
    (part / "pyconfig.h").touch()
    monkeypatch.syspath_prepend(ROOT / "tools")
    split_headers = importlib.import_module("split_headers")
    monkeypatch.setattr(split_headers.sysconfig, "get_path", lambda name: f"{tmp_path}/usr/python3.11")
    monkeypatch.setattr(split_headers.sysconfig, "get_config_var", lambda name: multiarch)
    flag = split_headers.link(str(tmp_path / "include"))
    assert flag == (f" -I{tmp_path}/include" if multiarch else "")
    assert (tmp_path / "include/x86_64-linux-gnu/python3.11/pyconfig.h").exists() == bool(multiarch)


def test_the_build_tools_are_read_from_pyproject():
    names = setup_rocm.build_requirements()
    assert any(name.startswith("scikit-build-core") for name in names)
    assert any(name.startswith("ziglang==") for name in names)


def test_a_step_that_fails_shows_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_rocm, "LOGS", tmp_path)
    monkeypatch.setattr(setup_rocm, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"exit status 3"):
        setup_rocm.run("Doing a thing", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "| the reason" in capsys.readouterr().out


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """apt(script, uid) puts an apt-get into an otherwise empty PATH, and gives the file of what it was asked."""
    def describe(script: str | None = "true", uid=0, others=()) -> Path:
        for name in ("sh", "timeout", "sleep", *others):
            (tmp_path / name).symlink_to(shutil.which(name) or sys.executable)
        if script is not None:
            (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$DEBIAN_FRONTEND $@" >> {tmp_path}/asked\n{script}\n')
            (tmp_path / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(setup_rocm, "LOGS", tmp_path)
        monkeypatch.setattr(setup_rocm, "ROOT", tmp_path)
        monkeypatch.setattr(setup_rocm.os, "geteuid", lambda: uid)
        return tmp_path / "asked"
    return describe


def test_chromium_is_installed_where_root_may(apt, capsys):
    asked = apt()
    setup_rocm.install_chromium()
    lists, packages = asked.read_text().splitlines()
    assert lists == "noninteractive -q update"
    assert packages.startswith("noninteractive -q -y ")
    assert packages.endswith(" install --no-install-recommends chromium chromium-driver")
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("how", [{"uid": 1000}, {"script": None}], ids=["not root", "no apt"])
def test_where_chromium_cannot_be_installed_it_is_said_how(apt, capsys, how):
    assert not apt(**how).exists()
    setup_rocm.install_chromium()
    assert "skipped without Chromium and its driver; as root: apt-get" in capsys.readouterr().out


def test_a_chromium_that_is_there_is_not_installed_again(apt):
    asked = apt(others=("chromium", "chromedriver"))
    setup_rocm.install_chromium()
    assert not asked.exists()


@pytest.mark.parametrize("script", ["echo the reason; exit 100", "sleep 60"])
def test_an_apt_that_fails_or_hangs_costs_a_test_and_not_the_run(apt, capsys, monkeypatch, script):
    apt(script)
    monkeypatch.setattr(setup_rocm, "APT_S", 0.2)
    setup_rocm.install_chromium()
    said = capsys.readouterr().out
    assert said.endswith("without it that test is skipped\n")
    assert ("| the reason" in said) is ("reason" in script)


def test_an_unknown_argument_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setup_rocm.py", "install", "--toch", "x"])
    with pytest.raises(SystemExit):
        setup_rocm.main()
    assert "unknown arguments: --toch x" in capsys.readouterr().err
