"""Owns Muon (Jordan et al. 2024): orthogonalised momentum for matrices, AdamW for everything else.

Knows nothing of shards: it asks for its matrices whole, and gets them so at every stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from deepcore.errors import ConfigError
from deepcore.ops import direct
from deepcore.optim.matrices import Matrices, Plans
from deepcore.optim.orthogonal import METHODS, orthogonalize
from deepcore.optim.ranges import out_of_range, require_at_least_zero, require_betas, require_fraction
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.optim.shared_matrices import SharedMatrices
from deepcore.sharding.placement import UpdateRule
from deepcore.sharding.scattered import shape_of
from deepcore.sharding.segments import SegmentBatch
from deepcore.sharding.update_arena import Form

MATRICES, REST = "muon", "adam"  # the families
NOT_FOR_MUON = ("embed", "lm_head")  # parts of names of matrices that are no linear maps between hidden layers
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STACK_NUMEL = 1 << 23  # elements that are orthogonalised together: more would cost memory and gain nothing
_ADJUST = ("original", "match_rms_adamw")


class Muon(SegmentOptimizer):
    """Muon for the matrices of hidden layers, AdamW for all other parameters, in one optimizer.

    For a matrix, in fp32 up to the orthogonalisation, with mu = momentum::

        B = B + (1 - mu) * (g - B)
        U = B + (1 - mu) * (g - B)               Nesterov, with the new B; else U = B
        O = orthogonalize(U)                     Newton-Schulz, see ``orthogonal.py``
        p = p * (1 - lr * wd)
        p = p - lr * adjust * O                  adjust = sqrt(max(1, rows / columns)) ("original"), or
                                                 0.2 * sqrt(max(rows, columns)) ("match_rms_adamw", Liu et al. 2025)

    as in ``torch.optim.Muon``, with the same results at the same settings. More dimensions than two are a matrix of
    the first by all others. Everything else is updated as ``FusedAdam`` does, with decoupled decay.

    A param_group is for Muon if its ``use_muon`` says so. A group without it is divided: a parameter with an attribute
    ``use_muon`` is treated as that says; others go to Muon if they have two or more dimensions and their name, where
    ``params`` gives names (pass ``model.named_parameters()``), contains neither "embed" nor "lm_head".

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of param_group dicts.
        lr: learning rate of all groups that have none; unset: 0.02 for matrices, 3e-4 for the rest.
        muon_lr: of matrices; wins over ``lr``.
        adam_lr: of the rest; wins over ``lr``.
        momentum: mu.
        nesterov: look ahead.
        betas, eps: of AdamW.
        weight_decay: of both.
        ns_method: "standard" or "gram": how Newton-Schulz iterates.
        ns_steps: its iterations.
        ns_dtype: "bf16", as published, or "fp32".
        adjust_lr_fn: how the rate follows the shape.

    Raises:
        ConfigError: a setting is out of range, or a vector is to be updated by Muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        ns_method: str = "standard",
        ns_steps: int = 5,
        ns_dtype: str = "bf16",
        adjust_lr_fn: str = "original",
    ) -> None:
        self._matrices = {
            "lr": _first(muon_lr, lr, 0.02),
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_method": ns_method,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self._rest = {"lr": _first(adam_lr, lr, 3e-4), "betas": tuple(betas), "eps": eps}
        self._plans = Plans()
        self.shared: SharedMatrices | None = None  # under an engine: matrices of which other ranks have parts
        super().__init__(params, {"weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or the two that it is divided into."""
        for group in divided(param_group):
            for name, value in (self._matrices if group["use_muon"] else self._rest).items():
                group.setdefault(name, value)
            super().add_param_group(group)

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "weight_decay")
        if not group["use_muon"]:
            require_at_least_zero(group, "eps")
            require_betas(group)
            return
        require_fraction(group, "momentum")
        _require_choice(group, "ns_method", METHODS)
        _require_choice(group, "ns_dtype", tuple(_DTYPES))
        _require_choice(group, "adjust_lr_fn", _ADJUST)
        if not (isinstance(group["ns_steps"], int) and 0 <= group["ns_steps"] < 100):
            raise out_of_range("ns_steps", group["ns_steps"], "an integer from 0 to 99")
        for param in group["params"]:
            if len(shape_of(param)) < 2:
                raise ConfigError(
                    "Muon updates matrices",
                    got=f"a parameter of shape {shape_of(param)} in a param_group with use_muon",
                    expected="two or more dimensions",
                    do="move it to a param_group with use_muon=False",
                )

    def family(self, group: Mapping[str, Any]) -> str:
        return MATRICES if group["use_muon"] else REST

    def state_names(self, family: str) -> tuple[str, ...]:
        return ("momentum_buffer",) if family == MATRICES else ("exp_avg", "exp_avg_sq")

    def rule(self, group: Mapping[str, Any], form: Form) -> UpdateRule:
        if not group["use_muon"]:
            return UpdateRule(REST)
        rows = form.shape[0]
        columns = form.numel // max(rows, 1)
        return UpdateRule(MATRICES, whole=True, cost=form.numel * min(rows, columns))  # multiplications, up to a factor

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        if group["use_muon"]:
            row = [group["lr"], group["momentum"], group["nesterov"], group["weight_decay"], 0, 0, 0, 0]
            return [float(value) for value in row]
        beta1, beta2 = group["betas"]
        row = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], True, True, 0.0]
        return [float(value) for value in row]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        if batch.family == MATRICES:
            self._launch_matrices(batch, hyper, grad_scale, skip)
            return
        direct.adam_(
            batch.params,
            batch.grads,
            batch.states["exp_avg"],
            batch.states["exp_avg_sq"],
            [],
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
        )

    def _launch_matrices(
        self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor
    ) -> None:
        """Every tensor of the batch is one parameter in its own shape; nothing is read back from the device."""
        names = () if self.shared is None else self.shared.cuts.keys()
        cut = [index for index, segment in enumerate(batch.table.segments) if segment.name in names]
        for group, indices in self._stacks(batch, set(cut)):
            param = batch.params[indices[0]]
            shape = (param.shape[0], param.numel() // param.shape[0])
            plan = self._plans.get(batch, indices, [_ratio(group, *shape)] * len(indices))
            matrices = Matrices(batch, indices, plan, hyper, skip)
            stack = torch.empty(len(indices), *shape, dtype=_DTYPES[group["ns_dtype"]], device=param.device)
            matrices.momentum(list(stack), grad_scale)
            matrices.apply(list(_orthogonal(group, stack)))
        if cut:
            self._launch_parts(batch, cut, hyper, grad_scale, skip)

    def _launch_parts(
        self, batch: SegmentBatch, indices: list[int], hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor
    ) -> None:
        """Matrices of which other ranks have the other parts."""
        shared = self.shared
        assert shared is not None
        names = [batch.table.segments[index].name for index in indices]
        groups = [self.param_groups[batch.table.hyper_of[index]] for index in indices]
        forms = [shared.cuts[name].shape for name in names]
        shapes = [(form[0], math.prod(form[1:])) for form in forms]

        def work(own: list[int], wholes: list[torch.Tensor]) -> list[torch.Tensor]:
            alike: dict[tuple[int, tuple[int, int]], list[int]] = {}
            for number, place in enumerate(own):
                alike.setdefault((batch.table.hyper_of[indices[place]], shapes[place]), []).append(number)
            found = dict[int, torch.Tensor]()
            for (row, shape), numbers in alike.items():
                for some in _bounded(numbers, math.prod(shape)):
                    stack = torch.stack([wholes[number].flatten(1) for number in some])
                    found.update(zip(some, _orthogonal(self.param_groups[row], stack).float(), strict=True))
            return [found[number].view(forms[place]) for number, place in enumerate(own)]

        plan = self._plans.get(
            batch, indices, [_ratio(group, *shape) for group, shape in zip(groups, shapes, strict=True)]
        )
        matrices = Matrices(batch, indices, plan, hyper, skip)
        given = [torch.zeros(shared.cuts[name].part_shape, device=batch.steps.device) for name in names]
        matrices.momentum(given, grad_scale)
        costs = [rows * columns * min(rows, columns) for rows, columns in shapes]
        matrices.apply([ortho.contiguous() for ortho in shared.mapped(names, given, costs, work)])

    def _stacks(self, batch: SegmentBatch, without: set[int]) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
        """The tensors of a batch by group and shape, as many together as ``STACK_NUMEL`` allows."""
        alike: dict[tuple[int, int, int], list[int]] = {}
        for index, segment in enumerate(batch.table.segments):
            if segment.numel and index not in without:
                rows = batch.params[index].shape[0]
                alike.setdefault((batch.table.hyper_of[index], rows, segment.numel // rows), []).append(index)
        for (row, rows, columns), indices in alike.items():
            for some in _bounded(indices, rows * columns):
                yield self.param_groups[row], some


def _bounded(indices: list[int], numel: int) -> Iterator[list[int]]:
    """As many at a time as ``STACK_NUMEL`` allows."""
    most = max(1, STACK_NUMEL // numel)
    for first in range(0, len(indices), most):
        yield indices[first : first + most]


def _orthogonal(group: Mapping[str, Any], matrices: torch.Tensor) -> torch.Tensor:
    """``orthogonalize`` as a param_group says."""
    dtype = _DTYPES[group["ns_dtype"]]
    return orthogonalize(matrices, method=group["ns_method"], steps=group["ns_steps"], dtype=dtype)


def _ratio(group: Mapping[str, Any], rows: int, columns: int) -> float:
    """How the rate follows the shape of a whole matrix."""
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def divided(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group if it says ``use_muon``; else its matrices, in the same dict, and the rest, in another."""
    if "use_muon" in group:
        return [group]
    given = group["params"]
    members = [given] if isinstance(given, torch.Tensor) else list(given)
    matrices = [item for item in members if _is_matrix(item)]
    if not matrices:
        group.update({"params": members, "use_muon": False})
        return [group]
    rest = [item for item in members if not _is_matrix(item)]
    other = {**group, "params": rest, "use_muon": False}
    group.update({"params": matrices, "use_muon": True})
    return [group, other] if rest else [group]


def _is_matrix(item: Any) -> bool:
    name, param = item if isinstance(item, tuple) else ("", item)
    chosen = getattr(param, "use_muon", None)
    if chosen is not None:
        return bool(chosen)
    return len(shape_of(param)) >= 2 and not any(part in name for part in NOT_FOR_MUON)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _require_choice(group: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    if group[name] not in choices:
        raise out_of_range(name, group[name], " or ".join(repr(choice) for choice in choices))
