"""Mistral 7B and its relatives: Llama with a sliding window (Jiang et al. 2023)."""

from wave64.serve.model.mistral.model import FAMILY

__all__ = ["FAMILY"]
