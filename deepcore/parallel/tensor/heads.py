"""Owns what cutting an attention means: heads stay whole, few key heads are shared, and its own numbers follow.

Knows attentions by the names that the field gives to their layers and numbers, and no model in particular.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepcore.parallel.tensor.draft import Demand, Draft, widths
from deepcore.parallel.tensor.plan import Adjustment

QUERIES = ("q_proj", "query", "q", "wq", "q_lin", "to_q", "query_proj", "q_linear", "linear_q", "q_attn")
KEYS = ("k_proj", "key", "k", "wk", "k_lin", "to_k", "key_proj", "k_linear", "linear_k")
VALUES = ("v_proj", "value", "v", "wv", "v_lin", "to_v", "value_proj", "v_linear", "linear_v")
FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "wqkv", "in_proj", "c_qkv", "attn_qkv", "to_qkv")  # query, key, value
_BY_HEAD = ("query_key_value",)  # query, key and value of one head beside each other: heads are cut, nothing follows
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin", "to_out", "o", "proj", "out", "proj_out", "output")

_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "nhead", "nheads", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups")
_GROUPS = ("num_key_value_groups", "n_rep", "num_groups")
_HEAD_WIDTH = ("head_dim", "attention_head_size", "dim_head", "d_head", "head_size", "d_kv")
_WIDTHS = ("split_size", "all_head_size", "inner_dim", "embed_dim", "hidden_size", "n_embd", "d_model", "q_size", "dim")


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and the width of one."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Attention:
    """The layers of one attention, by name; ``fused`` stands for queries, keys and values in one."""

    owner: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    output: str = ""


def find_attention(owner: str, names: Iterable[str]) -> Attention | None:
    """The attention that the layers ``names`` of ``owner`` make, by their names, or None."""
    own = {name.rpartition(".")[2]: name for name in names}
    output = next((own[kind] for kind in OUTPUTS if kind in own), "")
    parts = [next((own[kind] for kind in kinds if kind in own), "") for kinds in (QUERIES, KEYS, VALUES)]
    if all(parts):
        return Attention(owner, parts[0], parts[1], parts[2], output=output)
    fused = next((own[kind] for kind in FUSED if kind in own), "")
    return Attention(owner, fused=fused, output=output) if fused else None


def demand_heads(draft: Draft, owner: str, columns: Iterable[str]) -> None:
    """Heads that are stacked one by one stay whole: their number has to divide, where it is known."""
    module = draft.modules[owner]
    heads = _number([module, getattr(module, "config", None)], _QUERY_HEADS)
    if heads and any(name.rpartition(".")[2] in _BY_HEAD for name in columns):
        draft.demands.append(Demand(f"heads of '{owner}'", heads))


def heads_of(module: nn.Module, query_width: int, key_width: int) -> Heads | None:
    """As the attention says itself, or the config that it keeps; None where the numbers do not explain the widths."""
    places = [module, getattr(module, "config", None)]
    width = _number(places, _HEAD_WIDTH)
    queries = _number(places, _QUERY_HEADS)
    keys = _number(places, _KEY_HEADS)
    if queries is None and width:
        queries = query_width // width
    if not queries:
        return None
    width = query_width // queries
    keys = key_width // width if width and keys is None else keys
    if not keys or not width or queries * width != query_width or keys * width != key_width or queries % keys:
        return None
    return Heads(queries, keys, width)


def head_width(module: nn.Module, query_width: int) -> int:
    """The width of a head, where the attention or its config says how many there are; else 0."""
    heads = _number([module, getattr(module, "config", None)], _QUERY_HEADS)
    return query_width // heads if heads and query_width % heads == 0 else 0


def _number(places: Sequence[Any], names: Sequence[str]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def settle_attention(draft: Draft, attention: Attention, *, follow_widths: bool) -> bool:
    """Add what an attention demands, and what follows; False where its heads are unknown.

    Args:
        follow_widths: the module may use its width for what is cut, and not for what is whole.
    """
    module = draft.modules[attention.owner]
    if attention.fused:
        segments = draft.proposals[attention.fused].segments
        query_width, key_width = segments[0], segments[1] if len(segments) == 3 else 0
    else:
        query_width, key_width = (widths(draft.modules[name])[1] for name in (attention.query, attention.key))
    heads = heads_of(module, query_width, key_width)
    if heads is None:
        return False
    shares = not attention.fused and heads.keys % draft.size != 0 and draft.size % heads.keys == 0
    draft.demands.append(Demand(f"query heads of '{attention.owner}'", heads.queries))
    draft.demands.append(Demand(f"key heads of '{attention.owner}'", heads.keys, share=not attention.fused))
    if shares:
        for name in (attention.key, attention.value):
            draft.proposals[name].style = "column_shared"
            draft.proposals[name].blocks = heads.keys
    _adjust(draft, attention.owner, heads, query_width, follow_widths=follow_widths)
    return True


def _adjust(draft: Draft, owner: str, heads: Heads, width: int, *, follow_widths: bool) -> None:
    module, size = draft.modules[owner], draft.size
    queries, keys = heads.queries // size, max(1, heads.keys // size)
    wanted = dict.fromkeys(_QUERY_HEADS, (heads.queries, queries))
    wanted |= dict.fromkeys(_KEY_HEADS, (heads.keys, keys))
    wanted |= dict.fromkeys(_GROUPS, (heads.queries // heads.keys, queries // keys))
    if follow_widths:
        wanted |= dict.fromkeys(_WIDTHS, (width, width // size))
    for name, (before, after) in wanted.items():
        if type(getattr(module, name, None)) is int and getattr(module, name) == before and before != after:
            draft.adjustments.append(Adjustment(owner, name, before, after))
