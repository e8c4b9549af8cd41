"""Owns reading and writing of masters and gradients by parameter, whole or as they lie on this rank.

Knows nothing of stages: it asks the strategy what the window holds and assembles parts.

What is said here holds at every stage and precision. Functions on whole tensors are collective: every rank of the
engine calls them, in one order, with the same values where they write; of a pipeline, every rank that holds the layer.
They are of whole tensors where ranks share a layer, too; "local" is of what this rank's shards hold of its part. What
is returned is a copy. A parameter that belongs to no live engine, or a value of another shape, is a UsageError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from deepcore.errors import UsageError
from deepcore.zero import holdings
from deepcore.zero.gather import in_memory_order, in_shape, keep_weights
from deepcore.zero.locate import (
    gradient_part,
    in_fp32,
    inverse_scale,
    joined,
    mine_of,
    on_any_part,
    require_gradient,
    require_local,
    require_shape,
    run,
    store_weights,
    weights_part,
    whole_form,
)
from deepcore.zero.parts import assemble

Tensor = torch.Tensor
UpdateGrad = Callable[[Tensor, torch.nn.Parameter], Tensor]

# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def safe_get_full_fp32_param(param: torch.nn.Parameter) -> Tensor:
    """The master weights of a parameter, in fp32 and its own shape. Collective.

    A parameter that nothing updates has no master: its weights are returned, in fp32.
    """
    held = holdings.require(param)
    held.holdings.strategy.watch.absorb()
    if held.group is None:
        return joined(held, param.detach().to(torch.float32, copy=True))
    return joined(held, in_fp32(held, weights_part(held)))


@torch.no_grad()
def safe_set_full_fp32_param(param: torch.nn.Parameter, value: Tensor) -> None:
    """Write ``value`` into masters, shards and the low-precision weights of all ranks, each of which calls this."""
    held = holdings.require(param)
    require_shape(held, value, whole_form(held))
    value = mine_of(held, value)
    if held.group is None:
        param.data.copy_(value)
        return
    exact = in_memory_order(value, held).float()
    weights = exact.to(held.group.key.dtype)
    keep_weights(held, weights, exact)
    part = weights_part(held)
    if part is not None:  # a master that the weight rounds to is written too
        store_weights(held, part.offset, run(exact, part))


@torch.no_grad()
def safe_get_local_fp32_param(param: torch.nn.Parameter) -> Tensor | None:
    """This rank's part of the master weights, fp32, 1-D in memory order; None where its shards hold none of it.

    At stage 0 that is all of it. Not collective.
    """
    held = holdings.require(param)
    held.holdings.strategy.watch.absorb()
    if held.group is None:
        return param.detach().float().reshape(-1).clone()
    part = weights_part(held)
    return None if part is None else part.values.to(held.holdings.axis.device, torch.float32, copy=True)


@torch.no_grad()
def safe_set_local_fp32_param(param: torch.nn.Parameter, value: Tensor | None) -> None:
    """Write this rank's part. Collective, for weights that are whole on other ranks: who holds none passes None."""
    held = holdings.require(param)
    part = None if held.group is None else weights_part(held)
    if held.group is None:
        require_local(held, value, param.numel())
        if value is not None:
            param.data.copy_(value.reshape(param.shape))
        return
    require_local(held, value, 0 if part is None else part.values.numel())
    if part is not None and value is not None:
        store_weights(held, part.offset, value.reshape(-1))
        part = weights_part(held)
    whole = assemble(part, held.holdings.axis)
    if whole is not None:
        keep_weights(held, whole.values.to(held.group.key.dtype))


# --- gradients --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def safe_get_full_grad(param: torch.nn.Parameter) -> Tensor | None:
    """The gradient of the window so far, fp32, as the optimizer will see it before clipping. Collective.

    It is the mean over ranks (the sum, where the config asks for that) of what ``backward`` has accumulated, divided
    by the accumulation steps, with the loss scale divided out. Valid from a backward to the step; gradients that are
    not reduced yet are summed for this call only. None if no rank has a gradient for the parameter in this window,
    or nothing updates it.
    """
    held = holdings.require(param)
    axis, strategy = held.holdings.axis, held.holdings.strategy
    if held.number is None:
        return None
    window = strategy.window_gradient(held.number, held.index)
    question = f"whether '{held.name}' has a gradient"
    if not on_any_part(held, axis.vote(window.used, what=question), question):
        return None
    flat = torch.zeros(held.slot.numel, device=axis.device)
    if window.reduced:
        whole = assemble(gradient_part(held), axis)
        if whole is not None:
            flat.copy_(whole.values)
    if window.unreduced:
        local = torch.zeros_like(flat) if window.local is None else window.local.to(torch.float32, copy=True)
        axis.all_reduce(local, op="sum", what=held.name).wait()
        flat += local.div_(window.divisor)
    return joined(held, in_shape(flat.mul_(inverse_scale(held)), held))


@torch.no_grad()
def safe_set_full_grad(param: torch.nn.Parameter, value: Tensor) -> None:
    """Replace the gradient of the window so far by ``value``, in the meaning of ``safe_get_full_grad``. Collective.

    What is unreduced is reduced first. UsageError without a backward since the last step.
    """
    held = holdings.require(param)
    require_shape(held, value, whole_form(held))
    value = mine_of(held, value)
    number = require_gradient(held)
    held.holdings.strategy.make_boundary()
    part = gradient_part(held)
    if part is not None:
        part.values.copy_(run(in_memory_order(value, held), part).float() / inverse_scale(held))
    held.holdings.strategy.mark_used(number, held.index)


@torch.no_grad()
def safe_get_local_grad(param: torch.nn.Parameter) -> Tensor | None:
    """This rank's part of the reduced gradient, fp32, 1-D in memory order, scaled as the full one. Not collective.

    None where its shards hold none of the parameter, where nothing updates it, and before a backward. UsageError
    inside a window whose gradients are not reduced yet. Zeros where the parameter was not used.
    """
    held = holdings.require(param)
    if held.number is None:
        return None
    window = held.holdings.strategy.window_gradient(held.number, held.index)
    if window.unreduced:
        raise UsageError(
            f"the gradient of '{held.name}' is not reduced yet",
            got="local gradients of a micro-batch inside an accumulation window, or inside no_sync()",
            expected="a call after the backward that ends the window",
            do="use safe_get_full_grad, which reduces for its caller",
        )
    part = gradient_part(held) if window.reduced else None
    return None if part is None else part.values.to(held.holdings.axis.device).float() * inverse_scale(held)


@torch.no_grad()
def safe_set_local_grad(param: torch.nn.Parameter, value: Tensor | None) -> None:
    """Replace this rank's part; ranks that hold none pass None. Collective where something is unreduced."""
    held = holdings.require(param)
    number = require_gradient(held)
    held.holdings.strategy.make_boundary()
    part = gradient_part(held)
    require_local(held, value, 0 if part is None else part.values.numel())
    if part is not None and value is not None:
        part.values.copy_(value.reshape(-1).float() / inverse_scale(held))
    held.holdings.strategy.mark_used(number, held.index)


def safe_update_full_grad_vectorized(params: Iterable[torch.nn.Parameter], fn: UpdateGrad) -> None:
    """Replace every gradient by ``fn(gradient, parameter)``, whole and fp32; those without one are left. Collective."""
    for param in params:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, fn(grad, param))
