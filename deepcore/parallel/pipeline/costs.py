"""Owns what layers cost, by which they are cut into stages: parameters, a match of the type's name, measured time.

Knows nothing of ranks. A layer is built for this only where it must be, one at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from deepcore.errors import ConfigError
from deepcore.parallel.pipeline.layers import LayerSpec, TiedLayerSpec, type_name

REPEATS = 5
METHODS = 'one of "parameters", "uniform", "type:<regular expression>", "profile"'


def count_parameters(layers: Sequence[Any]) -> list[int]:
    """Trainable elements per layer; those of a tied module count where it comes first."""
    counts, seen = [], set()
    for layer in layers:
        if isinstance(layer, TiedLayerSpec):
            counts.append(0 if layer.key in seen else _numel(_built_without_memory(layer)))
            seen.add(layer.key)
        elif isinstance(layer, LayerSpec):
            counts.append(_numel(_built_without_memory(layer)))
        else:
            counts.append(_numel(layer) if isinstance(layer, nn.Module) else 0)
    return counts


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def _built_without_memory(spec: LayerSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return spec.build()
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return spec.build()  # one that looks at its numbers while it is built; it is let go of at once


def match_types(layers: Sequence[Any], pattern: str) -> list[int]:
    """1 for a layer whose type's name matches, 0 elsewhere.

    Raises:
        ConfigError: nothing matches, or the pattern is not a regular expression.
    """
    names = [type_name(layer) for layer in layers]
    try:
        found = [1 if re.search(pattern, name, re.IGNORECASE) else 0 for name in names]
    except re.error as error:
        raise ConfigError(
            "partition_method has no valid regular expression after 'type:'",
            got=f"{pattern!r}: {error}",
            expected="a pattern of Python's re module",
            do='for example "type:transformer"',
        ) from error
    if not any(found):
        raise ConfigError(
            "no layer's type matches partition_method",
            got=f"'type:{pattern}'",
            expected=f"a match of {', '.join(dict.fromkeys(names))}",
            do="change the pattern, or use 'parameters'",
        )
    return found


def measure(layers: Sequence[Any], build: Callable[[int], Callable[[Any], Any]], sample: Any) -> list[int]:
    """Nanoseconds of one forward and backward per layer, the median of a few.

    Args:
        build: the layer of an index, ready to be called; it is let go of before the next one is built.
        sample: the input of the first.
    """
    if sample is None:
        raise ConfigError(
            'partition_method "profile" has nothing to measure with',
            got="sample_input=None",
            expected="one micro-batch of the first layer's input, on the device where layers run",
            do="pass PipelineModule(..., partition_method='profile', sample_input=inputs)",
        )
    times = []
    for index in range(len(layers)):
        nanoseconds, sample = _time(build(index), sample)
        times.append(nanoseconds)
    return times


def _time(layer: Callable[[Any], Any], inputs: Any) -> tuple[int, Any]:
    spans, output = [], None
    for _ in range(REPEATS + 1):
        leaves = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), inputs)
        _settle(leaves)
        begin = time.perf_counter_ns()
        output = layer(leaves)
        ends = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        _settle(leaves)
        spans.append(time.perf_counter_ns() - begin)
    warm = sorted(spans[1:])
    return max(warm[len(warm) // 2], 1), tree_map_only(torch.Tensor, torch.Tensor.detach, output)


def _settle(tree: Any) -> None:
    if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(tree)):
        torch.cuda.synchronize()
