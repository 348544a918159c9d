"""Qwen2 is Llama's model; the biases of its projections are in the configuration."""

from wave64.serve.model.family import Family, keys_and_values
from wave64.serve.model.llama import LlamaForCausalLM
from wave64.serve.model.qwen2.config import read_config

FAMILY = Family(read_config, keys_and_values, LlamaForCausalLM)
