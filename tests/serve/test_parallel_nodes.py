"""One server over two hosts, which network namespaces stand for; hosts that differ are refused, naming both."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from helpers_server import READY_S, eventually, free_port

from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine import follower, team
from wave64.serve.engine.control import Beat, Channel, Refused, Welcome
from wave64.serve.engine.introduction import hello, unlike
from wave64.serve.node import Torchrun, rank_infos

ASK = """
import json, sys, urllib.request
body = {"prompt": "Four score and seven years ago", "max_tokens": 12, "temperature": 0}
asked = urllib.request.Request("http://127.0.0.1:30000/v1/completions", json.dumps(body).encode(),
                               {"content-type": "application/json"})
print(urllib.request.urlopen(asked, timeout=60).read().decode())
"""


@pytest.fixture
def hosts():
    """Two namespaces, [name, name], of which the first has the address 10.99.0.1 and the second 10.99.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces cannot be made here: there is no command ip")
    names = [f"w64-{os.getpid()}-{i}" for i in range(2)]
    links = [f"w64{os.getpid() % 100000}{end}" for end in "ab"]
    commands = [f"netns add {name}" for name in names] + [f"link add {links[0]} type veth peer name {links[1]}"]
    for i, (name, link) in enumerate(zip(names, links, strict=True)):
        commands += [f"link set {link} netns {name}", f"-n {name} addr add 10.99.0.{i + 1}/24 dev {link}",
                     f"-n {name} link set {link} up", f"-n {name} link set lo up"]  # fmt: skip
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: ip {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host: str, log: Path, module: str, *flags: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as sink:
        return subprocess.Popen(["ip", "netns", "exec", host, sys.executable, "-m", module, *flags], stdout=sink,
                                stderr=subprocess.STDOUT, env=env, start_new_session=True)  # fmt: skip


@pytest.mark.parametrize("by", ["flags", pytest.param("torchrun", marks=pytest.mark.long)])
def test_two_hosts_serve_one_model(hosts, tmp_path, by):
    logs, started = [tmp_path / "0", tmp_path / "1"], []
    port = free_port()
    for i in (1, 0):  # the second waits for the first
        if by == "flags":
            flags = ["wave64.launch_server", "--tp", "2", "--nnodes", "2", "--node-rank", str(i), "--dist-init-addr",
                     f"10.99.0.1:{port}"]  # fmt: skip
        else:
            flags = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1",
                     "--master-addr", "10.99.0.1", "--master-port", str(port), "-m", "wave64.launch_server"]
        started.append(start(hosts[i], logs[i], *flags, "--model-path", "demo-llama", "--device", "cpu"))
    try:
        assert eventually(lambda: "ready to roll" in logs[0].read_text() or any(p.poll() is not None for p in started),
                          120)  # fmt: skip
        answer = subprocess.run(["ip", "netns", "exec", hosts[0], sys.executable, "-c", ASK], capture_output=True,
                                text=True, timeout=READY_S)  # fmt: skip
        assert answer.returncode == 0, logs[0].read_text() + logs[1].read_text() + answer.stderr
        text = json.loads(answer.stdout)["choices"][0]["text"]
        assert " our fathers brought forth on this continent".startswith(text[:20])
        started[1].terminate()
        assert started[1].wait(READY_S) == (0 if by == "flags" else 1), "torchrun itself ends with 1 at a signal"
        assert eventually(lambda: started[0].poll() is not None)
        assert by != "flags" or started[0].returncode == 0
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_hosts_that_differ_are_refused_naming_both(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9)
    args = ServerArgs(tp_size=4, nnodes=2, dist_init_addr="a:1")
    ours = hello("steps", 0, args, tmp_path)
    on_b = replace(args, node_rank=1, dist_init_addr="alias:1", port=7, log_level="debug", base_gpu_id=4)
    theirs = msgspec.structs.replace(hello("steps", 2, on_b, tmp_path), host="b")
    assert unlike(ours, theirs) is None
    assert unlike(ours, msgspec.convert(msgspec.to_builtins(theirs), type(theirs))) is None
    both = f"rank 2 on host b has {{}}, rank 0 on host {ours.host} has {{}}; they have to be the same"
    other = msgspec.structs.replace(theirs, version="9.9")
    assert unlike(ours, other) == both.format("wave64 9.9", ours.version)
    other = msgspec.structs.replace(theirs, flags=theirs.flags | {"page_size": 8})
    assert unlike(ours, other) == both.format("--page-size 8", "16")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    changed = msgspec.structs.replace(hello("steps", 2, on_b, tmp_path), host="b")
    assert unlike(ours, changed) == both.format(f"a checkpoint with the fingerprint {changed.checkpoint}",
                                                ours.checkpoint)  # fmt: skip


def test_what_torchrun_says(monkeypatch):
    assert Torchrun.from_environment() is None
    for name, value in dict(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT=1, RANK=5, LOCAL_RANK=1,
                            WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, GROUP_RANK=1, MASTER_ADDR="h", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    torchrun = Torchrun.from_environment()
    assert torchrun is not None
    args = ServerArgs.from_cli(torchrun.flags())
    torchrun.check(args)
    assert (args.tp_size, args.nnodes, args.node_rank, args.dist_init_addr) == (8, 2, 1, "h:29500")
    assert torchrun.info() == {"rank": 5, "local_rank": 1, "torchrun": "none/1"}
    assert rank_infos(args) == [{"rank": 4 + i, "local_rank": i} for i in range(4)], "of --node-rank 1"
    with pytest.raises(ArgsError, match="--tp-size: expected 8, the processes or hosts of torchrun, or no such flag"):
        torchrun.check(ServerArgs(tp_size=2))


def test_the_barrier_says_which_ranks_are_missing(tmp_path, monkeypatch, caplog):
    """A stranger who connects, with or without a word, is none of them."""
    (tmp_path / "config.json").write_text("{}")
    for name, seconds in (("JOIN_S", 1000.0), ("NOTE_S", 0.0), ("HELLO_S", 0.2)):
        monkeypatch.setattr(team, name, seconds)
    port = free_port()
    args = ServerArgs(tp_size=2, nnodes=2, dist_init_addr=f"127.0.0.1:{port}")

    def strangers() -> None:
        try:
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n"):
                with Channel.connect("127.0.0.1", port, 60.0)._socket as stranger, contextlib.suppress(ConnectionError):
                    stranger.settimeout(60)
                    stranger.sendall(said)
                    assert stranger.recv(1) == b"", "it is sent away"
        finally:
            monkeypatch.setattr(team, "JOIN_S", 0.0)

    thread, listen = threading.Thread(target=strangers), team._listen
    monkeypatch.setattr(team, "_listen", lambda *where: [listen(*where), thread.ident or thread.start()][0])
    with caplog.at_level(logging.INFO), pytest.raises(team.RankLost) as lost:
        team.Team(args, tmp_path, print)
    thread.join()
    assert str(lost.value) == "waited 0 s in vain for rank 1 (host 1 of --nnodes)"
    assert "waiting for rank 1 (host 1 of --nnodes)" in caplog.text
    with pytest.raises(ArgsError, match="--dist-init-addr: cannot listen on 203.0.113.9:1: "):
        team.Team(replace(args, dist_init_addr="203.0.113.9:1"), tmp_path, print)


@pytest.fixture
def rank_0(tmp_path):
    """Rank 0 of two that nothing has started yet, and what a rank that introduces itself hears."""
    (tmp_path / "config.json").write_text("{}")
    args = ServerArgs(tp_size=2, nnodes=2, dist_init_addr="a:1")
    made = object.__new__(team.Team)
    made._me, made.members = hello("", 0, args, tmp_path), {1: team.Member(1)}
    made.address, made.store = "a", cast(Any, SimpleNamespace(port=2))
    opened: list[Channel] = []

    def introduced(rank: int, channel: str = "steps", **flags) -> object:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = Channel.connect(*listener.getsockname(), timeout_s=5.0)
            ours = Channel(listener.accept()[0])
        opened.extend((theirs, ours))
        theirs.send(hello(channel, rank, replace(args, **flags), tmp_path))
        end = "rank 0 ends"
        with contextlib.suppress(ArgsError):
            end = made._admit(ours)
        return end, theirs.receive(5.0)

    yield introduced
    for each in opened:
        each.close()


def test_a_host_with_more_ranks_than_rank_0_expects_is_refused_not_left_waiting(rank_0):
    name = socket.gethostname()
    assert rank_0(3, tp_size=4) == ("rank 0 ends", Refused(
        f"rank 3 on host {name} has --tp-size 4, rank 0 on host {name} has 2; they have to be the same"))  # fmt: skip


def test_a_second_host_of_one_number_hears_it_and_the_first_goes_on(rank_0):
    assert rank_0(1) == (None, Welcome("a", 2))
    assert rank_0(1) == (None, Refused(f"rank 1 (host {socket.gethostname()}, no device yet, process {os.getpid()}) is "
                                       "here already: every host needs a --node-rank of its own"))  # fmt: skip
    with pytest.raises(EOFError):
        rank_0(1, "process")


def test_an_address_at_which_something_else_answers_is_named(tmp_path, caplog, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened, (stranger, _) = Channel.connect(*listener.getsockname(), timeout_s=5.0), listener.accept()
    with stranger, contextlib.closing(opened):
        stranger.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        monkeypatch.setattr(follower, "_open", lambda where, introduction: opened)
        monkeypatch.setattr(follower.signal, "signal", lambda number, handler: None)
        assert follower.follow(ServerArgs(str(tmp_path)), follower.RankInfo(1, 0, ("a", 1))) == 1
    assert "rank 0 does not answer at a:1: expected a message of at most" in caplog.text


def test_ranks_on_devices_of_two_kinds_are_not_left_waiting():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = Channel.connect(*listener.getsockname(), timeout_s=5.0)
        ours = Channel(listener.accept()[0])
    rank_0 = object.__new__(team.Team)
    rank_0.doing, rank_0.device = "loading weights", team.NO_DEVICE
    member = team.Member(1, host="b", pid=7, watch=ours)

    def hear(device: str) -> str | None:
        theirs.send(Beat(device, "loading weights", 8.0))
        rank_0._take(member)
        return member.error

    assert hear(team.NO_DEVICE) is None
    assert hear("cpu") is None
    rank_0.device = "cuda:0"
    assert hear("cuda:1") is None
    assert hear("cpu") == "rank 0 computes on cuda:0; --device has to mean the same on all hosts"
    assert rank_0._verdict([member], 0.0) == (
        "rank 1 (host b, cpu, process 7) failed while loading weights: rank 0 computes on cuda:0; --device has to mean "
        "the same on all hosts")  # fmt: skip
    ours.close()
    theirs.close()
