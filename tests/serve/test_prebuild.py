"""Kernels compiled ahead: what a server asks for is among them, it finds them, and it says what does not fit."""

import errno
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from helpers_server import serve

prebuilt = pytest.importorskip("wave64.backends.prebuilt", reason="needs Triton")

ARCH = "gfx942"
FLAGS = ["--max-total-tokens", "512", "--max-running-requests", "2"]
#: Prints what random steps of a scheduler launch, of argv's model, that no step of prebuild's does.
MISSING = """
import random, sys
import wave64
from wave64 import distributed
from wave64.serve.args import ServerArgs
from wave64.serve.engine import prebuild
from wave64.serve.model_path import resolve_model_path

arch, count, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
draw = random.Random(1)

def steps(budget, max_running, context):
    for _ in range(count):
        decodes = draw.choice([0, draw.randint(0, max_running - 1)])
        left, prompts = draw.choice([budget, draw.randint(1, 40)]), []
        for _ in range(draw.randint(0 if decodes else 1, max_running - decodes)):
            tokens = min(context, draw.randint(1, max(left, 1)))
            prompts.append((draw.choice([0, draw.randint(0, context - tokens)]), tokens))
            left -= tokens
        yield prebuild.schedule(decodes, prompts, draw.randint(1, context))

args, drawn = ServerArgs.from_cli(flags), prebuild.Collected()
made = prebuild.collect(args, arch)
config = prebuild.config_of(resolve_model_path(args.model_path), args)
with wave64.emulate(arch, collect=drawn), prebuild.Plan():
    ranks = prebuild.ranks_of(args, 0)
    for group in (ranks.world, ranks.attention, ranks.data):
        distributed.register(group)
    prebuild.run_steps(args, config, ranks, steps)
print(len(made), len(drawn.launches), [key for key in drawn.launches if key not in made])
"""


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900,
                          env={**kept, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.slow
@pytest.mark.parametrize(("count", "flags"), [
    (40, ["demo-deepseek", "--tp", "2", "--max-running-requests", "6", "--max-total-tokens", "256", "--context-length",
          "256"]),
    *[pytest.param(400, flags, marks=pytest.mark.long)
      for flags in (["demo-llama"], ["demo-deepseek-fp8"], ["demo-deepseek", "--tp", "2"])]])
def test_whatever_a_scheduler_makes_launches_only_kernels_that_were_found(count, flags):
    done = python("-c", MISSING, ARCH, str(count), *flags)
    assert done.returncode == 0, done.stderr
    made, drawn, missing = done.stdout.strip().split(maxsplit=2)
    assert missing == "[]"
    assert 3 <= int(drawn) <= int(made)


def kind(n: int) -> tuple[int, bool, bool]:
    """What launchers and Triton look at in a size: its power of two, and whether it is 1 or a multiple of 16."""
    return n.bit_length(), n == 1, n % 16 == 0


@pytest.mark.parametrize("limit", [1, 3, 17, 100, 256, 1000])
def test_a_size_of_each_kind_stands_for_all(limit):
    from wave64.serve.engine import prebuild

    sizes = prebuild.ladder(limit)
    assert {kind(n) for n in sizes} == {kind(n) for n in range(1, limit + 1)}
    assert limit in sizes
    assert all(b <= 1.5 * a or b == 2 for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(("budget", "max_running", "context"), [(256, 40, 1000), (2048, 6, 500), (64, 1, 64)])
def test_steps_of_each_kind_are_gone_through(budget, max_running, context):
    """Decodes of every batch size and up to the longest context; prompts of every size, alone, behind tokens of before,
    several at once, and next to decodes."""
    from wave64.serve.engine import prebuild

    steps = list(prebuild.schedules(budget, max_running, context))
    decodes = [s for s in steps if s.num_decodes == len(s.rows)]
    prompts = [s for s in steps if s.num_decodes == 0]
    mixed = [s for s in steps if 0 < s.num_decodes < len(s.rows)]
    assert all(sum(s.counts) - s.num_decodes <= budget and len(s.rows) <= max_running for s in steps)
    assert {kind(s.num_decodes) for s in decodes} == {kind(n) for n in range(1, max_running + 1)}
    assert max_running in {s.num_decodes for s in decodes}
    lengths = {start + 1 for s in decodes if s.num_decodes == 1 for start in s.starts}
    assert {1 << i for i in range(context.bit_length())} | {context} == lengths
    longest = min(budget, context)
    alone = [s for s in prompts if len(s.rows) == 1]
    for later in (False, True):
        last = longest - 1 if later and longest == context else longest  # before the longest of all none fits
        seen = {kind(s.counts[0]) for s in alone if (s.starts[0] > 0) == later}
        assert seen >= {kind(n) for n in range(1, last + 1)}
    if max_running > 1:
        together = {sum(s.counts) for s in prompts if len(s.rows) == 2}
        assert together >= {1 << i for i in range(1, budget.bit_length()) if 1 << i <= min(budget, 2 * context)}
        assert {kind(s.counts[-1]) for s in mixed if s.num_decodes == 1} == {kind(n) for n in range(1, longest + 1)}
        assert {kind(s.num_decodes) for s in mixed} == {kind(n) for n in range(1, max_running)}


@pytest.mark.slow
def test_a_server_compiles_nothing_and_says_so(tmp_path):
    tar, empty = tmp_path / "kernels.tar.gz", tmp_path / "cache"
    done = python("-m", "wave64", "prebuild", "--arch", ARCH, "--model-path", "demo-llama", *FLAGS, "--output",
                  str(tar), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"a server takes them with --prebuilt-kernels {tar}" in done.stderr
    with tarfile.open(tar) as archive:
        manifest = json.load(archive.extractfile(prebuilt.MANIFEST))
        kinds = Counter(Path(name).suffix for name in archive.getnames())
    assert manifest["arch"] == ARCH
    assert manifest["models"] == {"demo-llama tp 1": kinds[".hsaco"]}
    assert not {".ttir", ".llir", ".amdgcn"} & set(kinds)
    with serve("demo-llama", tmp_path / "log", *FLAGS, "--device", ARCH, "--prebuilt-kernels", str(tar),
               "--skip-server-warmup", TRITON_CACHE_DIR=str(empty), HOME=str(tmp_path)) as server:
        server.http.timeout = 600
        params = {"max_new_tokens": 2, "temperature": 0}
        answer = server.post("/generate", text="Four score and", sampling_params=params)
        assert answer.status_code == 200
        assert server.stop() == 0
    log = server.log.read_text()
    assert f": {kinds['.hsaco']}\n" in log.partition("prebuilt Triton kernels at ")[2], log
    started, = (line for line in log.splitlines() if "Triton kernels of the start: " in line)
    assert int(started.split("start: ")[1].split(" prebuilt")[0]) >= 1
    assert started.endswith(" prebuilt, 0 compiled")
    assert "compiled _" not in log
    assert not list(empty.rglob("*.hsaco"))


def folder_for(path: Path, arch: str = ARCH, **changes) -> Path:
    path.mkdir(parents=True)
    (path / prebuilt.KERNELS).mkdir()
    prebuilt.write_manifest(path, prebuilt.made_for(arch) | changes)
    return path


@pytest.mark.parametrize(("changes", "words"), [
    ({}, None),
    ({"arch": "gfx950"}, "the architecture: made for gfx950, this is gfx942"),
    ({"triton": "3.0.0"}, "Triton: made for 3.0.0, this is "),
    ({"compiler": "0"}, "the build of Triton: made for 0, this is "),
    ({"environment": {"USE_IR_LOC": "ttir"}}, "Triton's variables of the environment: made for {'USE_IR_LOC'"),
    ({"sources": "0"}, "the sources of wave64's kernels: made for 0, this is ")])
def test_kernels_that_do_not_fit_are_told_in_one_line_and_not_used(changes, words, tmp_path, caplog):
    caplog.set_level("INFO", logger="wave64")
    folder = folder_for(tmp_path / "kernels", **changes)
    with prebuilt.reading(str(folder), ARCH) as reader:
        assert (reader.folder is None) == (words is not None)
    line, = caplog.messages
    assert "\n" not in line
    assert (words or "prebuilt Triton kernels at") in line
    assert ("are not used" in line) == (words is not None)


def test_a_group_is_found_wherever_the_folder_lies_and_only_whole(tmp_path):
    """Triton writes the paths of a kernel's files as they were."""
    folder = folder_for(tmp_path / "moved")
    entry = folder / prebuilt.KERNELS / "KEY"
    entry.mkdir()
    for name in ("k.json", "k.hsaco"):
        (entry / name).write_text("{}")
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": {n: f"/gone/{n}" for n in ("k.json", "k.hsaco")}}))
    with prebuilt.reading(str(folder), ARCH) as reader:
        manager = prebuilt.Manager("KEY")
        assert manager.get_group("k.json") == {name: str(entry / name) for name in ("k.json", "k.hsaco")}
        assert reader.prebuilt == {"k": 1}
        (entry / "k.hsaco").unlink()
        assert manager.get_group("k.json") is None
        assert "1 prebuilt, 0 compiled" in reader.summary()


def test_what_is_compiled_while_requests_wait_is_told(tmp_path, monkeypatch, caplog):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(prebuilt, "DEFAULT", tmp_path / "none")
    with prebuilt.reading(None, ARCH) as reader:
        for reader.is_serving in (False, True):
            prebuilt.Manager("KEY").put_group("_a_kernel.json", {})
    told, = caplog.messages
    assert told.startswith("compiled _a_kernel, for which requests waited")
    assert reader.compiled == {"_a_kernel": 2}


def test_a_tar_is_unpacked_once_and_what_is_none_is_refused(tmp_path):
    folder, tar = folder_for(tmp_path / "kernels"), tmp_path / "k.tar.xz"
    prebuilt.pack(folder, tar)
    first = prebuilt.unpacked(tar, tmp_path / "unpacked")
    (first / "kept").touch()
    assert prebuilt.unpacked(tar, tmp_path / "unpacked") == first
    assert (first / "kept").exists()
    tar.write_bytes(tar.read_bytes()[:100])
    for path in (tar, tmp_path / "none.tar", tmp_path):
        with pytest.raises(prebuilt.PrebuiltError, match=str(path)):
            prebuilt.read_manifest(prebuilt.unpacked(path, tmp_path / "unpacked"))
    assert {each.name for each in (tmp_path / "unpacked").iterdir()} == {first.name, prebuilt.LOCK}


#: Prints whether no function of a kernel has a hash when wave64 is imported, and how many have none in `reading`.
KEYS = """
import sys
from triton.runtime.jit import JITFunction
from wave64.backends import import_triton_kernels, prebuilt

import_triton_kernels()
functions = [f for name, module in sys.modules.items() if name.startswith("wave64.triton_ops.")
             for f in vars(module).values() if isinstance(f, JITFunction)]  # a set would hash them
print(sum(f.hash is None for f in functions) == len(functions) > 100)
with prebuilt.reading(None, "gfx942"):
    print(sum(f.hash is None for f in functions))
"""


def test_keys_do_not_depend_on_what_was_launched_before():
    """All functions are hashed at once, in one order: see settle_keys."""
    done = python("-c", KEYS)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_a_machine_without_shared_memory_is_told_so(tmp_path, monkeypatch):
    """As in a container whose /dev/shm is not there: processes cannot share a lock."""
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    with pytest.raises(prebuilt.PrebuiltError, match=r"/dev/shm: expected .*, got Permission denied\. Mount it"):
        prebuilt.compile_all({"a": lambda: None}, tmp_path, jobs=1)


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(tmp_path):
    code = ("import sys; from pathlib import Path; from wave64.backends import prebuilt\n"
            "with prebuilt.locked(Path(sys.argv[1])): print('held', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with prebuilt.locked(tmp_path):
        pass


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_looked_for(tmp_path, capsys):
    from wave64.serve.engine import prebuild

    (tmp_path / "file").touch()
    for output in ("file", "file/x", "file/x/kernels.tar.gz"):
        with pytest.raises(SystemExit) as ended:
            prebuild.main(["--arch", ARCH, "--model-path", "demo-llama", "--output", str(tmp_path / output)])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert f"--output: expected what can be written, got {tmp_path / output}: " in said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_the_command_refuses_in_words():
    done = python("-m", "wave64", "prebuild", "--arch", ARCH, "--model-path", "demo-lama", HOME="/nonexistent")
    assert done.returncode == 1
    assert done.stderr.startswith("wave64 prebuild: error: demo-lama: neither a folder nor a built-in name")
    assert done.stderr.count("\n") == 1
