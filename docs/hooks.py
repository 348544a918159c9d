"""Pages that are made when the site is built: every operator from its docstring, and the decode loop from its source.

mkdocs calls `on_files` (mkdocs.yml). The operators come from the package, so it must be importable.
"""

import inspect
from pathlib import Path
from typing import Any

#: Heading -> operators below it, in this order; what is in no list stands below "More".
GROUPS = {
    "Norms and activations": ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_quant_fp8", "silu_and_mul",
                              "silu_and_mul_per_token_group_quant_fp8",
                              "gelu_and_mul", "gelu_tanh_and_mul"),
    "Rotary embedding and cache writes": (
        "rotary_embedding", "rotary_embedding_and_cache", "reshape_and_cache", "concat_and_cache_mla",
        "concat_and_cache_mla_rope_fused", "transfer_kv"),
    "Attention": ("paged_attention", "prefill_attention", "varlen_attention", "mla_decode", "mla_decode_rope",
                  "merge_attn_states"),
    "Mixture of experts": ("topk_softmax", "grouped_topk", "moe_align_block_size", "fused_moe"),
    "Products and FP8": ("linear", "per_tensor_quant_fp8", "per_token_quant_fp8", "per_token_group_quant_fp8",
                         "fp8_scaled_mm", "fp8_block_scaled_mm"),
    "Between ranks": ("all_reduce", "all_gather", "reduce_scatter", "fused_all_reduce_rms_norm",
                      "fused_all_reduce_rms_norm_quant_fp8"),
    "Sampling": ("sample", "apply_penalties", "apply_token_bitmask"),
}
HEAD = """# Every operator

Made from the docstrings when these pages are built: what `help(wave64.ops.<name>)` prints. Each is
`wave64.ops.<name>(...)` and `torch.ops.wave64.<name>(...)`. `!` after an argument of the signature says that it is
written. Shapes, dtypes and errors are the contract that every backend is held to; the body of the function in
`pysrc/wave64/ops/` is the formula.
"""


def signature(op: Any) -> str:
    """`name(x, weight, eps=1e-06)`, with `!` behind what the operator writes."""
    shown = []
    for parameter in inspect.signature(op.reference).parameters.values():
        written = "!" if parameter.name in op.mutates else ""
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        shown.append(f"{parameter.name}{written}{default}")
    return f"{op.name}({', '.join(shown)})"


def operators() -> str:
    """The page of all operators, as Markdown."""
    from wave64 import OPS

    lines = [HEAD]
    listed = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in OPS if name not in listed)
    for title, names in [*GROUPS.items(), ("More", rest)]:
        names = [name for name in names if name in OPS]
        lines += [f"## {title}\n"] if names else []
        for name in names:
            op = OPS[name]
            backends = ", ".join(f"`{backend}`" for backend in op.backends)
            contract = inspect.cleandoc(op.reference.__doc__ or "")
            lines += [f"### `{name}`\n", "```text", signature(op), "", contract, "```\n", f"Backends: {backends}.\n"]
    return "\n".join(lines)


def decode_loop(source: str) -> str:
    """The page of docs/decode_loop.py: its docstring, then its code."""
    return f"""# The composed decode loop

A whole Llama of the operators, without the server: prefill, paged decode, RoPE's table, sampling, in a hundred lines.
It is `docs/decode_loop.py` of the repository, and a test holds it to what transformers generates. Run it on the model
that ships with wave64, here on any machine:

```bash
python docs/decode_loop.py serve/demo/llama "Four score and" 40
```

```python
{source.strip()}
```
"""


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    source = (Path(config["docs_dir"]) / "decode_loop.py").read_text()
    for path, text in (("reference.md", operators()), ("decode_loop.md", decode_loop(source))):
        files.append(File.generated(config, path, content=text))
    return files
