"""Owns how a module is called for the next token: which arguments its forward takes, and where its answer has logits.

Knows nothing of architectures. What a forward offers is read from the names of its parameters:

    input_ids        (rows, n) int64; a forward without this name gets them as its first argument
    attention_mask   (rows, tokens so far), 0 for padding on the left; passed where a row has any
    position_ids     (rows, n), counted from each row's first token
    cache            what the last call returned as ``cache``; the first goes without. ``input_ids`` are then the
                     tokens after those that it holds. ``past_key_values`` is the same under an older name
    use_cache        whether a cache is to be kept
    logits_to_keep   how many of the last logits are wanted

It returns logits (rows, n, vocabulary), or an object or mapping that has them as ``logits`` (and ``cache``). Models of
transformers have all of it, with cache objects of their own, and a method ``prepare_inputs_for_generation``, which is
asked for the arguments. A plain module needs tokens and logits only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deepcore.errors import UsageError

CACHES = ("cache", "past_key_values")


class TokenModel:
    """A module seen as a function from tokens to logits.

    Attributes:
        label: its class.
        takes: the names that its forward takes.
        cache_name: under which of them it takes a cache, or None.
        prepare: its own way to the arguments of its forward, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.label = module, type(module).__name__
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True:
            raise UsageError(
                "generate() does not have models with an encoder",
                got=self.label,
                expected="a model that continues its own input",
                do="call engine.begin_generation() and then engine.module.generate(...)",
            )
        self.takes = _parameters(module)
        self.cache_name = next((name for name in CACHES if name in self.takes), None)
        prepare = getattr(module, "prepare_inputs_for_generation", None)
        self.prepare: Callable[..., dict[str, Any]] | None = prepare if callable(prepare) else None

    def call(self, ids: torch.Tensor, **more: Any) -> Any:
        """The module's own output; arguments that it does not take, and those that are None, are left out."""
        more = {name: value for name, value in more.items() if value is not None and name in self.takes}
        if "input_ids" in self.takes:
            return self.module(input_ids=ids, **more)
        return self.module(ids, **more)

    def logits_of(self, output: Any, rows: int) -> torch.Tensor:
        """(rows, n, vocabulary) from what the module returned."""
        logits = output if isinstance(output, torch.Tensor) else field(output, "logits")
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[0] != rows:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(output).__name__
            raise UsageError(
                f"the forward of {self.label} returned no logits",
                got=got,
                expected=f"a tensor of shape ({rows}, tokens, vocabulary), or an object with .logits",
                do="generate with a model whose forward takes tokens and returns logits",
            )
        return logits

    def cache_of(self, output: Any) -> Any:
        """The cache in what the module returned."""
        cache = next((kept for kept in (field(output, name) for name in CACHES) if kept is not None), None)
        if cache is None:
            raise UsageError(
                f"the forward of {self.label} takes a {self.cache_name} and returned none",
                got=type(output).__name__,
                expected=f"an object or a mapping with logits and {self.cache_name}",
                do=f"return the {self.cache_name}, or call generate(use_cache=False)",
            )
        return cache


def field(output: Any, name: str) -> Any:
    """An item of a mapping, or an attribute; None where there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _parameters(module: nn.Module) -> frozenset[str]:
    """Names that the forward takes; a wrapper that passes everything on is asked for the model inside."""
    found = inspect.signature(module.forward).parameters
    names = {name for name, parameter in found.items() if parameter.kind is not parameter.VAR_KEYWORD}
    inner = getattr(module, "get_base_model", None)  # peft's
    if len(names) < len(found) and callable(inner):
        names |= _parameters(inner())
    return frozenset(names)
