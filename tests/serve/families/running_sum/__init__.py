"""A model that continues a text with the sum of its tokens: what a family of its own takes."""

from families.running_sum.model import FAMILY

__all__ = ["FAMILY"]
