"""Owns the split of a model's parameters into groups: which parameters travel together.

Knows nothing of buffers or collectives: it returns names and keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from deepcore.sharding.scattered import numel_of

# Bytes of parameters per group where the config sets no bucket size. Large enough that a collective is worth its start;
# small enough that those of two groups, in flight at a time, are a small part of the model, and overlap with backward.
MAX_GROUP_NBYTES, MIN_GROUP_NBYTES = 25 * 2**20, 4 * 2**20
GROUPS_PER_MODEL = 8


@dataclass(frozen=True)
class GroupKey:
    """What all parameters of one group share. Optimizer param_groups are not part of it."""

    unit: int
    dtype: torch.dtype
    requires_grad: bool
    axis: str
    device: torch.device


@dataclass
class GroupPlan:
    """One group to be: its key and its parameters, by name, in registration order."""

    key: GroupKey
    params: list[tuple[str, torch.nn.Parameter]] = field(default_factory=list)
    numel: int = 0


def plan_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    axis: str,
    dtype_of: Mapping[torch.nn.Parameter, torch.dtype] | None = None,
    held: Collection[torch.nn.Parameter] = (),
    max_numel: int | None = None,
    first_unit: int = 0,
) -> list[GroupPlan]:
    """Pack parameters, in registration order, into groups of at most ``max_numel`` elements each.

    Parameters of different dtype, device or trainability never share a group, nor do those that an optimizer holds
    with others. A parameter larger than the
    bound gets a group of its own.

    Args:
        named: (name, parameter) pairs, each parameter once.
        axis: name of the mesh axis over which the groups are reduced.
        dtype_of: dtype that each parameter will be cast to; None keeps theirs.
        held: parameters that an optimizer holds.
        first_unit: number of the first group.
        max_numel: elements per group; None means an eighth of all, within ``MIN_`` and ``MAX_GROUP_NBYTES``.
    """
    named = list(named)
    total = sum(numel_of(param) * param.element_size() for _, param in named)
    most = max(MIN_GROUP_NBYTES, min(MAX_GROUP_NBYTES, total // GROUPS_PER_MODEL))
    plans: list[GroupPlan] = []
    current: dict[tuple[object, ...], GroupPlan] = {}
    for name, param in named:
        dtype = param.dtype if dtype_of is None else dtype_of[param]
        kind = (param.dtype, dtype, param.requires_grad, param in held, param.device)
        bound = max_numel or most // param.element_size()
        plan = current.get(kind)
        numel = numel_of(param)
        if plan is None or (plan.numel and plan.numel + numel > bound):
            plan = GroupPlan(GroupKey(first_unit + len(plans), dtype, param.requires_grad, axis, param.device))
            plans.append(plan)
            current[kind] = plan
        plan.params.append((name, param))
        plan.numel += numel
    return plans
