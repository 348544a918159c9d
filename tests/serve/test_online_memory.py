"""`--quantization fp8` has one plain tensor in memory at a time: the peak of a process that loads nothing else."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN, INTER, LAYERS = 256, 4096, 16
#: Above what the model keeps: a weight as it is stored, some of it in fp32, and what the allocator holds of both.
SPARE_MB = 60
CHILD = """
import gc, sys
from dataclasses import replace
from pathlib import Path
import torch
from wave64 import quant
from wave64.serve.model import load
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.schemes import ONLINE

def mb(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(key)) / 1024

def peak():
    model = load.load_model(config, folder, torch.bfloat16, "cpu")
    return mb("VmHWM") - start, sum(weight.nbytes for weight in model.parameters()) / 2**20

folder = Path(sys.argv[1])
config = replace(ModelConfig.from_folder(folder), schemes=ONLINE)
load.load_model(replace(config, num_layers=1), folder, torch.bfloat16, "cpu", "dummy")  # what it imports
start = mb("VmRSS")
print(*peak())
gc.collect()
kept, quantize = [], quant.quantize_weight_channels  # what a loader that reads all tensors first would take
quant.quantize_weight_channels = lambda plain, dtype: kept.append(plain) or quantize(plain, dtype)
print(*peak())
"""


def make(folder: Path) -> int:
    """A plain Llama of zeros, in a file with a hole; returns the bytes of its quantized layers as they are stored."""
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=HIDDEN,
                  intermediate_size=INTER, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
                  max_position_embeddings=64, rms_norm_eps=1e-5, torch_dtype="bfloat16")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [64, HIDDEN], "lm_head.weight": [64, HIDDEN], "model.norm.weight": [HIDDEN]}
    projections = {**{f"self_attn.{part}_proj": [HIDDEN, HIDDEN] for part in "qkvo"}, "mlp.gate_proj": [INTER, HIDDEN],
                   "mlp.up_proj": [INTER, HIDDEN], "mlp.down_proj": [HIDDEN, INTER]}
    for layer in (f"model.layers.{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"{layer}{name}_layernorm.weight": [HIDDEN] for name in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[end, end + size])
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    return 2 * LAYERS * sum(rows * columns for rows, columns in projections.values())


@pytest.mark.slow
def test_one_plain_tensor_is_in_memory_at_a_time(tmp_path):
    plain = make(tmp_path) / 2**20
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    (peak, model), (peak_if_kept, _) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert plain / 2 < model < plain / 2 + 2
    assert peak < model + SPARE_MB < peak_if_kept, done.stdout
