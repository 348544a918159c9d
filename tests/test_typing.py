"""Type checkers see the operators' signatures: they refuse the bad calls of typed_calls.py, those and no others."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "typed_calls.py"
TENSORS = ("torch", "torch._tensor", "torch._C.*", "torch.types")
BAD = {number for number, line in enumerate(FILE.read_text().splitlines(), 1) if "  # bad" in line}


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "pysrc/wave64/py.typed").exists()


def refused_by(command, lines) -> set[int]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT,
                          env={**os.environ, "MYPYPATH": str(ROOT / "pysrc")})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return lines(done.stdout)


def run(module: str, *arguments) -> str:
    """What a checker prints of the tree, with the settings in pyproject.toml; "" where it finds nothing."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=400,
                          cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed: pip install wave64[lint]")
def test_ruff_finds_nothing_in_the_tree():
    assert run("ruff", "check", "--no-cache", ".") == ""


@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None,
                    reason="pyright is not installed: pip install wave64[lint]")
def test_pyright_finds_nothing_in_the_tree():
    assert run("basedpyright", "--level", "error", "--pythonpath", sys.executable) == ""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install wave64[lint]")
def test_mypy_refuses_the_bad_calls(tmp_path):
    """Of torch it reads what says what a Tensor is and a dtype; all of it takes three times as long."""
    settings = tmp_path / "mypy.ini"
    settings.write_text("".join(f"[{section}]\nfollow_imports = {follow}\n" for section, follow in (
        ("mypy-torch.*", "skip"), *((f"mypy-{module}", "silent") for module in TENSORS),
        ("mypy", f"silent\nignore_missing_imports = True\ncache_dir = {os.devnull}"))))
    command = [sys.executable, "-m", "mypy", "--config-file", settings, FILE]
    assert refused_by(command, lambda text: {int(n) for n in re.findall(r"typed_calls\.py:(\d+): error", text)}) == BAD


@pytest.mark.skipif(shutil.which("basedpyright") is None and importlib.util.find_spec("basedpyright") is None,
                    reason="pyright is not installed: pip install wave64[lint]")
def test_pyright_refuses_the_bad_calls(tmp_path):
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(json.dumps({"include": [str(FILE)], "extraPaths": [str(ROOT / "pysrc")],
                                    "typeCheckingMode": "basic"}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", settings, "--pythonpath",
               sys.executable]

    def lines(text):
        return {error["range"]["start"]["line"] + 1 for error in json.loads(text)["generalDiagnostics"]
                if error["severity"] == "error"}

    assert refused_by(command, lines) == BAD
