"""Owns the plan of a model that nobody has described: attentions by the names of their layers, pairs by their graph.

Refuses to guess: a layer that fits no rule, or whose weight is read outside of its call, stays whole and is named.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from deepcore.parallel.tensor.chains import Pair, pairs_in, pairs_in_row
from deepcore.parallel.tensor.draft import Demand, Draft, Proposal, is_embedding, is_linear, widths
from deepcore.parallel.tensor.heads import Attention, find_attention, head_width, settle_attention

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LARGEST_TRACE = 12  # linear layers: no block of a model has more, and a model is not to be traced as a whole
_HEADS = ("lm_head", "head", "embed_out", "output_projection", "decoder", "unembed", "output", "to_logits")
_NAMED_PAIRS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
_NOT_ON_THE_STEP = ("__init__", "_init_weights", "reset_parameters", "init_weights", "tie_weights")
_UNKNOWN_HEADS = "its number of heads is not in the module: name it num_heads, or use partition_config"


def infer(draft: Draft) -> None:
    """Propose what can be proved or is named as the field names it; note the rest."""
    draft.source = "the module graph"
    free = {name for name, module in draft.modules.items() if is_linear(module) or is_embedding(module)}
    whole = {name: why for name in sorted(free) if (why := draft.around.why_whole(name))}
    whole |= dict.fromkeys(_inside_torch(draft), "a module of torch.nn around it reads its weight itself")
    for name in sorted(free - whole.keys()):
        if _is_read_elsewhere(draft, name):
            whole[name] = "its weight is read outside of its call, or the source cannot be seen"
    for name in list(whole):
        for other in sorted(draft.tied.get(name, set()) - whole.keys()):
            whole[other] = f"its weight is that of '{name}', which stays whole"
    free -= whole.keys()
    draft.left.update(whole)
    _attentions(draft, free)
    _pairs(draft, free)
    _vocabulary(draft, free)
    for name in sorted(free - draft.proposals.keys() - draft.left.keys()):
        if is_linear(draft.modules[name]):
            draft.left[name] = "no rule pairs it with another layer"


def _inside_torch(draft: Draft) -> Iterator[str]:
    for name, module in draft.modules.items():
        if type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS):
            for below, child in module.named_modules():
                if below and (is_linear(child) or isinstance(child, nn.Linear)):
                    yield f"{name}.{below}" if name else below


# --- attention --------------------------------------------------------------------------------------------------------


def _attentions(draft: Draft, free: set[str]) -> None:
    for owner in draft.modules:
        own = [name for name in free if name.rpartition(".")[0] == owner and is_linear(draft.modules[name])]
        found = find_attention(owner, sorted(own))
        if found is None or not owner:
            continue
        attention = _with_output(draft, found, free)
        parts = [attention.fused] if attention.fused else [attention.query, attention.key, attention.value]
        if not attention.output:
            _leave(draft, parts, "no output projection is known by its name")
            continue
        if not _fits(draft, attention):
            _leave(draft, [*parts, attention.output], "the widths of its layers are not those of an attention")
            continue
        if attention.fused and not _is_in_blocks(draft, attention):
            _leave(draft, [*parts, attention.output], "the order of query, key and value in its layer cannot be seen")
            continue
        segments = _fused_segments(draft, attention)
        for name in parts:
            draft.proposals[name] = Proposal("column", segments)
        draft.proposals[attention.output] = Proposal("row")
        odd = _other_weights(draft, attention, parts)
        if odd is None:
            _leave(draft, [*parts, attention.output], "it has other weights, which might be used on cut heads")
        elif not settle_attention(draft, attention, follow_widths=True):
            _leave(draft, [*parts, attention.output], _UNKNOWN_HEADS)
        else:
            draft.proposals.update({name: Proposal("summed") for name in odd})


def _other_weights(draft: Draft, attention: Attention, parts: list[str]) -> list[str] | None:
    """Modules inside of an attention that work on single heads, such as norms; None where there is any other weight."""
    owner = attention.owner
    width = head_width(draft.modules[owner], widths(draft.modules[attention.output])[0])
    found = []
    for name, module in draft.modules.items():
        inside = name == owner or name.startswith(f"{owner}.")
        if not inside or name in parts or name == attention.output:
            continue
        params = list(module.parameters(recurse=False))
        if not params:
            continue
        if name == owner or not width or any(tuple(param.shape) != (width,) for param in params):
            return None
        found.append(name)
    return found


def _is_in_blocks(draft: Draft, attention: Attention) -> bool:
    """Whether the attention's code takes the output of its fused layer apart into query, key and value, as it comes.

    An output that is reshaped first may have them beside each other for every head.
    """
    layer = rf"self\.{attention.fused.rpartition('.')[2]}\([^()]*\)"
    kind: Any = type(draft.modules[attention.owner])
    code = "\n".join(_sources(kind) or ())
    names = re.findall(rf"(\w+)\s*=\s*{layer}\s*$", code, flags=re.MULTILINE)
    apart = r"\.(split|chunk)\(|\.(view|reshape)\(.*[,(]\s*3\s*,\s*self\.\w*heads?\b"
    if re.search(rf"{layer}\s*({apart})", code):
        return True
    return any(re.search(rf"\b{n}({apart})|torch\.(split|chunk)\({n}\b", code) for n in names)


def _with_output(draft: Draft, found: Attention, free: set[str]) -> Attention:
    """Some keep the output projection in a list, or in a module beside that of queries, keys and values."""
    if found.output:
        return found
    beside = found.owner.rpartition(".")[0]
    for name in (f"{found.owner}.to_out.0", f"{beside}.output.dense", f"{beside}.output.proj"):
        if name in free and is_linear(draft.modules[name]):
            return Attention(found.owner, found.query, found.key, found.value, found.fused, name)
    return found


def _fits(draft: Draft, attention: Attention) -> bool:
    inputs, _ = widths(draft.modules[attention.output])
    if attention.fused:
        _, outputs = widths(draft.modules[attention.fused])
        return outputs > inputs and (outputs - inputs) % 2 == 0
    outs = [widths(draft.modules[name])[1] for name in (attention.query, attention.key, attention.value)]
    return outs[0] == inputs and outs[1] == outs[2] <= inputs


def _fused_segments(draft: Draft, attention: Attention) -> tuple[int, ...]:
    """Queries as wide as the output's input, then keys and values, which share the rest."""
    if not attention.fused:
        return ()
    inputs, _ = widths(draft.modules[attention.output])
    _, outputs = widths(draft.modules[attention.fused])
    rest = (outputs - inputs) // 2
    return inputs, rest, rest


def _leave(draft: Draft, names: list[str], why: str) -> None:
    for name in names:
        draft.drop(name, why)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(draft: Draft, free: set[str]) -> None:
    """Children come before the modules that hold them, so that a pair is found in the smallest one."""
    for name in reversed(list(draft.modules)):
        module = draft.modules[name]
        inside = [n for n, child in module.named_modules() if is_linear(child)]
        if not 2 <= len(inside) <= _LARGEST_TRACE or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        if draft.around.is_stage and not name:
            continue  # its layers are rows
        full = {below: f"{name}.{below}" if name else below for below in inside}
        undecided = [n for n in full.values() if n in free and n not in draft.proposals and n not in draft.left]
        if len(undecided) < 2:
            continue
        traced = pairs_in(module)
        for pair in _pairs_by_name(module) if traced is None else traced:
            columns = tuple(full[below] for below in pair.columns)
            _take(draft, free, Pair(columns, full[pair.row], frozenset(full[below] for below in pair.halves)))
    for row in draft.around.rows:
        for pair in pairs_in_row(row, draws_by_layer=draft.around.draws_by_layer):
            _take(draft, free, pair)


def _take(draft: Draft, free: set[str], pair: Pair) -> None:
    """Cut a pair, by full names, if nothing else is to happen to its layers."""
    if any(n not in free or n in draft.proposals or n in draft.left for n in (*pair.columns, pair.row)):
        return
    if draft.tied.keys() & {*pair.columns, pair.row}:
        _leave(draft, [*pair.columns, pair.row], "a weight of the pair is another layer's too")
        return
    width = widths(draft.modules[pair.row])[0]
    for name in pair.columns:
        draft.proposals[name] = Proposal("column", (width, width) if name in pair.halves else ())
    draft.proposals[pair.row] = Proposal("row")
    draft.demands.append(Demand(f"width of '{pair.row}'", width))


def _pairs_by_name(module: nn.Module) -> Iterator[Pair]:
    """The pair of a module that cannot be traced, by the names and widths of its layers.

    Where something else in the module is as wide as what would be cut, such as a norm, there is none.
    """
    linear = {name: child for name, child in module.named_modules() if is_linear(child)}
    for columns, row in _NAMED_PAIRS:
        if row not in linear or not all(name in linear for name in columns):
            continue
        width, outputs = widths(linear[row])
        members = {*columns, row}
        others = [p for n, p in module.named_parameters() if n.rpartition(".")[0] not in members]
        alike = all(widths(linear[name]) == (outputs, width) for name in columns)
        spread = any(width in param.shape or param.numel() == 1 for param in others)  # such as PReLU's slope
        if alike and width != outputs and not spread:
            yield Pair(columns, row, frozenset())


# --- embedding and head -----------------------------------------------------------------------------------------------


def _vocabulary(draft: Draft, free: set[str]) -> None:
    """A head by name or by a weight that an embedding has too; the embedding of the same weight, or of as many rows.

    Head and embedding may lie on different stages of a pipeline.
    """
    linear = {name for name in free if is_linear(draft.modules[name]) and name not in draft.proposals}
    tables: dict[str, Any] = {name: draft.modules[name] for name in free if is_embedding(draft.modules[name])}
    sizes = {table.weight.shape[0] for table in tables.values()} | draft.around.tables
    for name in sorted(linear - draft.left.keys()):
        module: Any = draft.modules[name]
        tied = any(table.weight is module.weight for table in tables.values())
        named = _is_head(draft, name) and widths(module)[1] in sizes
        if not (tied or named):
            continue
        _cut_rows(draft, name, widths(module)[1], "column_gathered")
        for other, table in tables.items():
            if table.weight is module.weight or (not tied and table.weight.shape[0] == widths(module)[1]):
                _cut_rows(draft, other, table.weight.shape[0], "vocab")
    for name in sorted(tables.keys() - draft.proposals.keys() - draft.left.keys()):
        if (rows := tables[name].weight.shape[0]) in draft.around.outputs:
            _cut_rows(draft, name, rows, "vocab")
        else:
            draft.left[name] = "an embedding of no output head"


def _is_head(draft: Draft, name: str) -> bool:
    return name.rpartition(".")[2] in _HEADS or name in draft.around.heads


def vocabularies(draft: Draft) -> dict[str, list[int]]:
    """Rows of all embeddings, and widths of what may be a head: what stages tell each other."""
    modules: dict[str, Any] = draft.modules
    heads = [name for name, module in modules.items() if is_linear(module) and _is_head(draft, name)]
    return {
        "tables": [module.weight.shape[0] for module in modules.values() if is_embedding(module)],
        "outputs": [widths(modules[name])[1] for name in heads],
    }


def _cut_rows(draft: Draft, name: str, rows: int, style: Any) -> None:
    if rows % draft.size:
        draft.drop(name, f"{rows} rows do not divide by {draft.size}")
    else:
        draft.proposals[name] = Proposal(style)


# --- weights that are read without a call -----------------------------------------------------------------------------


def _is_read_elsewhere(draft: Draft, name: str) -> bool:
    """Whether the code of a module around ``name`` reads its weight: a part of it would then be taken for the whole."""
    owner, _, own = name.rpartition(".")
    pattern = re.compile(rf"\b{re.escape(own)}\.(weight|bias)\b")
    while True:
        kind: Any = type(draft.modules[owner])
        sources = _sources(kind)
        if sources is None or any(pattern.search(source) for source in sources):
            return True
        if not owner:
            return False
        owner = owner.rpartition(".")[0]


@cache
def _sources(kind: Any) -> tuple[str, ...] | None:
    """What a class's methods say, those of torch and of transformers' common base left out; None if unreadable."""
    found = []
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_utils", "transformers.distributed")):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if inspect.isfunction(function) and name not in _NOT_ON_THE_STEP:
                try:
                    found.append(inspect.getsource(function))
                except (OSError, TypeError):
                    return None
    return tuple(found)
