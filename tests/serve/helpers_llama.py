"""Tiny Llama checkpoints in Hugging Face format, the answers transformers gives for them, and a small paged driver
that puts wave64's model through the same tokens."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from wave64.serve.model.batch import Batch
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.load import load_model

BASE = dict(vocab_size=101, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None)  # fmt: skip

#: name -> what differs from BASE; between them every rope type, tied and untied, biases, GQA 1, 3, 4, MQA, a head_dim
#: that is neither hidden/heads nor a multiple of four, every activation
LLAMAS = {
    "default-mha": dict(num_hidden_layers=3),
    "linear-gqa3-bias": dict(num_attention_heads=6, num_key_value_heads=2, attention_bias=True,
                             rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0)),
    "dynamic-mqa-mlp_bias": dict(num_key_value_heads=1, mlp_bias=True, max_position_embeddings=24,
                                 rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=100.0)),
    "llama3-gqa4-tied": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
                             rope_parameters=dict(rope_type="llama3", factor=8.0, rope_theta=1000.0,
                                                  low_freq_factor=1.0, high_freq_factor=4.0,
                                                  original_max_position_embeddings=64)),
    "yarn-head_dim10-all_biases": dict(num_attention_heads=3, head_dim=10, attention_bias=True, mlp_bias=True,
                                       rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=300.0,
                                                            original_max_position_embeddings=32)),
    "yarn-mscale-gelu": dict(num_key_value_heads=2, hidden_act="gelu", rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=300.0, original_max_position_embeddings=32, beta_fast=4.0,
        beta_slow=0.5, mscale=0.7, mscale_all_dim=1.0, truncate=False)),
    "default-mqa-tied-head_dim6-gelu_tanh": dict(num_attention_heads=3, num_key_value_heads=1, head_dim=6,
                                                 tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
}  # fmt: skip


def make_llama(folder: Path, max_shard_size: str = "1GB", old_spelling: bool = False, family: str = "Llama",
               **overrides) -> transformers.PreTrainedModel:
    """Saves a random fp32 Llama to `folder` and returns it. Every weight, biases and gains too, is drawn so that
    leaving it out shows in the logits.

    old_spelling: rope_theta next to rope_scaling, as transformers wrote before version 5.
    family: another of transformers' families with Llama's configuration keys
    """
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**BASE, **overrides}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if old_spelling:
        edit_json(folder / "config.json", _respell)
    return model


def _respell(config: dict) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


def edit_json(file: Path, edit) -> None:
    """Applies `edit(dict)` to a JSON file in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def load(folder: Path, device: str, dtype: torch.dtype | None = None) -> tuple[torch.nn.Module, ModelConfig]:
    config = ModelConfig.from_folder(folder)
    return load_model(config, folder, dtype or config.dtype, device), config


class NearTie(AssertionError):
    """Logits so near to each other that right ones may choose another token."""


@functools.lru_cache(maxsize=2)
def in_fp64(model: torch.nn.Module) -> Any:
    """A copy of transformers' model with weights and products in fp64 (its norms and RoPE stay in fp32): in fp32 its
    own logits are up to 4e-5 from these."""
    wide: Any = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # the grouped product knows no fp64
    return wide


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """transformers' greedy tokens after `prompt`, and the logits [steps, vocab] each was chosen from, in fp64. Refuses
    a prompt where logits equal to 1e-4 may still choose another token."""
    ids = torch.tensor([prompt])
    out = in_fp64(model).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    logits = torch.cat(out.logits).float()
    best = logits.topk(2).values
    if (best[:, 0] - best[:, 1]).min() <= 2e-4:
        raise NearTie(f"near tie after {prompt}: choose another prompt")
    return out.sequences[0, len(prompt):].tolist(), logits


class PagedDriver:
    """The least an engine must do: pages in shuffled order, batches with decodes first. What no token was written to
    holds NaN and what no page-table entry names is out of range, so that reading either shows."""

    def __init__(self, model: Any, config: ModelConfig, device: str, page_size: int = 4,
                 num_pages: int = 128):
        self.model, self.device, self.page_size = model, device, page_size
        dtype = model.lm_head.weight.dtype
        self.kv_cache = self.pool(config, num_pages, page_size, dtype, device)
        self.free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(2)).tolist()
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def pool(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: str) -> list[tuple]:
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        return [tuple(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in "kv")
                for _ in range(config.num_layers)]

    def prefix(self, prefills: dict[str, list[int]]) -> dict:
        """What a batch says of the prefilling sequences' earlier tokens."""
        return {}

    @torch.inference_mode()
    def step(self, decodes: dict[str, int], prefills: dict[str, list[int]], rows: list[int] | None = None) -> Tensor:
        """One forward pass: {sequence: its one new token}, {sequence: its new tokens}. Returns the logits [R, vocab] of
        the named token rows, of all where `rows` is None, on the host."""
        new = {name: [token] for name, token in decodes.items()} | prefills
        positions, slots = [], []
        for name, tokens in new.items():
            start = self.lengths.get(name, 0)
            end = self.lengths[name] = start + len(tokens)
            table = self.pages.setdefault(name, [])
            while len(table) * self.page_size < end:
                table.append(self.free.pop())
            positions += range(start, end)
            slots += [table[p // self.page_size] * self.page_size + p % self.page_size for p in range(start, end)]
        width = max(len(self.pages[name]) for name in new)
        tables = [self.pages[name] + [2147480000] * (width - len(self.pages[name])) for name in new]
        ids = [token for tokens in new.values() for token in tokens]
        starts = [0]
        for tokens in prefills.values():
            starts.append(starts[-1] + len(tokens))

        def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        batch = Batch(
            input_ids=tensor(ids),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            page_table=tensor(tables, torch.int32),
            seq_lens=tensor([self.lengths[name] for name in new], torch.int32),
            num_decodes=len(decodes),
            cu_seqlens_q=tensor(starts, torch.int32),
            max_seqlen_q=max(map(len, prefills.values()), default=0),
            logit_rows=tensor(list(range(len(ids))) if rows is None else rows),
            **self.prefix(prefills),
        )
        logits = self.model(batch, self.kv_cache)
        assert logits.dtype == torch.float32
        return logits.cpu()
