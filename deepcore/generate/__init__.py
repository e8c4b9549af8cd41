"""Owns generation: prompts, options, the choice of tokens, the call of a module with or without a cache, LoRA fusion.

Knows nothing of engines, ranks and shards: the weights of the module that it is given are whole.
"""
