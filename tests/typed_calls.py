"""Calls of operators that type checkers must accept, and others, each marked with `# bad`, that they must not.

tests/test_typing.py holds mypy and pyright to the marks; nothing runs this file.
"""

import torch
from torch import Tensor

import wave64
from wave64 import ops

x = torch.randn(4, 32)
ids = torch.zeros(4, dtype=torch.int64)

y: Tensor = ops.rms_norm(x, x[0])
y = ops.rms_norm(x, weight=x[0], eps=1e-5)
ops.rms_norm(x)  # bad: no weight
ops.rms_norm(x, x[0], 1e-6, 3)  # bad: one too many
ops.rms_norm(x, [1.0, 2.0])  # bad: a list
ops.rms_norm(x, x[0], epsilon=1e-6)  # bad: no such argument
ops.rms_norm(x, x[0], eps="1e-6")  # bad: a string

q, scale = ops.per_token_group_quant_fp8(x, 32)
q, scale = ops.per_tensor_quant_fp8(x, None)
one: Tensor = ops.per_tensor_quant_fp8(x)  # bad: two results
ops.per_token_group_quant_fp8(x, 32.0)  # bad: a float

ops.rotary_embedding(ids, x, None, 32, x)
ops.rotary_embedding(ids, None, x, 32, x)  # bad: query is no option
z: Tensor = ops.apply_token_bitmask(x, ids)  # bad: it returns nothing

out: Tensor = ops.fp8_scaled_mm(x, x, x, x, torch.bfloat16, bias=None)
ops.fp8_scaled_mm(x, x, x, x, "bfloat16")  # bad: a string
ops.no_such_operator(x)  # bad

with wave64.use("triton"), wave64.use(rms_norm="hip"):
    pass
