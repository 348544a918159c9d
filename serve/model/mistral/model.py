"""Mistral is Llama's model; the window of its attention is in the configuration."""

from wave64.serve.model.family import Family, keys_and_values
from wave64.serve.model.llama import LlamaForCausalLM
from wave64.serve.model.mistral.config import read_config

FAMILY = Family(read_config, keys_and_values, LlamaForCausalLM)
