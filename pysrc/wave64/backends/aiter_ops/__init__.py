"""Adapters to AITER's kernels, a module for each operator; each registers itself."""
