#!/usr/bin/env python3
"""The checks of the design that a machine can make, over every file of the repository: `python tools/check_house.py`.

Prints a line per finding and exits with their number. Run by pre-commit and by tests/test_house.py. Each check is a
function from a path (relative, with /) and its text to messages; the rule it holds stands in its docstring.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 500
SOURCES = (".py", ".hip", ".h", ".cpp", ".cmake", ".txt", ".toml", ".yaml", ".md", "")

#: `__init__` files that do more than list: `wave64` binds the backends at import, `backends` is what binds them.
INIT_WITH_CODE = {"pysrc/wave64/__init__.py", "pysrc/wave64/backends/__init__.py"}

#: Where an import of each module (and what lies below it) may stand. Entry points start the server; the hip backend is
#: the only way into the extension; only triton_ops, and what compiles or probes it, knows Triton.
MAY_IMPORT = {
    "wave64.serve": ("serve/", "tests/", "pysrc/wave64/launch_server.py", "pysrc/wave64/bench_serving.py"),
    "wave64._hip": ("pysrc/wave64/backends/hip.py", "tests/"),
    "triton": ("triton_ops/", "pysrc/wave64/backends/__init__.py", "pysrc/wave64/testing/", "tests/"),
    "wave64.triton_ops": ("triton_ops/", "pysrc/wave64/backends/__init__.py", "pysrc/wave64/testing/", "tests/"),
}
#: What operators (contract and reference) must not import: what implements them.
OPS_NEVER_IMPORT = ("wave64.backends", "wave64.testing")

ENVIRONMENT_READERS = ("pysrc/wave64/backends/__init__.py", "pysrc/wave64/backends/hip_library.py",
                       "serve/engine/engine.py", "tests/", "setup_rocm.py")


def length(path: str, text: str) -> Iterator[str]:
    """No file over 500 lines."""
    lines = text.count("\n")
    if lines > MAX_LINES:
        yield f"{lines} lines; at most {MAX_LINES}"


def init_lists(path: str, text: str) -> Iterator[str]:
    """An `__init__` has a docstring, imports and assignments of literals or names, nothing else."""
    if not path.endswith("__init__.py") or path in INIT_WITH_CODE:
        return
    for node in ast.parse(text).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names_only = isinstance(node, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(node.value))
        if not (docstring or names_only or isinstance(node, ast.Import | ast.ImportFrom)):
            yield f"line {node.lineno}: an __init__ lists and does nothing else"


def imported(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def below(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def import_direction(path: str, text: str) -> Iterator[str]:
    """Imports point one way: serve -> ops -> triton_ops and backends -> _hip."""
    if not path.endswith(".py"):
        return
    for line, name in imported(text):
        for module, places in MAY_IMPORT.items():
            if below(name, module) and not path.startswith(places):
                yield f"line {line}: {module} may be imported by {', '.join(places)} only"
        if path.startswith("pysrc/wave64/ops/") and any(below(name, module) for module in OPS_NEVER_IMPORT):
            yield f"line {line}: an operator's contract does not know {name}"


def hip_is_free(path: str, text: str) -> Iterator[str]:
    """hip/ includes neither torch nor a GPU runtime; operators there do not allocate, synchronise or read the
    environment."""
    if not path.startswith("hip/"):
        return
    for i, line in enumerate(text.splitlines(), 1):
        if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|hip/|hsa|roc|cuda\.h|cuda_runtime)', line):
            yield f"line {i}: hip/ includes neither torch nor a GPU runtime"
        if path.startswith("hip/ops/") and re.search(r"\bgetenv|[mM]alloc|Synchronize|\bnew\b", line.split("//")[0]):
            yield f"line {i}: an operator does not allocate, synchronise or read the environment"


def vocabulary(path: str, text: str) -> Iterator[str]:
    """Kernels say wave and lds."""
    if path.startswith(("hip/", "triton_ops/")):
        for i, line in enumerate(text.splitlines(), 1):
            if word := re.search(r"\b(warps?|smem)\b", line, re.IGNORECASE):
                yield f"line {i}: {word[0]}: say wave, or lds"


def one_return(path: str, text: str) -> Iterator[str]:
    """A function that Triton compiles returns a value in one place. What follows a return under a compile-time
    condition is compiled all the same, and must give the same types, which only some configurations show."""
    if not path.startswith("triton_ops/") or not path.endswith(".py"):
        return
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
            returns = sum(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
            if returns > 1:
                yield f"line {function.lineno}: {function.name} returns in {returns} places; assign, and return once"


def reads_environment(path: str, text: str) -> Iterator[str]:
    """The environment is read in one place."""
    if path.endswith(".py") and not path.startswith((*ENVIRONMENT_READERS, "tools/")):
        for i, line in enumerate(text.splitlines(), 1):
            if re.search(r"\bos\.(environ|getenv)", line):
                yield f"line {i}: only {', '.join(ENVIRONMENT_READERS)} read the environment"


def anchored_todo(path: str, text: str) -> Iterator[str]:
    """What is left to do has an issue: the word, then its number, as in `(#12)`."""
    if path.endswith(".md"):  # prose may speak of the rule
        return
    for i, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))", line):
            yield f"line {i}: an open task without the number of its issue"


def no_machine_paths(path: str, text: str) -> Iterator[str]:
    """No file knows where it lies on someone's machine, nor which registry someone installs from."""
    for i, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"(?<![\w.}/<-])/(home|root|work|tmp|Users|mnt)/\w+", line):
            yield f"line {i}: {found[0]}: an absolute path of one machine"
        if re.search(r"pypi\.(org|python)|pythonhosted\.(org)|download\.(pytorch)|repo\.(radeon)", line):
            yield f"line {i}: the host name of a package registry"


CHECKS = (length, init_lists, import_direction, hip_is_free, vocabulary, one_return, reads_environment,
          no_machine_paths)
CHECKS_ELSEWHERE = (anchored_todo,)  # of every file but this one, which has to spell the words


def findings(root: Path) -> list[str]:
    """`path: message` for everything under `root` that git tracks or would, and that breaks a rule."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True, check=True)
    found = []
    for path in sorted(filter(None, listed.stdout.split("\0"))):
        file = root / path
        if not file.is_file() or file.is_symlink() or file.suffix not in SOURCES:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        checks = CHECKS if path == "tools/check_house.py" else CHECKS + CHECKS_ELSEWHERE
        found += [f"{path}: {message}" for check in checks for message in check(path, text)]
    return found


def main() -> None:
    found = findings(Path(__file__).resolve().parent.parent)
    print("\n".join(found) or "the house is in order")
    sys.exit(min(len(found), 100))


if __name__ == "__main__":
    main()
