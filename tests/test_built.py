"""The cache of what is compiled of hip/: the same sources are compiled once, wherever they lie; others anew."""

import shutil
from pathlib import Path

import pytest

from wave64.testing import built

HIP = Path(__file__).resolve().parent.parent / "hip"


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """The steps the compiler is asked for, with a cache of this test's own."""
    asked, zig = [], built.zig
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(built, "zig", lambda *step, cwd: (asked.append(step), zig(*step, cwd=cwd)))
    return asked


def test_the_same_source_elsewhere_is_not_compiled_again(compiles, tmp_path):
    first = built.code_object(HIP, "silu_and_mul", "gfx942")
    assert first.read_bytes()[:4] == b"\x7fELF"
    assert len(compiles) == 3
    shutil.copytree(HIP, tmp_path / "hip")
    assert built.code_object(tmp_path / "hip", "silu_and_mul", "gfx942") == first
    assert len(compiles) == 3
    header = tmp_path / "hip" / "include" / "wave64" / "gated.h"
    header.write_text(header.read_text() + "// changed\n")
    assert built.code_object(tmp_path / "hip", "silu_and_mul", "gfx942") != first
    assert built.code_object(HIP, "silu_and_mul", "gfx950") != first
    assert len(compiles) == 9
    assert [file for file in built.folder().iterdir() if file.is_dir()] == [], "no folder to work in stays"


def test_what_does_not_compile_is_not_kept(compiles, tmp_path):
    (tmp_path / "hip" / "ops").mkdir(parents=True)
    (tmp_path / "hip" / "include").mkdir()
    (tmp_path / "hip" / "ops" / "no_op.hip").write_text("not C++\n")
    for _ in range(2):
        with pytest.raises(built.CompileError, match="expected unqualified-id"):
            built.code_object(tmp_path / "hip", "no_op", "gfx942")
    assert len(compiles) == 2
    assert [file.suffix for file in built.folder().iterdir()] == [".lock"]
