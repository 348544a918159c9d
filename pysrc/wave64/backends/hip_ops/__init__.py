"""A module per operator that hip/ops has: tensors become addresses, sizes and strides."""
