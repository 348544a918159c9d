"""The ranks of a host that has no api process: those of `--node-rank 1` and higher, and a process of torchrun's.

Rank 0 is elsewhere, or another process of torchrun's, and decides when all of them end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from wave64.serve.args import ArgsError, ServerArgs

POLL_S = 0.1


@dataclass(frozen=True)
class Torchrun:
    """What torchrun's environment says of this process and the others that it has started."""

    rank: int
    local_rank: int
    world: int
    nnodes: int
    node_rank: int
    address: str  # host:port of torchrun's store
    run: str

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        """None in a process that torchrun did not start."""
        env = os.environ
        if "TORCHELASTIC_RUN_ID" not in env or "RANK" not in env:
            return None
        world = int(env["WORLD_SIZE"])
        return cls(int(env["RANK"]), int(env["LOCAL_RANK"]), world, world // int(env["LOCAL_WORLD_SIZE"]),
                   int(env["GROUP_RANK"]), f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
                   f"{env['TORCHELASTIC_RUN_ID']}/{env['TORCHELASTIC_RESTART_COUNT']}")  # fmt: skip

    def flags(self) -> list[str]:
        """The same as flags."""
        return ["--tp-size", str(self.world), "--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank),
                "--dist-init-addr", self.address]  # fmt: skip

    def check(self, args: ServerArgs) -> None:
        """Raises ArgsError where flags say something else."""
        for name, said in (("tp-size", self.world), ("nnodes", self.nnodes)):
            if (got := getattr(args, name.replace("-", "_"))) != said:
                raise ArgsError(f"--{name}: expected {said}, the processes or hosts of torchrun, or no such flag; "
                                f"got {got}")  # fmt: skip

    def info(self) -> dict[str, Any]:
        """For the process of a rank other than 0."""
        return {"rank": self.rank, "local_rank": self.local_rank, "torchrun": self.run}


def rank_infos(args: ServerArgs) -> list[dict[str, Any]]:
    """Of the ranks of this host, where rank 0 is on another."""
    local = args.tp_size // args.nnodes
    return [{"rank": args.node_rank * local + i, "local_rank": i} for i in range(local)]


def run_node(args: ServerArgs, of: Sequence[dict[str, Any]]) -> int:
    """Start ranks and wait until they end; one that fails ends the others. The exit status."""
    ranks: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> NoReturn:
        for rank in ranks:
            rank.kill()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    host, port = address(args)
    for info in of:
        process = subprocess.Popen([sys.executable, "-m", "wave64.serve.engine.process"], stdin=subprocess.PIPE)
        settings = {"args": asdict(args), "rank": info | {"control": [host, port]}, "parent": os.getpid()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.close()
        ranks.append(process)
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(POLL_S)
    status = 0
    for info, rank in zip(of, ranks, strict=True):
        if rank.poll():
            print(f"wave64.launch_server: error: rank {info['rank']} ended with status {rank.returncode}; its log is "
                  "above, and rank 0's says why", file=sys.stderr)  # fmt: skip
            status = 1
        rank.kill()
        rank.wait()
    return status


def address(args: ServerArgs) -> tuple[str, int]:
    """Host and port of --dist-init-addr."""
    host, _, port = (args.dist_init_addr or "").rpartition(":")
    return host.strip("[]"), int(port)
