"""Floor 2: optimizers over segment tables, gradient clipping and learning-rate schedules."""

from deepcore.optim.adagrad import FusedAdagrad
from deepcore.optim.adam import FusedAdam
from deepcore.optim.lamb import FusedLamb
from deepcore.optim.lion import FusedLion
from deepcore.optim.muon import Muon
from deepcore.optim.sgd import FusedSGD

__all__ = ["FusedAdagrad", "FusedAdam", "FusedLamb", "FusedLion", "FusedSGD", "Muon"]
