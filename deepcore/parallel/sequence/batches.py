"""Owns the cutting of batches: a rank's part of every sequence, with labels and positions that only the whole knows.

Knows nothing of datasets: all ranks of a sequence are given the same batches, which the engine's loader does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepcore.comm.mesh import Axis
from deepcore.errors import LayoutError, UsageError

TOKENS = (
    *("input_ids", "inputs_embeds", "labels", "shift_labels", "targets"),
    *("attention_mask", "position_ids", "token_type_ids"),
)


class SequenceLoader:
    """Gives this rank's part of every batch of ``loader``; see ``shard_batch``, which takes ``options``.

    The first batch of every pass is compared between the ranks: a loader that shows them different samples, as one
    for data parallelism does, would train on sequences that do not exist.
    """

    def __init__(self, loader: Iterable[Mapping[str, Any]], axis: Axis, **options: Any) -> None:
        self.loader, self.axis, self.options = loader, axis, options

    def __len__(self) -> int:
        """Batches per pass; TypeError where the loader does not say."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        compared = False
        for batch in self.loader:
            if not compared:
                _require_same(batch, self.axis)
                compared = True
            yield shard_batch(batch, self.axis, **self.options)

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the loader."""
        self.loader.set_epoch(epoch)  # type: ignore[attr-defined]


def shard_batch(
    batch: Mapping[str, Any],
    axis: Axis,
    *,
    causal: bool = True,
    ignore_index: int = -100,
    pad_token_id: int = 0,
    tokens: Iterable[str] = (),
    whole: Collection[str] = (),
) -> dict[str, Any]:
    """This rank's part of a batch whose sequences lie in dim 1; issues no collective.

    A length that does not divide by the ranks is padded, with tokens whose label is ``ignore_index``. Added are

    - ``position_ids``, unless given;
    - where ``causal``, ``shift_labels`` from ``labels``: each token's label is the next token's, across the cut.
      ``labels`` itself is then all ``ignore_index``: it makes a model of transformers compute a loss, and one that
      would shift it by itself gets nan for a wrong loss. ``num_items_in_batch`` is the number of tokens that count, of
      all ranks, by the number of ranks: such a model divides by it, and the mean over ranks is the mean over tokens;
    - else ``targets`` in place of ``labels``, for ``cross_entropy``: not every model divides a masked loss by a count,
      and the mean over a part would be silently wrong. ``attention_mask``, where padding was needed.

    Args:
        batch: tensors by name; ``input_ids`` or ``inputs_embeds`` is among them.
        axis: the ranks that share the sequence, ``engine.mesh.sp``.
        causal: ``labels`` are the input, to be shifted; else they lie beside the tokens that they belong to.
        ignore_index: the label of tokens that do not count.
        pad_token_id: what sequences are padded with.
        tokens: further names that hold one entry per token.
        whole: names that do not, although their dim 1 has the length of the sequence.

    Raises:
        LayoutError: something per token has another length, or may or may not be per token.
    """
    names = {*TOKENS, *tokens} - set(whole)
    made = dict(batch)
    length = _length(made)
    _require_known(made, names, set(whole), length)
    first = made["input_ids"] if "input_ids" in made else made["inputs_embeds"]
    if "position_ids" not in made:
        made["position_ids"] = torch.arange(length, device=first.device).expand(first.shape[0], length)
    surplus = -length % axis.size
    if surplus and not causal and "attention_mask" not in made:
        made["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.int64, device=first.device)
    if "labels" in names & made.keys():
        _place_labels(made, causal, ignore_index, axis)
    fills = {"input_ids": pad_token_id, **dict.fromkeys(("labels", "shift_labels", "targets"), ignore_index)}
    for name in names & made.keys():
        filled = _filled(name, made[name], surplus, fills.get(name, 0))
        made[name] = filled.chunk(axis.size, 1)[axis.rank].contiguous()
    return made


def _place_labels(batch: dict[str, Any], causal: bool, ignore_index: int, axis: Axis) -> None:
    labels = batch.pop("labels")
    if not causal:
        batch["targets"] = labels
        return
    shifted = batch.setdefault("shift_labels", pad(labels[:, 1:], (0, 1), value=ignore_index))
    batch["labels"] = torch.full_like(labels, ignore_index)
    batch["num_items_in_batch"] = (shifted != ignore_index).sum() / axis.size


def _filled(name: str, tensor: Tensor, surplus: int, value: int) -> Tensor:
    if not surplus:
        return tensor
    if name == "position_ids":  # they go on: a jump would look like the start of another sequence
        more = tensor[:, -1:] + torch.arange(1, surplus + 1, device=tensor.device)
        return torch.cat([tensor, more], 1)
    return pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, surplus), value=value)


def _length(batch: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        found = batch.get(name)
        if isinstance(found, Tensor) and found.ndim >= 2:
            return found.shape[1]
    raise LayoutError(
        "the batch has no sequence",
        got=", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items()) or "an empty batch",
        expected="input_ids of shape (batch, sequence), or inputs_embeds of shape (batch, sequence, width)",
        do="name them so, for example in the collate_fn",
    )


def _require_known(batch: Mapping[str, Any], names: set[str], whole: set[str], length: int) -> None:
    for name, value in batch.items():
        if name in whole or not isinstance(value, Tensor):
            continue
        per_token = value.ndim >= 2 and value.shape[1] == length
        if name in names and not per_token:
            raise LayoutError(
                f"'{name}' does not have one entry per token",
                got=f"shape {tuple(value.shape)}, with sequences of {length} tokens",
                expected=f"(batch, {length}, ...)",
                do=f"cut it to that shape, or pass whole=['{name}'] if it is no matter of tokens",
            )
        if name not in names and per_token:
            raise LayoutError(
                f"it is not known whether '{name}' is cut with the sequence",
                got=f"shape {tuple(value.shape)}, whose dim 1 has the length of the sequence",
                expected="a name that says so",
                do=f"pass tokens=['{name}'] to cut it, or whole=['{name}'] to leave it",
            )


def _require_same(batch: Mapping[str, Any], axis: Axis) -> None:
    if axis.size == 1:
        return
    digest = sum((_digest(batch[name]) for name in sorted(batch) if isinstance(batch[name], Tensor)), start=0)
    everyone = torch.empty(axis.size, dtype=torch.int64, device=axis.device)
    axis.all_gather_into(everyone, torch.tensor([digest % 2**62], device=axis.device)).wait()
    found = everyone.tolist()
    if len(set(found)) > 1:
        other = next(rank for rank, value in enumerate(found) if value != found[0])
        raise UsageError(
            "the ranks of one sequence were given different batches",
            got=f"rank {axis.ranks[other]} has another batch than rank {axis.ranks[0]}",
            expected="the same whole sequences on every rank of the axis, which are then cut",
            do="let the sampler go by engine.get_data_parallel_rank() and engine.dp_world_size, not by the global rank",
        )


def _digest(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).long()
    weights = torch.arange(flat.numel(), device=flat.device) % 65521 + 1
    return int((flat * weights).sum()) + flat.numel()
