"""Adapters to AITER, over a recorder with the signatures of a published version, which computes what its kernels do by
the references. What an adapter gives is what the operator's contract says; what does not fit is a reason in words."""

from types import ModuleType

import pytest
from torch import Tensor

from wave64 import OPS
from wave64.backends import aiter
from wave64.testing import contract


def rms_norm(input: Tensor, weight: Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0) -> Tensor:
    return OPS["rms_norm"].reference(input, weight, epsilon)


def rmsnorm2d_fwd_with_add(out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor,
                           epsilon: float, use_model_sensitive_rmsnorm: int = 0) -> None:
    assert len({each.data_ptr() for each in (out, input, residual_in, residual_out)}) == 4
    residual_out.copy_(residual_in + input)
    out.copy_(OPS["rms_norm"].reference(residual_out, weight, epsilon))


def topk_softmax(topk_weights: Tensor, topk_indices: Tensor, token_expert_indices: Tensor, gating_output: Tensor,
                 need_renorm: bool) -> None:
    assert token_expert_indices.shape == topk_indices.shape
    weights, ids = OPS["topk_softmax"].reference(gating_output, topk_indices.shape[1], need_renorm)
    topk_weights.copy_(weights)
    topk_indices.copy_(ids)


def grouped_topk(gating_output: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_expert_group: int, topk_group: int,
                 need_renorm: bool, is_softmax: bool = True, routed_scaling_factor: float = 1.0,
                 bias: Tensor | None = None) -> None:
    scoring = "softmax" if is_softmax else "sigmoid"
    weights, ids = OPS["grouped_topk"].reference(gating_output, topk_ids.shape[1], num_expert_group, topk_group,
                                                 need_renorm, scoring, bias, routed_scaling_factor)
    topk_weights.copy_(weights)
    topk_ids.copy_(ids)


def biased_grouped_topk(gating_output: Tensor, correction_bias: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                        num_expert_group: int, topk_group: int, need_renorm: bool,
                        routed_scaling_factor: float = 1.0) -> None:
    grouped_topk(gating_output, topk_weights, topk_ids, num_expert_group, topk_group, need_renorm, False,
                 routed_scaling_factor, correction_bias)


FUNCTIONS = (rms_norm, rmsnorm2d_fwd_with_add, topk_softmax, grouped_topk, biased_grouped_topk)


@pytest.fixture
def package(monkeypatch):
    """AITER, as far as adapters call it."""
    made = ModuleType("aiter")
    for function in FUNCTIONS:
        setattr(made, function.__name__, function)
    monkeypatch.setattr(aiter, "package", lambda: made)
    return made


ADAPTED = [op for op in OPS.values() if "aiter" in op.backends]


def test_there_are_adapters():
    assert {op.name for op in ADAPTED} >= {"rms_norm", "fused_add_rms_norm", "topk_softmax", "grouped_topk"}


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_an_adapter_keeps_the_contract(op, package):
    backend, served = op.backends["aiter"], 0
    assert backend.absent is not None
    assert backend.absent(None) is None
    for case in (case for case in op.cases() if not case.large):
        if backend.supports(**contract.draw(case, "cpu", 0)) is None:
            contract.verify(op, "aiter", case, "cpu")
            served += 1
    assert served >= 3


@pytest.mark.parametrize("op", ADAPTED, ids=lambda op: op.name)
def test_another_signature_is_a_reason_and_no_crash(op, package):
    absent = op.backends["aiter"].absent
    for name in [function.__name__ for function in FUNCTIONS]:
        delattr(package, name)
    assert absent(None).startswith("this aiter has no ")
    for function in FUNCTIONS:
        setattr(package, function.__name__, lambda x, /, strange: None)
    assert " takes no " in absent(None)
    assert ", strange besides" in absent(None)


def test_each_difference_is_named():
    module = ModuleType("aiter")
    vars(module)["norm"] = lambda input, weight, epsilon, layout, fast=True: None
    given = ["input", "weight", "epsilon"]
    assert aiter.differs(module, "norm", [*given, "layout"]) is None
    assert aiter.differs(module, "norm", given) == "this aiter's norm takes layout besides"
    assert aiter.differs(module, "norm", [*given, "layout", "slow"]) == "this aiter's norm takes no slow"


def test_why_aiter_does_not_serve_is_said(monkeypatch):
    assert aiter.missing("cpu") == "AITER's kernels want a GPU"
    monkeypatch.setattr(aiter.platform, "is_hip", lambda: False)
    assert aiter.missing("cuda") == "AITER's kernels want a ROCm build of torch"
    monkeypatch.setattr(aiter.platform, "is_hip", lambda: True)
    monkeypatch.setattr(aiter, "package", lambda: "aiter cannot be imported (RuntimeError: no driver)")
    assert aiter.missing("cuda") == "aiter cannot be imported (RuntimeError: no driver)"
