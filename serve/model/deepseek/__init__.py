"""DeepSeek V2 and V3: multi-head latent attention and a mixture of experts."""
