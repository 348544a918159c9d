"""Kernels in Gluon for NVIDIA's Hopper (sm_90); imported there only."""
