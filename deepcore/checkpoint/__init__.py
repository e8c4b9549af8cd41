"""Checkpoints that know nothing of ranks: named tensors, whoever holds which part of them."""
