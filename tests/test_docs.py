"""What docs/ shows is run."""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SPEC = importlib.util.spec_from_file_location("decode_loop", DOCS / "decode_loop.py")
decode_loop = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(decode_loop)


@pytest.mark.parametrize("tied", [False, True])
def test_the_composed_decode_loop_says_what_transformers_says(tmp_path, tied, device):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, initializer_range=0.2)
    theirs: Any = transformers.LlamaForCausalLM(config).to(device).eval()
    theirs.save_pretrained(tmp_path)
    prompt, count = torch.randint(3, 97, (21,)).tolist(), 30
    mine = decode_loop.Llama(tmp_path, device, len(prompt) + count)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt], device=device)).logits[0, -1]
        torch.testing.assert_close(mine.forward(torch.tensor(prompt, device=device), 0), expected, rtol=1e-4, atol=1e-4)
        ids = theirs.generate(torch.tensor([prompt], device=device), max_new_tokens=count, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
    assert decode_loop.generate(mine, prompt, count) == ids[0, len(prompt):].tolist()


def test_the_composed_decode_loop_is_a_hundred_lines():
    assert len((DOCS / "decode_loop.py").read_text().splitlines()) <= 110


def life(name: str) -> str:
    """CONTRIBUTING's walk through the code."""
    return (ROOT / "CONTRIBUTING.md").read_text().partition(f"## The life of {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", ["a request", "a kernel"])
def test_a_life_is_short_and_names_files_that_exist(name):
    """At most 40 lines; a path is one from the root, the package or its folder."""
    assert 20 < len(life(name).splitlines()) <= 40
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = re.findall(r"`([\w/]+\.(?:py|hip|h|cpp|cmake|txt|json))\b", life(name))
    assert len(named) > 15
    assert [path for path in named if not any(f"/{file}".endswith(f"/{path}") for file in files)] == []


@pytest.mark.parametrize("name", ["a request", "a kernel"])
def test_a_life_names_classes_and_functions_that_exist(name):
    code = "".join(file.read_text() for folder in ("serve", "pysrc", "hip") for file in (ROOT / folder).rglob("*")
                   if file.suffix in (".py", ".h", ".hip", ".cpp"))
    named = re.findall(r"`(?:hip\.)?([A-Z]\w+(?:\.\w+)?|[a-z]+_\w+)(?<!txt)[`(]", life(name))
    parts = {part for each in named for part in each.split(".")}
    assert len(parts) > 1
    assert [each for each in sorted(parts) if not re.search(
        rf"\b(class|def|void|struct) {each}\b|\b{each}\b *[=:]", code)] == []
