"""Writes docs/flags.md from what the code knows: `python tests/serve/flags_table.py`."""

from dataclasses import fields
from pathlib import Path

from wave64.serve.args import ONLY, REFUSED, WITHOUT_EFFECT, ServerArgs, flag_of

FILE = Path(__file__).parents[2] / "docs" / "flags.md"
HEAD = """# Flags of `python -m wave64.launch_server`

Names are SGLang's, where SGLang has the flag. This file is made from the code: `python tests/serve/flags_table.py`.
"""
ABSENT = """
## What is absent

| | why |
|---|---|
| LoRA | adapters can be merged into a checkpoint; serving several at once needs kernels of its own |
| embeddings, rerankers | models generate |
| weight update while serving | a server starts in the time that its weights take to be read |
| pipeline parallelism | tensor and expert parallel ranks hold all layers |
| beam search | `n` draws independent answers |
| images, sound | messages are text |
| drafted tokens (speculative decoding) | every token is a step |
| jump-forward in grammars | a JSON schema forces few tokens in a row: 2 of 74 steps less (RESULTS_ENGINE.md) |
"""


def cell(text: object) -> str:
    return str(text).replace("|", "\\|")


def text() -> str:
    """The whole file."""
    lines = [HEAD, "## Served", "", "| flag | values | default | meaning |", "|---|---|---|---|"]
    for item in fields(ServerArgs):
        about = item.metadata
        flags = ", ".join(f"`{flag}`" for flag in (flag_of(item.name), *about["aliases"]))
        values = ", ".join(about["choices"]) or ("switch" if about["kind"] is bool else about["kind"].__name__)
        default = "" if item.default in (None, ()) else "off" if item.default is False else item.default
        lines.append(f"| {flags} | {cell(values)} | {cell(default)} | {cell(about['help'])} |")
    lines += ["", "## Taken without effect, with a line in the log", "", "| flag | why |", "|---|---|"]
    lines += [f"| `{flag}` | {cell(why.partition('; the package')[0])} |" for flag, (_, why) in WITHOUT_EFFECT.items()]
    lines += ["", "## Taken with one value", "", "| flag | value | why |", "|---|---|---|"]
    lines += [f"| `{flag}` | {value} | {cell(why)} |" for flag, (_, value, why) in ONLY.items()]
    lines += ["", "## Refused", "", "| flag | why |", "|---|---|"]
    lines += [f"| `{flag}` | {cell(why)} |" for flag, why in REFUSED.items()]
    return "\n".join(lines) + "\n" + ABSENT


if __name__ == "__main__":
    FILE.write_text(text())
