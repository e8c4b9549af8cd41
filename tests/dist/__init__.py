"""Tests that need several ranks, and the pool of processes that plays them."""
