#!/usr/bin/env python3
"""The checks of the design that a machine can make, over every file of the repository: `python tools/check_house.py`.

Prints a line per finding and exits with their number. Run by pre-commit and by tests/test_house.py. Each check is a
function from a path (relative, with /) and its text to messages; the rule it holds stands in its docstring.
"""

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 500
SOURCES = (".py", ".hip", ".h", ".cpp", ".cmake", ".txt", ".toml", ".yaml", ".md", "")

#: `__init__` files that do more than list: `wave64` binds the backends at import, `backends` is what binds them.
INIT_WITH_CODE = {"pysrc/wave64/__init__.py", "pysrc/wave64/backends/__init__.py"}

#: Where an import of each module (and what lies below it) may stand. Entry points start the server; the hip backend is
#: the only way into the extension; only triton_ops, and what compiles or probes it, knows Triton.
MAY_IMPORT = {
    "wave64.serve": ("serve/", "tests/", "pysrc/wave64/launch_server.py", "pysrc/wave64/bench_one_batch.py",
                     "pysrc/wave64/__init__.py"),
    "wave64.serve.http": ("serve/http/", "tests/", "pysrc/wave64/launch_server.py", "pysrc/wave64/__init__.py"),
    "wave64.serve.engine": ("serve/engine/", "pysrc/wave64/bench_one_batch.py", "tests/"),
    "wave64.serve.model": ("serve/engine/", "serve/model/", "tests/"),
    "wave64.distributed": ("pysrc/wave64/distributed/", "pysrc/wave64/ops/", "pysrc/wave64/backends/", "serve/engine/",
                           "serve/model/", "tests/"),
    "wave64.triton_ops.hopper": ("triton_ops/hopper/", "pysrc/wave64/backends/__init__.py", "tests/"),
    "wave64._hip": ("pysrc/wave64/backends/hip.py", "tests/"),
    "triton": ("triton_ops/", "pysrc/wave64/backends/__init__.py", "pysrc/wave64/backends/prebuilt.py",
               "pysrc/wave64/testing/", "tests/"),
    "wave64.triton_ops": ("triton_ops/", "pysrc/wave64/backends/__init__.py", "pysrc/wave64/backends/prebuilt.py",
                           "pysrc/wave64/testing/", "tests/"),
}
#: What must not be imported below a folder, and why. Imports for type checkers alone count, too.
NEVER_IMPORT = {
    "pysrc/wave64/ops/": (("wave64.backends", "wave64.testing"), "an operator's contract does not know {}"),
    "pysrc/wave64/distributed/": (("wave64.ops", "wave64.op", "wave64.backends", "wave64.serve", "wave64.triton_ops"),
                                  "groups and collectives are below the operators: they do not know {}"),
    "serve/http/": (("torch", "triton", "wave64.ops"), "the api process imports no {}"),
    "serve/args.py": (("torch", "triton", "wave64.ops"), "the api process imports no {}"),
    "serve/messages.py": (("torch", "triton", "wave64.ops"), "the api process imports no {}"),
}

#: What one file alone does, as CONTRIBUTING and the files' headers promise: (where to look, pattern) -> the file.
ONE_FILE = {
    ("hip/", r"pybind11/"): "hip/src/bindings.cpp",
    ("hip/", r"\bdl(open|sym)\("): "hip/src/runtime.cpp",
    ("pysrc/wave64/", r"\btorch\.library\."): "pysrc/wave64/op.py",
    ("serve/", r"\b(gpu|cuda)\.graph\("): "serve/engine/graphs.py",
    ("serve/model/", r"\b(all_gather|all_reduce|reduce_scatter)\b"): "serve/model/parallel.py",
}

MAX_KERNEL_PARAMETERS, MAX_POSITIONAL = 25, 8
#: Functions with more, and how many they have: the list may only shrink, and so may the numbers.
MANY_PARAMETERS = {
    "triton_ops/attention.py:attend": 30,
    "triton_ops/concat_and_cache_mla_rope_fused.py:_concat_and_cache_mla_rope_fused_kernel": 26,
    "triton_ops/concat_and_cache_mla_rope_fused.py:supports": 9,
    "triton_ops/fp8_block_scaled_mm.py:_fp8_block_scaled_mm_kernel": 27,
    "triton_ops/fused_moe.py:first_product": 11,
    "triton_ops/fused_moe.py:second_product": 10,
    "triton_ops/fused_moe.py:second_product_of_few": 9,
    "triton_ops/grouped_topk.py:unsupported": 9,
    "triton_ops/hopper/fused_moe.py:product": 12,
    "triton_ops/hopper/fused_moe.py:unsupported": 12,
    "triton_ops/hopper/prefill_attention.py:unsupported": 14,
    "triton_ops/mla_decode_rope.py:call_of": 13,
    "triton_ops/moe_gemm.py:_moe_gate_up_kernel": 40,
    "triton_ops/moe_gemm.py:_moe_down_kernel": 34,
    "triton_ops/moe_gemm.py:_moe_down_few_kernel": 26,
    "triton_ops/paged_attention.py:_paged_attention_kernel": 43,
    "triton_ops/paged_attention.py:launch": 13,
    "triton_ops/prefill_attention.py:_prefill_attention_kernel": 40,
    "triton_ops/prefill_attention.py:launch": 15,
    "triton_ops/varlen_attention.py:_varlen_attention_kernel": 28,
    "triton_ops/varlen_attention.py:launch": 10,
}

#: The field's words, in one sense: pattern -> what to say. Of prose and names alike.
WORDS = {
    r"\b[Nn]obody\b": "no one, none, or the passive voice",
    r"\blest\b": "so that ... not",
    r"\b[Ll]ikewise\b": "as above, the same",
    r"\b[Bb]eside\b": "next to, besides",
    r"(?i)(neighb|flav|behavi|col|hon|fav)ours?(?![a-z]*(ce|g))|\b(cent|met)re\b|\b(catalogue|artefact|judgement|whilst)\b":
        "the American spelling",
    r"(?i)(quanti|normali|penali|initiali|speciali|synchroni|optimi|recogni|generali|seriali|tokeni|vectori|randomi)"
    r"s(e[drs]?|ing|ations?|ers)(?![a-z])": "the American spelling, -ize",
}

#: Where names and prose have been read by the table of the design's section 7, and keep to it.
READ = ("triton_ops/", "pysrc/wave64/ops/", "pysrc/wave64/backends/", "tests/ops/")
#: Where prose alone has been read so.
READ_PROSE = (*READ, "serve/", "tests/", "pysrc/wave64/", "tools/")
#: Parts of names -> what to say. `at_most`, `in_place` and the like are other words.
NAME_WORDS = {
    "turn": "rotate", "turned": "rotated", "share": "split, partition or fraction", "deal": "assign",
    "dealt": "assigned", "room": "capacity", "peak": "row_max or max", "peaks": "maxima", "mixed": "acc or out",
    "least": "min", "most": "max", "place": "offset, pc, view or device_of", "places": "offsets",
    "apart": "stride or gap", "kin": "fallback", "facts": "key",
}
#: Where names have been read, too, with words that have another sense there: turns of a chat, pages that are shared,
#: peaks that AMD publishes, mixed formats.
READ_WITH_OTHER_SENSES = ("serve/", "tests/", "tools/", "pysrc/wave64/")
OTHER_SENSES = {"turn", "share", "peak", "peaks", "mixed", "most"}
COMPOUNDS = re.compile(r"at_(most|least)|in_(place|turn)|(are|keep|stay|taken|tells_\w+)_apart")
#: The same in comments and strings.
PROSE = {
    r"\b[Tt]urn(s|ed|ing)? (the |its |their |more )?(heads?|keys?|quer\w+|pairs?|rows?)\b": "rotate, apply RoPE",
    r"\b([Dd]ealt?|[Dd]eals|[Dd]ealing) (to|out|among)\b": "assign, split",
    r"\b[Ss]hares? (of|out)\b|\b[Ss]har(e|ed|ing) (the|its|their) \w+ out\b": "split, partition, fraction",
    r"\broom (for|of|to|besides)\b": "capacity, space",
    r"(?<![Aa]t )\bleast (number|power|step|value|relative|x)": "smallest, minimum",
    r"\bfar apart\b|\brows apart\b": "row stride",
    r"\b(is|are|be) told\b|\bthere is none\b": "what the argument is; no ...",
    r"\bunder way\b": "in flight",
}

ENVIRONMENT_READERS = ("pysrc/wave64/backends/__init__.py", "pysrc/wave64/backends/hip_library.py",
                       "pysrc/wave64/tools/doctor/machine.py",
                       "serve/engine/rank.py", "serve/node.py", "tests/", "setup_rocm.py")


parsed = functools.lru_cache(maxsize=1)(ast.parse)  # several checks in turn look at one file


def length(path: str, text: str) -> Iterator[str]:
    """No file over 500 lines."""
    lines = text.count("\n")
    if lines > MAX_LINES:
        yield f"{lines} lines; at most {MAX_LINES}"


def init_lists(path: str, text: str) -> Iterator[str]:
    """An `__init__` has a docstring, imports and assignments of literals or names, nothing else."""
    if not path.endswith("__init__.py") or path in INIT_WITH_CODE:
        return
    for node in parsed(text).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names_only = isinstance(node, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(node.value))
        if not (docstring or names_only or isinstance(node, ast.Import | ast.ImportFrom)):
            yield f"line {node.lineno}: an __init__ lists and does nothing else"


def imported(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parsed(text)):
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
        for folder, (modules, words) in NEVER_IMPORT.items():
            if path.startswith(folder) and (module := next((m for m in modules if below(name, m)), None)):
                yield f"line {line}: {words.format(module)}"


def one_file(path: str, text: str) -> Iterator[str]:
    """What CONTRIBUTING says that one file alone does, no other does."""
    for (folder, pattern), owner in ONE_FILE.items():
        if path.startswith(folder) and path != owner and path.endswith((".py", ".h", ".hip", ".cpp")):
            for i, line in enumerate(text.splitlines(), 1):
                if re.search(pattern, line):
                    yield f"line {i}: only {owner} does this"


def few_parameters(path: str, text: str) -> Iterator[str]:
    """A kernel has at most 25 parameters, a function in triton_ops or serve at most 8 that may be given by position,
    unless it has the signature of an operator. Beyond that: a struct, or a second file."""
    if not path.startswith(("triton_ops/", "serve/")) or not path.endswith(".py"):
        return
    for function in ast.walk(parsed(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = " ".join(map(ast.unparse, function.decorator_list))
        if ".backend(" in decorators:
            continue
        arguments, is_kernel = function.args, "jit" in decorators
        count = len(arguments.posonlyargs) + len(arguments.args) - (arguments.args[:1] != [] and
                                                                    arguments.args[0].arg in ("self", "cls"))
        limit = MAX_KERNEL_PARAMETERS if is_kernel else MAX_POSITIONAL
        excused = MANY_PARAMETERS.get(f"{path}:{function.name}", 0)
        if count > max(limit, excused):
            yield f"line {function.lineno}: {function.name} has {count} parameters; at most {limit}"
        elif excused and count < excused:
            yield f"line {function.lineno}: {function.name} has {count} parameters now: correct MANY_PARAMETERS"


def hip_is_free(path: str, text: str) -> Iterator[str]:
    """hip/ includes neither torch nor a GPU runtime; operators there do not allocate, synchronize or read the
    environment."""
    if not path.startswith("hip/"):
        return
    for i, line in enumerate(text.splitlines(), 1):
        if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|hip/|hsa|roc|cuda\.h|cuda_runtime)', line):
            yield f"line {i}: hip/ includes neither torch nor a GPU runtime"
        if path.startswith("hip/ops/") and re.search(r"\bgetenv|[mM]alloc|Synchronize|\bnew\b", line.split("//")[0]):
            yield f"line {i}: an operator does not allocate, synchronize or read the environment"


def vocabulary(path: str, text: str) -> Iterator[str]:
    """The field's words, in one sense, in American spelling; kernels say wave and lds."""
    words = dict(WORDS)
    if path.startswith(("hip/", "triton_ops/")):
        words[r"(?i)\b(warps?|smem)\b"] = "wave, or lds"
    if path.startswith("tests/"):
        del words[r"\b[Nn]obody\b"]  # names of those who are not there
    words = {pattern: better for pattern, better in words.items() if re.search(pattern, text)}
    for i, line in enumerate(text.splitlines() if words else (), 1):
        for pattern, better in words.items():
            if word := re.search(pattern, line):
                yield f"line {i}: {word[0]}: say {better}"


def names_by_the_table(path: str, text: str) -> Iterator[str]:
    """Names in the folders that were read by the design's table say the field's words, and so does prose."""
    if not path.endswith(".py") or path == "tests/test_house.py":
        return
    words = NAME_WORDS if path.startswith(READ) else {}
    if not words and path.startswith(READ_WITH_OTHER_SENSES):
        words = {word: better for word, better in NAME_WORDS.items() if word not in OTHER_SENSES}
    words = {word: better for word, better in words.items() if word in text.lower()}
    prose = {pattern: better for pattern, better in PROSE.items()
             if path.startswith(READ_PROSE) and re.search(pattern, text)}
    if not words and not prose:
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            for part in COMPOUNDS.sub("", token.string.lower()).split("_"):
                if part in words:
                    yield f"line {token.start[0]}: {token.string}: say {words[part]}"
        elif token.type in (tokenize.COMMENT, tokenize.STRING):
            for pattern, better in prose.items():
                if word := re.search(pattern, token.string):
                    yield f"line {token.start[0]}: {word[0]}: say {better}"


def one_return(path: str, text: str) -> Iterator[str]:
    """A function that Triton compiles returns a value in one place. What follows a return under a compile-time
    condition is compiled all the same, and must give the same types, which only some configurations show."""
    if not path.startswith("triton_ops/") or not path.endswith(".py"):
        return
    for function in ast.walk(parsed(text)):
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


CHECKS = (length, init_lists, import_direction, one_file, few_parameters, hip_is_free, one_return, reads_environment,
          no_machine_paths)
CHECKS_ELSEWHERE = (anchored_todo, vocabulary, names_by_the_table)  # but in this file, which spells the words


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
