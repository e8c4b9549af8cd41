"""Owns the benchmarks: what deepcore's engine calls, beside what users have today, in one run."""
