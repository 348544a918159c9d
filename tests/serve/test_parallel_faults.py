"""A rank of two that is killed or stopped: the server ends within seconds with one line that says which, clients get an
error, and no process is left."""

import ctypes
import json
import os
import random
import re
import resource
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from helpers_processes import children
from helpers_server import READY_S, Server, eventually, is_alive, serve

FLAGS = ("--tp-size", "2", "--rank-timeout", "3", "--max-total-tokens", "2048")
LONG = {"prompt": "Four score and seven years ago", "max_tokens": 1500, "temperature": 0, "ignore_eos": True,
        "stream": True}
PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000


def processes(server: Server) -> dict[str, int]:
    """Of the api process, and of each rank."""
    engine = server.engine_pid
    return {"api": server.process.pid, "rank 0": engine, "rank 1": children(engine)[0]}


def end_in(server: Server, pids: dict[str, int], victim: str, number: signal.Signals, after_tokens: int) -> str:
    """Sends a signal to one of the processes while it generates; returns the error that the client got."""
    said = []
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG, timeout=60) as stream:
        lines = stream.iter_lines()
        for _ in range(2 * after_tokens + 1):
            next(lines)
        if victim == "api":
            for rank in ("rank 0", "rank 1"):  # which could not notice
                os.kill(pids[rank], signal.SIGSTOP)
        os.kill(pids[victim], number)
        if victim == "api":
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        else:
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    server.process.wait(READY_S)  # --watchdog-timeout is longer
    assert eventually(lambda: not any(map(is_alive, pids.values())))
    return said[-1]["error"]["message"] if said else ""


@pytest.mark.parametrize(("victim", "number"), [
    ("rank 1", signal.SIGKILL), ("rank 1", signal.SIGSTOP), ("rank 0", signal.SIGSTOP), ("api", signal.SIGKILL)])
def test_a_lost_rank_ends_the_server(tmp_path, victim, number):
    with serve("demo-llama", tmp_path / "log", *FLAGS) as server:
        pids = processes(server)
        error = end_in(server, pids, victim, number, after_tokens=3)
        if victim == "api":
            return
        assert server.process.returncode == 1
        log = server.log.read_text()
    last = log.splitlines()[-1]
    host = os.uname().nodename
    what = "was ended by signal SIGKILL" if number == signal.SIGKILL else "has not answered for "
    assert last.startswith(f"wave64.launch_server: error: {victim} (host {host}, cpu, process {pids[victim]}) {what}")
    doing = r"step \d+ \(sequences: 1, tokens: 1\)" if victim == "rank 1" else r"step \d+ \(.*\)|waiting for requests"
    assert re.fullmatch(doing, last.rpartition(" while ")[2])
    assert last.removeprefix("wave64.launch_server: error: ") in error
    assert "Traceback" not in log


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_at_any_point(tmp_path, seed):
    """While it starts, too; then there may be no client, and nothing is said to it."""
    drawn = random.Random(seed)
    victim, number = drawn.choice(["rank 0", "rank 1"]), drawn.choice([signal.SIGKILL, signal.SIGSTOP])
    server = Server("demo-llama", tmp_path / "log", *FLAGS)
    try:
        server.wait_for(lambda: children(server.process.pid) and children(server.engine_pid))
        pids = processes(server)
        if drawn.random() < 0.5:
            server.wait_ready()
            assert victim in end_in(server, pids, victim, number, drawn.randrange(40)) or victim == "rank 0"
        else:
            # A rank that has not yet introduced itself is waited for: it may be of a host that is slow.
            server.wait_for(lambda: "what serves each operator" in server.log.read_text())
            time.sleep(drawn.random())
            os.kill(pids[victim], number)
            server.process.wait(READY_S)
            assert eventually(lambda: not any(map(is_alive, pids.values())))
        assert server.process.returncode == 1
        assert server.log.read_text().splitlines()[-1].startswith("wave64.launch_server: error: ")
    finally:
        server.process.kill()
        server.process.wait()
        server.http.close()


def test_a_rank_without_memory_says_so(tmp_path):
    """From here on rank 1 may take no more address space, and a long prompt comes."""
    with serve("demo-llama", tmp_path / "log", *FLAGS, "--chunked-prefill-size", "2048") as server:
        pids = processes(server)
        pages = int(Path(f"/proc/{pids['rank 1']}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize()
        resource.prlimit(pids["rank 1"], resource.RLIMIT_AS, (limit, limit))
        answer = server.post("/v1/completions", prompt=[7] * 2000, max_tokens=1)
        assert answer.status_code == 503
        assert server.process.wait(READY_S) == 1
        assert eventually(lambda: not any(map(is_alive, pids.values())))
    last = server.log.read_text().splitlines()[-1]
    assert re.search(rf"error: rank 1 \(host .*, cpu, process {pids['rank 1']}\) failed while step \d+ \(sequences: 1, "
                     r"tokens: 2000\): .*(memory|Memory|alloc)", last), last


def test_a_full_disk_under_the_log_changes_no_answer(tmp_path):
    """No process may make a file longer, which is how a disk that is full looks."""
    with serve("demo-llama", tmp_path / "log", *FLAGS) as server:
        before = server.complete(prompt="Four score and")
        limit = server.log.stat().st_size
        for pid in processes(server).values():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        size = server.log.stat().st_size  # with what was written of the answer meanwhile
        after = server.complete(prompt="Four score and")
        assert after["choices"] == before["choices"]
        assert server.log.stat().st_size == size
        assert server.stop() == 0


def stop_main_thread(pid: int) -> None:
    """From now on the main thread of a descendant stands still, and its others run, until the process is killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    standing = threading.Event()

    def trace() -> None:  # one thread is the tracer, and has to learn of the end
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            if libc.ptrace(request, pid, None, None) != 0:
                return
        os.waitpid(pid, WALL)
        standing.set()
        os.waitpid(pid, WALL)

    threading.Thread(target=trace, daemon=True).start()
    if not standing.wait(READY_S):
        pytest.skip("processes may not be traced here")


def ended_by_rank_1_that_stands_still(server: Server) -> dict[str, int]:
    """The processes, of which none is left once a client has been answered."""
    pids = processes(server)
    stop_main_thread(pids["rank 1"])
    answer = server.post("/v1/completions", prompt="Four", max_tokens=2)
    assert answer.status_code == 503
    assert server.process.wait(READY_S) == 1
    assert eventually(lambda: not any(map(is_alive, pids.values())))
    return pids


def test_a_rank_that_stands_still_while_it_says_that_it_lives(tmp_path):
    with serve("demo-llama", tmp_path / "log", *FLAGS, "--watchdog-timeout", "3") as server:
        pids = ended_by_rank_1_that_stands_still(server)
        log = server.log.read_text()
    last = log.splitlines()[-1]
    assert "error: a step has not ended for " in last
    assert re.search(rf"rank 0 \(host .*\): step \d+ .*; rank 1 \(host .*process {pids['rank 1']}\): ", last), last
    assert re.search(r'File ".*", line \d+ in all_reduce', log), "no stack of what rank 0 waits in"


@pytest.mark.long
def test_a_kernel_that_waits_in_vain_ends_the_server_and_says_for_whom(tmp_path):
    """Two emulated devices; the main thread of rank 1 stands still, so that rank 0's machine code waits for its part
    of a sum, before the step has taken too long."""
    flags = (*FLAGS[:2], "--max-total-tokens", "512", "--max-running-requests", "1", "--skip-server-warmup", "--device",
             "gfx942", "--disable-cuda-graph", "--watchdog-timeout", "30")  # fmt: skip
    with serve("demo-llama", tmp_path / "log", *flags) as server:
        ended_by_rank_1_that_stands_still(server)
    last = server.log.read_text().splitlines()[-1]
    assert re.search(r"rank 0 \(host .*\) failed while step 1 .*: rank 0 waited 24 s for rank 1 of group world in "
                     r"fused_all_reduce_rms_norm, round \d+ of block \d+$", last), last
