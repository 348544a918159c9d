#!/usr/bin/env python3
"""How large the house is: `python tools/house_figures.py` prints files, lines, the longest function, most parameters,
and imports that run back, of what git tracks.

Lines are counted as they are, comments and empty ones among them. Tests are counted apart: tests/ alone, not testing/,
which ships.
"""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import check_house

LANGUAGES = {"Python": (".py",), "C++ and HIP": (".hip", ".h", ".cpp", ".c"), "documents": (".md",)}
ROOTS = {"pysrc/": "", "triton_ops/": "wave64.", "serve/": "wave64."}  # folder -> what its modules' names begin with


def sources(root: Path) -> dict[str, str]:
    """path -> text of the tracked files that are text and no link."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    found = {}
    for path in filter(None, listed.split("\0")):
        if (root / path).is_file() and not (root / path).is_symlink():
            try:
                found[path] = (root / path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                found[path] = ""
    return found


def functions(files: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """(path:name, lines, parameters) of every Python function."""
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                yield f"{path}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, count


def module_of(path: str) -> str | None:
    for folder, prefix in ROOTS.items():
        if path.startswith(folder) and path.endswith(".py"):
            inside = path.removeprefix("pysrc/") if folder == "pysrc/" else path
            return prefix + inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return None


def imports(files: dict[str, str]) -> dict[str, set[str]]:
    """module -> modules of the package that it imports when it is imported: at the top of the file."""
    names = {module: path for path in files if (module := module_of(path))}
    found = {}
    for module, path in names.items():
        top = "\n".join(ast.unparse(node) for node in ast.parse(files[path]).body
                        if isinstance(node, ast.Import | ast.ImportFrom))
        asked = [name for _, name in check_house.imported(top)]
        found[module] = {name if name in names else name.rpartition(".")[0] for name in asked} & names.keys() - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Sets of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), [start]
        while waiting:
            for after in graph[waiting.pop()] - seen:
                seen.add(after)
                waiting.append(after)
        reached[start] = seen
    return sorted({tuple(sorted({one, *(two for two in reached[one] if one in reached[two])}))
                   for one in graph if one in reached[one]})


def report(root: Path) -> list[str]:
    files = sources(root)
    shipped = {path: text for path, text in files.items() if not path.startswith("tests/")}
    lines = [f"files: {len(files)}, {len(files) - len(shipped)} of them in tests/"]
    for language, suffixes in LANGUAGES.items():
        outside, inside = (sum(text.count("\n") for path, text in files.items()
                               if path.endswith(suffixes) and path.startswith("tests/") == tests)
                           for tests in (False, True))
        lines.append(f"lines of {language}: {outside} outside tests/, {inside} in it")
    longest = max((text.count("\n"), path) for path, text in files.items()
                  if Path(path).suffix in check_house.SOURCES and Path(path).suffix)
    lines.append(f"longest file: {longest[0]} lines, {longest[1]}")
    found = list(functions(shipped))
    kernels = {name for name, _, _ in found if name.endswith("_kernel")}
    for what, of in (("function", {name for name, _, _ in found} - kernels), ("kernel", kernels)):
        chosen = [each for each in found if each[0] in of]
        if chosen:
            name, length, _ = max(chosen, key=lambda each: each[1])
            widest, _, count = max(chosen, key=lambda each: each[2])
            lines.append(f"longest {what}: {length} lines, {name}; most parameters: {count}, {widest}")
    back = [f"{path}: {message}" for path, text in files.items() if path.endswith(".py")
            for message in check_house.import_direction(path, text)]
    lines.append(f"imports against the arrows of the design: {len(back)}")
    rings = circles(imports(shipped))
    lines.append(f"circles of imports: {len(rings)}" + "".join(f"\n  {', '.join(ring)}" for ring in rings))
    return lines


if __name__ == "__main__":
    print("\n".join(report(Path(__file__).resolve().parent.parent)))
