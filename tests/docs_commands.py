"""The commands that documents show, and a check of each by the parser that would read it: nothing is run."""

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [path for path in DOCUMENTS if path.exists()] + sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
#: Programs and modules of others: what follows them is theirs.
OTHERS = {"pip", "ninja", "cmake", "git", "docker", "torchrun", "curl", "pytest", "ziglang", "http.server",
          "sglang_router.launch_router"}
OWN = re.compile(r"^(\w+=\S+ )*(python3? (-m wave64|setup_rocm\.py|docs/|tests/|tools/)|wave64 )")


class Parsed(Exception):
    """The parser took the command."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block, without its indentation."""
    for indent, language, content in FENCE.findall(text):
        yield language, re.sub(f"^{indent}", "", content, flags=re.MULTILINE)


def commands(text: str) -> list[str]:
    """Lines of shell blocks, those that end in a backslash joined with the next, and inline code that is a command of
    ours. A block without a language may have output between its commands; inline a verb alone is a name."""
    found = []
    for language, content in blocks(text):
        if language in ("bash", ""):
            lines = content.replace("\\\n", " ").splitlines()
            found += [line for line in lines if (language or OWN.match(line)) and line.strip() and line[0] != "#"]
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    inline = [" ".join(code.split()) for code in inline]
    inline = [f"{line} --help" if re.fullmatch(r"python -m wave64 [\w-]+", line) else line for line in inline]  # names
    return found + [line for line in inline if OWN.match(line) and "..." not in line]


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises, or ends the process with the parser's words, if a command of this repository would not be taken."""
    if definition := re.match(r"\w+\(\) \{ (.*); \}$", line):
        return check(definition[1], monkeypatch)
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    program, *rest = words
    if program in ("drun", "drun_rdma"):
        return _in_container(rest, monkeypatch)
    if program == "wave64":
        return _module("wave64", rest, monkeypatch)
    if program == "torchrun":
        return _module(rest[rest.index("-m") + 1], rest[rest.index("-m") + 2:], monkeypatch)
    if program == "docker" and rest[0] == "build":
        return _image(rest)
    if program == "curl":
        (path,) = re.findall(r"localhost:30000(/[\w/]+)", line)
        assert f'"{path}"' in (ROOT / "serve/http/app.py").read_text(), f"no endpoint {path}"
        return None
    if program.rpartition("/")[2] in ("python", "python3"):
        if rest[0] == "-m":
            return _module(rest[1], rest[2:], monkeypatch)
        assert (ROOT / rest[0]).is_file() or rest[0] == "bench_peers.py", f"no file {rest[0]}"
        return _front_door(rest[1:], monkeypatch) if rest[0] == "setup_rocm.py" else None
    assert program in OTHERS or program.startswith(".venv/bin/"), f"an unknown program: {program}"
    return None


def _module(name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m name argv`, up to the point where all flags are read."""
    if name in OTHERS:
        return
    from wave64.__main__ import MODULES, main
    from wave64.serve.args import ServerArgs

    run: Any = main
    if name == "wave64" and argv[:1] and argv[0] in MODULES:
        name, argv = MODULES[argv[0]][0], argv[1:]
    if name == "wave64.launch_server":
        ServerArgs.from_cli(argv)
        return
    if name != "wave64":
        module: Any = importlib.import_module(name)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{name}.run")
        run = module.main
    parse, from_cli = argparse.ArgumentParser.parse_args, ServerArgs.from_cli.__func__

    def parse_and_stop(parser, args=None, namespace=None):
        raise Parsed(parse(parser, args, namespace))

    def from_cli_and_stop(cls, args=None):
        raise Parsed(from_cli(cls, args))

    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [name, *argv])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(ServerArgs, "from_cli", classmethod(from_cli_and_stop))
        with pytest.raises(Parsed):
            run()


def _front_door(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = importlib.util.spec_from_file_location("front_door", ROOT / "setup_rocm.py")
    front_door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front_door)
    for name in [name for name in vars(front_door) if name.startswith("do_")]:
        setattr(front_door, name, lambda args: None)
    monkeypatch.setattr("sys.argv", ["setup_rocm.py", *argv])
    front_door.main()


def _image(argv: list[str]) -> None:
    file = ROOT / argv[argv.index("-f") + 1]
    arguments = set(re.findall(r"^ARG (\w+)", file.read_text(), re.MULTILINE))
    given = {argv[i + 1].partition("=")[0] for i, word in enumerate(argv) if word == "--build-arg"}
    assert given <= arguments, f"{file.name} has no argument {given - arguments}"
    assert argv[-1] == "."


def _in_container(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the image's name goes to `python -m wave64`, or to the entry point that is named."""
    if argv[-1] == "$@":
        return
    image = next(i for i, word in enumerate(argv) if word.startswith("wave64:"))
    if "--entrypoint" in argv[:image]:
        check(shlex.join([argv[argv.index("--entrypoint") + 1], *argv[image + 1:]]), monkeypatch)
    else:
        _module("wave64", argv[image + 1:], monkeypatch)
