"""Owns computations over a long sequence that never hold the whole of their intermediate: tile by tile, twice.

Refuses to know axes and models. What is tiled works on every token by itself, such as an MLP, or logits and their loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deepcore.comm.mesh import Axis
from deepcore.errors import LayoutError, UsageError
from deepcore.parallel.randomness import replayed, state_of
from deepcore.parallel.sequence.loss import token_mean


class Tiled(nn.Module):
    """A module that reads the parameters of those inside it: ZeRO's stage 3 gathers them for its call."""


class TiledMLP(Tiled):
    """``mlp`` on one tile of the sequence at a time, recomputed in backward: it holds 1/num_tiles of its intermediate.

    Args:
        mlp: a module from a tensor to one of the same leading shape, token by token.
        num_tiles: parts of the sequence.
        dim: the dim of the sequence.
    """

    def __init__(self, mlp: nn.Module, num_tiles: int, dim: int = 1) -> None:
        super().__init__()
        _require_tiles(num_tiles)
        self.mlp, self.num_tiles, self.dim = mlp, num_tiles, dim

    def forward(self, x: Tensor) -> Tensor:
        return tiled(self.mlp, x, self.mlp.parameters(), self.num_tiles, self.dim)


class TiledCrossEntropy(Tiled):
    """Cross entropy of ``head(hidden)``, averaged over tokens, without ever holding the logits of more than one tile.

    Gradients are computed along with the loss, while a tile's logits are there; backward only scales them.

    Args:
        head: from hidden states to logits, token by token; its parameters may be tied to others.
        num_tiles: parts of the sequence.
        ignore_index: the label of tokens that do not count.
    """

    def __init__(self, head: nn.Module, num_tiles: int, ignore_index: int = -100) -> None:
        super().__init__()
        _require_tiles(num_tiles)
        self.head, self.num_tiles, self.ignore_index = head, num_tiles, ignore_index

    def forward(self, hidden: Tensor, labels: Tensor, axis: Axis | None = None) -> Tensor:
        """The mean over the tokens of ``axis``; see ``cross_entropy``, whose arguments these are."""
        if hidden.shape[:-1] != labels.shape:
            raise LayoutError(
                "hidden states and labels do not fit together",
                got=f"hidden states {tuple(hidden.shape)}, labels {tuple(labels.shape)}",
                expected="a label for every token: the shape of the hidden states without their last dim",
                do="cut both alike; deepcore.sequence.shard_batch gives shifted labels",
            )
        params = _trained(self.head.parameters())
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if torch.is_grad_enabled() and (hidden.requires_grad or params):
            total = _TiledSum.apply(self._sum, flat, targets, self.num_tiles, *params)  # type: ignore[no-untyped-call]
        else:
            total = torch.stack([self._sum(*pair) for pair in _pairs(flat, targets, self.num_tiles)]).sum()
        return token_mean(total, (targets != self.ignore_index).sum(), axis)

    def _sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(hidden).float()
        return functional.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, params: Iterable[Tensor], num_tiles: int, dim: int = 1
) -> Tensor:
    """``function(x)``, one tile of dim ``dim`` at a time and once more in backward.

    Args:
        function: from a tensor to one of the same leading shape, token by token.
        x: its input.
        params: the parameters that ``function`` reads; those left out get no gradient.
        num_tiles: parts of ``dim``; the last ones may be shorter.
        dim: the dim of the sequence.
    """
    _require_tiles(num_tiles)
    found: Tensor = _TiledMap.apply(function, x, num_tiles, dim, *_trained(params))  # type: ignore[no-untyped-call]
    return found


class _TiledMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, count: int, dim: int, *params: Tensor
    ) -> Tensor:
        ctx.function, ctx.count, ctx.dim, ctx.params = function, count, dim, params
        ctx.autocast, ctx.state = _autocast_of(x.device), state_of(x.device)
        ctx.save_for_backward(x)
        parts = [function(tile) for tile in _tiles(x, count, dim)]
        if any(
            part.shape[: dim + 1] != tile.shape[: dim + 1]
            for part, tile in zip(parts, _tiles(x, count, dim), strict=True)
        ):
            raise LayoutError(
                "what is tiled changed the shape of its tile",
                got=f"{tuple(parts[0].shape)} for a tile of {tuple(_tiles(x, count, dim)[0].shape)}",
                expected="an output for every token",
                do="tile only what works on every token by itself, along the dim of the sequence",
            )
        return torch.cat(parts, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        gradients = _Gradients(ctx.params, x if ctx.needs_input_grad[1] else None)
        slices = zip(_tiles(x, ctx.count, ctx.dim), _tiles(gradient, ctx.count, ctx.dim), strict=True)
        with replayed(x.device, ctx.state), torch.enable_grad(), ctx.autocast():
            for number, (tile, seed) in enumerate(slices):
                leaf = tile.detach().requires_grad_(gradients.of_input is not None)
                gradients.add(
                    ctx.function(leaf.view_as(leaf)), seed, leaf, _tiles(gradients.of_input, ctx.count, ctx.dim), number
                )
        return None, gradients.of_input, None, None, *gradients.of_params()


class _TiledSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], x: Tensor, labels: Tensor, count: int, *params: Tensor
    ) -> Tensor:
        gradients = _Gradients(params, x if ctx.needs_input_grad[1] else None)
        into = _tiles(gradients.of_input, count, 0)
        sums = []
        with torch.enable_grad():
            for number, (tile, targets) in enumerate(_pairs(x, labels, count)):
                leaf = tile.detach().requires_grad_(gradients.of_input is not None)
                total = function(leaf.view_as(leaf), targets)
                gradients.add(total, torch.ones_like(total), leaf, into, number)
                sums.append(total.detach())
        ctx.gradients = gradients
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise UsageError(
                "a second backward through a tiled loss",
                got="retain_graph, or the loss used in two backward passes",
                expected="one backward per forward: the gradients were made with the loss, and handed out",
                do="add the losses and call backward once",
            )
        ctx.gradients = None
        return None, gradients.scaled_input(gradient), None, None, *gradients.of_params(gradient)


class _Gradients:
    """The gradients of a tiled computation while they grow; those of parameters in fp32, whatever these are."""

    def __init__(self, params: Sequence[Tensor], x: Tensor | None) -> None:
        self._params = params
        self._totals: list[Tensor | None] = [None] * len(params)
        self.of_input = None if x is None else torch.empty_like(x)

    def add(self, output: Tensor, seed: Tensor, leaf: Tensor, into: Sequence[Tensor], number: int) -> None:
        """Differentiate one tile's ``output``."""
        wanted = [leaf, *self._params] if leaf.requires_grad else list(self._params)
        found = list(torch.autograd.grad(output, wanted, seed, allow_unused=True))
        with torch.no_grad():
            if leaf.requires_grad:
                mine = found.pop(0)
                into[number].zero_() if mine is None else into[number].copy_(mine)
            for index, part in enumerate(found):
                if part is not None:
                    total = self._totals[index]
                    wide = part.to(torch.promote_types(part.dtype, torch.float32))
                    self._totals[index] = wide if total is None else total.add_(wide)

    def scaled_input(self, factor: Tensor) -> Tensor | None:
        return None if self.of_input is None else self.of_input.mul_(factor)

    def of_params(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The sums in the parameters' dtypes, times ``factor``; None for a parameter that no tile used."""
        scaled = [total if total is None or factor is None else total.mul_(factor) for total in self._totals]
        return [
            None if total is None else total.to(param.dtype) for total, param in zip(scaled, self._params, strict=True)
        ]


def _tiles(tensor: Tensor | None, count: int, dim: int) -> Sequence[Tensor]:
    return () if tensor is None else tensor.tensor_split(max(1, min(count, tensor.shape[dim])), dim)


def _pairs(x: Tensor, labels: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_tiles(x, count, 0), _tiles(labels, count, 0), strict=True)


def _trained(params: Iterable[Tensor]) -> list[Tensor]:
    return [param for param in dict.fromkeys(params) if param.requires_grad]


def _autocast_of(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled)


def _require_tiles(count: int) -> None:
    if type(count) is not int or count < 1:
        raise UsageError(
            "a number of tiles is a positive integer", got=repr(count), expected="1, 2, ...", do="pass for example 4"
        )
