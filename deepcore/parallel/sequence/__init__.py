"""Sequence parallelism: every rank of an axis holds a part of each sequence, and attention sees the whole."""
