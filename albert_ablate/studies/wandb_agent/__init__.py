"""A Weights & Biases sweep agent with persistent workers."""
