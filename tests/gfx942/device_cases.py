"""What tests/gfx942/test_device.py asks of wave64.emulate, a function each, for a process without TRITON_INTERPRET:
each returns what it saw, in plain values."""

import contextlib
import io
import threading
from typing import Any

import torch
from torch import Tensor

import wave64
from wave64 import BadArgument, NotSupported, quant
from wave64.__main__ import main
from wave64.op import OPS
from wave64.ops.mla_decode_rope import make_case as make_latents
from wave64.ops.paged_attention import make_case as make_decode
from wave64.testing import contract, cost, step_cost

ops: Any = wave64.ops


def drawn(make, *args, **options) -> dict[str, Any]:
    torch.manual_seed(0)
    return make(*args, **options)


def error_of(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except (BadArgument, NotSupported, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).abs().max() / exact.double().abs().max())


def dispatch(arch: str) -> dict[str, Any]:
    """Inside the block everything is the card's, and behind it nothing is."""
    before, x = wave64.report(), torch.randn(3, 256).bfloat16()
    with wave64.emulate(arch) as device:
        inside = wave64.report()
        q, scale = ops.per_token_group_quant_fp8(x, 128)
        kernels = sorted(device.counts.kernels)
        seen = {
            "name": device.name, "type": wave64.platform.device_type(), "called": wave64.platform.device_name(),
            "units": wave64.platform.compute_units(), "quantized": str(q.dtype), "kernels": kernels,
            "error": distance(quant.dequantize(q, scale, [1, 128]), x),
            "row stride": quant.pad_rows(torch.zeros(4, 512, dtype=q.dtype)).stride(0),
            "in use": {row["op"]: row["backend"] for row in inside if row["status"] == "bound"},
            "cpu": {row["reason"] for row in inside if row["backend"] == "cpu"},
            "other flavor": error_of(ops.paged_attention, **fp8_cache(quant.FP8[
                "e4m3fn" if arch == "gfx942" else "e4m3fnuz"])),
            "asked for cpu": error_of(lambda: wave64.use(rms_norm="cpu").__enter__()),
            "inside": error_of(lambda: wave64.emulate(arch).__enter__()),
        }
        with wave64.use("triton"):
            ops.rms_norm(x, x[0], 1e-6)
        seen["by triton"] = sorted({kernel for _, kernel in device.counts.kernels} - {k for _, k in kernels})
        executed = device.counts.instructions
    ops.rms_norm(x, x[0], 1e-6)
    return seen | {"same behind": wave64.report() == before, "nothing executed behind":
                   device.counts.instructions == executed}


def fp8_cache(dtype: torch.dtype) -> dict[str, Any]:
    args = drawn(make_decode, [5], heads=2, kv_heads=1, head_dim=64)
    return {**args, **{name: args[name].to(dtype) for name in ("key_cache", "value_cache")},
            "k_scale": torch.ones(1), "v_scale": torch.ones(1)}


def several_queries(arch: str) -> dict[str, Any]:
    """MLA with three new tokens per sequence, by Triton; the cache is written as the reference writes it."""
    args = drawn(make_latents, [37, 4], heads=4, queries=3, rank=64, page_size=16)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    wanted = OPS["mla_decode_rope"].reference(**exact)
    with wave64.emulate(arch) as device:
        got = ops.mla_decode_rope(**args)
    return {"error": distance(got, wanted), "kernels": sorted(kernel for _, kernel in device.counts.kernels),
            "cache": distance(args["kv_cache"].nan_to_num(), exact["kv_cache"].nan_to_num())}


def a_fault(arch: str) -> dict[str, Any]:
    """A page beyond the pool: the report names kernel and argument, and the device serves the next call."""
    args = drawn(make_decode, [40], heads=2, kv_heads=1, head_dim=64, page_size=16)
    bad = {**args, "page_table": args["page_table"] + len(args["key_cache"])}
    with wave64.emulate(arch):
        seen = {"hip": error_of(ops.paged_attention, **bad)}
        with wave64.use("triton"):
            seen["triton"] = error_of(ops.paged_attention, **bad)
        again = ops.paged_attention(**args)
    return seen | {"again": distance(again, OPS["paged_attention"].reference(**args))}


def other_thread(arch: str) -> dict[str, Any]:
    """A thread of its own has another current device at first."""
    x, found = torch.randn(2, 64), []
    with wave64.emulate(arch) as device:
        thread = threading.Thread(target=lambda: found.append(ops.rms_norm(x, x[0], 1e-6)))
        thread.start()
        thread.join()
        kernels = sorted(device.counts.kernels)
    return {"kernels": kernels, "error": distance(found[0], OPS["rms_norm"].reference(x, x[0], 1e-6))}


def compiled(arch: str) -> dict[str, Any]:
    """Under torch.compile, and as torch's own operator."""
    x = torch.randn(2, 64)

    def called(x: Tensor) -> Tensor:
        return ops.rms_norm(x + 1, x[0], 1e-6) * 2

    with wave64.emulate(arch) as device:
        by_torch = torch.ops.wave64.rms_norm(x, x[0], 1e-6)
        result = torch.compile(called, backend="aot_eager", fullgraph=True)(x)
        launches = device.counts.launches
    exact = OPS["rms_norm"].reference
    return {"launches": launches, "error": max(distance(result, exact(x + 1, x[0], 1e-6) * 2),
                                               distance(by_torch, exact(x, x[0], 1e-6)))}


def graphs(arch: str) -> dict[str, Any]:
    """A graph of both backends' launches with torch's operations between them: what it computes of new inputs, and what
    its capture left alone."""
    torch.manual_seed(0)
    x, weight, table = torch.randn(6, 64), torch.randn(64), torch.randn(4, 64)
    rows, total = torch.tensor([0, 1, 2]), torch.zeros(3, 64)

    def model() -> Tensor:
        h = ops.rms_norm(x[rows], weight, 1e-6)                  # indices, then HIP
        residual = torch.zeros_like(h)
        residual.add_(table[rows])                               # in place, of what a row names
        ops.fused_add_rms_norm(h, residual, weight, 1e-6)        # written arguments
        left, right = residual.split(32, dim=-1)                 # views
        y = torch.cat((right, left), -1) @ torch.eye(64)
        with wave64.use("triton"):
            y = ops.silu_and_mul(torch.cat((y, h), -1).contiguous())
        total.add_(y)
        return y.double().float()

    with wave64.emulate(arch) as device, torch.inference_mode():
        gpu, graph = device.streams, device.streams.CUDAGraph()
        early = error_of(graph.replay)
        with gpu.graph(graph, pool=None):
            out = model()
            seen = {"executed while capturing": device.counts.launches,
                    "item": error_of(x[0, 0].item), "mask": error_of(lambda: x[x > 0]),
                    "synchronize": error_of(gpu.synchronize)}
        differences, sums = [], torch.zeros(3, 64)
        total.zero_()
        for step in range(3):
            x.normal_()
            weight.normal_()
            table.normal_()
            rows.copy_((torch.arange(3) * 2 + step) % 4)
            graph.replay()
            replayed = out.clone()
            sums += replayed
            differences.append(distance(replayed, model()))
        seen["launches"] = device.counts.launches
        seen["sum"] = distance(total, 2 * sums)
        busy = gpu.Event()
        other = device.streams.CUDAGraph()
        with gpu.graph(other):
            busy.record(gpu.current_stream())
            seen["event"] = error_of(busy.synchronize)
        seen["unknown stream"] = error_of(lambda: device._driver("hipStreamSynchronize", 0x5EED))
    return seen | {"replayed": max(differences), "without a capture": early}


def two_devices() -> dict[str, Any]:
    """One after the other, in one process; a stand-in has both."""
    x = torch.randn(2, 64)
    found = []
    for arch in ("gfx942", "gfx950", "gfx942"):
        with wave64.emulate(arch) as device:
            ops.rms_norm(x, x[0], 1e-6)
            found.append(sorted(device.counts.kernels))
    return {"kernels": found}


def reported(arch: str) -> str:
    """What `python -m wave64 --device ARCH` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["--device", arch]) == 0
    return shown.getvalue()


def costs(arch: str) -> dict[str, Any]:
    """Of one call, of the same three times, and of a graph of it with a product of torch's between, replayed; and by
    wave64.testing.cost."""
    case = next(case for case in OPS["rms_norm"].cases() if not case.large)
    args, meter = contract.draw(case, "cpu", 0), step_cost.StepCosts(arch)
    with wave64.emulate(arch, meter=meter) as device, torch.inference_mode():
        ops.rms_norm(**args)
        once = meter.take()
        for _ in range(3):
            ops.rms_norm(**args)
        thrice = meter.take()
        graph, left, right = device.streams.CUDAGraph(), torch.randn(64, 128), torch.randn(128, 32)
        with meter.watching():
            with device.streams.graph(graph):
                ops.rms_norm(**args)
                view = (left @ right).view(-1)
            meter.take()
            graph.replay()
        replayed = meter.take()
        assert view.numel() == 64 * 32
    return {"once": once, "thrice": thrice, "replayed": replayed, "table": step_cost.table({"a step": thrice}, "X"),
            "bound": sum(cost.bounds_us("rms_norm", "hip", case, arch).values())}
