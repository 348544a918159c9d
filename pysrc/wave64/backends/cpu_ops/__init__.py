"""Operators on CPU tensors, faster than their references: one file each, of the same stem."""
