"""How fast the ranks of a host load a checkpoint, next to plain reads of the same files, from a cold page cache.

    python tests/bench/loading.py [--ranks 8] [--layers 6] [--folder FOLDER] [--rounds 2] [--tiny]

Makes a Llama of so many layers in bf16 (6: 3.1 GB in 4 files) in a new folder inside FOLDER, which goes at the end. In
turn, the pages of the files dropped before each (posix_fadvise): plain, in which as many processes each read an equal,
contiguous part of all bytes into memory that they have, 16 MiB at a time; and ranks, in which each reads its slices
into its part of the model (serve/model/load.py). Seconds are those of the slowest, from the same moment on; GB are of
what processes asked for. Ranks are to reach 80 % of plain reads, and no more main memory than 1.1 times their weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES, BLOCK, TO_REACH, MEMORY = 4, 16 << 20, 0.8, 1.1
CONFIG: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], hidden_act="silu", vocab_size=32000, max_position_embeddings=4096,
    rms_norm_eps=1e-5, rope_theta=10000.0, torch_dtype="bfloat16", head_dim=128, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=False, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
TINY = CONFIG | dict(vocab_size=512, hidden_size=256, intermediate_size=512, head_dim=32, num_attention_heads=8)


def main() -> int:
    options = read_options()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="wave64-") as folder:
        size = make(Path(folder), (TINY if options.tiny else CONFIG) | {"num_hidden_layers": options.layers})
        print(f"{size / 1e9:.2f} GB in {FILES} files, {options.ranks} processes", flush=True)
        found: dict[str, list[tuple[float, float]]] = {"plain": [], "ranks": []}
        fine = True
        for number in range(options.rounds):
            for how, act in (("plain", read_plainly), ("ranks", load_rank))[:: -1 if number % 2 else 1]:
                said = together(act, Path(folder), options.ranks)
                seconds, read = max(each["seconds"] for each in said), sum(each["bytes"] for each in said)
                found[how].append((read / seconds / 1e9, seconds))
                print(f"{how}: {read / 1e9:.2f} GB in {seconds:.2f} s, {read / seconds / 1e9:.2f} GB/s", flush=True)
                if how == "ranks":
                    ratio = max(each["grown"] / each["weights"] for each in said)
                    fine &= ratio <= MEMORY or options.tiny
                    print(f"main memory: at most {ratio:.2f} times a rank's weights", flush=True)
    plain, ranks = (max(found[how])[0] for how in ("plain", "ranks"))
    print(f"ranks reach {100 * ranks / plain:.0f} % of plain reads, the best of {options.rounds} rounds each")
    return 0 if fine and (ranks >= TO_REACH * plain or options.tiny) else 1


def read_options() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    parser.add_argument("--tiny", action="store_true", help="a model of 1 MB a layer, to test this file")
    return parser.parse_args()


def make(folder: Path, config: dict[str, Any], sparse: bool = False) -> int:
    """A checkpoint of random bytes, which are finite as bf16, or of zeros that take none of the disk; returns how
    many."""
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inter, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (config["vocab_size"], hidden)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                 "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                 "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
                 "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
                 "mlp.down_proj": (hidden, inter)}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    names, total, weight_map = list(shapes), 0, {}
    values = bytes(b & 0xBF for b in os.urandom(1 << 20)) * 16
    for number in range(FILES):
        file = f"model-{number + 1}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name in names[number * len(names) // FILES : (number + 1) * len(names) // FILES]:
            size = 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end, weight_map[name] = end + size, file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as f:
            f.write(struct.pack("<Q", len(encoded)) + encoded)
            for at in range(0, 0 if sparse else end, len(values)):
                f.write(values[: end - at])
            f.truncate(8 + len(encoded) + end)
            f.flush()
            os.fsync(f.fileno())  # only pages that are written can be dropped
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def together(act: Callable[..., dict[str, float]], folder: Path, count: int) -> list[dict[str, float]]:
    """What `count` processes say that begin at the same moment, the files' pages being dropped before."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count + 1), context.Queue()
    processes = [context.Process(target=be, args=(act, folder, rank, count, barrier, answers)) for rank in range(count)]
    for each in processes:
        each.start()
    barrier.wait(300)  # all are ready
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    barrier.wait(300)
    said = [answers.get(timeout=600) for _ in processes]
    for each in processes:
        each.join()
    return said


def be(act: Callable[..., dict[str, float]], folder: Path, rank: int, count: int, barrier: Any, answers: Any) -> None:
    def begin() -> None:
        barrier.wait(300)
        barrier.wait(300)

    answers.put(act(folder, rank, count, begin))


def read_plainly(folder: Path, rank: int, count: int, begin: Callable[[], None]) -> dict[str, float]:
    """One `count`-th of all bytes, file by file as they lie."""
    files = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    first, last = (sum(sizes) * each // count for each in (rank, rank + 1))
    memory = memoryview(bytearray(last - first + 1))
    begin()
    began, read, start = time.perf_counter(), 0, 0
    for file, size in zip(files, sizes, strict=True):
        at, until = max(first - start, 0), min(last - start, size)
        if at < until:
            with file.open("rb", buffering=0) as f:
                f.seek(at)
                while at < until:
                    got = f.readinto(memory[read : read + min(BLOCK, until - at)])
                    at, read = at + got, read + got
        start += size
    return {"seconds": time.perf_counter() - began, "bytes": read}


def load_rank(folder: Path, rank: int, count: int, begin: Callable[[], None]) -> dict[str, float]:
    """Be a rank that fills its part of the model; `grown`: bytes of main memory at most, more than before."""
    import torch
    from memory_cpu import resident

    from wave64.serve.args import ServerArgs
    from wave64.serve.engine.ranks import ranks_of
    from wave64.serve.model.config import ModelConfig
    from wave64.serve.model.load import _build, fill_from

    torch.set_num_threads(1)
    ranks = ranks_of(ServerArgs(model_path=str(folder), tp_size=count), rank)
    before, read = resident("VmRSS"), {}
    model = _build(ModelConfig.from_folder(folder), torch.bfloat16, "cpu", ranks)
    weights = sum(weight.nbytes for weight in model.parameters())
    begin()
    began = time.perf_counter()

    def progress(so_far: int, size: int) -> None:
        read.update(bytes=so_far, seconds=time.perf_counter() - began)

    fill_from(model, folder, progress)
    return read | {"weights": weights, "grown": 1e6 * (resident("VmHWM") - before)}


if __name__ == "__main__":
    sys.exit(main())
