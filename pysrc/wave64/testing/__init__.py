"""What proves an operator right: the contract, cross-compilation, static figures of machine code."""
