"""The processes of a server are found whichever thread has started them, and where the kernel lists no children."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers_processes
from helpers_processes import children, engines

WAITS = "import sys; sys.stdin.read()"
#: a server whose first child is none of its ranks, and whose first rank has started the other
SERVER = """
import subprocess, sys
waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
if sys.argv[-1] == "server":
    parts = [subprocess.Popen(waits), subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1],
                                                        "wave64.serve.engine.process", "0"])]
elif sys.argv[-1] == "0":
    parts = [subprocess.Popen([*waits, "wave64.serve.engine.process", "1"])]
    print(parts[0].pid, flush=True)
sys.stdin.read()
"""


def test_children_of_any_thread_are_found_the_oldest_first(monkeypatch):
    before = children(os.getpid())
    with ThreadPoolExecutor(1) as threads:
        started = [threads.submit(subprocess.Popen, [sys.executable, "-c", WAITS], stdin=subprocess.PIPE).result()
                   for _ in range(2)]
    try:
        pids = [each.pid for each in started]
        assert children(os.getpid())[len(before) :] == pids
        monkeypatch.setattr(helpers_processes, "_processes", lambda: [2**22 + 1, *reversed(pids)])
        assert children(os.getpid()) == pids, "of one that ended meanwhile nothing is said"
    finally:
        for each in started:
            each.communicate()
    assert not set(pids) & set(children(os.getpid()))


def test_ranks_of_a_server_are_found_rank_0_first():
    server = subprocess.Popen([sys.executable, "-c", SERVER, SERVER, "server"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        last = int(server.stdout.readline())
        found = engines(server.pid)
        assert len(found) == 2
        assert found[1] == last
        assert Path(f"/proc/{found[0]}/cmdline").read_bytes().endswith(b"wave64.serve.engine.process\x000\x00")
    finally:
        server.communicate()
