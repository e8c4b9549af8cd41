"""Owns what a user may ask of ``generate``: names, defaults, ranges, and what contradicts what.

Knows nothing of how any of it is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deepcore.config.paths import nearest, shown
from deepcore.errors import UsageError


@dataclass(frozen=True)
class Options:
    """What one call of ``generate`` is to do.

    Attributes:
        max_new_tokens: tokens that a row gets at most; None: as far as ``max_length`` allows.
        max_length: prompt and answer together; None: as far as ``max_new_tokens`` allows.
        min_new_tokens: before that many tokens no row ends.
        do_sample: draw tokens; otherwise the likeliest is taken.
        temperature, top_k, top_p: of the distribution that is drawn from; ``top_k`` 0 keeps every token.
        repetition_penalty: divides positive logits of tokens that a row has, and multiplies negative ones.
        eos_token_id: each of these ends its row.
        pad_token_id: what a row holds after its end.
        num_return_sequences: answers per prompt.
        use_cache: keep keys and values where the module can.
        seed: of this call; None: another one in every call.
        generator: that draws, instead.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    use_cache: bool = True
    seed: int | None = None
    generator: torch.Generator | None = None

    @property
    def pad(self) -> int:
        """What fills a row after its end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    def total_length(self, prompt_length: int, bound: int) -> int:
        """Tokens of prompt and answer, of which a cache of ``bound`` tokens has to have room for all."""
        total = self.max_length
        if total is None:
            total = bound if self.max_new_tokens is None else prompt_length + self.max_new_tokens
        if prompt_length >= total and self.max_new_tokens is None:
            raise UsageError(
                "the prompt leaves no room for an answer",
                got=f"a prompt of {prompt_length} tokens and {total} in all",
                expected="max_length (or hybrid_engine.max_out_tokens) above the prompt's length",
                do="raise it, or cut the prompt",
            )
        if total > bound:
            raise UsageError(
                "prompt and answer are longer than hybrid_engine.max_out_tokens",
                got=f"up to {total} tokens, of which {prompt_length} are the prompt",
                expected=f"at most {bound}",
                do=f'set "hybrid_engine": {{"max_out_tokens": {total}}}, or ask for fewer tokens',
            )
        return total


class _Rule(NamedTuple):
    accepts: Callable[[Any], bool]
    expected: str
    do: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _int_from(low: int) -> Callable[[Any], bool]:
    return lambda value: _is_int(value) and value >= low


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    many = value.tolist() if isinstance(value, torch.Tensor) else value
    many = many if isinstance(many, list | tuple) else [many]
    return all(_is_int(token) and token >= 0 for token in many)


_POSITIVE = _Rule(_int_from(1), "an integer >= 1", "pass how many tokens you want")
_SWITCH = _Rule(_is_bool, "True or False", "pass one of them")
_RULES: dict[str, _Rule] = {
    "max_new_tokens": _Rule(_int_from(0), "an integer >= 0", "pass how many tokens you want"),
    "max_length": _POSITIVE,
    "min_new_tokens": _Rule(_int_from(0), "an integer >= 0", "pass how many tokens a row has at least"),
    "do_sample": _SWITCH,
    "temperature": _Rule(
        lambda v: _is_number(v) and v > 0, "a number > 0", "for the likeliest token at each step leave do_sample out"
    ),
    "top_k": _Rule(_int_from(0), "an integer >= 0; 0 keeps every token", "pass how many tokens to draw from"),
    "top_p": _Rule(
        lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]", "pass the probability to keep, 1.0 for all of it"
    ),
    "repetition_penalty": _Rule(lambda v: _is_number(v) and v > 0, "a number > 0", "pass 1.0 for no penalty"),
    "eos_token_id": _Rule(_is_stop, "a token id, or a list of them", "pass the tokens that end a row"),
    "pad_token_id": _Rule(_int_from(0), "a token id", "pass the tokenizer's pad_token_id"),
    "num_return_sequences": _Rule(_int_from(1), "an integer >= 1", "pass how many answers a prompt gets"),
    "use_cache": _SWITCH,
    "seed": _Rule(_int_from(0), "an integer >= 0", "pass a seed"),
    "generator": _Rule(lambda v: isinstance(v, torch.Generator), "a torch.Generator", "pass one, or a seed"),
    "generation_config": _Rule(lambda v: True, "", ""),
    "synced_gpus": _Rule(lambda v: True, "", ""),  # ranks never wait for each other here, whatever it says
}
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # name -> what changes nothing

# What a model's generation_config may ask for that is not done here, and the values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "guidance_scale", "typical_p", "encoder_repetition_penalty"), (1,)
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), (0,)),
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "watermarking_config", "dola_layers", "max_time"), ()),
    **dict.fromkeys(("token_healing", "prompt_lookup_num_tokens"), (False,)),
}
ELSEWHERE = "call engine.begin_generation() and then engine.module.generate(...), which has it"


def read_options(given: Mapping[str, Any], config: Any) -> Options:
    """The options of a call; what it leaves out is looked up in ``config``, a model's generation_config, or None.

    Raises:
        UsageError: an unknown name, a value out of range, or two that contradict each other.
    """
    _require_known(given)
    config = given.get("generation_config") or config
    chosen = {name: value for name, value in given.items() if value is not None and name in Options.__annotations__}
    for name, value in chosen.items():
        _require_valid(name, value, "")
    _require_one(chosen, "max_new_tokens", "max_length")
    _require_one(chosen, "seed", "generator")
    if config is not None:
        _require_offered(config)
        for name, value in _defaults(config, chosen).items():
            _require_valid(name, value, "generation_config.")
            chosen[name] = value
    sampling = chosen.get("do_sample", False)
    idle = [name for name, neutral in _SAMPLING.items() if given.get(name) not in (None, neutral)]
    if idle and not sampling:
        raise UsageError(
            f"{idle[0]} changes nothing without do_sample=True",
            got=f"{idle[0]}={given[idle[0]]}, and no sampling",
            expected="do_sample=True, or none of temperature, top_k and top_p",
            do="add do_sample=True to draw tokens, or remove it for the likeliest ones",
        )
    if "eos_token_id" in chosen:
        chosen["eos_token_id"] = _stops(chosen["eos_token_id"])
    return Options(**chosen)


def _stops(value: Any) -> tuple[int, ...]:
    many = value.tolist() if isinstance(value, torch.Tensor) else value
    return tuple(many) if isinstance(many, list | tuple) else (many,)


def _defaults(config: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config`` says of the rest. An end that the call sets replaces any that the config has."""
    found = {}
    for name in Options.__annotations__:
        value = getattr(config, name, None)
        if value is not None and name not in (*chosen, "seed", "generator"):
            found[name] = value
    if "max_length" in chosen or "max_new_tokens" in chosen:
        found.pop("max_length", None)
        found.pop("max_new_tokens", None)
    elif "max_new_tokens" in found:
        found.pop("max_length", None)
    return found


def _require_known(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in _RULES:
            continue
        close = nearest(name, _RULES)
        raise UsageError(
            f"generate() does not have {name}" + (f"; did you mean {close}?" if close else ""),
            got=f"{name}={shown(given[name])}",
            expected=", ".join(name for name in _RULES if name != "synced_gpus"),
            do=f"remove it; or, if the model has a generate() of its own, {ELSEWHERE}",
        )


def _require_valid(name: str, value: Any, where: str) -> None:
    rule = _RULES[name]
    if not rule.accepts(value):
        raise UsageError(
            f"{where}{name} has a value that it cannot take", got=shown(value), expected=rule.expected, do=rule.do
        )


def _require_one(chosen: Mapping[str, Any], first: str, second: str) -> None:
    if first in chosen and second in chosen:
        raise UsageError(
            f"{first} and {second} exclude each other",
            got=f"{first}={shown(chosen[first])}, {second}={shown(chosen[second])}",
            expected="one of them",
            do=f"remove {second}",
        )


def _require_offered(config: Any) -> None:
    for name, neutral in _NOT_OFFERED.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise UsageError(
                f"the generation_config asks for {name}, which generate() does not have",
                got=f"{name}={shown(value)}",
                expected=f"no {name}",
                do=f"set generation_config.{name} = None, or {ELSEWHERE}",
            )
