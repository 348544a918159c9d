"""Kernels that spell out Hopper's instructions, in Gluon; imported there only."""
