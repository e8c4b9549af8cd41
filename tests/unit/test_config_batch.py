"""Owns the tests of the batch arithmetic: every case of the table, and every way to get it wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcore.config import Settings, parse
from deepcore.config.resolve import fitting_world_size
from deepcore.errors import ConfigError

TB, MB, GA = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def sizes(settings: Settings) -> tuple[int, int, int]:
    found = (
        settings.train_batch_size,
        settings.train_micro_batch_size_per_gpu,
        settings.gradient_accumulation_steps,
    )
    assert all(type(size) is int for size in found)
    return found


@pytest.mark.parametrize(
    ("raw", "ranks", "expected"),
    [
        ({TB: 32, MB: 4, GA: 4}, 2, (32, 4, 4)),
        ({TB: 32, MB: 4}, 2, (32, 4, 4)),
        ({TB: 32, GA: 4}, 2, (32, 4, 4)),
        ({MB: 4, GA: 4}, 2, (32, 4, 4)),
        ({TB: 32}, 2, (32, 16, 1)),
        ({MB: 4}, 2, (8, 4, 1)),
        ({TB: 1}, 1, (1, 1, 1)),
        ({TB: 3, MB: 1}, 3, (3, 1, 1)),
        ({TB: 32.0, MB: 4.0}, 2, (32, 4, 4)),
        ({TB: "auto", MB: 4, GA: "auto"}, 2, (8, 4, 1)),
        ({TB: "auto", MB: 4, GA: 3}, 2, (24, 4, 3)),
        ({TB: 32, MB: "auto", GA: "auto"}, 2, (32, 16, 1)),
        ({TB: 32, MB: None, GA: None}, 2, (32, 16, 1)),
    ],
)
def test_every_case_of_the_table(raw: dict[str, Any], ranks: int, expected: tuple[int, int, int]) -> None:
    assert sizes(parse(raw, world_size=ranks)) == expected


@pytest.mark.parametrize(
    ("raw", "phrases"),
    [
        ({TB: 32, MB: 4, GA: 3}, ["32 != 4 x 3 x 2 = 24", "remove one of the three"]),
        (
            {TB: 30, MB: 4},
            ["30 / (train_micro_batch_size_per_gpu 4 x 2 ranks) = 3.75", "set train_batch_size to 24 or 32"],
        ),
        ({TB: 30, GA: 4}, ["30 / (gradient_accumulation_steps 4 x 2 ranks) = 3.75", "24 or 32"]),
        ({TB: 31}, ["31 / (gradient_accumulation_steps 1 x 2 ranks) = 15.5", "30 or 32"]),
        ({TB: 1}, ["set train_batch_size to 2"]),
        ({GA: 4}, ["gradient_accumulation_steps = 4 alone", 'set "train_micro_batch_size_per_gpu"']),
        ({}, ["none of the batch settings", "nothing to infer it from"]),
        ({TB: "auto", MB: "auto", GA: "auto"}, ["nothing to infer it from", "train_batch_size"]),
        ({TB: 0}, ["train_batch_size", "got:      0", "a number > 0"]),
        ({TB: -8, MB: 4}, ["train_batch_size", "got:      -8"]),
        ({MB: 2.5}, ["train_micro_batch_size_per_gpu", "2.5", "an integer"]),
        ({MB: "4"}, ["train_micro_batch_size_per_gpu", "'4'", "an integer"]),
        ({MB: True}, ["train_micro_batch_size_per_gpu", "true", "an integer"]),
        ({MB: 4, GA: float("inf")}, ["gradient_accumulation_steps", "inf", "integer"]),
        ({MB: 4, GA: float("nan")}, ["gradient_accumulation_steps", "nan", "integer"]),
    ],
)
def test_errors_show_the_equation(raw: dict[str, Any], phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw, world_size=2)
    for phrase in phrases:
        assert phrase in str(caught.value)
    assert str(caught.value).splitlines()[-1].strip().startswith("do:")


@given(micro=st.integers(1, 64), steps=st.integers(1, 16), ranks=st.integers(1, 16), keep=st.sampled_from([7, 3, 5, 6]))
def test_any_two_of_three_give_the_third(micro: int, steps: int, ranks: int, keep: int) -> None:
    whole = {TB: micro * steps * ranks, MB: micro, GA: steps}
    raw = {key: value for bit, (key, value) in enumerate(whole.items()) if keep >> bit & 1}
    assert sizes(parse(raw, world_size=ranks)) == tuple(whole.values())


def test_sequence_and_tensor_ranks_are_not_data_parallel() -> None:
    raw = {MB: 4, "sequence_parallel_size": 2, "tensor_parallel": {"autotp_size": 2}}
    settings = parse(raw, world_size=8, require_built=False)
    assert settings.data_parallel_size == 2
    assert sizes(settings) == (8, 4, 1)


def test_ranks_that_do_not_split_are_refused_with_the_numbers() -> None:
    raw = {MB: 4, "sequence_parallel_size": 3}
    with pytest.raises(ConfigError, match=r"8 ranks / \(sequence 3 x tensor 1\) = 2.66667"):
        parse(raw, world_size=8, require_built=False)


def test_data_parallel_size_must_agree_with_the_ranks() -> None:
    raw = {MB: 4, "sequence_parallel_size": 2, "data_parallel_size": 2}
    assert parse(raw, world_size=4, require_built=False).data_parallel_size == 2
    with pytest.raises(ConfigError, match="data_parallel_size does not agree"):
        parse({MB: 4, "data_parallel_size": 1e30}, world_size=8)
    with pytest.raises(ConfigError, match="data_parallel_size does not agree") as caught:
        parse(raw, world_size=8, require_built=False)
    assert "set it to 4, or start 4 ranks" in str(caught.value)


def test_stages_take_their_share_of_the_ranks() -> None:
    raw = {MB: 4, "tensor_parallel": {"autotp_size": 2}}
    assert parse(raw, world_size=8, num_stages=2).data_parallel_size == 2
    with pytest.raises(ConfigError, match="data_parallel_size does not agree") as caught:
        parse({**raw, "data_parallel_size": 1}, world_size=8, num_stages=2)
    assert "1 data-parallel x 2 pipeline x 1 sequence x 2 tensor is not 8 ranks" in str(caught.value)
    assert "set it to 2, or start 4 ranks" in str(caught.value)
    with pytest.raises(ConfigError, match="pipeline-, sequence- and tensor-parallel groups"):
        parse(raw, world_size=6, num_stages=2)


def test_a_caller_may_know_the_number_of_data_parallel_ranks() -> None:
    assert sizes(parse({MB: 4}, world_size=8, data_parallel_size=2)) == (8, 4, 1)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({TB: 32, MB: 4, GA: 2}, 4),
        ({TB: 32, MB: 4, GA: 2, "sequence_parallel_size": 2}, 8),
        ({TB: 32, MB: 4}, 1),
        ({TB: 33, MB: 4, GA: 2}, 1),
        ({TB: "auto", MB: 4, GA: 2, "data_parallel_size": 3}, 3),
        ({}, 1),
    ],
)
def test_the_fewest_ranks_that_a_config_can_mean(raw: dict[str, Any], expected: int) -> None:
    assert fitting_world_size(raw) == expected
