"""Owns the way to a plan: whose word counts, what tied weights have to agree on, and whether the ranks fit.

Knows nothing of process groups, and changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepcore.config.sections.parallel import PartitionConfig, TensorParallel
from deepcore.errors import ConfigError
from deepcore.parallel.tensor import patterns
from deepcore.parallel.tensor.draft import Draft, Proposal, is_embedding, splits_of
from deepcore.parallel.tensor.inference import infer, vocabularies
from deepcore.parallel.tensor.plan import LayerPlan, TensorPlan, TensorSplit
from deepcore.parallel.tensor.presets import preset
from deepcore.parallel.tensor.surroundings import Surroundings, surroundings_of

_MOST_RANKS = 1024  # that an error looks for


def make_plan(model: nn.Module, size: int, section: TensorParallel, around: Surroundings | None = None) -> TensorPlan:
    """The plan for ``size`` ranks: the user's, else the model's own, else what the module graph shows.

    Args:
        around: of a stage, where it knows of the others; what is cut may then be nothing.

    Raises:
        ConfigError: a plan cannot be followed, or heads or widths do not divide by the ranks.
    """
    draft = Draft(model, size, _alone(model, size) if around is None else around)
    own = patterns.own_plan(model)
    if section.partition_config is not None or section.preset_model is not None:
        rules = {} if section.preset_model is None else preset(section.preset_model)
        words = [f"the preset {section.preset_model}"] * (section.preset_model is not None)
        words = ["partition_config"] * (section.partition_config is not None) + words
        patterns.obey(draft, section.partition_config or PartitionConfig(), rules, " and ".join(words))
    elif own:
        patterns.follow(draft, own, "the model's own tp_plan")
    else:
        infer(draft)
    _require_may_be_cut(draft)
    _require_fits(draft)
    _agree_on_tied(draft)
    layers = tuple(
        LayerPlan(name, proposal.style, splits_of(draft.modules[name], proposal), proposal.blocks, draft.source)
        for name in draft.modules
        if (proposal := draft.proposals.get(name)) is not None
    )
    if around is None and not any(plan.splits for plan in layers):
        raise nothing_to_cut(type(model).__name__, draft.source, draft.left)
    order = list(draft.modules)
    left = {name: draft.left[name] for name in sorted(draft.left, key=order.index)}
    return TensorPlan(size, layers, tuple(draft.adjustments), left, draft.source)


def _alone(model: nn.Module, size: int) -> Surroundings:
    """The surroundings of a model whose stages are all here."""
    around = surroundings_of(model)
    return around.with_vocabularies([vocabularies(Draft(model, size, around))]) if around.is_stage else around


def _require_may_be_cut(draft: Draft) -> None:
    """Raise where a written plan names a layer whose weight is read without a call: a part would be taken for all."""
    name = next((name for name in draft.proposals if draft.around.why_whole(name)), None)
    if name is not None:
        raise ConfigError(
            f"{draft.source} names a layer that cannot be cut",
            got=f"'{name}': {draft.around.why_whole(name)}",
            expected="layers whose weights are used by calls of them only",
            do='leave it out, or "skip" it; a tied head can be an nn.Linear inside of the tied module that has the '
            "embedding's weight, and forward_fn a call of it",
        )


def _require_fits(draft: Draft) -> None:
    wrong = [demand for demand in draft.demands if not demand.fits(draft.size)]
    if not wrong:
        return
    good = [size for size in range(1, _MOST_RANKS) if all(demand.fits(size) for demand in draft.demands)]
    below = max((size for size in good if size < draft.size), default=1)
    above = min((size for size in good if size > draft.size), default=None)
    sizes = str(below) if above is None else f"{below} or {above}"
    raise ConfigError(
        f"the model cannot be cut over {draft.size} tensor-parallel ranks",
        got="; ".join(f"{demand.number} {demand.what}" for demand in wrong[:3])
        + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
        expected=f"numbers that divide by {draft.size}; the nearest sizes that fit all layers: {sizes}",
        do=f'set "tensor_parallel": {{"autotp_size": {below if above is None else above}}}, or leave layers whole by '
        'a "skip" in partition_config',
    )


def _agree_on_tied(draft: Draft) -> None:
    """A weight that several layers have is cut in one way, or not at all."""
    holders: dict[torch.Tensor, list[str]] = {}
    for name, param in draft.model.named_parameters(remove_duplicate=False):
        holders.setdefault(param, []).append(name)
    shared = [names for names in holders.values() if len(names) > 1]
    while not all(_settle_tied(draft, names) for names in shared):  # what is dropped may be tied to others
        continue


def _settle_tied(draft: Draft, names: Sequence[str]) -> bool:
    """Whether nothing had to change."""
    layers = [name.rpartition(".")[0] for name in names]
    if not any(layer in draft.proposals for layer in layers):
        return True
    if _follow_head(draft, layers) and len({_split(draft, name) for name in names}) == 1:
        return True
    if len({_split(draft, name) for name in names}) == 1:
        return True
    for layer in [layer for layer in layers if layer in draft.proposals]:
        proposal = draft.proposals[layer]
        if proposal.forced or proposal.style not in ("vocab", "column_gathered"):
            raise _torn(draft, names)
        draft.drop(layer, f"its weight is tied to that of {_others(layer, layers)}, which stays whole")
    return False


def _follow_head(draft: Draft, layers: Sequence[str]) -> bool:
    """Let embeddings that are tied to a cut head be cut with it."""
    cut_by_rows = any(
        layer in draft.proposals and draft.proposals[layer].style in ("vocab", "column_gathered") for layer in layers
    )
    for layer in layers:
        if layer in draft.proposals:
            continue
        module: Any = draft.modules[layer]
        if not cut_by_rows or not is_embedding(module) or module.weight.shape[0] % draft.size:
            return False
        draft.left.pop(layer, None)
        draft.proposals[layer] = Proposal("vocab")
    return True


def _split(draft: Draft, param: str) -> TensorSplit | None:
    layer, _, own = param.rpartition(".")
    proposal = draft.proposals.get(layer)
    splits: Mapping[str, TensorSplit] = {} if proposal is None else splits_of(draft.modules[layer], proposal)
    return splits.get(own)


def _others(layer: str, layers: Sequence[str]) -> str:
    return ", ".join(f"'{other}'" for other in layers if other != layer)


def _torn(draft: Draft, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        "layers that share one weight are to be cut in different ways",
        got="; ".join(f"{name}: {_split(draft, name) or 'whole'}" for name in names),
        expected="one way for all, such as a vocabulary's rows in an embedding and its head",
        do='give them one rule in tensor_parallel.partition_config, or "skip" for all',
    )


def nothing_to_cut(model: str, source: str, left: Mapping[str, str]) -> ConfigError:
    """The error of a plan that cuts nothing."""
    reasons = "; ".join(f"'{name}': {why}" for name, why in list(left.items())[:3])
    return ConfigError(
        "tensor parallelism finds no layer to cut in this model",
        got=f"{model}, by {source}" + (f" ({reasons})" if reasons else ""),
        expected="linear layers in pairs, as around attention and in an MLP",
        do="name them in tensor_parallel.partition_config, or set autotp_size to 1; 'deepcore plan tensor' shows why",
    )
