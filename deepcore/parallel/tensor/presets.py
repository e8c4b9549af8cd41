"""Owns the plans that the config can name: the ends of layers' names, and transformers' words for what is done to them.

Knows nothing of how a plan is followed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from deepcore.errors import ConfigError

_ENDS = {"embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
PRESETS: dict[str, Mapping[str, str]] = {
    "llama": {**_ENDS, **_ATTENTION, **_MLP},
    "qwen2": {**_ENDS, **_ATTENTION, **_MLP},
    "mixtral": {
        **_ENDS,
        **_ATTENTION,
        "mlp.experts": "moe_tp_experts",
        "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise",
        "block_sparse_moe.experts.*.w1": "colwise",
        "block_sparse_moe.experts.*.w3": "colwise",
        "block_sparse_moe.experts.*.w2": "rowwise",
    },
    # Its attention takes query, key and value apart by the config's numbers: they have to be whole by then.
    "phi3": {
        **_ENDS,
        "self_attn.qkv_proj": "colwise_gather_output",
        "self_attn.o_proj": "rowwise_split_input",
        "mlp.gate_up_proj": "packed_colwise",
        "mlp.down_proj": "rowwise",
    },
}
_NOT_HERE = ("bloom", "chatglm", "deepseek_v2")


def preset(name: str) -> Mapping[str, str]:
    """The plan of this name.

    Raises:
        ConfigError: there is none.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    do = "describe its layers in tensor_parallel.partition_config, or leave preset_model out: then the model's own plan"
    raise ConfigError(
        "tensor_parallel.preset_model names no plan of this version" if name in _NOT_HERE else "no such preset_model",
        got=repr(name),
        expected=", ".join(PRESETS),
        do=f"did you mean {near[0]!r}?" if near else f"{do}, or the module graph, is taken",
    )
