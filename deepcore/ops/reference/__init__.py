"""Owns the pure-torch reference of every op: always there, always right, never fast."""
