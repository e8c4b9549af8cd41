"""Owns the registration with Hugging Face transformers: an attention, and its masks, that models take by name.

Refuses to know any model. transformers is imported when somebody registers, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from deepcore.comm.mesh import Axis
from deepcore.errors import LayoutError, UsageError
from deepcore.parallel.sequence.attention import attend
from deepcore.parallel.sequence.binding import axis_of, axis_of_config
from deepcore.parallel.sequence.exchange import Dims
from deepcore.parallel.sequence.heads import HeadPlan

CORES = ("sdpa",)
_DIMS = Dims(sequence=2, heads=1)  # transformers' query, key and value: (batch, heads, sequence, width)


def register_with_transformers(core_attn_implementation: str = "sdpa") -> str:
    """Make attention over cut sequences known to transformers, and return the name under which models take it.

    ``AutoModelForCausalLM.from_pretrained(path, attn_implementation=register_with_transformers())``, then
    ``deepcore.initialize(model=...)``, which tells the model its axis. Without a sequence axis it is the core.

    Args:
        core_attn_implementation: transformers' attention that every rank runs on whole sequences: "sdpa".

    Raises:
        UsageError: transformers is missing or too old, or the core sees more than query, key, value and mask.
    """
    if core_attn_implementation not in CORES:
        raise UsageError(
            "this attention of transformers cannot run inside ours",
            got=repr(core_attn_implementation),
            expected=f"one of {', '.join(CORES)}; on CUDA, sdpa chooses torch's own flash attention where it can",
            do='use register_with_transformers("sdpa")',
        )
    attentions, masks = _interfaces()
    name = f"deepcore_{core_attn_implementation}"
    attentions.register(name, _Attention(attentions[core_attn_implementation]))
    masks.register(name, _Mask(masks[core_attn_implementation]))
    return name


def _interfaces() -> tuple[Any, Any]:
    try:
        attentions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        return attentions, import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    except (ImportError, AttributeError) as error:
        raise UsageError(
            "transformers cannot be used",
            got=f"{type(error).__name__}: {error}",
            expected="Hugging Face transformers 5 or newer",
            do="pip install 'transformers>=5'",
        ) from error


class _Attention:
    """An entry of transformers' table of attentions."""

    def __init__(self, core: Callable[..., tuple[Tensor, Any]]) -> None:
        self._core = core

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        axis = axis_of(module)
        if axis is None or axis.size == 1:
            return self._core(module, query, key, value, attention_mask, **kwargs)
        _require_whole(query, key, attention_mask, axis, kwargs)

        def local(query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan) -> Tensor:
            mask = attention_mask
            if mask is not None and mask.shape[1] > 1:
                mask = mask.narrow(1, *plan.queries[axis.rank])
            grouped = _Grouped(module, query.shape[1] // key.shape[1])
            return self._core(grouped, query, key, value, mask, **kwargs)[0].transpose(1, 2)

        output = attend(axis, _DIMS, (query, key, value), local)
        return output.transpose(1, 2).contiguous(), None


class _Grouped:
    """A layer as the core sees it: with the query heads per key head of this rank's share."""

    def __init__(self, module: nn.Module, num_key_value_groups: int) -> None:
        self._module = module
        self.num_key_value_groups = num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Mask:
    """An entry of transformers' table of masks: the core's mask of the whole sequence, which all ranks then have."""

    def __init__(self, core: Callable[..., Any]) -> None:
        self._core = core

    def __call__(self, **arguments: Any) -> Any:
        axis = axis_of_config(arguments["config"])
        if axis is None or axis.size == 1:
            return self._core(**arguments)
        length = arguments["q_length"]
        if arguments["kv_length"] != length or arguments.get("q_offset") or arguments.get("kv_offset"):
            raise _incremental(length, arguments["kv_length"])
        _require_positional(arguments["mask_function"])
        local = arguments.get("attention_mask")
        if local is not None:
            arguments["attention_mask"] = _whole(local, axis)
        return self._core(**{**arguments, "q_length": length * axis.size, "kv_length": length * axis.size})


def _whole(mask: Tensor, axis: Axis) -> Tensor:
    """The padding of the whole sequence: (batch, sequence)."""
    source = mask.contiguous().view(torch.uint8)
    parts = source.new_empty(axis.size, *source.shape)
    axis.all_gather_into(parts, source).wait()
    return parts.transpose(0, 1).reshape(source.shape[0], -1).view(torch.bool)


def _require_whole(query: Tensor, key: Tensor, mask: Tensor | None, axis: Axis, kwargs: dict[str, Any]) -> None:
    if key.shape[2] != query.shape[2]:
        raise _incremental(query.shape[2], key.shape[2])
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise UsageError(
                f"attention with '{name}' does not work on cut sequences yet",
                got=f"{name} of shape {tuple(kwargs[name].shape)}",
                expected="attention by query, key, value and mask",
                do="train this model with sequence_parallel_size 1",
            )
    length = query.shape[2] * axis.size
    if mask is not None and mask.shape[-2:] != (length, length):
        raise LayoutError(
            "the attention mask is not one of whole sequences",
            got=f"{tuple(mask.shape)}, with {axis.size} parts of {query.shape[2]} tokens",
            expected=f"(batch, 1, {length}, {length})",
            do="pass attention_mask as (batch, sequence), cut with the other inputs by deepcore.sequence.shard_batch",
        )


def _require_positional(mask_function: Any) -> None:
    """A mask that looks tokens up, for packed sequences or images, knows those of this part only."""
    waiting, seen = [mask_function], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            raise UsageError(
                "this attention mask looks up tokens of the whole sequence",
                got=f"a mask over a tensor of shape {tuple(value.shape)} (packed sequences, chunks, or image tokens)",
                expected="a mask by positions and padding: causal, sliding window, bidirectional",
                do="pass an attention_mask of (batch, sequence) with one sequence a row, or train on whole ones",
            )
        if isinstance(value, tuple | list):
            waiting += value
        elif isinstance(value, FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or ()]


def _incremental(num_queries: int, num_keys: int) -> UsageError:
    return UsageError(
        "attention over a cache, or over another sequence, does not work on cut sequences",
        got=f"{num_queries} queries, {num_keys} keys on this rank",
        expected="self-attention in training and evaluation",
        do="generate with deepcore.sequence.bind(model, None), on whole sequences; pass use_cache=False in training",
    )
