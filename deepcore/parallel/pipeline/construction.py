"""Owns how layers come to be: from which random numbers, and which may not be cut apart.

Knows nothing of who keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deepcore.errors import ConfigError
from deepcore.parallel.pipeline.layers import LayerSpec
from deepcore.parallel.pipeline.placement import Placement


class Builder:
    """Builds layers in any order and on any rank to the same weights.

    Without a seed, one number is drawn from torch's global state, which ranks have in common where they were seeded
    alike, and every layer's construction starts from that number and its place. The global state moves by that draw.

    Args:
        seed: of the first layer's construction; None draws one.
        seed_fn: takes a layer's seed; default torch's own, for the time of the construction only.
    """

    def __init__(self, layers: Sequence[Any], seed: int | None, seed_fn: Callable[[int], Any] | None) -> None:
        self._layers = layers
        self._seed = int(torch.randint(2**48, (), device="cpu")) if seed is None else seed
        self._seed_fn = seed_fn if seed is not None else None

    def build(self, index: int) -> Callable[[Any], Any]:
        """A layer: built from its spec, or as it was given."""
        layer: Any = self._layers[index]
        if not isinstance(layer, LayerSpec):
            _require_layer(layer, index)
            given: Callable[[Any], Any] = layer
            return given
        if self._seed_fn is not None:
            self._seed_fn(self._seed + index)
            return layer.build()
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed + index)
            return layer.build()


def _require_layer(layer: Any, index: int) -> None:
    if isinstance(layer, type) or not callable(layer):
        raise ConfigError(
            f"layer {index} cannot be called",
            got=f"{layer!r} of type {type(layer).__name__}",
            expected="a LayerSpec, a module or a function of one argument",
            do="for a class write LayerSpec(TheClass, arguments...)",
        )


def require_apart(layers: Sequence[Any], stage_of: Callable[[int], int], placement: Placement) -> None:
    """Raise where layers that were given as modules share a parameter across ranks: nothing would keep it equal."""
    seen: dict[torch.Tensor, tuple[int, str]] = {}
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            continue
        rank = placement.rank_of(stage_of(index))
        for name, param in layer.named_parameters():
            first, first_name = seen.setdefault(param, (index, name))
            if placement.rank_of(stage_of(first)) != rank:
                raise ConfigError(
                    f"layers {first} and {index} share a parameter and lie on different stages",
                    got=f"'{first}.{first_name}' is '{index}.{name}'",
                    expected="weights that are used by one stage, or tied ones",
                    do="describe both with TiedLayerSpec(key, ...): their gradients are then added",
                )
