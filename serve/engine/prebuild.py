"""Compiles, ahead and without a GPU, every Triton kernel that a server would ask for:

    python -m wave64 prebuild --arch gfx942 --model-path meta-llama/Llama-3.1-8B --output kernels.tar.gz

Further flags are the server's (--tp 8, --kv-cache-dtype fp8_e4m3, --max-running-requests 64): give those that it is
started with. A server finds what lies in the default folder; of others --prebuilt-kernels names the folder or the tar.
Weights are not read: a folder with config.json is enough.

The model's steps run on tensors without memory: decodes of every batch size of the ladder and beyond, prompts of many
lengths, alone, together and next to decodes. Operators choose their backends as on the card, and what Triton would be
asked to launch is collected, each binary once, then compiled by several processes.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import wave64
from wave64 import OPS, NotSupported, distributed
from wave64.arch import EMULATED
from wave64.backends import peers, prebuilt
from wave64.op import Op
from wave64.serve.args import LEVELS, ArgsError, ServerArgs
from wave64.serve.engine.rank import (
    DTYPE_ALIASES,
    SAID_IN_WORDS,
    config_of,
    graph_sizes,
    kv_dtype_of,
    named_backends,
    prefill_budget,
    prompt_tokens,
)
from wave64.serve.engine.ranks import ranks_of
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import Schedule
from wave64.serve.logs import LINE
from wave64.serve.model import FAMILIES
from wave64.serve.model.config import DTYPES, ModelConfig
from wave64.serve.model.load import without_weights
from wave64.serve.model.parallel import Ranks
from wave64.serve.model_path import CONFIG_FILES, resolve_model_path
from wave64.testing.compile import Launch

log = logging.getLogger("wave64")

NO_MEMORY = torch.device("meta")
NEAR = 2**31 - 1  # bytes: Triton's kernels address a tensor of so many by offsets of 32 bits
FAR = 2**33  # of a tensor for which they do not


class Plan(TorchDispatchMode):
    """Inside, operators choose their backends as on the card. Triton's run, so that their launches are collected; of
    others, which have nothing to compile, there is but the shape of the result."""

    def __init__(self) -> None:
        super().__init__()
        self._promised: dict[str, tuple[list[tuple], Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "wave64":
            return func(*args, **(kwargs or {}))
        op = OPS[func._schema.name.removeprefix("wave64::")]
        given = op.signature.bind(*args, **(kwargs or {}))
        given.apply_defaults()
        values = given.args
        for backend in () if op.name in peers.OPS.values() else op.bound["cpu"]:
            if backend.supports is None or backend.supports(*values) is None:
                if backend.name != "triton":
                    break
                with self:
                    return backend.run(*values)
        return self._promise(op, values)

    def _promise(self, op: Op, values: tuple) -> Any:
        """The result of a call; what it is like is found once for calls of the same shapes."""
        given, spec = pytree.tree_flatten(values)
        key = f"{op.name} {spec} {[_layout(x) if isinstance(x, Tensor) else x for x in given]}"
        if key not in self._promised:
            leaves, spec = pytree.tree_flatten(op._promise(*values))
            self._promised[key] = [_layout(x) for x in leaves if x is not None], spec
        layouts, spec = self._promised[key]
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=NO_MEMORY) for shape, stride, dtype in layouts]
        return pytree.tree_unflatten(made, spec) if made else None


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return x.shape, x.stride(), x.dtype


def distinct(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Of layers that are alike in all that a launch could depend on, the first."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        plain = [(name, type(m).__name__, {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str)})
                 for name, m in layer.named_modules()]
        weights = [(name, w.shape, w.stride(), w.dtype) for name, w in layer.named_parameters()]
        found.setdefault(f"{plain} {weights}", layer)
    return list(found.values())


def ladder(limit: int) -> list[int]:
    """Sizes up to `limit` that stand for all: powers of two, quarters between them, and what follows a power, since
    kernels are chosen by ranges of sizes, some of a multiple of these, and specialized on 1 and on multiples of 16."""
    powers = [1 << i for i in range(limit.bit_length())]
    near = {n for p in powers for n in (p, p + 1, p + p // 4, p + p // 2, p + 3 * p // 4)}
    return sorted({n for n in near if n <= limit} | {limit})


def schedule(num_decodes: int, prompts: Sequence[tuple[int, int]], length: int) -> Schedule:
    """A step of so many decodes at `length` tokens, and of prompts (tokens before this step, tokens in it)."""
    starts = [length - 1] * num_decodes + [before for before, _ in prompts]
    counts = [1] * num_decodes + [count for _, count in prompts]
    return Schedule(num_decodes, list(range(len(starts))), starts, counts, [1] * len(starts), [0] * sum(counts))


def schedules(budget: int, max_running: int, context: int) -> Iterator[Schedule]:
    """Steps that stand for all that a scheduler makes, in tokens, sequences and lengths. Behind decodes that are no
    multiple of 4, what prompts have of a step's arrays does not begin at a multiple of 16 bytes."""
    for count in ladder(max_running):
        for i in range(context.bit_length() if count.bit_count() == 1 else 0):
            yield schedule(count, [], 1 << i)
        yield schedule(count, [], context)
    for tokens in ladder(min(budget, context)):
        for before in {0, 1, 64, context - tokens}:
            if before <= context - tokens:
                yield schedule(0, [(before, tokens)], 1)
        for decodes in {1, 4} & set(range(max_running)):
            yield schedule(decodes, [(0, tokens)], 1)
    for tokens in ladder(budget):
        for rows in {2, 16, max_running} & set(range(2, min(tokens, max_running) + 1)):
            each = min(tokens // rows, context)
            if tokens.bit_count() == 1:
                yield schedule(0, [(0, each)] * (rows - 1) + [(0, min(tokens - each * (rows - 1), context))], 1)
    for decodes in ladder(max_running - 1):
        yield schedule(decodes, [(0, min(16, context))], 1)


class Collected:
    """Triton launches, each binary once."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, launch: Launch) -> None:
        self.launches.setdefault(launch.key, launch)


@torch.inference_mode()
def run_steps(args: ServerArgs, config: ModelConfig, ranks: Ranks,
              steps: Callable[[int, int, int], Iterable[Schedule]] = schedules) -> None:
    """A rank's part of the model, through all `steps`, in pools whose tensors are near and far."""
    dtype = config.dtype if args.dtype == "auto" else DTYPES[DTYPE_ALIASES.get(args.dtype, args.dtype)]
    model = without_weights(config, dtype, ranks)
    model.model.layers = nn.ModuleList(distinct(model.model.layers))
    config = replace(config, num_layers=len(model.model.layers))
    kv_dtype = kv_dtype_of(args.kv_cache_dtype, dtype, NO_MEMORY)
    budget = prefill_budget(args, config.context_length, is_gpu=True)
    for num_pages in pool_sizes(args, config, kv_dtype.itemsize, ranks):
        max_running = min(-(-args.max_running_requests // args.groups), num_pages)
        make = functools.partial(Runner, model, config, kv_dtype, NO_MEMORY, num_pages, args.page_size, max_running,
                                 ranks=ranks, graph_sizes=graph_sizes(args, max_running),
                                 prompt_tokens=prompt_tokens(args, emulated=False),
                                 one_by_one=args.enable_deterministic_inference)
        if not args.disable_cuda_graph:
            make(capture=True)  # launches what its graphs hold
        runner = make(capture=False)
        context = min(config.context_length, num_pages * args.page_size)
        if args.enable_deterministic_inference:
            runner.forward(*[schedule(1, [], 1)] * args.groups)
            continue
        for step in steps(budget, max_running, context):
            runner.forward(*[step] * args.groups)
    for rows in ladder(args.max_running_requests):
        logits, numbers = torch.empty(rows, config.vocab_size, device=NO_MEMORY), torch.empty(4, rows, device=NO_MEMORY)
        temperature, top_p, min_p, uniform = numbers
        wave64.ops.sample(logits, temperature, top_p.int(), top_p, min_p, uniform)


def pool_sizes(args: ServerArgs, config: ModelConfig, itemsize: int, ranks: Ranks) -> list[int]:
    """Pages of the pools to run in: that of --max-total-tokens, or the largest whose tensors are near, and one whose
    are far, since what a card has left for the pool is not known here."""
    if args.max_total_tokens is not None:
        return [-(-args.max_total_tokens // args.page_size)]
    shapes = FAMILIES[config.architecture].kv_shapes(config, ranks, 1, args.page_size)
    page = max(torch.Size(shape).numel() for shape in shapes) * itemsize
    return [NEAR // page, FAR // page]


def collect(args: ServerArgs, arch: str, say: Callable[[str], None] = log.info) -> dict[str, Launch]:
    """The launches of all ranks, by what tells their binaries apart. Raises as Engine does, and NotSupported for an
    architecture that is not emulated."""
    config = config_of(resolve_model_path(args.model_path, args.revision, CONFIG_FILES), args)
    collected = Collected()
    with wave64.emulate(arch, collect=collected), named_backends(args), Plan():
        seen = set()
        for rank in range(args.tp_size):
            ranks = ranks_of(args, rank)
            for group in (ranks.world, ranks.attention, ranks.data):
                distributed.register(group)
            parts = str([(name, w.shape, w.stride()) for name, w in without_weights(config, config.dtype, ranks)
                         .named_parameters()])
            if parts not in seen:  # as most ranks are
                seen.add(parts)
                run_steps(args, config, ranks)
                say(f"rank {rank}: {len(collected.launches)} kernels in all")
    distributed.leave()
    return collected.launches


def prebuild(args: ServerArgs, arch: str, output: Path | None, jobs: int) -> int:
    """Do all of it; the number of kernels. output: a folder, a tar, or None: the default folder.

    Raises RuntimeError where kernels do not compile, ArgsError where `output` cannot be written.
    """
    began = time.monotonic()
    is_tar = output is not None and not output.is_dir() and ".tar" in output.suffixes or str(output).endswith(".tgz")
    refuse_unless_writable(output or prebuilt.DEFAULT / arch, is_tar)
    launches = collect(args, arch)
    collected = time.monotonic()
    log.info("%s for %s: %d Triton kernels, found in %.1f s", args.model_path, arch, len(launches), collected - began)
    with tempfile.TemporaryDirectory(prefix="wave64-prebuild-") as scratch:
        folder = Path(scratch) if is_tar else output or prebuilt.DEFAULT / arch
        with wave64.emulate(arch, collect=lambda launch: None):  # Triton compiles for its target
            failures = prebuilt.compile_all({key: launch.make for key, launch in launches.items()}, folder, jobs)
        if failures:
            raise RuntimeError(f"{len(failures)} of {len(launches)} kernels do not compile: {failures[0]}")
        _note(folder, arch, args, len(launches))
        if is_tar and output is not None:
            prebuilt.pack(folder, output)
    where = output or folder
    log.info("%s: %d kernels in %.1f s of compiling; a server %s", where, len(launches), time.monotonic() - collected,
             "finds them" if output is None else f"takes them with --prebuilt-kernels {where}")
    return len(launches)


def refuse_unless_writable(output: Path, is_tar: bool) -> None:
    """Makes the folder; raises ArgsError where it cannot be made or written."""
    folder = output.parent if is_tar else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgsError(f"--output: expected what can be written, got {output}: {error.strerror}; name another "
                        "folder or tar") from None


def _note(folder: Path, arch: str, args: ServerArgs, count: int) -> None:
    """Write the manifest, with the models that are in the folder already where they fit these kernels."""
    with prebuilt.locked(folder):
        models = {}
        if (folder / prebuilt.MANIFEST).exists() and prebuilt.mismatch(before := prebuilt.read_manifest(folder),
                                                                       arch) is None:
            models = before.get("models", {})
        models[f"{args.model_path} tp {args.tp_size}"] = count
        prebuilt.write_manifest(folder, {**prebuilt.made_for(arch), "models": models})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64 prebuild", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, required=True)
    parser.add_argument("--output", type=Path, metavar="FOLDER|TAR",
                        help=f"default: {prebuilt.DEFAULT}/ARCH, which a server finds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes that compile (default: %(default)s)")
    parser.add_argument("--log-level", default="info", choices=LEVELS, help="(default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=own.log_level.upper(), format=LINE)
    torch.set_num_threads(1)
    try:
        if any(word.split("=")[0] == "--device" for word in rest):
            raise ArgsError("--device: expected --arch alone, got both")
        prebuild(ServerArgs.from_cli([*rest, "--log-level", own.log_level]), own.arch, own.output, own.jobs)
    except (ArgsError, NotSupported, prebuilt.PrebuiltError, *SAID_IN_WORDS, RuntimeError, OSError) as error:
        parser.exit(1, f"wave64 prebuild: error: {' '.join(str(error).split())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
