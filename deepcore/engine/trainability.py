"""Owns what is said about frozen parameters: room that is kept for them, and training that they do not get.

Knows nothing of how freezing is followed; gradients that arrive, or do not, decide that.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepcore.base.log import logger, warn_once
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.module_units import NamedParam


def note_room_for_frozen(groups: Sequence[FlatGroup]) -> None:
    """Say, once per engine, what frozen parameters in an optimizer's param_groups cost."""
    frozen = [group for group in groups if not group.key.requires_grad]
    if frozen:
        count, numel = sum(len(group.params) for group in frozen), sum(group.layout.numel for group in frozen)
        logger().info(
            f"{count} frozen tensors ({numel:,} elements, '{frozen[0].names[0]}' first) are among those to optimize; "
            "masters, gradients and optimizer state are kept for them, so that they can be unfrozen. "
            "Leave them out of the optimizer to save that."
        )


class LateThaws:
    """Looks for parameters that were frozen, are in no optimizer, and require gradients now: nothing trains them."""

    def __init__(self, named: Sequence[NamedParam], groups: Sequence[FlatGroup]) -> None:
        held = {param for group in groups for param in group.params}
        self._frozen = [
            (name, param)
            for name, param in named
            if not param.requires_grad and param not in held and param.is_floating_point()
        ]

    def check(self) -> None:
        """Warn once of each such parameter's case; a look at one flag per parameter."""
        thawed = [name for name, param in self._frozen if param.requires_grad]
        if thawed:
            warn_once(
                f"thawed {thawed[0]}",
                f"{len(thawed)} parameters, '{thawed[0]}' first, were unfrozen after initialize(), but no optimizer "
                "holds them, so they do not train. Give them to initialize() from the start: "
                "model_parameters=model.parameters()",
            )
            self._frozen = [(name, param) for name, param in self._frozen if not param.requires_grad]
