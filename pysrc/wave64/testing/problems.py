"""Small problems that show what a launch configuration costs: executed on the emulator in a second or two, with the
tiles, element types and widths of the large calls that a row of a tuned table is for.

`problem(op, facts, rows)` is the same for every configuration of the same facts, so that what configurations use of
each unit can be compared as it is. `typical(table, row)` gives facts that a table's row is chosen for.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from wave64.op import Case
from wave64.ops.fp8_block_scaled_mm import make_case as make_block_product
from wave64.ops.fp8_scaled_mm import make_case as make_product
from wave64.ops.fused_moe import make_case as make_experts
from wave64.ops.mla_decode import make_case as make_latents
from wave64.ops.mla_decode_rope import make_case as make_rotated
from wave64.ops.paged_attention import make_case as make_decode
from wave64.ops.prefill_attention import make_prefill
from wave64.ops.varlen_attention import make_case as make_ragged
from wave64.tuning import Row, Table

Facts = Mapping[str, Any]
#: Rows (tokens, queries) that a problem has, where its facts have as many: as the largest tiles.
ROWS = 256
#: Keys before a prompt's, and of a decoding sequence; columns and depth of products.
KEYS, COLUMNS, DEPTH = 128, 256, 384


def _dtype(facts: Facts) -> torch.dtype:
    return torch.float32 if facts.get("fp32") or facts.get("kind") == "fp32" else torch.bfloat16


def _products(make: Callable, facts: Facts, rows: int) -> Callable[[], dict]:
    return partial(make, min(facts["m"], rows), COLUMNS, DEPTH)


def _experts(facts: Facts, rows: int) -> Callable[[], dict]:
    options = {"row": dict(scales="channel"), "block": dict(scales="block", block_shape=[128, 128])}
    sizes = dict(hidden=DEPTH, inter=COLUMNS, dtype=_dtype(facts), **options.get(facts["kind"], {}))
    if facts["pairs"] <= 32:
        return partial(make_experts, 2, 4, 2, **sizes)
    return partial(make_experts, min(facts["per_expert"], rows), 1, 1, **sizes)


def _decode(facts: Facts, rows: int) -> Callable[[], dict]:
    return partial(make_decode, [KEYS], heads=min(facts["group"], 16), kv_heads=1, head_dim=facts["head_dim"],
                   dtype=_dtype(facts), fp8=facts["fp8"])


def _latents(make: Callable, facts: Facts, rows: int) -> Callable[[], dict]:
    return partial(make, [KEYS], heads=min(facts["rows"], 64), page_size=64, dtype=_dtype(facts), fp8=facts["fp8"])


def _prompt(facts: Facts, rows: int) -> Callable[[], dict]:
    new = min(facts["max_seqlen_q"], rows)
    return partial(make_prefill, [new], [new + KEYS], heads=1, kv_heads=1, head_dim=facts["head_dim"],
                   dtype=_dtype(facts), logit_cap=8.0 if facts["capped"] else 0.0)


def _ragged(facts: Facts, rows: int) -> Callable[[], dict]:
    new = min(facts["max_seqlen_q"], rows)
    return partial(make_ragged, [new], [new + KEYS], heads=1, kv_heads=1, qk_dim=facts["qk_dim"], v_dim=facts["v_dim"],
                   dtype=_dtype(facts))


_DECODING = dict(rows=[16], fp32=[False], fp8=[False], num_seqs=[64])
#: operator -> (problem of its facts, the facts of usual calls, the most usual first)
_PROBLEMS: dict[str, tuple[Callable[[Facts, int], Callable[[], dict]], dict[str, list]]] = {
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
    """Facts of a usual call that the table chooses this row for: of a range, its upper bound, or the next power of 2.
    Raises LookupError where no usual call is like that."""
    def one(wanted: Any) -> Any:
        if not isinstance(wanted, list):
            return wanted
        low, high = wanted
        return 1 << (low - 1).bit_length() if high is None else high

    usual = _PROBLEMS[table.op][1] | {name: [one(wanted)] for name, wanted in row.when.items()}
    for values in itertools.product(*usual.values()):
        facts = dict(zip(usual, values, strict=True))
        if next(each for each in table.rows if each.fits(facts, table.file)) is row:
            return facts
    raise LookupError(f"{table.file}: {dict(row.when)}: expected a row that a usual call is for; give problems.py one")


def problem(op: str, facts: Facts, rows: int = ROWS) -> Case:
    """A small call of the operator's with these facts, of at most so many rows. Raises KeyError for an operator that
    has no problem here, or a fact that its problem needs and is not given."""
    return Case("small", _PROBLEMS[op][0](facts, rows))
