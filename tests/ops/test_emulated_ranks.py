"""Collectives between emulated devices, each in a process of its own, which share memory: HIP's machine code keeps the
contract, and what cannot be shared is said in words."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from wave64.backends import hip

RANK = Path(__file__).parent / "ranks_contract.py"


def run(size: int) -> list[list[dict]]:
    """What each rank said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": "0"}
    ranks = [subprocess.Popen([sys.executable, RANK, str(rank), str(size), str(port)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=env) for rank in range(size)]
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, "\n".join(errors for _, errors in said)
    return [[json.loads(line) for line in out.splitlines()] for out, _ in said]


@pytest.fixture(scope="module")
def said() -> list[list[dict]]:
    if "gfx942" not in hip.code_objects():
        pytest.skip("the package was built without gfx942 code objects")
    return run(2)


def of(rank: list[dict], key: str) -> list[dict]:
    return [line for line in rank if key in line]


def test_machine_code_keeps_the_contract_and_gives_the_same_bits_on_every_rank(said):
    marks = [of(rank, "bits") for rank in said]
    assert len(marks[0]) == 18
    assert marks[0] == marks[1]


def test_every_protocol_adds_up(said):
    for rank in said:
        assert [(line["protocol"], line["right"]) for line in of(rank, "protocol")] == [
            ("LL", True), ("LL128", True), ("one-shot", True), ("two-shot", True)]


def test_large_sums_are_sent_as_codes_on_request(said):
    """Off by more than bf16 rounds, 2^-9 of numbers up to 6, and less than FP8 may be."""
    codes = [of(rank, "codes")[0]["codes"] for rank in said]
    assert codes[0] == codes[1]
    assert 0.02 < codes[0]["sum"] < 0.7
    assert codes[0]["norm"] < 0.5


def test_a_graph_replays(said):
    for rank in said:
        assert [line["sum"] for line in of(rank, "replay")] == [3.0, 6.0]


def test_every_rank_says_why_torch_serves(said):
    for rank in said:
        assert of(rank, "reason") == [{"reason": "group world is not connected"}]
        assert [line["refused"] for line in of(rank, "refused")] == [
            "rank 1: RuntimeError: HIP: allocating memory that peers can map: out of memory",
            "rank 1: RuntimeError: HIP: mapping memory of a peer: invalid argument",
            "rank 1: RuntimeError: HIP: allocating memory of the host that kernels can write to: out of memory"]
        assert of(rank, "by_torch") == [{"by_torch": 2.0, "launches": 0}]
        assert of(rank, "connected") == [{"connected": None}]


def test_torch_gathers_any_dtype_and_a_graph_replays_what_torch_exchanges(said):
    for rank in said:
        line, = of(rank, "by_torch_too")
        assert [dtype for dtype, right in line["by_torch_too"].items() if not right] == []
        assert line["replayed"] == 3.0


def test_a_graph_whose_arenas_are_gone_says_so(said):
    for rank in said:
        line, = of(rank, "left")
        assert "bytes of the runtime's memory at 0x" in line["left"]
        assert line["left"].endswith(" were freed since the launch was recorded")


def test_who_waited_for_whom_is_said(said):
    assert [of(rank, "waited")[0]["waited"] for rank in said] == [
        f"rank {rank} waited 300 s for rank {1 - rank} of group world in all_gather, round 17 of block 2"
        for rank in (0, 1)]


def test_ranks_that_call_different_things_hear_both(said):
    """One before its launch, the other when its kernel has waited in vain."""
    for rank, words in enumerate(("rank 1 calls all_reduce of 8 float32, rank 0 calls all_gather of 8 float32",
                                  "rank 0 calls all_gather of 8 float32, rank 1 calls all_reduce of 8 float32")):
        line, = of(said[rank], "differs")
        assert re.match(rf"call \d+ in group world: {words}; every rank has to make the same calls", line["differs"])


def test_bad_calls_are_refused(said):
    line, = of(said[0], "rows")
    assert line["group"].startswith("all_reduce: group: expected a registered name: alone, world, got 'nowhere'")
    assert line["rows"] == ("reduce_scatter: x: expected a multiple of 2 rows, one part per rank, got float32 [3, 2] "
                            "on cpu")
    line, = of(said[0], "strange")
    assert line["strange"].startswith("group: expected one of alone, world, which are registered, got 'nowhere'")
    assert line["known"] is None
    assert line["order"] == ("groups 'pair': expected each of 2 ranks in one group, each group in ascending order, "
                             "got [[1, 0]]")
