"""Owns an engine's hold on its memory: states that leave between steps, who finds them, and their release.

Knows nothing of where they go and how (``residence``), or of how an engine trains.
"""

from __future__ import annotations

from typing import Any

from deepcore.engine.core import TrainCore
from deepcore.engine.persistence import Persistent
from deepcore.engine.residence import Residence, require_kinds
from deepcore.errors import UsageError
from deepcore.parallel.sequence.binding import say_axis, unbind
from deepcore.zero import holdings
from deepcore.zero.strategy import ZeroStrategy


class Resident(Persistent):
    """An engine whose states may be away for a while.

    Attributes:
        residence: where they are.
    """

    residence: Residence
    _holdings: holdings.Holdings | None

    def _move_in(self, strategy: ZeroStrategy, core: TrainCore | None) -> None:
        """Take over what trains the model."""
        self.strategy, self.core = strategy, core
        self.residence = Residence(strategy, core)
        self._holdings = None

    def take_charge(self, held: holdings.Holdings) -> None:
        """Let the functions of ``deepcore.zero`` find this engine by its parameters, until ``destroy``."""
        say_axis(self, self.mesh.sp)  # of which a loss asks
        self._holdings = self.residence.holdings = held
        holdings.register(self.module, held)

    def offload_states(
        self, include: Any = None, device: Any = "cpu", pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """Send states to the CPU between steps. Until ``reload_states`` nothing trains, and what is away is unreadable.

        Args:
            include: of "optim_states", "hp_params" (masters), "lp_params" (weights; in fp32 these are the masters) and
                "lp_grads"; by default all. Without "lp_params" the model still runs.
            device: "cpu".
        """
        self.residence.offload(require_kinds(include, device), pin_memory=pin_memory, non_blocking=non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` sent away."""
        self.residence.reload(non_blocking=non_blocking)

    def _require_core(self, verb: str) -> TrainCore:
        if self.core is None:
            raise UsageError(
                f"{verb} on an engine without an optimizer",
                got="initialize() was given no optimizer and the config names none",
                expected="an optimizer",
                do="pass optimizer=... or add an optimizer section to the config",
            )
        self.core.require_alive()
        self.residence.require_home(verb)
        return self.core

    def _retire(self) -> None:
        """States come home, nobody finds this engine any more, and nothing trains."""
        self.residence.reload()
        if self._holdings is not None:
            holdings.release(self._holdings)
        if self.core is not None:
            self.core.clear()
            self.core.kill("engine.destroy() was called")
        unbind(self, self.mesh.sp)
