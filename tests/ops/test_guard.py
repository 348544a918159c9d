"""Under the interpreter a Triton kernel that reads or writes outside its tensors fails by name: it neither corrupts the
process nor passes. Deliberate kernels without masks, wrong by a byte or by a page."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from wave64 import OPS
from wave64.op import Case
from wave64.op import op as declare
from wave64.testing import contract, guard

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="kernels are compiled here, not interpreted")
WIDTH = 37


@triton.jit
def _double_kernel(y_ptr, x_ptr, count, LOAD: tl.constexpr, STORE: tl.constexpr, SHIFT: tl.constexpr,
                   BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + SHIFT, mask=offs < LOAD, other=0.0)
    tl.store(y_ptr + offs + SHIFT, 2 * x, mask=offs < STORE)


@triton.jit
def _count_kernel(y_ptr, x_ptr, count, STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < count, other=0.0) * 2, mask=offs < STORE)


@triton.jit
def _doubled(x):
    return tl.cdiv(x, 1) * 2


@triton.jit
def _powers_kernel(y_ptr, COUNT: tl.constexpr):
    x = tl.program_id(0) + 1
    for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(y_ptr + i, x)
        x = _doubled(x)


def test_a_device_function_patches_nothing_that_its_launch_has_patched(monkeypatch):
    """Else the interpreter spends a third of its time on it."""
    patched = []
    original = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *rest: patched.append(pkg) or original(pkg, *rest))
    counts = []
    for count in (3, 3, 9):  # the first launch finds triton.language's own functions not patched yet
        y = torch.zeros(count, dtype=torch.int32)
        before = len(patched)
        _powers_kernel[(1,)](y, COUNT=count)
        counts.append(len(patched) - before)
        assert y.tolist() == [2 ** i for i in range(count)]
        assert tl.core.is_builtin(tl.load), "a launch leaves the language as it was"
    assert counts[1] == counts[2] > 0


def declared(run):
    def test_double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = declare(cases=list, cost=lambda x: None)(test_double)
    del OPS["test_double"]
    op.backend("triton")(run)
    return op


def verify(run):
    contract.verify(declared(run), "triton", Case("some", lambda: dict(x=torch.randn(WIDTH))), "cpu")


def doubled(load=WIDTH, store=WIDTH, shift=0):
    def run(x):
        y = torch.empty_like(x)
        _double_kernel[(1,)](y, x, WIDTH, LOAD=load, STORE=store, SHIFT=shift, BLOCK=64)
        return y
    return run


def counted(store):
    def run(x):
        y = torch.zeros_like(x)
        _count_kernel[(1,)](y, x, WIDTH, STORE=store, BLOCK=64)
        return y
    return run


@pytest.mark.parametrize("run", [doubled(), counted(WIDTH)])
def test_a_kernel_with_its_masks_passes(run):
    verify(run)


@pytest.mark.parametrize(("run", "message"), [
    (doubled(store=64), r"stores 4 bytes 148 bytes into y_ptr of _double_kernel \(float32 \[37\] on cpu\), of 148"),
    (doubled(store=WIDTH + 1), "stores 4 bytes 148 bytes into y_ptr"),
    (doubled(load=64), r"loads 4 bytes 148 bytes into argument x, x_ptr of _double_kernel \(.*\), of 148 bytes"),
    (doubled(load=WIDTH + 1), "loads 4 bytes 148 bytes into argument x"),
    (doubled(shift=-1), "loads 4 bytes 4 bytes before argument x, x_ptr"),
    (doubled(load=0, shift=-1), "stores 4 bytes 4 bytes before y_ptr"),
    (doubled(shift=2**20), "loads 4 bytes"),
    (counted(64), "changes 4 bytes 148 bytes into y_ptr of _count_kernel"),
])
def test_what_leaves_a_tensor_is_named(run, message):
    with pytest.raises(contract.ContractError, match=f"^test_double, case some: {message}"):
        verify(run)


def test_nothing_is_changed_by_an_access_that_is_refused():
    memory = torch.zeros(64)
    y = torch.frombuffer(memory.numpy(), dtype=torch.float32, count=WIDTH)
    with guard.watched(), pytest.raises(Exception, match="stores 4 bytes 148 bytes into y_ptr"):
        _double_kernel[(1,)](y, torch.ones(64), WIDTH, LOAD=64, STORE=64, SHIFT=0, BLOCK=64)
    assert not memory.any()


def test_an_error_of_another_kind_stays_what_it_is():
    def run(x):
        raise KeyError("other")

    with pytest.raises(KeyError, match="other"):
        verify(run)
    verify(doubled())  # and nothing is left watched by the kernels that failed
