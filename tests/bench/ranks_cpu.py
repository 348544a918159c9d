"""A decode step of demo-llama by two ranks on a CPU, next to that of one rank and gloo's all-reduces alone.

    python tests/bench/ranks_cpu.py [--batch N ...]

At last, how long rank 0 takes to pack a step of 256 rows for the others: to be under 20 us.

Two ranks may take as long as one and the all-reduces they need, two a layer, of which each is timed by itself between
two processes, at the size of a step. More than that is what handing out steps and waiting costs. Give it cores of its
own: two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import ranks_serving
from transformers import AutoConfig

from wave64.serve.model_path import resolve_model_path

MODEL, STEPS, ALL_REDUCES, ROWS = "demo-llama", 200, 2000, 256


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--gloo", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gloo:
        return all_reduces(*options.gloo)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = AutoConfig.from_pretrained(resolve_model_path(MODEL))
    ms = {tp: ranks_serving.run_child(
        {"flags": ["--model-path", MODEL, "--tp", str(tp), "--device", "cpu"], "batches": options.batch, "context": 32,
         "steps": STEPS}, SimpleNamespace(limit=120))["ms"] for tp in (1, 2)}  # fmt: skip
    print(f"{'B':>3}  {'one rank, ms':>12}  {'all-reduces, ms':>15}  {'allowed':>7}  {'two ranks, ms':>13}  of allowed")
    for batch in options.batch:
        reducing = 2 * config.num_hidden_layers * all_reduce_ms(batch * config.hidden_size)
        alone, together = ms[1][str(batch)], ms[2][str(batch)]
        print(f"{batch:3}  {alone:12.3f}  {reducing:15.3f}  {alone + reducing:7.3f}  {together:13.3f}  "
              f"{together / (alone + reducing):.2f}")
    print(f"a step of {ROWS} rows is packed in {packing_us():.1f} us")
    return 0


def packing_us() -> float:
    """Microseconds in which a step of ROWS decodes becomes what is sent, the best of many."""
    from wave64.serve.engine.control import Step, frame
    from wave64.serve.engine.schedule import LAST_SAMPLED, Schedule

    rows = list(range(ROWS))
    pages = [(row, 62, [7 * row]) for row in rows[::16]]  # as many as need a new one
    step = Schedule(ROWS, rows, [1000 + row for row in rows], [1] * ROWS, [1] * ROWS, [LAST_SAMPLED] * ROWS, pages)
    best = float("inf")
    for _ in range(200):
        began = time.perf_counter()
        for _ in range(20):
            frame(Step([step]))
        best = min(best, (time.perf_counter() - began) / 20)
    return best * 1e6


def all_reduce_ms(elements: int) -> float:
    """Milliseconds of gloo's all-reduce of so many fp32 between two processes that do nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        ranks = [subprocess.Popen([sys.executable, __file__, "--gloo", store, str(rank), str(elements)],
                                  stdout=subprocess.PIPE, text=True) for rank in (0, 1)]  # fmt: skip
        return max(json.loads(each.communicate(timeout=120)[0]) for each in ranks)


def all_reduces(store: str, rank: str, elements: str) -> int:
    """Be one of the two; prints the milliseconds."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    x = torch.ones(int(elements))
    for _ in range(100):
        dist.all_reduce(x)
    began = time.perf_counter()
    for _ in range(ALL_REDUCES):
        dist.all_reduce(x)
    print(json.dumps((time.perf_counter() - began) / ALL_REDUCES * 1e3))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
