"""Every operator x backend x case is held to the contract (wave64/testing/contract.py says what that is)."""

import pytest
import torch

from wave64 import OPS, platform
from wave64.backends import probe
from wave64.testing import contract

GPU = platform.device_type() == "cuda"
BACKENDS = ["reference", "triton", "cpu", *(b for b in ("hip", "hopper") if GPU and probe(b, "cuda") is None)]


def grid():
    for op in OPS.values():
        for case in op.cases():
            if case.large and not GPU:
                continue
            for backend in BACKENDS:
                if backend in op.backends and (backend != "cpu" or not case.large):
                    yield pytest.param(op, backend, case, id=f"{op.name}-{backend}-{case.id}")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of what is saturated next
@pytest.mark.parametrize(("op", "backend", "case"), list(grid()))
def test_backend_keeps_the_contract(op, backend, case, device):
    device = "cpu" if backend == "cpu" else device
    if why := contract.too_large(case, device):
        pytest.skip(why)
    args = contract.draw(case, device, seed=0)
    supports = op.backends[backend].supports
    if supports is not None and (why := supports(**args)):
        pytest.skip(why)
    contract.verify(op, backend, case, device)


def first_cases():
    return [pytest.param(op, case, id=f"{op.name}-{case.id}")
            for op in OPS.values() for case in [c for c in op.cases() if not c.large][:3]]


@pytest.mark.parametrize(("op", "case"), first_cases())
def test_registration_survives_opcheck(op, case, device):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    args = contract.draw(case, device, seed=0)
    which = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(x, torch.Tensor) and x.dtype in contract.FP8 for x in args.values()):
        which.append("test_schema")  # compares arguments by allclose, which torch does not have for FP8
    torch.library.opcheck(op.torch_op.default, (), args, test_utils=which)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_fake_agrees_on_every_case(op, device):
    """What the fake implementation promises is what the operator returns."""
    for case in op.cases():
        if case.large or contract.too_large(case, device):
            continue
        args = contract.draw(case, device, seed=0)
        real = contract.outputs(op, op(**contract.copy(args, case.sparse)), {})
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
            promised = contract.outputs(op, op(**fakes), {})
        assert [(p.shape, p.dtype, p.stride()) for p in promised] == [(r.shape, r.dtype, r.stride()) for r in real]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_compiles_without_a_graph_break(op, device):
    torch.compiler.reset()  # one function serves all operators; its specializations are counted
    case = next(c for c in op.cases() if not c.large)
    args = contract.draw(case, device, seed=0)
    eager, traced = contract.copy(args), contract.copy(args)
    expected = contract.outputs(op, op(**eager), eager)
    compiled = torch.compile(lambda kwargs: op(**kwargs), fullgraph=True, backend="aot_eager")
    got = contract.outputs(op, compiled(traced), traced)
    assert all(contract.same_bits(a, b) for a, b in zip(expected, got, strict=True))
