"""Tensor parallelism: the ranks of an axis hold parts of each layer's weights and compute on the same samples."""
