"""Owns plans that are written down: the user's ``partition_config``, presets, and the model's own ``tp_plan``.

Knows nothing of ranks but their number; what such a plan does not name stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from deepcore.config.sections.parallel import LayerSpec, PartitionConfig
from deepcore.errors import ConfigError
from deepcore.parallel.tensor.draft import Demand, Draft, Proposal, is_embedding, is_linear, widths
from deepcore.parallel.tensor.heads import demand_heads, find_attention, settle_attention
from deepcore.parallel.tensor.plan import Style, TensorSplit

# transformers' words for what is done to a layer, and ours
STYLES: dict[str, Style] = {
    "colwise": "column",
    "packed_colwise": "column",
    "colwise_rep": "column_gathered",
    "colwise_gather_output": "column_gathered",
    "rowwise": "row",
    "rowwise_split_input": "row_split",
    "rowwise_rep": "row_split",
    "embedding_rowwise": "vocab",
    "moe_tp_experts": "experts",
    "replicated_with_grad_allreduce": "summed",
    "replicate": "replicated",
    "replicated": "replicated",
}
_PACKED = "packed_colwise"


def own_plan(model: nn.Module) -> dict[str, str]:
    """The ``tp_plan`` that a transformers model brings, by patterns of whole names; empty where there is none."""
    if not any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__):
        return {}
    plan: Mapping[str, str] | None = getattr(model, "_tp_plan", None)
    return dict(plan or {})


def follow(draft: Draft, plan: Mapping[str, str], source: str) -> None:
    """Propose what a plan in transformers' words says.

    Raises:
        ConfigError: it has a word that is not known.
    """
    draft.source = source
    _require_known(plan)
    _propose(draft, plan, prefix=r"\A")
    finish(draft, follow_widths=False)


def _require_known(plan: Mapping[str, str]) -> None:
    for pattern, word in plan.items():
        if word not in STYLES:
            raise ConfigError(
                "the model's own plan of tensor parallelism has a word that deepcore does not know",
                got=f"{pattern!r}: {word!r}",
                expected=", ".join(STYLES),
                do="describe the model's layers in tensor_parallel.partition_config, which is taken instead",
            )


def _propose(draft: Draft, plan: Mapping[str, str], prefix: str) -> None:
    """What a plan says of layers of which nothing is known yet."""
    rules = [
        (re.compile(prefix + re.escape(pattern).replace(r"\*", r"\d+") + r"\Z"), word) for pattern, word in plan.items()
    ]
    params = dict(draft.model.named_parameters(remove_duplicate=False))
    named = {name: word for name in (*draft.modules, *params) for rule, word in rules if rule.search(name)}
    for name, word in named.items():
        known = name in draft.proposals or name in draft.left
        if name in draft.modules and STYLES[word] != "replicated" and not known:
            _follow_one(draft, name, word, {n: w for n, w in named.items() if n.rpartition(".")[0] == name})


def _follow_one(draft: Draft, name: str, word: str, own: Mapping[str, str]) -> None:
    module, style = draft.modules[name], STYLES[word]
    if style == "experts":
        _follow_experts(draft, name, own)
    elif style == "summed" or (style == "vocab" and is_embedding(module)):
        draft.proposals[name] = Proposal(style)
    elif style != "vocab" and is_linear(module):
        outputs = widths(module)[1]
        draft.proposals[name] = Proposal(style, (outputs // 2,) * 2 if word == _PACKED else ())
    elif style != "vocab":
        raise ConfigError(
            "the plan of tensor parallelism names a layer whose product is not an ordinary one",
            got=f"'{name}', a {type(module).__name__}, as {word!r}",
            expected="torch.nn.Linear, or transformers' Conv1D",
            do='leave it whole by a "skip" in tensor_parallel.partition_config, with the layers that it feeds',
        )
    else:
        draft.left[name] = f"a {type(module).__name__} does more than look up rows"


def _follow_experts(draft: Draft, name: str, own: Mapping[str, str]) -> None:
    """Stacked weights (experts, outputs, inputs): outputs of the first product are cut, and inputs of the second."""
    module = draft.modules[name]
    params = dict(module.named_parameters(recurse=False))
    splits: dict[str, TensorSplit] = {}
    for full, word in own.items():
        param = full.rpartition(".")[2]
        shape = params[param].shape
        dim = len(shape) - 1 if STYLES[word] == "row" else len(shape) - 2
        size = shape[dim]
        splits[param] = TensorSplit(dim, (size // 2,) * 2 if word == _PACKED else (size,))
        draft.demands.append(Demand(f"width of '{full}'", size // 2 if word == _PACKED else size))
    if params.keys() - splits.keys():
        draft.left[name] = f"its plan says nothing of {', '.join(sorted(params.keys() - splits.keys()))}"
    else:
        draft.proposals[name] = Proposal("experts", splits=splits)


def finish(draft: Draft, *, follow_widths: bool) -> None:
    """What a written plan leaves open: heads of its attentions, widths, vocabularies that do not divide."""
    columns = [name for name, proposal in draft.proposals.items() if proposal.style == "column"]
    settled: set[str] = set()
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in columns):
        own = [name for name in columns if name.rpartition(".")[0] == owner]
        demand_heads(draft, owner, own)
        attention = find_attention(owner, own)
        if attention is None or (attention.fused and len(draft.proposals[attention.fused].segments) != 3):
            continue
        if settle_attention(draft, attention, follow_widths=follow_widths):
            settled |= {attention.fused, attention.query, attention.key, attention.value}
    for name, proposal in list(draft.proposals.items()):
        _demand(draft, name, proposal, settled=name in settled)


def _demand(draft: Draft, name: str, proposal: Proposal, *, settled: bool) -> None:
    module: Any = draft.modules[name]
    if proposal.style in ("vocab", "column_gathered"):
        rows = module.weight.shape[0] if proposal.style == "vocab" else widths(module)[1]
        if rows % draft.size and not proposal.forced:
            draft.drop(name, f"{rows} rows do not divide by {draft.size}")
            return
        draft.demands.append(Demand(f"outputs of '{name}'", rows))
    elif proposal.style == "width":
        draft.demands.append(Demand(f"width of '{name}'", module.weight.shape[1]))
    elif proposal.style in ("row", "row_split"):
        draft.demands.append(Demand(f"inputs of '{name}'", widths(module)[0]))
    elif proposal.style == "column" and not settled:
        for size in proposal.segments or (widths(module)[1],):
            draft.demands.append(Demand(f"outputs of '{name}'", size))


# --- partition_config -------------------------------------------------------------------------------------------------


def obey(draft: Draft, config: PartitionConfig, preset: Mapping[str, str], source: str) -> None:
    """Propose what the config's rules say, the first that matches a parameter's name; then what a preset says.

    Args:
        preset: the ends of names, and transformers' words for them.

    Raises:
        ConfigError: a rule cannot be followed, or, in strict mode, a matrix is named by none.
    """
    draft.source = source
    kind = getattr(getattr(draft.model, "config", None), "model_type", None)
    rules = [spec for spec in config.layer_specs if not spec.model_types or kind in spec.model_types]
    unnamed = []
    for param_name, param in draft.model.named_parameters(remove_duplicate=False):
        name, _, own = param_name.rpartition(".")
        module = draft.modules[name]
        spec = next((rule for rule in rules if _matches(rule.patterns, param_name)), None)
        if spec is not None:
            _obey_one(draft, name, own, spec)
        elif _matches(config.lm_head_patterns, name) or _matches(config.lm_head_patterns, param_name):
            draft.proposals[name] = Proposal("column_gathered", forced=True)
        elif config.embedding_partition_dim is not None and is_embedding(module) and _is_of_tokens(draft, name):
            style: Style = "vocab" if config.embedding_partition_dim == 0 else "width"
            draft.proposals[name] = Proposal(style, forced=True)
        elif param.ndim > 1:
            unnamed.append(param_name)
    if config.use_default_specs:
        _propose(draft, preset, prefix=r"(\A|\.)")
    unnamed = [name for name in unnamed if name.rpartition(".")[0] not in draft.proposals]
    if config.strict_mode and unnamed:
        raise ConfigError(
            "tensor_parallel.partition_config names no rule for a weight, and strict_mode is on",
            got=f"'{unnamed[0]}'" + (f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""),
            expected="a pattern in layer_specs that matches it",
            do='add one, of partition_type "skip" if it is to stay whole',
        )
    finish(draft, follow_widths=True)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _is_of_tokens(draft: Draft, name: str) -> bool:
    """Whether it is the embedding of tokens: the one that the model names, or else the largest."""
    get: Callable[[], nn.Module] | None = getattr(draft.model, "get_input_embeddings", None)
    if callable(get):
        return draft.modules[name] is get()
    largest = max(m.num_embeddings for m in draft.modules.values() if isinstance(m, nn.Embedding))
    return bool(getattr(draft.modules[name], "num_embeddings", 0) == largest)


def _obey_one(draft: Draft, name: str, own: str, spec: LayerSpec) -> None:
    module = draft.modules[name]
    if spec.grad_allreduce:
        draft.proposals[name] = Proposal("summed", forced=True)
        return
    if spec.partition_type == "skip":
        draft.left[name] = "partition_config says skip"
        return
    if own != "weight" or not is_linear(module):
        if own == "bias" and name in draft.proposals:
            return  # follows from its weight
        raise ConfigError(
            "a rule of tensor_parallel.partition_config matches what is not the weight of a linear layer",
            got=f"'{name}.{own}' of a {type(module).__name__}, for {spec.patterns}",
            expected="weights of torch.nn.Linear, or of transformers' Conv1D",
            do=r"write the pattern more closely, for example '.*\.up_proj\.weight$'",
        )
    if spec.partition_type == "row":
        draft.proposals[name] = Proposal("row", forced=True)
        return
    style: Style = "column_gathered" if spec.gather_output else "column"
    draft.proposals[name] = Proposal(style, _segments(name, widths(module)[1], spec), forced=True)


def _segments(name: str, outputs: int, spec: LayerSpec) -> tuple[int, ...]:
    """The sizes of what a fused weight consists of, from its logical shape: (3, -1), or ((q, k, v), -1)."""
    if spec.shape is None:
        return ()
    of_outputs = spec.shape[spec.partition_dim or 0]
    found = of_outputs if isinstance(of_outputs, tuple) else (outputs // of_outputs,) * of_outputs
    if sum(found) != outputs or (isinstance(of_outputs, int) and of_outputs < 1):
        raise ConfigError(
            "a logical shape of tensor_parallel.partition_config does not fit its weight",
            got=f"shape {spec.shape}, partition_dim {spec.partition_dim or 0}, for '{name}' with {outputs} outputs",
            expected="a number of equal parts, or their sizes, at partition_dim",
            do=f"write sizes that add up to {outputs}",
        )
    return found
