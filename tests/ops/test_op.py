"""The op machinery: declaration, binding, overrides, errors; and the contract test's own ability to fail."""

import subprocess
import sys

import pytest
import torch

import wave64
from wave64 import OPS, BadArgument, Case, Cost, NotSupported, ops
from wave64.__main__ import main
from wave64.op import BACKENDS, Backend, Op
from wave64.testing import contract


@pytest.fixture
def x(device):
    return torch.randn(4, 32, device=device)


def test_one_stem(request):
    """An operator's name is its file's name in every layer that knows it."""
    root = request.config.rootpath
    contracts = {p.stem for p in (root / "pysrc/wave64/ops").glob("*.py")} - {"__init__"}
    assert contracts == set(OPS)
    for op in OPS.values():
        assert op.reference.__module__ == f"wave64.ops.{op.name}"
        assert getattr(ops, op.name) is op
        assert op.__doc__.strip(), f"{op.name} has no contract"
        for name, backend in op.backends.items():
            if name in ("triton", "hopper"):
                folder = "wave64.triton_ops" + (".hopper" if name == "hopper" else "")
                assert backend.run.__module__ == f"{folder}.{op.name}"
            if name == "cpu":
                assert backend.run.__module__ == f"wave64.backends.cpu_ops.{op.name}"
    assert {p.stem for p in (root / "hip/ops").glob("*.hip")} <= set(OPS)
    assert {name for name, op in OPS.items() if "triton" in op.backends} <= {
        p.stem for p in (root / "triton_ops").glob("*.py")}


def test_every_operator_but_collectives_and_linear_has_a_triton_kernel():
    """What hip's linear declines is torch's product, the reference."""
    collectives = [op.name for op in OPS.values() if "group" in op.signature.parameters]
    assert sorted(collectives) == ["all_gather", "all_reduce", "fused_all_reduce_rms_norm",
                                   "fused_all_reduce_rms_norm_quant_fp8", "reduce_scatter"]
    assert sorted(op.name for op in OPS.values() if "triton" not in op.backends) == sorted([*collectives, "linear"])


def test_torch_ops_serve_the_same_call(x):
    weight = torch.randn(32, device=x.device)
    assert torch.equal(torch.ops.wave64.rms_norm(x, weight), ops.rms_norm(x, weight))
    assert torch.equal(ops.rms_norm(x=x, weight=weight, eps=1e-6), ops.rms_norm(x, weight))


def test_refusals_name_operator_argument_expected_and_got(x):
    with pytest.raises(BadArgument, match=r"rms_norm: weight: expected .*\[32\].*, got float32 \[31\] on"):
        ops.rms_norm(x, torch.randn(31, device=x.device))
    with pytest.raises(ValueError, match="rms_norm: weight"):
        torch.ops.wave64.rms_norm(x, torch.randn(32, device=x.device).half())


@pytest.mark.parametrize("name", ["rotary_embedding", "reshape_and_cache", "fused_add_rms_norm", "rms_norm"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_eager_call_runs_few_functions(name, mode, monkeypatch):
    """What a call costs on the host is the Python functions between the caller and the backend: counted, not timed."""
    op = OPS[name]
    args = tuple(contract.draw(next(case for case in op.cases() if not case.sparse), "cpu", 0).values())
    monkeypatch.setattr(op, "bound", {"cpu": (Backend("nothing", lambda *args: None),)})
    monkeypatch.setattr(op, "check", None)
    called = []
    with mode():
        op(*args)
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
        try:
            op(*args)
        finally:
            sys.setprofile(None)
    ours = [each for each in called if not each.startswith("is_")]  # torch's questions differ by version
    assert ours == ["__call__", name, "_serve", "_run", "<lambda>"] + ["bump"] * bool(op.mutates)


def test_use_demands_and_restores(x):
    kind = x.device.type
    before = ops.rms_norm.bound[kind]
    with wave64.use(rms_norm="triton"):
        assert [b.name for b in ops.rms_norm.bound[kind]] == ["triton"]
        weight = torch.randn(32, device=x.device)
        torch.testing.assert_close(ops.rms_norm(x, weight), ops.rms_norm.reference(x, weight))
    assert ops.rms_norm.bound[kind] == before
    with wave64.use("triton"):
        assert ops.rms_norm.bound[kind][0].name == "triton"
    with pytest.raises(NotSupported, match="rms_norm: backend aiter was asked for: "), wave64.use(rms_norm="aiter"):
        pass
    with pytest.raises(NotSupported, match="no operator 'rms_nrom'"), wave64.use(rms_nrom="triton"):
        pass
    with pytest.raises(NotSupported, match="no backend 'trition'"), wave64.use("trition"):
        pass
    assert ops.rms_norm.bound[kind] == before


def test_every_pair_is_bound_available_or_off_with_a_reason():
    rows = wave64.report()
    assert {(r["op"], r["backend"]) for r in rows} == {(o, b) for o in OPS for b in BACKENDS}
    assert all(r["reason"] for r in rows if r["status"] == "off")
    assert not any(r["reason"] for r in rows if r["status"] == "bound")
    assert sum(r["status"] == "bound" for r in rows) == len(OPS)
    table = wave64.table()
    assert all(r["op"] in table and r["reason"] in table for r in rows)


def in_place(qkv):
    ops.rotary_embedding(torch.arange(3), qkv[:, :32], None, 32, torch.ones(8, 32))


def view_itself(q):
    ops.rotary_embedding(torch.arange(3), q, None, 32, torch.ones(8, 32))


def of_a_copy(qkv):
    q = qkv[:, :32].clone()
    ops.rotary_embedding(torch.arange(3), q, None, 32, torch.ones(8, 32))
    qkv[:, :32].copy_(q)


@pytest.mark.parametrize(("function", "view"), [
    pytest.param(in_place, lambda base: base[1:].clone(), id="of-a-whole-input"),
    pytest.param(view_itself, lambda base: base[1:, 8:40], id="input-with-offset"),
    pytest.param(of_a_copy, lambda base: base[1:], id="by-way-of-a-copy"),
    pytest.param(in_place, lambda base: base[1:], id="view-of-input-with-offset", marks=pytest.mark.xfail(
        strict=True, reason="torch's, of any custom operator: docs/operators.md"))])
def test_what_is_written_under_compile(function, view):
    """What docs/operators.md promises; where torch mends its fault, the last one passes and the paragraph can go."""
    torch.compiler.reset()
    eager, compiled = (torch.arange(4.0 * 60).reshape(4, 60) for _ in range(2))
    mine, its = view(eager), view(compiled)
    function(mine)
    torch.compile(function, backend="aot_eager", fullgraph=True)(its)
    assert torch.equal(mine, its)
    assert torch.equal(eager, compiled)


def declare(reference, **kwargs) -> Op:
    """An operator of the test's own, bound to nothing but what the test registers."""
    op = Op(reference, cases=kwargs.pop("cases", list), cost=lambda *_: Cost(0), mutates=kwargs.pop("mutates", ()),
            check=None, fake=None, agree=None)
    op.bound = {"cpu": (op.backends["reference"],), "cuda": (op.backends["reference"],)}
    return op


def test_arguments_a_backend_declines_go_to_the_next_one_aloud(caplog, device):
    def test_double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = declare(test_double)
    op.backend("hip", supports=lambda x: "only even lengths" if len(x) % 2 else None)(lambda x: x + x + 1)
    op.bound = dict.fromkeys(("cpu", "cuda"), (op.backends["hip"], op.backends["reference"]))
    one, two = torch.ones(1, device=device), torch.ones(2, device=device)
    assert op(two).tolist() == [3, 3]
    assert [op(one).tolist() for _ in range(2)] == [[2], [2]]
    assert [r.message for r in caplog.records] == [
        "test_double: backend hip declines: only even lengths; the next one serves"]
    op.bound = dict.fromkeys(("cpu", "cuda"), (op.backends["hip"],))
    with pytest.raises(NotSupported, match="test_double: backend hip: only even lengths"):
        op(one)


def wrong(name):
    """Backends of `y = 2 x`, `total += sum(x)`, each breaking one clause."""
    def off_by_one(x, total):
        total += x.sum()
        return x * 2 + 1e-3

    def leaves_a_hole(x, total):
        total += x.sum()
        y = torch.empty_like(x)
        y[1:] = x[1:] * 2
        return y

    def writes_an_argument(x, total):
        total += x.sum()
        y = x * 2
        x[0] = 0
        return y

    def writes_past_its_view(x, total):
        total += x.sum()
        total.as_strided((1,), (1,), total.storage_offset() + 1).add_(1)
        return x * 2

    def unsteady(x, total, calls=[0]):  # noqa: B006
        calls[0] += 1
        total += x.sum()
        return x * 2 + calls[0] * 1e-8

    def wrong_shape(x, total):
        total += x.sum()
        return (x * 2)[None]

    def right(x, total):
        total += x.sum()
        return x * 2

    return locals()[name]


@pytest.mark.parametrize(("name", "message"), [
    ("off_by_one", "error"), ("leaves_a_hole", "error"), ("writes_an_argument", "argument x changed"),
    ("writes_past_its_view", "argument total changed outside"), ("unsteady", "differs between two runs"),
    ("wrong_shape", "expected float32"), ("right", None)])
def test_the_contract_can_fail(name, message, device):
    def test_contract(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total += x.sum()
        return x * 2

    op = declare(test_contract, mutates=("total",))
    op.backend("triton")(wrong(name))
    case = Case("some", lambda: dict(x=torch.rand(5), total=torch.zeros(3)[1:2]))
    if message is None:
        contract.verify(op, "triton", case, "cpu")
    else:
        with pytest.raises(contract.ContractError, match=message):
            contract.verify(op, "triton", case, "cpu")


def python(*args, **env):
    import os

    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **env})


@pytest.mark.slow
def test_environment_override_is_loud():
    done = python("-c", "import wave64", WAVE64_BACKEND="rms_norm=aiter")
    assert done.returncode != 0
    assert "NotSupported: rms_norm: backend aiter was asked for" in done.stderr
    done = python("-c", "import wave64; print(wave64.ops.rms_norm.bound[wave64.platform.device_type()][0].name)",
                  WAVE64_BACKEND="rms_norm=triton")
    assert done.stdout.strip() == "triton", done.stderr


@pytest.mark.slow
def test_triton_is_not_imported_where_it_cannot_serve(device):
    done = python("-c", "import sys, wave64; print('triton' in sys.modules)", TRITON_INTERPRET="0")
    assert done.stdout.strip() == str(device == "cuda"), done.stderr


@pytest.mark.slow
def test_command_line_prints_the_table_and_checks(capsys):
    done = python("-m", "wave64")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in OPS)
    assert main(["check", "silu_and_mul"]) == 0
    assert "silu_and_mul" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["check", "no_such_op"])
    assert end.value.code == 2
    assert "no_such_op" in capsys.readouterr().err
