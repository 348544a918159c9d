"""A module per operator of hip/ops: it allocates the outputs and launches with the fields of the op's struct."""
