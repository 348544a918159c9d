"""The repository keeps the design's mechanical rules, and each check can find what it is for."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("check_house", ROOT / "tools" / "check_house.py")
house = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(house)

BROKEN = {
    "long.py": ("x = 1\n" * 501, "501 lines"),
    "pysrc/wave64/ops/__init__.py": ("import os\nos.getcwd()\n", "an __init__ lists"),
    "pysrc/wave64/platform.py": ("from wave64.serve import messages\n", "wave64.serve may be imported by"),
    "triton_ops/rms_norm.py": ("from wave64 import _hip\n", "wave64._hip may be imported by"),
    "serve/model/layers.py": ("import triton.language as tl\n", "triton may be imported by"),
    "pysrc/wave64/ops/sample.py": ("from wave64 import backends\n", "does not know wave64.backends"),
    "hip/src/runtime.cpp": ("#include <hip/hip_runtime.h>\n", "neither torch nor a GPU runtime"),
    "hip/ops/sample.hip": ('auto x = getenv("X");\n', "does not allocate, synchronize or read"),
    "hip/ops/rms_norm.hip": ("int warp = 0;\n", "say wave"),
    "hip/include/wave64/device.h": ("#include <pybind11/pybind11.h>\n", "only hip/src/bindings.cpp does this"),
    "CONTRIBUTING.md": ("what lies besi" "de it\n", "say next to"),
    "pysrc/wave64/quant.py": ("def dequanti" "se(x):\n    pass\n", "American spelling"),
    "serve/http/app.py": ("import torch\n", "the api process imports no torch"),
    "serve/engine/pages.py": ("from wave64.serve.http import app\n", "wave64.serve.http may be imported by"),
    "serve/model/rope.py": ("from wave64.serve.engine import pages\n", "wave64.serve.engine may be imported by"),
    "triton_ops/gated.py": (f"@triton.jit\ndef f({', '.join(f'x{i}' for i in range(26))}):\n    pass\n",
                            "f has 26 parameters"),
    "triton_ops/paged_attention.py": ("def launch(x):\n    pass\n", "correct MANY_PARAMETERS"),
    "triton_ops/splits.py": ("@triton.jit\ndef f(x, W):\n    if W:\n        return x\n    return x + 1\n",
                             "f returns in 2"),
    "triton_ops/topk.py": ("MOST_IDS = 8\n", "MOST_IDS: say max"),
    "triton_ops/sample.py": ("peak = 0.0\n", "peak: say row_max or max"),
    "pysrc/wave64/ops/mla_decode.py": ('"""Turns the heads of query and key."""\n', "say rotate"),
    "tests/serve/test_tools.py": ("def least_turn(): pass\n", "least_turn: say min"),
    "serve/node.py": ("first_place = 0\n", "first_place: say offset"),
    "tests/ops/test_sample.py": ("# two products are under way\n", "say in flight"),
    "serve/engine/scheduler.py": ("# a page is dealt to a sequence\n", "say assign"),
    "pysrc/wave64/arch.py": ("fp8_fla" "vour = None\n", "American spelling"),
    "pysrc/wave64/op.py": ("import os\nx = os.environ['X']\n", "read the environment"),
    "serve/engine/engine.py": ("# TO" "DO: later\n", "without the number"),
    "serve/args.py": ('x = "/ho' 'me/me/models"\n', "absolute path"),
    "README.md": ("pip install --index-url https://py" "pi.org/simple wave64\n", "package registry"),
}
CLEAN = {
    "pysrc/wave64/ops/__init__.py": '"""Ops."""\nfrom wave64.ops.sample import sample\n\n__all__ = ["sample"]\n',
    "pysrc/wave64/launch_server.py": "from wave64.serve.http import launch\n",
    "triton_ops/rms_norm.py": "import triton\nnum_warps = 4\n",
    "triton_ops/sample.py": "@triton.jit\ndef f(x, W):\n    if W:\n        return\n    return x\n\n\n"
                            "def g(x):\n    if x:\n        return 1\n    return 2\n",
    "serve/engine/engine.py": "# TO" "DO(#12): later\n",
    "triton_ops/topk.py": "# at most two in place, one in turn\nat_most, in_place = 1, 2\n",
    "tests/serve/test_prefix_cache.py": "turn, shares_pages, stay_apart = 1, 2, 3\n",
    "hip/ops/rms_norm.hip": '#include "wave64/types.h"  // no malloc here\n',
}


def repository(folder: Path, files: dict[str, str]) -> Path:
    subprocess.run(["git", "init", "-q", folder], check=True)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_this_repository_is_in_order():
    assert house.findings(ROOT) == []


@pytest.mark.parametrize("path", BROKEN)
def test_every_rule_can_be_broken(tmp_path, path):
    text, message = BROKEN[path]
    found = house.findings(repository(tmp_path, {path: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert message in found[0]


def test_what_the_rules_allow(tmp_path):
    assert house.findings(repository(tmp_path, CLEAN)) == []


def test_the_readme_reads_on_a_package_index_too():
    """Where it is shown without the files next to it: links that name a file would lead nowhere, and a picture's words
    stand in its place."""
    links = re.findall(r"(!?)\[([^]]*)\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert [link for is_picture, _, link in links if not is_picture and not link.startswith("https://")] == []
    assert all(len(words) > 20 and (ROOT / link).is_file() for is_picture, words, link in links if is_picture)


@pytest.mark.parametrize("title", ["The life of a kernel", "The life of a request"])
def test_a_walk_is_short_and_names_what_is_there(title):
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    assert sum(bool(line) for line in text.splitlines()) <= 40
    folders = ("hip", "cmake", "pysrc/wave64", "serve", "triton_ops", "tests")
    files = ["CMakeLists.txt", *(path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    named = {name for name in re.findall(r"`([\w/]+\.(?:py|h|hip|cpp|cmake|json|txt))[`:]", text)}
    assert len(named) > 15
    assert {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)} == set()


def test_figures_are_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import house_figures

    root = repository(tmp_path, {
        "pysrc/wave64/a.py": "from wave64.b import g\n\n\ndef f(x, y):\n    return g(x, y)\n",
        "pysrc/wave64/b.py": "import wave64.a\nfrom wave64 import c\n\n\ndef g(*, x):\n    return x\n\n",
        "serve/c.py": "import math\n", "pysrc/wave64/c.py": "def h():\n    from wave64 import a\n    return a\n",
        "hip/d.h": "int d;\n", "tests/e.py": "def long(a, b, c, d):\n    pass\n    pass\n    pass\n"})
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    assert house_figures.report(root) == [
        "files: 6, 1 of them in tests/", "lines of Python: 16 outside tests/, 4 in it",
        "lines of C++ and HIP: 1 outside tests/, 0 in it", "lines of documents: 0 outside tests/, 0 in it",
        "longest file: 7 lines, pysrc/wave64/b.py",
        "longest function: 3 lines, pysrc/wave64/c.py:h; most parameters: 2, pysrc/wave64/a.py:f",
        "imports against the arrows of the design: 0", "circles of imports: 1\n  wave64.a, wave64.b"]
