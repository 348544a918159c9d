"""The HIP kernels of prefill_attention and varlen_attention on more queries than the operators' small cases have, each
kernel on either architecture; and what they decline."""

import pytest
import torch
from test_latents import executed

from wave64 import OPS, platform
from wave64.op import Case
from wave64.ops.prefill_attention import make_prefill
from wave64.ops.varlen_attention import make_case as make_ragged
from wave64.testing.emulator.run import emulate

HALF = torch.float16
ONE = dict(heads=1, kv_heads=1)
RAGGED = {
    "64": dict(queries=[70, 3, 130], keys=[200, 40, 130], heads=4, kv_heads=2),
    "128-full": dict(queries=[70, 0], keys=[33, 7], qk_dim=128, causal=False, **ONE),
    "192-128": dict(queries=[70], keys=[100], heads=2, kv_heads=2, qk_dim=192, v_dim=128),
    "no-keys-fp16": dict(queries=[70, 3, 5], keys=[60, 0, 2], dtype=HALF, **ONE),
    "128-fp16": dict(queries=[66], keys=[66], qk_dim=128, dtype=HALF, heads=2, kv_heads=1),
    "192-128-fp16": dict(queries=[66], keys=[66], qk_dim=192, v_dim=128, dtype=HALF, **ONE),
}
PAGED = {
    "64-sinks": dict(new=[0, 70, 2], seq_lens=[12, 70, 0], sinks=True, **ONE),
    "128-full-window": dict(new=[70], seq_lens=[200], head_dim=128, page_size=64, sliding_window=77, causal=False,
                            **ONE),
    "64-fp16": dict(new=[70], seq_lens=[70], dtype=HALF, **ONE),
    "128-fp16": dict(new=[70], seq_lens=[90], head_dim=128, dtype=HALF, page_size=48, **ONE),
    "64-fp8": dict(new=[70], seq_lens=[90], fp8=True, **ONE),
    "128-fp8": dict(new=[70, 9], seq_lens=[150, 9], heads=4, kv_heads=2, head_dim=128, page_size=48, fp8=True,
                    per_head=True, sinks=True),
    "64-fp16-from-fp8": dict(new=[70], seq_lens=[90], fp8=True, dtype=HALF, **ONE),
    "128-fp16-from-fp8": dict(new=[70], seq_lens=[90], head_dim=128, fp8=True, dtype=HALF, **ONE),
}
CASES = [("varlen_attention", Case(name, lambda options=options: make_ragged(**options)))
         for name, options in RAGGED.items()]
CASES += [("prefill_attention", Case(name, lambda options=options: make_prefill(**options)))
          for name, options in PAGED.items()]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.id}") for op, case in CASES])
def test_machine_code_keeps_the_contract(op, case, arch, record_property):
    assert executed(arch, op, case, record_property) == 1


@pytest.mark.parametrize(("options", "words"), [
    (dict(new=[64], seq_lens=[64]), "is for calls with more than 64"),
    (dict(head_dim=80), "serves heads of 64 or 128, these have 80"), (dict(logit_cap=5.0), "has no logit_cap"),
    (dict(page_size=5), "page_size must be a multiple of 16, got 5"),
    (dict(dtype=torch.float32), "multiplies bf16 and fp16, not torch.float32"),
])
def test_what_is_declined(options, words):
    args = make_prefill(**dict(new=[70], seq_lens=[70]) | options)
    with platform.target("gfx942"):
        assert words in (OPS["prefill_attention"].backends["hip"].supports(**args) or "")
    with platform.target("gfx1201"):
        assert "CDNA's matrix instructions" in (OPS["prefill_attention"].backends["hip"].supports(**args) or "")


def test_what_of_ragged_heads_is_declined():
    args = make_ragged([70], [70], qk_dim=576, v_dim=512, **ONE)
    with platform.target("gfx942"):
        assert "these have 576 and 512" in (OPS["varlen_attention"].backends["hip"].supports(**args) or "")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_vector_instructions_for_a_score(arch):
    """In the steady state, of 256 queries: AITER's assembly takes twice as many vector cycles for a score on gfx942."""
    counts = []
    for keys in (256, 512):
        with platform.target(arch), emulate(arch) as ran:
            OPS["varlen_attention"].backends["hip"].run(**make_ragged([256], [keys], qk_dim=128, causal=False, **ONE))
        counts.append(ran.instructions)
    assert 200 < (counts[1] - counts[0]) * 32 * 64 / (256 * 256) < 380  # of a wave, for 32 queries and 64 keys
