"""The front door's decisions: which torch, if any, and what it says when it will not choose."""

import importlib.metadata
import importlib.util
import sys
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


def test_an_unknown_argument_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setup_rocm.py", "install", "--toch", "x"])
    with pytest.raises(SystemExit):
        setup_rocm.main()
    assert "unknown arguments: --toch x" in capsys.readouterr().err
