"""Results that are kept: what a test found by compiling Triton's kernels and executing them stands in recorded.json,
with a hash, its `mark`, of all that it came of.

A result is valid until something changes that it came of: the operator's sources, those of its Triton kernels, what its
launchers launch (binaries, grids, arguments), and, for all results together, the emulator, the contract and Triton. The
suite takes valid results as they are and obtains a drawn twentieth of them anew, which must be the same; what is not
valid is obtained and judged, and its test then fails with the command that renews the record. `--tier long` obtains
everything. Where Triton is another version than the record's, everything is obtained and nothing is compared.

    python -m pytest tests/gfx942 --renew-record -n 2      obtains all that is not valid, and writes recorded.json
"""

import ast
import contextlib
import datetime
import functools
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import wave64
from wave64 import OPS, triton_ops
from wave64.op import Case

RECORD = Path(__file__).with_name("recorded.json")
RENEW = "python -m pytest tests/gfx942 --renew-record -n 2"
#: One of so many valid results is obtained anew, other ones every day.
DRAWN_OF = 20
#: What numbers of a result that is obtained anew may differ by.
SLACK = 0.02
PACKAGE = Path(wave64.__file__).parent
TRITON_OPS = Path(triton_ops.__file__).parent
#: What all results come of, with what these import of wave64.testing, besides Triton and the emulator's core.
COMMON = ("testing/emulator/check.py", "testing/cost.py", "testing/problems.py", "quant.py")


# ---- what a result came of

def code_of(text: str) -> str:
    """Python source without comments, docstrings, empty lines and the ends of lines: what may change and change
    nothing."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1:first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def hash_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def common() -> str:
    """The mark of what all results come of."""
    python = [*(PACKAGE / name for name in COMMON), Path(__file__).with_name("shrunken.py")]
    core = [file for file in sorted((PACKAGE / "testing/emulator/core").iterdir()) if file.suffix in (".c", ".h")]
    assert core
    return hash_of([*_codes(python, {"wave64.testing": PACKAGE / "testing"}), *(file.read_text() for file in core)])


def _codes(wanted: list[Path], folders: dict[str, Path]) -> list[str]:
    """The code of these files and of those that they import of the packages in `folders`."""
    seen: dict[Path, str] = {}
    while wanted:
        file = wanted.pop()
        if file not in seen and file.is_file():
            seen[file], imported = _read(file.read_text(), *folders.items())
            wanted += imported
    return sorted(seen.values())  # wherever the files lie


@functools.cache  # operators share most of what they import
def _read(text: str, *folders: tuple[str, Path]) -> tuple[str, list[Path]]:
    """The code of a file, and the files that it imports."""
    return code_of(text), list(_imported(text, dict(folders)))


def _imported(text: str, folders: dict[str, Path]) -> Iterator[Path]:
    """The files of the packages in `folders` that a file imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name, folder in folders.items():
                if node.module == name:
                    yield from (folder / f"{alias.name}.py" for alias in node.names)
                elif node.module.startswith(f"{name}."):
                    inner = node.module.removeprefix(f"{name}.").replace(".", "/")
                    yield from (folder / f"{inner}.py", *(folder / inner / f"{alias.name}.py" for alias in node.names))


@functools.cache
def sources(op: str) -> str:
    """The mark of ops/<op>.py, triton_ops/<op>.py and what they import of these two packages."""
    folders = {"wave64.ops": PACKAGE / "ops", "wave64.triton_ops": TRITON_OPS}
    return hash_of(_codes([folder / f"{op}.py" for folder in folders.values()], folders))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.storage_offset()}"
    if hasattr(value, "_fields"):
        return f"({', '.join(map(_described, value))})"
    return repr(value)


def mark(op: str, cases: Sequence[Case | str], arch: str, config: Any = None) -> str:
    """The mark of what the operator's Triton backend launches for the cases, which may be its own by name;
    nothing is compiled. Needs a process without TRITON_INTERPRET."""
    from wave64.testing import tune
    from wave64.testing.compile import compile_case

    told, own = [arch, sources(op)], {case.id: case for case in OPS[op].cases()}
    with tune.tuning_of(OPS[op]).forced(config) if config is not None else contextlib.nullcontext():
        for case in (own[case] if isinstance(case, str) else case for case in cases):
            torch.manual_seed(0)
            for launch in compile_case(OPS[op], case, arch, compiled=False):
                grid = launch.grid(launch.arguments) if callable(launch.grid) else launch.grid
                told += [launch.key, repr(tuple(grid)),
                         *(f"{name} {_described(value)}" for name, value in launch.arguments.items())]
    return hash_of(told)


# ---- the record

@dataclass
class Entry:
    """A result of the record, for the time of a test."""

    key: str
    mark: str
    kept: Any   # what the record says; None where it is not valid
    anew: bool  # it is to be obtained
    told: Any   # what the test goes by; None: to be obtained


@dataclass
class Record:
    """recorded.json, for the tests of a run."""

    held: dict[str, Any] = field(default_factory=lambda: read())
    renewing: bool = False
    all_anew: bool = False  # the tier `long`

    def __post_init__(self) -> None:
        self.comparable = self.held.get("triton") == triton.__version__
        self.current = self.comparable and self.held.get("common") == common()

    def entry(self, key: str, mark: str) -> Entry:
        held = self.held.get("results", {}).get(key)
        kept = held["told"] if held and self.current and held["mark"] == mark else None
        anew = kept is None or self.all_anew or (self._drawn(key) and not self.renewing)
        return Entry(key, mark, kept, anew, None if anew else kept)

    @staticmethod
    def _drawn(key: str) -> bool:
        day = datetime.date.today().toordinal()
        return int(hashlib.sha256(f"{day} {key}".encode()).hexdigest(), 16) % DRAWN_OF == 0

    @contextlib.contextmanager
    def result(self, key: str, mark: str, record_property: Any) -> Iterator[Entry]:
        """The block obtains and judges `told` where it is None: as JSON has it. At its end it is compared with what was
        kept, and kept."""
        entry = self.entry(key, mark)
        yield entry
        assert entry.told is not None
        told = json.loads(json.dumps(entry.told))
        record_property("recorded", (key, mark, told))
        if self.renewing or not self.comparable:
            return
        if entry.kept is not None:
            same = _same(_without_examples(told), _without_examples(entry.kept))
            assert same, f"{key}: obtained anew it is {told}, and recorded.json has {entry.kept}"
        elif self.current:  # test_the_record_is_of_this_emulator says so once for all where it is not
            pytest.fail(f"{key}: passes, and recorded.json has no result of it as it is now; renew with {RENEW}")


def read() -> dict[str, Any]:
    """recorded.json, with the forms of a result's instructions in full: they are numbers there, places in a table."""
    if not RECORD.exists():
        return {}
    held = json.loads(RECORD.read_text())
    table = list(held.pop("forms").items())
    for result in held["results"].values():
        if "forms" in result["told"]:
            result["told"]["forms"] = dict(table[index] for index in result["told"]["forms"])
    return held


def _same(told: Any, kept: Any) -> bool:
    """Numbers may differ by what random operands do to a search: on a CPU of another kind torch rounds some of them
    another way."""
    if isinstance(told, dict) and isinstance(kept, dict):
        return told.keys() == kept.keys() and all(_same(told[key], kept[key]) for key in told)
    if isinstance(told, int | float) and isinstance(kept, int | float):
        return abs(told - kept) <= SLACK * abs(kept)
    return told == kept


def _without_examples(told: Any) -> Any:
    """Of the instructions of a form, another may come first."""
    return told | {"forms": sorted(told["forms"])} if "forms" in told else told


def write(results: list[tuple[str, str, Any]]) -> None:
    """Write these results, one a line. Others that the record held stay, where they are of the same emulator."""
    held = Record()
    kept = held.held["results"] if held.current else {}
    kept |= {key: dict(mark=mark, told=told) for key, mark, told in results}
    examples: dict[str, str] = {}
    for key in sorted(kept):
        for form, code in kept[key]["told"].get("forms", {}).items():
            examples.setdefault(form, code)
    table = {form: examples[form] for form in sorted(examples)}
    indexes = {form: index for index, form in enumerate(table)}
    for result in kept.values():
        if "forms" in result["told"]:
            result["told"] = result["told"] | {"forms": sorted(indexes[form] for form in result["told"]["forms"])}

    def lines(pairs: dict[str, Any]) -> str:
        return ",\n".join(f"  {json.dumps(key)}: {json.dumps(pairs[key], sort_keys=True)}" for key in sorted(pairs))

    RECORD.write_text(f'{{\n "triton": "{triton.__version__}",\n "common": "{common()}",\n'
                      f' "forms": {{\n{lines(table)}\n }},\n "results": {{\n{lines(kept)}\n }}\n}}\n')
