"""The package on the stand-in, in a process of its own that prints what it saw as JSON: `python package.py STANDIN`,
with the stand-in where the loader finds it and the code objects' architecture first in STANDIN_HIP.

Imports and a fork come first, then what the hip backend says of itself, then operators end to end: the adapter, the
launcher, hip/src/runtime.cpp, the stand-in's checks and, on the emulator, the code object that ships.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from session import Standin
from torch import Tensor

import wave64
from wave64 import OPS, platform
from wave64.backends import hip
from wave64.testing import contract


def mapped() -> bool:
    return "libamdhip64" in Path("/proc/self/maps").read_text()


def in_a_child(answer) -> str:
    """What `answer` gives in a forked child."""
    receive, send = os.pipe()
    if child := os.fork():
        os.close(send)
        with os.fdopen(receive) as lines:
            told = lines.read()
        os.waitpid(child, 0)
        return told
    try:
        os.write(send, str(answer()).encode())
    finally:
        os._exit(0)


def emulated(storages: dict[int, Any], folder: Path):
    """A callback that executes launches on the emulator."""
    from types import SimpleNamespace

    from wave64.testing.emulator.memory import Buffer
    from wave64.testing.emulator.run import execute

    def run(launch) -> None:
        path = folder / f"{launch.kernel}.co"
        path.write_bytes(launch.code_object)
        whole = SimpleNamespace(**{**vars(launch), "code_object": path})
        execute(whole, [Buffer(f"storage {i}", address, storage.nbytes())
                        for i, (address, storage) in enumerate(storages.items())])

    return run


def driven(standin: Standin, name: str, case_id: str) -> dict:
    """Runs the hip adapter of an operator through the driver, and once more recorded; its error against the reference.
    """
    case = next(case for case in OPS[name].cases() if case.id == case_id)
    args, storages, seen = contract.draw(case, "cpu", 0), {}, []
    run = OPS[name].backends["hip"].run

    def noted(tensor: Tensor) -> int:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.data_ptr()

    # torch has no GPU here: CPU tensors lie on device 0 of the stand-in
    hip.connect(data_ptr=noted, get_device=lambda tensor: 0, current_device=lambda: 0, current_stream=lambda index: 0)
    with tempfile.TemporaryDirectory() as folder, platform.target("gfx942"):
        execute = emulated(storages, Path(folder))
        standin.on_launch(lambda launch: (seen.append(launch), execute(launch)))
        try:
            out = run(**args)
        finally:
            hip.connect()
    with hip.record("gfx942") as recorded:
        run(**args)
    exact = OPS[name].reference(**{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                                   for k, v in args.items()})
    numbers = [{k: v for k, v in hip.arguments(launch).items() if kinds[k] != "P"} for launch in recorded
               for kinds in [{field: kind for field, kind, _ in hip._hip.fields()[launch.op]}]]

    def shape(launch) -> list:
        return [launch.kernel, launch.grid, launch.block, launch.lds_bytes, len(launch.args)]

    return {"error": float((out.double() - exact).abs().max() / exact.abs().max()), "launches": len(seen),
            "same": [shape(launch) for launch in seen] == [shape(launch) for launch in recorded],
            "numbers": len(numbers), "errors": [repr(e) for e in standin.errors]}


def main(path: str) -> dict:
    saw = {"mapped after import": mapped()}
    x, weight = torch.randn(2, 64), torch.randn(64)
    saw["child before any use"] = in_a_child(lambda: hip.reason("cuda"))
    wave64.ops.rms_norm(x, weight)
    rows = wave64.report()
    saw["mapped after a call and a report"] = mapped()
    saw["reason for cpu"] = next(row["reason"] for row in rows if row["backend"] == "hip")
    saw["runtime"] = hip.runtime()

    standin, reason = Standin(path), hip.reason.__wrapped__
    standin.library.standin_newest_code_object(4)
    saw["an older runtime"] = reason("cuda")
    standin.library.standin_newest_code_object(5)
    standin.fail("hipModuleLoadData", 200)
    saw["a bad code object"] = reason("cuda")
    saw["serves"] = reason("cuda")
    standin.library.hipSetDevice(1)
    saw["a current device without code objects"] = reason("cuda")
    standin.library.hipSetDevice(0)
    saw["child after use"] = in_a_child(lambda: reason("cuda"))
    try:
        wave64.emulate("gfx942").__enter__()
    except wave64.NotSupported as e:
        saw["emulate"] = str(e)
    saw["rms_norm"] = driven(standin, "rms_norm", next(case.id for case in OPS["rms_norm"].cases()))
    saw["paged_attention"] = driven(standin, "paged_attention", "dim-128")
    return saw


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
