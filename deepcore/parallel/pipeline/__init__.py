"""Layers in a row, cut into stages that work on different micro-batches at the same time."""
