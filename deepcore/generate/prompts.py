"""Owns what is known of a batch of prompts: its tokens, and how many columns of each row are padding on the left.

Knows nothing of models. Everything that a user can get wrong about prompts is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deepcore.errors import UsageError
from deepcore.generate.options import Options


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        ids: (rows, length) int64.
        padding: (rows,) int64, columns before a row's first token; None where no row has any.
    """

    ids: torch.Tensor
    padding: torch.Tensor | None

    def repeated(self, times: int) -> Prompts:
        """Every row that many times, one after the other."""
        if times == 1:
            return self
        padding = None if self.padding is None else self.padding.repeat_interleave(times)
        return Prompts(self.ids.repeat_interleave(times, dim=0), padding)


def read_prompts(ids: Any, mask: Any, options: Options, device: torch.device) -> Prompts:
    """Check and place what the user gave.

    Without a mask a run of ``pad_token_id`` at the beginning of a row is padding, unless that token ends rows as well.
    """
    _require_ids(ids)
    ids = ids.to(device, torch.int64)
    if mask is not None:
        _require_mask(mask, ids)
        real = mask.to(device) != 0
    elif options.pad_token_id is not None and options.pad_token_id not in options.eos_token_id:
        real = (ids != options.pad_token_id).int().cumsum(dim=1) > 0
    else:
        return Prompts(ids, None)
    counts = real.sum(dim=1)
    padding = ids.shape[1] - counts
    _require_left(real, padding)
    return Prompts(ids, padding if bool(padding.any()) else None)


def _require_ids(ids: Any) -> None:
    what = None
    if not isinstance(ids, torch.Tensor):
        what, got = "prompts are no tensor", type(ids).__name__
    elif ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        what, got = "prompts are no batch of token ids", f"shape {tuple(ids.shape)}, {ids.dtype}"
    elif ids.shape[1] == 0:
        what, got = "the prompt is empty", f"shape {tuple(ids.shape)}"
    if what is not None:
        raise UsageError(
            what,
            got=got,
            expected="input_ids of shape (rows, length), integers, at least one token in each row",
            do="begin a prompt with the model's first token (bos) where there is nothing else",
        )


def _require_mask(mask: Any, ids: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UsageError(
            "attention_mask does not fit the prompts",
            got=got,
            expected=f"shape {tuple(ids.shape)}: 1 for a token, 0 for padding",
            do="pass the tokenizer's attention_mask",
        )


def _require_left(real: torch.Tensor, padding: torch.Tensor) -> None:
    """Raise unless each row is padding and then tokens, of which there is one at least."""
    columns = torch.arange(real.shape[1], device=real.device)
    wrong = (real != (columns >= padding[:, None])).any(dim=1) | (padding == real.shape[1])
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        empty = int(padding[row]) == real.shape[1]
        raise UsageError(
            f"row {row} is an empty prompt" if empty else f"row {row} is not padded on the left",
            got=f"attention_mask {real[row].int().tolist()}"[:200],
            expected="zeros, then a one for every token of the prompt",
            do="leave the row out, or begin it with the model's first token (bos)"
            if empty
            else 'set tokenizer.padding_side = "left"',
        )
