"""What torch's profiler and flop counter see of an operator."""

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from wave64 import OPS, ops
from wave64.testing import contract

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def first(op):
    return contract.draw(next(case for case in op.cases() if not case.large), "cpu", seed=0)


@each_op
def test_the_profiler_names_the_operator_and_its_shapes(op):
    args = first(op)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        op(**args)
    events = [event for event in seen.events() if event.name == f"wave64::{op.name}"]
    assert len(events) == 1
    expected = [list(args[name].shape) for name in op.signature.parameters if isinstance(args.get(name), torch.Tensor)]
    assert [shape for shape in events[0].input_shapes if shape] == [shape for shape in expected if shape]


@each_op
def test_the_flop_counter_knows_the_cost(op):
    args = first(op)
    flops = op.cost(**args).flops
    with FlopCounterMode(display=False) as counter:
        op(**args)
    assert counter.get_flop_counts()["Global"].get(op.torch_op, 0) == flops
    assert counter.get_total_flops() == flops  # and not those of the reference's own operators


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels are Triton's, too")
def test_counting_is_registered_without_importing_triton():
    code = """
import sys, wave64
assert "torch.utils.flop_counter" not in sys.modules
assert "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert all(op.torch_op in flop_registry for op in wave64.OPS.values())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr


def test_flops_of_a_product():
    a, b = (torch.randn(4, 256).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(4, 1)
    with FlopCounterMode(display=False) as counter:
        ops.fp8_scaled_mm(a, b, scale, scale, torch.float32)
    assert counter.get_total_flops() == 2 * 4 * 4 * 256
