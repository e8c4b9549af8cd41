"""Owns the choice of the next token from logits: penalty, temperature, top-k, top-p, and the draw.

Knows nothing of where logits come from. Order and meaning are those of transformers' processors, but for padding,
which no penalty counts, and for top-k, which is off unless asked for.
"""

from __future__ import annotations

import torch

from deepcore.generate.options import Options
from deepcore.generate.prompts import Prompts

_OUT = float("-inf")


class Chooser:
    """Chooses tokens for the rows of one batch.

    Attributes:
        broken: (rows,) whether a row's logits had no finite maximum, at any step.
    """

    def __init__(self, options: Options, prompts: Prompts, generator: torch.Generator | None) -> None:
        self._options, self._prompts, self._generator = options, prompts, generator
        self._seen: torch.Tensor | None = None  # (rows, vocabulary): the tokens that a row has
        self._made = 0
        self.broken = torch.zeros(len(prompts.ids), dtype=torch.bool, device=prompts.ids.device)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows,) int64 from (rows, vocabulary) fp32."""
        options = self._options
        sound = logits.amax(dim=-1).isfinite()  # not nan, not inf, and not -inf everywhere
        self.broken |= ~sound
        logits = logits.where(sound[:, None], torch.zeros((), device=logits.device))
        if options.repetition_penalty != 1.0:
            logits = self._penalised(logits)
        if self._made < options.min_new_tokens and options.eos_token_id:
            logits = logits.clone()
            logits[:, list(options.eos_token_id)] = _OUT
        self._made += 1
        if options.do_sample:
            probabilities = narrowed(logits, options).softmax(dim=-1)
            chosen = torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)
        else:
            chosen = logits.argmax(dim=-1)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        if self._seen is None:
            self._seen = _tokens_of(self._prompts, logits.shape[1])
        penalty = self._options.repetition_penalty
        return logits.where(~self._seen, torch.where(logits < 0, logits * penalty, logits / penalty))


def _tokens_of(prompts: Prompts, vocabulary: int) -> torch.Tensor:
    """(rows, vocabulary): whether a row's prompt has the token, its padding not counted."""
    counts = torch.zeros(len(prompts.ids), vocabulary, dtype=torch.int32, device=prompts.ids.device)
    counted = torch.ones_like(prompts.ids, dtype=torch.int32)
    if prompts.padding is not None:
        columns = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)
        counted = (columns >= prompts.padding[:, None]).int()
    return counts.scatter_add_(1, prompts.ids, counted) > 0


def narrowed(logits: torch.Tensor, options: Options) -> torch.Tensor:
    """Logits at the temperature, with -inf for tokens outside of top-k and top-p; the likeliest is never out."""
    if options.temperature != 1.0:
        logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[1]:
        least = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, _OUT)
    if options.top_p < 1.0:
        ordered, places = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities  # of all tokens that are likelier
        out = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, places, above >= options.top_p)
        logits = logits.masked_fill(out, _OUT)
    return logits
