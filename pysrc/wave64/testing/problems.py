"""Small problems that show what a launch configuration costs: executed on the emulator in a second or two, with the
tiles, element types and widths of the large calls that a row of a tuned table is for.

`problem(op, key, rows)` is the same for every configuration of the same tuning key, so that what configurations use of
each unit can be compared as it is. `typical(table, row)` gives a key that a table's row is chosen for.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from wave64 import OPS
from wave64.op import Case
from wave64.ops.fp8_block_scaled_mm import make_case as make_block_product
from wave64.ops.fp8_scaled_mm import make_case as make_product
from wave64.ops.fused_moe import make_case as make_experts
from wave64.ops.mla_decode import make_case as make_latents
from wave64.ops.mla_decode_rope import make_case as make_rotated
from wave64.ops.paged_attention import make_case as make_decode
from wave64.ops.prefill_attention import make_prefill
from wave64.ops.varlen_attention import make_case as make_ragged
from wave64.testing.cost import usages
from wave64.tuning import Row, Table

#: Rows (tokens, queries) of a problem, where its key has as many: as the largest tiles.
ROWS = 256
Key = Mapping[str, Any]  # of a row: numbers, flags and names, by the parameter

#: Keys before a prompt's, and of a decoding sequence; columns and depth of products.
KEYS, COLUMNS, DEPTH = 128, 256, 384


def _dtype(key: Key) -> torch.dtype:
    return torch.float32 if key.get("fp32") or key.get("kind") == "fp32" else torch.bfloat16


def _products(make: Callable, key: Key, rows: int) -> Callable[[], dict]:
    return partial(make, min(key["m"], rows), COLUMNS, DEPTH)


def _experts(key: Key, rows: int) -> Callable[[], dict]:
    options = {"row": dict(scales="channel"), "block": dict(scales="block", block_shape=[128, 128])}
    sizes = dict(hidden=DEPTH, inter=COLUMNS, dtype=_dtype(key), **options.get(key["kind"], {}))
    if key["pairs"] <= 32:
        return partial(make_experts, 2, 4, 2, **sizes)
    return partial(make_experts, min(key["per_expert"], rows), 1, 1, **sizes)


def _decode(key: Key, rows: int) -> Callable[[], dict]:
    return partial(make_decode, [KEYS], heads=min(key["group"], 16), kv_heads=1, head_dim=key["head_dim"],
                   dtype=_dtype(key), fp8=key["fp8"])


def _latents(make: Callable, key: Key, rows: int) -> Callable[[], dict]:
    return partial(make, [KEYS], heads=min(key["rows"], 64), page_size=64, dtype=_dtype(key), fp8=key["fp8"])


def _prompt(key: Key, rows: int) -> Callable[[], dict]:
    new = min(key["max_seqlen_q"], rows)
    return partial(make_prefill, [new], [new + KEYS], heads=1, kv_heads=1, head_dim=key["head_dim"],
                   dtype=_dtype(key), logit_cap=8.0 if key["capped"] else 0.0)


def _ragged(key: Key, rows: int) -> Callable[[], dict]:
    new = min(key["max_seqlen_q"], rows)
    return partial(make_ragged, [new], [new + KEYS], heads=1, kv_heads=1, qk_dim=key["qk_dim"], v_dim=key["v_dim"],
                   dtype=_dtype(key))


_DECODING = dict(rows=[16], fp32=[False], fp8=[False], num_seqs=[64])
#: operator -> (problem of its tuning key, values of usual calls, the most usual first)
_PROBLEMS: dict[str, tuple[Callable[[Key, int], Callable[[], dict]], dict[str, list]]] = {
    "fp8_scaled_mm": (partial(_products, make_product), dict(m=[4096])),
    "fp8_block_scaled_mm": (partial(_products, make_block_product), dict(m=[4096])),
    "fused_moe": (_experts, dict(kind=["block"], pairs=[4096], per_expert=[1024])),
    "mla_decode": (partial(_latents, make_latents), _DECODING),
    "mla_decode_rope": (partial(_latents, make_rotated), _DECODING),
    "paged_attention": (_decode, dict(group=[8], head_dim=[128], fp32=[False], fp8=[False])),
    "prefill_attention": (_prompt, dict(max_seqlen_q=[4096], head_dim=[128, 256], fp32=[False], capped=[False])),
    "varlen_attention": (_ragged, dict(max_seqlen_q=[4096], qk_dim=[192, 128], v_dim=[128, 256], fp32=[False])),
}


def typical(table: Table, row: Row) -> dict[str, Any]:
    """The tuning key of a usual call that the table chooses this row for: of a range, its upper bound or the next power
    of 2. Raises LookupError where no usual call has one."""
    def one(wanted: Any) -> Any:
        if not isinstance(wanted, list):
            return wanted
        low, high = wanted
        return 1 << (low - 1).bit_length() if high is None else high

    usual = _PROBLEMS[table.op][1] | {name: [one(wanted)] for name, wanted in row.when.items()}
    for values in itertools.product(*usual.values()):
        key = dict(zip(usual, values, strict=True))
        if next(each for each in table.rows if each.fits(key, table.file)) is row:
            return key
    raise LookupError(f"{table.file}: {dict(row.when)}: expected a row that a usual call gets; add one to problems.py")


def problem(op: str, key: Key, rows: int = ROWS) -> Case:
    """A small call of the operator with this tuning key, of at most so many rows. Raises KeyError for an operator that
    has no problem here, or where the key lacks a name that its problem needs."""
    return Case("small", _PROBLEMS[op][0](key, rows))


def execute_with(op: str, key: Key, config: Key, arch: str, rows: int = ROWS) -> dict[str, dict[str, float]]:
    """Kernel with matrix instructions -> the LDS cycles that a small problem of this key, of at most so many rows,
    takes with a configuration of Triton's, and `free`, those without bank conflicts. Needs a process without
    TRITON_INTERPRET. Raises LookupError for an operator that chooses no configuration."""
    tuning = OPS[op].backends["triton"].tuning
    if tuning is None:
        raise LookupError(f"{op}: backend triton chooses no configuration")
    with tuning.forced(tuning.config(**config)):
        found = usages(op, "triton", problem(op, key, rows), arch)
    return {kernel: {"LDS": usage.cycles["lds"], "free": usage.conflict_free}
            for kernel, usage in found.items() if usage.cycles["matrix"]}
