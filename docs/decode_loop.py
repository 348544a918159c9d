"""A Llama in 100 lines of wave64's operators: prefill, paged decode, a table of rotations, sampling. No server.

    python docs/decode_loop.py FOLDER "Four score and" 40      FOLDER: a Llama in Hugging Face's format

It computes what `LlamaForCausalLM` does, for one sequence, with a KV cache in pages: where to begin when an engine of
one's own is to call the operators. Each of them says its shapes and dtypes in `help(wave64.ops.paged_attention)`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear

from wave64 import ops

PAGE_SIZE = 16


class Llama:
    def __init__(self, folder: Path, device: str, max_tokens: int):
        self.config = config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.to(device) for file in sorted(folder.glob("*.safetensors"))
                        for name, tensor in load_file(file).items()}
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        dtype = self.weights["model.embed_tokens.weight"].dtype
        # cos, then sin, of every position: Su et al. 2021. A scaled table (Llama 3.1) has other frequencies.
        rope = config.get("rope_parameters") or config
        powers = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim
        angles = torch.outer(torch.arange(max_tokens, device=device), rope["rope_theta"] ** -powers)
        self.cos_sin_cache = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        # A pool of pages for each layer. This sequence gets every page, the last first: any order will do.
        pages = -(-max_tokens // PAGE_SIZE)
        shape = (pages, PAGE_SIZE, self.kv_heads, self.head_dim)
        self.kv_cache = [torch.zeros(2, *shape, dtype=dtype, device=device) for _ in range(config["num_hidden_layers"])]
        self.page_table = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=device)[None]

    def forward(self, ids: Tensor, start: int) -> Tensor:
        """Logits [vocab_size] fp32 behind the last of `ids`, which stand at positions start, start + 1, ..."""
        w, eps = self.weights, self.config["rms_norm_eps"]
        positions = torch.arange(start, start + len(ids), device=ids.device)
        slots = self.page_table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        seq_lens = torch.tensor([start + len(ids)], dtype=torch.int32, device=ids.device)
        residual = embedding(ids, w["model.embed_tokens.weight"])
        x = ops.rms_norm(residual, w["model.layers.0.input_layernorm.weight"], eps)
        for i, (keys, values) in enumerate(self.kv_cache):
            layer = f"model.layers.{i}"
            query, key, value = (linear(x, w[f"{layer}.self_attn.{name}_proj.weight"]) for name in "qkv")
            ops.rotary_embedding(positions, query, key, self.head_dim, self.cos_sin_cache)  # in place
            key, value = (part.view(-1, self.kv_heads, self.head_dim) for part in (key, value))
            ops.reshape_and_cache(key, value, keys, values, slots)
            x = self.attend(query.view(-1, self.heads, self.head_dim), keys, values, seq_lens)
            x = linear(x.flatten(1), w[f"{layer}.self_attn.o_proj.weight"])
            ops.fused_add_rms_norm(x, residual, w[f"{layer}.post_attention_layernorm.weight"], eps)  # in place, both
            gate_up = torch.cat([w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up")])  # once, in an engine
            x = linear(ops.silu_and_mul(linear(x, gate_up)), w[f"{layer}.mlp.down_proj.weight"])
            following = f"model.layers.{i + 1}.input_layernorm" if i + 1 < len(self.kv_cache) else "model.norm"
            ops.fused_add_rms_norm(x, residual, w[f"{following}.weight"], eps)
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return linear(x[-1], head).float()

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor) -> Tensor:
        scale = self.head_dim**-0.5
        if len(query) == 1:
            return ops.paged_attention(query, keys, values, self.page_table, seq_lens, scale)
        bounds = torch.tensor([0, len(query)], dtype=torch.int32, device=query.device)
        out, _ = ops.prefill_attention(query, keys, values, self.page_table, bounds, seq_lens, len(query), scale)
        return out


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], count: int, temperature: float = 0.0, top_p: float = 1.0) -> list[int]:
    """`count` tokens behind the prompt; temperature 0 takes the most likely one each time."""
    device = model.page_table.device
    one = torch.ones(1, device=device)
    logits, tokens = model.forward(torch.tensor(prompt, device=device), 0), []
    while True:
        uniform = torch.rand(1, device=device)
        token = ops.sample(logits[None], one * temperature, torch.zeros_like(one, dtype=torch.int32), one * top_p,
                           one * 0, uniform)
        tokens.append(int(token))
        if len(tokens) == count:
            return tokens
        logits = model.forward(token.long(), len(prompt) + len(tokens) - 1)


def main() -> None:
    from tokenizers import Tokenizer

    folder, text, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(text).ids
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = generate(Llama(folder, device, len(prompt) + count), prompt, count)
    print(text + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
