"""Owns the choice of the arena that an optimizer updates, by what it asks for and how the strategy shards.

Knows nothing of any optimizer or stage.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepcore.comm.mesh import Axis
from deepcore.errors import ConfigError
from deepcore.optim.segment_optimizer import Agree, alone
from deepcore.sharding.placement import UpdateRule
from deepcore.sharding.update_arena import UpdateArena
from deepcore.zero.replicated import ReplicatedArena
from deepcore.zero.strategy import ZeroStrategy
from deepcore.zero.turned import TurnedArena
from deepcore.zero.whole import WholeArena


def place_updates(
    strategy: ZeroStrategy, axis: Axis, rules: Mapping[str, UpdateRule], *, replicate: bool, at_once: bool
) -> tuple[UpdateArena, Agree]:
    """The arena to bind the optimizer to, and what completes sums over its parameters.

    Args:
        strategy: owner of the shards.
        axis: over which they are cut.
        rules: what the optimizer asks for, per parameter name.
        replicate: every rank is to update everything.
        at_once: in memory, the update sees all batches together, and not one after the other.
    """
    base = strategy.arena
    if base.is_filed and replicate:
        raise _needs_memory()
    if replicate and not base.is_whole:
        return ReplicatedArena(base, axis, rules), alone
    whole = any(rule.whole for rule in rules.values())
    one_kind = all(not rule.family for rule in rules.values())
    if one_kind and (not whole or (base.is_whole and not base.is_filed)):  # tiles of a file may cut parameters
        return base, strategy.agree
    make = WholeArena if at_once and not base.is_filed else TurnedArena
    return make(base, axis, rules), strategy.agree


def _needs_memory() -> ConfigError:
    return ConfigError(
        "optimizer state in a file is updated a few parameters at a time, and this update needs all of them at once",
        got="replicate_optimizer",
        expected="an optimizer that updates each parameter by itself, without replicate_optimizer",
        do='set "zero_optimization.offload_optimizer.device" to "cpu", or leave out replicate_optimizer',
    )
