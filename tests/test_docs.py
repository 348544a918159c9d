"""What docs/ shows is run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

DOCS = Path(__file__).resolve().parent.parent / "docs"
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
