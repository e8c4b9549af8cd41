"""Owns predictions of what a training run will need, made before anything is allocated."""
