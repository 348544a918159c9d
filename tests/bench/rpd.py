"""How long rpd2trace takes for a profile of many rows, and what memory it holds at most.

    python tests/bench/rpd.py [--operations 1000000]

The file is made here, in the shape that RPD writes: for each operation a row of its call, of itself, of their link and
of the call's arguments. The converter runs in a process of its own, whose memory has torch's import in it.
"""

import argparse
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_rpd import BASE, RPD_TABLES

GPUS, KERNELS, THREADS = 8, 200, 8
NAMES = ["hipLaunchKernel", "KernelExecution", *(f"kernel_{i}<float, {i}>" for i in range(KERNELS))]
FIRST_ARGS = 1000  # the number of the first call's arguments among the strings


def calls(operations: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each call."""
    rng, start = random.Random(0), BASE
    for number in range(1, operations + 1):
        start += rng.randrange(2000, 9000)
        yield number, start, start + rng.randrange(1000, 4000)


def save(path: Path, operations: int) -> None:
    db = sqlite3.connect(path)
    db.executescript(RPD_TABLES)
    db.executemany("INSERT INTO rocpd_string VALUES (?, ?)", enumerate(NAMES, 1))
    db.executemany("INSERT INTO rocpd_string VALUES (?, ?)",
                   ((FIRST_ARGS + i, f"0x7f{i:06x} grid={i % 977} block=256") for i in range(1, operations + 1)))
    db.executemany("INSERT INTO rocpd_api VALUES (?, 7, ?, ?, ?, 1, ?)",
                   ((i, 7 + i % THREADS, start, end, FIRST_ARGS + i) for i, start, end in calls(operations)))
    rng = random.Random(1)
    db.executemany("INSERT INTO rocpd_op VALUES (?, ?, ?, 0, ?, ?, ?, 2)",
                   ((i, i % GPUS, i // GPUS % 2, end + 5000, end + 5000 + rng.randrange(1000, 40000), 3 + i % KERNELS)
                    for i, _, end in calls(operations)))
    db.executemany("INSERT INTO rocpd_api_ops VALUES (NULL, ?, ?)", ((i, i) for i in range(1, operations + 1)))
    db.commit()
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made.rpd")
        # in a process of its own, too: what this one held at most would count as the converter's
        subprocess.run([sys.executable, "-c", "import sys; from pathlib import Path; import rpd; "
                        "rpd.save(Path(sys.argv[1]), int(sys.argv[2]))", path, str(options.operations)],
                       check=True, cwd=Path(__file__).parent)
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "-m", "wave64", "rpd2trace", path], check=True, stderr=subprocess.DEVNULL)
        took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{options.operations:,} calls, as many operations and links, {path.stat().st_size / 1e6:.0f} MB -> "
              f"{path.with_suffix('.json.gz').stat().st_size / 1e6:.0f} MB: {took:.1f} s, of them {cpu:.1f} of "
              f"processor, {after.ru_maxrss / 1024:.0f} MB at most")


if __name__ == "__main__":
    main()
