"""What one rank executes for an all-reduce, by protocol, on the emulated device, waits apart: all ranks' launches run
next to each other; then the first rank's again, alone, over what the others have left in its arena, so that it waits
for none.

    python tests/bench/collective_counts.py [--world 8] [--bytes 8192] [--arch gfx942]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gfx942"))
from collectives import AllReduce, Arenas, layout, run  # noqa: E402

from wave64.testing.emulator import Buffer, execute  # noqa: E402

PROTOCOLS = ("LL", "LL128", "one shot", "two shots")
BYTES = {"dwordx4": 16, "dword": 4, "short": 2, "ushort": 2}


def moved(by_name: dict[str, int], kind: str) -> int:
    """Bytes that loads or stores of all lanes ask for; a flag is one lane's."""
    return sum(count * (4 if name == "buffer_store_dword" else 64 * BYTES[name.rpartition("_")[2]])
               for name, count in by_name.items() if name.startswith(f"buffer_{kind}_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--arch", default="gfx942")
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
        figures = (ran.instructions, ran.instructions // ran.waves, moved(ran.by_name, "load"),
                   moved(ran.by_name, "store"))
        print(f"| {name} | {launch.grid[0]} x {launch.block[0] // 64} | " +
              " | ".join(f"{figure:,}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
