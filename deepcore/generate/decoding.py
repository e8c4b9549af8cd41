"""Owns the ways from the tokens so far to the logits of the next one: with a cache, or all over again.

Knows nothing of how a token is chosen. A way is a function of the tokens, (rows, n), whose n grows by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.base.log import warn_once
from deepcore.generate.calling import TokenModel
from deepcore.generate.prompts import Prompts

Way = Callable[[torch.Tensor], torch.Tensor]


def begin(model: TokenModel, prompts: Prompts, *, use_cache: bool) -> Way:
    """The best way for this module and these prompts: (rows, n) int64 to (rows, vocabulary) fp32."""
    has_cache = model.cache_name is not None
    hides = prompts.padding is None or "attention_mask" in model.takes
    if use_cache and not (has_cache and hides):
        reason = "takes a cache and no attention_mask, and rows differ in length" if has_cache else "takes no cache"
        warn_once(
            f"generate without a cache: {model.label}",
            f"generate() runs the whole sequence again for every token: the forward of {model.label} {reason}. "
            "docs/hybrid.md says which arguments give it one; use_cache=False says that this is meant.",
        )
    if not hides:
        return _Compacted(model, prompts)
    cached = use_cache and has_cache
    return _Prepared(model, prompts, cached) if model.prepare is not None else _Plain(model, prompts, cached)


class _Plain:
    """Passes what the forward takes: the tokens that its cache does not hold yet, or all of them."""

    def __init__(self, model: TokenModel, prompts: Prompts, cached: bool) -> None:
        self._model, self._padding, self._cached = model, prompts.padding, cached
        self._cache: Any = None
        self._held = 0  # tokens that the cache holds

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self._output(tokens)
        if self._cached:
            self._cache, self._held = self._model.cache_of(output), tokens.shape[1]
        return self._model.logits_of(output, tokens.shape[0])[:, -1].float()

    def _output(self, tokens: torch.Tensor) -> Any:
        ids = tokens[:, self._held :].contiguous()
        cache = {self._model.cache_name: self._cache} if self._model.cache_name is not None else {}
        return self._model.call(
            ids,
            attention_mask=_mask(self._padding, tokens),
            position_ids=_positions(self._padding, tokens)[:, self._held :],
            use_cache=self._cached,
            logits_to_keep=1,
            **cache,
        )


class _Prepared(_Plain):
    """Lets a model of transformers make its arguments: some hide padding, or the past, in ways of their own."""

    def _output(self, tokens: torch.Tensor) -> Any:
        model = self._model
        assert model.prepare is not None
        given = {
            "attention_mask": _mask(self._padding, tokens),
            "position_ids": _positions(self._padding, tokens),
            "logits_to_keep": 1,
            **({model.cache_name: self._cache} if model.cache_name is not None else {}),
        }
        given = {name: value for name, value in given.items() if value is not None and name in model.takes}
        arguments = model.prepare(
            tokens,
            next_sequence_length=tokens.shape[1] - self._held,
            is_first_iteration=not self._held,
            use_cache=self._cached,
            **given,
        )
        return model.module(**arguments)


class _Compacted:
    """Runs all tokens, with padding moved behind them: no token looks ahead, so nothing has to hide it."""

    def __init__(self, model: TokenModel, prompts: Prompts) -> None:
        assert prompts.padding is not None
        self._model, self._padding = model, prompts.padding

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, length = tokens.shape
        columns = torch.arange(length, device=tokens.device) + self._padding[:, None]
        ids = tokens.gather(1, columns.clamp_max(length - 1))
        output = self._model.call(ids, position_ids=_positions(None, ids), use_cache=False)
        last = (length - 1 - self._padding)[:, None, None]
        return self._model.logits_of(output, rows).take_along_dim(last, dim=1).squeeze(1).float()


def _positions(padding: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """(rows, n), counted from each row's first token."""
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    return columns if padding is None else (columns - padding[:, None]).clamp_min(0)


def _mask(padding: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    if padding is None:
        return None
    return (torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]).long()
