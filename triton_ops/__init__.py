"""Triton kernels, one file per operator: kernel, launcher, registration."""
