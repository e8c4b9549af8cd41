"""Owns the loop of generation: a token for every row at a time, until each row has ended.

Knows nothing of how a token is chosen (``sampling``) or how logits come about (``decoding``).
"""

from __future__ import annotations

import torch

from deepcore.errors import UsageError
from deepcore.generate.calling import TokenModel
from deepcore.generate.decoding import begin
from deepcore.generate.options import Options
from deepcore.generate.prompts import Prompts
from deepcore.generate.sampling import Chooser


@torch.no_grad()
def generate(
    model: TokenModel, prompts: Prompts, options: Options, total: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Prompts and answers, (rows, at most ``total``) int64; rows that ended earlier are padded.

    Raises:
        UsageError: a row's logits were not finite.
    """
    prompts = prompts.repeated(options.num_return_sequences)
    rows, length = prompts.ids.shape
    if not rows or length >= total:
        return prompts.ids.clone()
    tokens = prompts.ids.new_full((rows, total), options.pad)
    tokens[:, :length] = prompts.ids
    stops = torch.tensor(options.eos_token_id, dtype=torch.int64, device=tokens.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    chooser = Chooser(options, prompts, generator)
    logits_of = begin(model, prompts, use_cache=options.use_cache)
    while length < total:
        chosen = chooser.choose(logits_of(tokens[:, :length]))
        tokens[:, length] = chosen.masked_fill(ended, options.pad)
        length += 1
        if options.eos_token_id:
            ended |= torch.isin(chosen, stops)
            if bool((ended | chooser.broken).all()):  # the one look at the device per token
                break
    _require_sound(chooser.broken)
    return tokens[:, :length].clone()


def _require_sound(broken: torch.Tensor) -> None:
    if bool(broken.any()):
        raise UsageError(
            "the model's logits are not finite",
            got=f"nan or inf for row {int(broken.nonzero()[0])}",
            expected="finite logits",
            do="look for weights or activations that overflowed; engine.was_step_applied() tells of skipped steps",
        )
