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
from deepcore.zero.whole import WholeArena


def place_updates(
    strategy: ZeroStrategy, axis: Axis, rules: Mapping[str, UpdateRule], *, replicate: bool
) -> tuple[UpdateArena, Agree]:
    """The arena to bind the optimizer to, and what completes sums over its parameters.

    Args:
        strategy: owner of the shards.
        axis: over which they are cut.
        rules: what the optimizer asks for, per parameter name.
        replicate: every rank is to update everything.
    """
    base = strategy.arena
    if base.is_filed and (replicate or any(rule.whole or rule.family for rule in rules.values())):
        raise _needs_memory(replicate)
    if replicate and not base.is_whole:
        return ReplicatedArena(base, axis, rules), alone
    one_kind = all(not rule.family for rule in rules.values())
    if one_kind and (base.is_whole or not any(rule.whole for rule in rules.values())):
        return base, strategy.agree
    return WholeArena(base, axis, rules), strategy.agree


def _needs_memory(replicate: bool) -> ConfigError:
    return ConfigError(
        "optimizer state in a file is updated tile by tile, and this update needs whole parameters",
        got="replicate_optimizer" if replicate else "Muon, or an optimizer passed as an object",
        expected="Adam, AdamW, LAMB, Lion, Adagrad or SGD of deepcore.optim or the config, without replicate_optimizer",
        do='set "zero_optimization.offload_optimizer.device" to "cpu", or choose another optimizer',
    )
