"""What every operator demands of its arguments, whichever operator it is: kinds, devices, dtypes, gradients, memory."""

import copy
import functools
import importlib
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import wave64
from wave64 import OPS, BadArgument, NotSupported, arguments, ops
from wave64.testing import contract

machinery = importlib.import_module("wave64.op")


def with_backends(chosen):
    """Each operator's reference, and its Triton kernel if it has one."""
    return (pytest.param(op, backend, id=f"{backend}-{op.name}") for op in chosen
            for backend in ("reference", "triton") if backend in op.backends)


each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
mutating = pytest.mark.parametrize("op", [op for op in OPS.values() if op.mutates],
                                   ids=[op.name for op in OPS.values() if op.mutates])


def is_floating(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1


def draw(op, device="cpu", rows=1, dtype=None):
    """The arguments of the op's smallest case with written tensors of at least `rows` rows, of `dtype` if there is one
    such; all parameters by name."""
    return contract.copy(smallest(op.name, device, rows, dtype))


@functools.cache
def smallest(name, device, rows, dtype):
    op, found = OPS[name], []
    for case in op.cases():
        if case.large or case.sparse:
            continue
        args = contract.draw(case, device, seed=0)
        tensors = [value for value in args.values() if isinstance(value, Tensor)]
        if all(value.numel() for value in tensors) and all(
                value.shape[0] >= rows for name, value in args.items() if name in op.mutates and value is not None):
            other = sum(is_floating(value) and value.dtype != dtype for value in tensors) if dtype else 0
            found.append((other, sum(value.numel() for value in tensors), len(found), args))
    bound = op.signature.bind(**min(found)[3])
    bound.apply_defaults()
    return dict(bound.arguments)


def tensors_of(args):
    return {name: value for name, value in args.items() if isinstance(value, Tensor)}


def refused(op, argument, call, *words):
    pattern = f"^{op.name}: {argument}: expected " + "".join(f".*{re.escape(word)}" for word in words)
    with pytest.raises(BadArgument, match=pattern):
        call()


@each_op
def test_each_argument_has_a_kind(op):
    args = draw(op)
    wrong = {Tensor: ([1.0], 2.5, "x", np.zeros(2)), int: (1.5, "x", [1], 2**31, -(2**31) - 1, torch.ones(())),
             float: ("x", [1.0], 1j, torch.ones(())), bool: (2, "x", torch.ones(())), str: (1, None),
             torch.dtype: ("x",), list[int]: (3, [1.5], "x")}
    for p in op._examiner.parameters:
        for value in (*wrong[p.kind], *(() if p.optional else (None,))):
            refused(op, p.name, lambda: op(**args | {p.name: value}), "got")  # noqa: B023


@each_op
def test_a_call_is_bound_to_the_signature_in_words(op):
    args = draw(op)
    names = list(args)
    refused(op, names[0], lambda: op(), "a tensor", "got nothing", f"the call is {op.name}(")
    refused(op, "color", lambda: op(**args, color=1), "one of the arguments", "got an unknown one")
    refused(op, names[0], lambda: op(*args.values(), **{names[0]: args[names[0]]}), "one value")
    refused(op, names[-1], lambda: op(*args.values(), 1), f"at most {len(names)} arguments")


def test_what_can_be_converted_is(device):
    x = torch.randn(4, 256, device=device)
    weight = torch.ones(256, device=device)
    assert torch.equal(ops.rms_norm(x, weight, np.float32(1)), ops.rms_norm(x, weight, 1))
    expected = ops.per_token_group_quant_fp8(x, 128)
    got = ops.per_token_group_quant_fp8(x, np.int64(128))
    assert all(contract.same_bits(a, b) for a, b in zip(got, expected, strict=True))
    gating = torch.randn(3, 8, device=device)
    assert torch.equal(ops.topk_softmax(gating, 2, np.bool_(True))[1], ops.topk_softmax(gating, 2, True)[1])


@each_op
def test_tensors_lie_on_one_device(op):
    args = draw(op)
    first, *others = tensors_of(args)
    for name in others:
        call = args | {name: args[name].to("meta")}
        refused(op, ".*" if op.device_of else name, lambda: op(**call), "on ")  # noqa: B023
        if op.device_of:  # it has a rule of its own
            continue
        with pytest.raises(BadArgument, match="on cpu, where"):  # what the torch operator runs, too
            op._examiner.examine(tuple(call.values()), eager=False)


class Elsewhere(Tensor):
    """A CPU tensor that says it lies on GPU 1."""

    is_cpu: Any = property(lambda self: False)
    is_cuda: Any = property(lambda self: True)

    def get_device(self):
        return 1


def test_a_call_runs_on_the_device_of_its_tensors(monkeypatch):
    """`cuda:1` without set_device: backends find their device current, so architecture and stream are its own."""
    current, seen = [0], []

    class Entered:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    arguments.PLAIN.add(Elsewhere)
    monkeypatch.setattr(machinery, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Entered)
    backend = machinery.Backend("hip", lambda x, weight, eps: seen.append(current[0]),
                                supports=lambda *args: seen.append(current[0]))
    monkeypatch.setattr(ops.rms_norm, "bound", {"cuda": (backend,), "cpu": (backend,)})
    try:
        x, weight = torch.ones(2, 4).as_subclass(Elsewhere), torch.ones(4).as_subclass(Elsewhere)
        ops.rms_norm(x, weight)
        assert seen == [1, 1]
        assert current == [0]
    finally:
        arguments.PLAIN.discard(Elsewhere)


@each_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_numbers_are_floating(op, dtype):
    args = draw(op)
    for name in [name for name, value in args.items() if is_floating(value)]:
        refused(op, name, lambda: op(**args | {name: args[name].to(dtype)}), str(dtype).removeprefix("torch."))  # noqa: B023


@each_op
def test_a_gradient_is_refused_where_it_would_vanish(op):
    args = draw(op)
    for name in [name for name, value in args.items() if is_floating(value)]:
        call = args | {name: args[name].clone().requires_grad_()}
        refused(op, name, lambda: op(**call), "which does; there is no backward")  # noqa: B023
        with pytest.raises(BadArgument, match=f"^{op.name}: .*there is no backward"):
            op.torch_op(**call)
        with torch.no_grad():
            op(**call)


@pytest.mark.parametrize(("op", "backend"), [*with_backends(op for op in OPS.values() if op.mutates)])
def test_what_is_written_has_a_new_version(op, backend, device):
    args = contract.copy(draw(op, device))
    written = [args[name] for name in op.mutates if args[name] is not None]
    before = [tensor._version for tensor in written]
    with wave64.use(**{op.name: backend}):
        op(**args)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
    with torch.inference_mode():  # whose tensors have no version
        op(**{name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()})


def test_autograd_notices_that_a_saved_tensor_was_written(device):
    leaf = torch.randn(2, 32, device=device, requires_grad=True)
    x = leaf * 1
    squares = x.square()
    with torch.no_grad(), wave64.use(fused_add_rms_norm="triton"):
        ops.fused_add_rms_norm(x, torch.zeros(2, 32, device=device), torch.ones(32, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


@each_op
def test_autocast_changes_nothing(op):
    args = draw(op, dtype=torch.float32)
    plain, eager, registered = (contract.copy(args) for _ in range(3))
    expected = contract.outputs(op, op(**plain), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contract.outputs(op, op(**eager), eager)
        also = contract.outputs(op, op.torch_op(**registered), registered)
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in args.items()}
            promised = contract.outputs(op, op(**fakes), fakes)
    for a, b, c, d in zip(expected, got, also, promised, strict=True):
        assert contract.same_bits(a, b)
        assert contract.same_bits(a, c)
        assert d.dtype == a.dtype


@mutating
def test_what_is_written_does_not_overlap_itself(op):
    args = draw(op, rows=2)
    for name in op.mutates:
        if (value := args[name]) is None:
            continue
        for shared in (value[:1].expand_as(value), value.as_strided(value.shape, (1, *value.stride()[1:]))):
            if shared.is_contiguous():
                continue
            refused(op, name, lambda: op(**args | {name: shared}), "no overlapping elements")  # noqa: B023


def test_two_written_arguments_are_two_tensors():
    x = torch.randn(4, 32)
    call = functools.partial(ops.fused_add_rms_norm, x, x, torch.ones(32))
    refused(ops.fused_add_rms_norm, "residual", call, "memory of its own")


@pytest.mark.parametrize(("shape", "strides", "disjoint"), [
    ((4, 8), (8, 1), True), ((4, 8), (1, 4), True), ((4, 8), (7, 1), False), ((4, 8), (0, 1), False),
    ((1, 8), (0, 1), True), ((4, 0), (0, 0), True), ((2, 3, 4), (4, 8, 1), True), ((2, 3, 4), (3, 8, 1), False),
    ((4,), (2,), True), ((), (), True)])
def test_disjoint_elements_are_told_by_strides(shape, strides, disjoint):
    assert arguments.is_disjoint(torch.zeros(100).as_strided(shape, strides)) is disjoint


@each_op
def test_operators_pickle_and_copy_as_themselves(op):
    assert pickle.loads(pickle.dumps(op)) is op
    assert copy.copy(op) is op
    assert copy.deepcopy({"norm": op})["norm"] is op


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.norm = torch.nn.Parameter(torch.ones(32), requires_grad=False), ops.rms_norm

    def forward(self, x):
        return self.norm(x, self.weight)


def test_a_module_that_holds_an_operator_is_saved_and_traced(tmp_path):
    module, x = Norm(), torch.randn(3, 32)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert loaded.norm is ops.rms_norm
    traced = torch.fx.symbolic_trace(module)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [torch.ops.wave64.rms_norm.default]
    assert torch.equal(traced(x), module(x))
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_transforms_and_fake_tensors_go_to_the_torch_operator(backend, device):
    x, weight = torch.randn(2, 3, 32, device=device), torch.ones(32, device=device)
    with wave64.use(rms_norm=backend):
        mapped = torch.func.vmap(ops.rms_norm, in_dims=(0, None))(x, weight)
        torch.testing.assert_close(mapped, torch.stack([ops.rms_norm(each, weight) for each in x]))
        mode = FakeTensorMode()
        fake, fake_weight = mode.from_tensor(x[0]), mode.from_tensor(weight)
        promised = ops.rms_norm(fake, fake_weight)  # outside of the mode
        assert (promised.shape, promised.dtype) == ((3, 32), torch.float32)
        assert type(promised) is type(fake)
        sub = x[0].as_subclass(type("Sub", (Tensor,), {}))
        torch.testing.assert_close(ops.rms_norm(sub, weight).as_subclass(Tensor), ops.rms_norm(x[0], weight))


@pytest.mark.parametrize(("op", "backend"), [*with_backends(OPS.values())])
def test_meta_tensors_get_shapes(op, backend):
    args = draw(op)
    real, metas = contract.copy(args), {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
    expected = contract.outputs(op, op(**real), {})
    with wave64.use(**{op.name: backend}):
        got = contract.outputs(op, op(**metas), {})
    assert [(g.shape, g.dtype, g.device.type) for g in got] == [(e.shape, e.dtype, "meta") for e in expected]


@each_op
def test_sparse_tensors_are_refused_in_words(op):
    args = draw(op)
    name, value = next(iter(tensors_of(args).items()))
    sparse = (value.float() if value.element_size() == 1 else value).to_sparse()  # there are none of FP8
    refused(op, name, lambda: op(**args | {name: sparse}), "sparse_coo")


SHAPES = {
    "no dimension": lambda x: torch.zeros((), dtype=x.dtype), "five dimensions": lambda x: x.reshape(1, 1, 1, 1, -1),
    "one more": lambda x: x[None], "flat": lambda x: x.reshape(-1), "no rows": lambda x: x[:0] if x.ndim else x,
    "no columns": lambda x: x[..., :0] if x.ndim else x, "transposed": lambda x: x.mT if x.ndim > 1 else x,
    "one of five dimensions": lambda x: torch.ones(1, 1, 1, 1, 1).to(x.dtype),
    "another dtype": lambda x: x.to(torch.bfloat16) if x.ndim < 2 else x.double()}


@each_op
def test_tensors_of_any_shape_are_served_or_refused_in_words(op):
    """As argument and operator; never as an error of something within."""
    said = []
    for name, value in tensors_of(draw(op)).items():
        for change in SHAPES.values():
            args = draw(op)
            try:
                op(**args | {name: change(value.clone())})
            except (BadArgument, NotSupported) as e:
                said.append(str(e))
    assert all(text.startswith(f"{op.name}: ") for text in said), said
