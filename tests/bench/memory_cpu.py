"""Peak memory of an engine process on a CPU: python tests/bench/memory_cpu.py FOLDER DTYPE prints one row.

A process of its own, which imports what the engine's does and nothing else. It loads the model in FOLDER, serves 8
sequences of 500 + 32 tokens and touches the whole KV pool. Resident memory counts, torch's libraries in it.
The exit status is 1 where more than 300 MB are neither weights nor pool.
"""

import sys
from pathlib import Path

import torch

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams

AT_MOST_MB = 300


def resident(key: str) -> float:
    """MB of this process's memory: VmRSS, now, or VmHWM, at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def main(folder: str, dtype: str) -> int:
    imports = resident("VmRSS")
    engine = Engine(ServerArgs(model_path=folder, device="cpu", dtype=dtype))
    weights = engine.runner.weight_bytes / 1e6
    pool = sum(keys.nbytes + values.nbytes for keys, values in engine.runner.kv_cache) / 1e6
    for keys, values in engine.runner.kv_cache:
        keys.zero_()
        values.zero_()
    for i, ids in enumerate(torch.randint(engine.config.vocab_size, (8, 500)).tolist()):
        engine.add(Request(str(i), ids, SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    peak = resident("VmHWM")
    rest = peak - weights - pool
    met = rest <= AT_MOST_MB
    print(f"| {dtype} | {peak:.0f} | {weights:.0f} | {pool:.0f} | {rest:.0f} | {imports:.0f} | {AT_MOST_MB} "
          f"{'met' if met else 'MISSED'} |", flush=True)  # fmt: skip
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
