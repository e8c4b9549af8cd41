"""Owns the cutting of a model over an axis by a plan, and the way back: parameters stay the same objects.

Knows nothing of training; whoever trains is given the cuts, by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deepcore.comm.mesh import Axis
from deepcore.parallel.tensor.layers import Stretch, bind_layer, unbind_layer
from deepcore.parallel.tensor.plan import TensorPlan
from deepcore.sharding import scattered
from deepcore.sharding.cuts import Cut, gathered


class TensorShards:
    """What one engine's model is cut into.

    Attributes:
        axis: the ranks that hold the parts.
        plan: what was done.
        cuts: by parameter; those that are whole on every rank are not in it.
    """

    def __init__(self, model: nn.Module, axis: Axis, plan: TensorPlan, replicas: Axis) -> None:
        """Cut ``model``. Collective: every rank's part comes from the first rank's weights.

        What ``zero.Init`` has scattered over all ranks is then, part by part, over ``replicas``: those with the part.
        """
        self.axis, self.plan = axis, plan
        self.cuts: dict[torch.Tensor, Cut] = {}
        self._model = model
        modules = dict(model.named_modules())
        for layer in plan.layers:
            for own, split in layer.splits.items():
                param = modules[layer.name]._parameters[own]
                if param is not None and param not in self.cuts:
                    shape = scattered.shape_of(param)
                    self.cuts[param] = Cut(shape, split.dim, split.segments, axis.rank, axis.size)
        with torch.no_grad():
            self._share(replicas)
        for change in plan.adjustments:
            setattr(modules[change.module], change.attribute, change.after)
        stretch = Stretch(axis)
        for layer in plan.layers:
            if layer.style != "replicated":
                bind_layer(modules[layer.name], layer, stretch)

    def _share(self, replicas: Axis) -> None:
        """One tensor at a time, wherever the model is: no device holds more of it whole."""
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            if scattered.find(tensor) is not None:  # the same on all ranks already
                scattered.replace(tensor, self._part_of(tensor), replicas)
                continue
            flat = tensor.data.to(self.axis.device, copy=True).contiguous()
            self.axis.broadcast(flat, what=name).wait()
            cut = self.cuts.get(tensor)
            if cut is None:
                tensor.data.copy_(flat)
            else:
                tensor.data = cut.take(flat).to(tensor.device)

    def _part_of(self, param: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        cut = self.cuts.get(param)
        return cut.take if cut is not None else lambda whole: whole

    def names(self) -> dict[str, Cut]:
        """Cuts by all names that a state dict has."""
        named = self._model.named_parameters(remove_duplicate=False)
        return {name: self.cuts[param] for name, param in named if param in self.cuts}

    def whole(self, part: torch.Tensor, cut: Cut) -> torch.Tensor:
        """All ranks' parts in one, in new memory. Collective."""
        return gathered(part, cut, self.axis)

    def whole_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of parts as one of whole tensors. Collective."""
        cuts = self.names()
        return {name: self.whole(value, cuts[name]) if name in cuts else value for name, value in state.items()}

    def part_of_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of whole tensors as one of this rank's parts; what has another shape is left to be refused."""
        cuts = self.names()
        return {
            name: cuts[name].take(value)
            if name in cuts and isinstance(value, torch.Tensor) and tuple(value.shape) == cuts[name].shape
            else value
            for name, value in state.items()
        }

    def release(self, *, whole: bool) -> None:
        """Let modules be what they were, and, if ``whole``, have all of their weights again. Collective then."""
        modules = dict(self._model.named_modules())
        if whole:
            with torch.no_grad():
                for param, cut in self.cuts.items():
                    param.data = self.whole(param.data, cut).to(param.device)
        for change in self.plan.adjustments:
            setattr(modules[change.module], change.attribute, change.before)
        for layer in self.plan.layers:
            unbind_layer(modules[layer.name])
        self.cuts.clear()
