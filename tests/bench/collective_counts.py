"""What one rank executes for an all-reduce, by protocol, on the emulated device, waits apart: all ranks' launches run
next to each other; then the first rank's again, alone, over what the others have left in its arena, so that it waits
for none.

    python tests/bench/collective_counts.py [--world 8] [--bytes 8192] [--arch gfx942] [--peers FILE.co [--slots 64]]

--peers: a code object with SGLang's or vLLM's cross_device_reduce_1stage and _2stage for 8 ranks and bf16, in the form
that pulls, with signals per block that grow; its rows then follow. --slots: how many blocks it has signals for, 64 of
SGLang's, 36 of vLLM's. They have no flags to wait for either: those of all ranks are set beforehand.
"""

import argparse
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gfx942"))
from collectives import AllReduce, Arenas, layout, run  # noqa: E402

from wave64.testing.emulator import Buffer, Counts, code_object, execute  # noqa: E402

PROTOCOLS = ("LL", "LL128", "one shot", "two shots")
RANKS = 8  # of peers' kernels
BYTES = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}


def moved(by_name: dict[str, int], kind: str) -> int:
    """Bytes that loads or stores of all lanes ask for; a flag is one lane's."""
    return sum(count * (4 if name.endswith("store_dword") else 64 * BYTES[name.rpartition("_")[2]])
               for name, count in by_name.items() if name.startswith((f"buffer_{kind}_", f"global_{kind}_")))


THREADS, MAX_BLOCKS = 512, 16  # as they are launched on AMD


def of_a_peer(path: Path, kernel: str, count: int, slots: int) -> tuple[SimpleNamespace, Counts]:
    """The launch of rank 0, and what it executed; the sums are held to fp64's."""
    packs = count // 8
    x = [each.contiguous() for each in torch.randn(RANKS, count).bfloat16()]
    out = torch.empty(RANKS, count, dtype=torch.bfloat16)
    flag_bytes = 2 * slots * RANKS * 4  # at the start and at the end, by block and rank; counters by block follow
    signals = torch.zeros(RANKS, flag_bytes + slots * 4 + 128 + count * 2 + 128, dtype=torch.uint8)
    at = [-(-row.data_ptr() // 128) * 128 for row in signals]
    pointers = torch.tensor([each.data_ptr() for each in x])
    flags = [each[first - each.data_ptr():][:flag_bytes].view(torch.int32)
             for each, first in zip(signals, at, strict=True)]
    buffers = [Buffer(name, each.data_ptr(), each.nbytes) for name, each in
               (("out", out), ("signals", signals), ("pointers", pointers),
                *((f"x of rank {rank}", each) for rank, each in enumerate(x)))]
    blocks = min(MAX_BLOCKS, -(-packs // THREADS))
    for _ in range(2):  # the second finds what the first has left
        for rank in reversed(range(RANKS)):
            flags[rank].fill_(1 << 30)
            args = struct.pack("<Q8x8QQQii", pointers.data_ptr(), *at, at[rank], out[rank].data_ptr(), rank, packs)
            launch = SimpleNamespace(op=None, kernel=kernel, code_object=str(path), lds_bytes=0, grid=(blocks, 1, 1),
                                     block=(THREADS, 1, 1), tensors={}, args=args)
            ran = execute(launch, buffers, checks=(), seconds=60)
    exact = torch.stack([each.double() for each in x]).sum(0).expand(RANKS, -1)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-6)
    return launch, ran


def row(name: str, launch, ran: Counts) -> str:
    figures = (ran.instructions, ran.instructions // ran.waves, moved(ran.by_name, "load"), moved(ran.by_name, "store"))
    return f"| {name} | {launch.grid[0]} x {launch.block[0] // 64} | " + " | ".join(f"{n:,}" for n in figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--arch", default="gfx942")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    print("| protocol | blocks x waves | instructions | a wave | bytes loaded | bytes stored |")
    print("|---|---|---:|---:|---:|---:|")
    for protocol, name in enumerate(PROTOCOLS):
        call = AllReduce.drawn(options.world, options.bytes // 2, torch.bfloat16, protocol, 1)
        arenas = Arenas(options.world)
        run([call], options.arch, 1, arenas, checks=())
        call.verify()
        launch, = call.launches(options.arch, 0, arenas)
        for block in range(launch.grid[0]):
            counter = arenas.addresses[0] + block * layout().LINE - arenas.memory[0].ctypes.data
            arenas.memory[0][counter:counter + 4] = 0
        buffers = [Buffer(f"arena {rank}", at, layout().ARENA_BYTES) for rank, at in enumerate(arenas.addresses)]
        buffers += [Buffer(field, x.data_ptr(), x.nbytes) for field, x in call.tensors(0).items()]
        ran = execute(launch, buffers, checks=())
        call.verify()
        print(row(name, launch, ran), flush=True)
    if options.peers:
        for kernel in code_object.load(options.peers.read_bytes()).kernels:
            if "cross_device_reduce_" in kernel:
                print(row(kernel, *of_a_peer(options.peers, kernel, options.bytes // 2, options.slots)), flush=True)


if __name__ == "__main__":
    main()
