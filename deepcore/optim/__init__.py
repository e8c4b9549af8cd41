"""Floor 2: optimizers over segment tables, gradient clipping and learning-rate schedules."""

from deepcore.optim.adam import FusedAdam

__all__ = ["FusedAdam"]
