"""Owns the checks of the training loader: shares, order, epochs, refusals.

Knows nothing of process groups; ranks are played one after the other in one process.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

from deepcore.base import log
from deepcore.engine.data import DeepcoreDataLoader, RepeatingLoader, build_dataloader
from deepcore.errors import ConfigError, UsageError


class Numbers(Dataset[int]):
    """Sample i is i; a tensor dataset would hide a wrong type."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Noise(Numbers):
    """Samples are drawn in the worker, from its own random state."""

    def __getitem__(self, index: int) -> int:
        return int(torch.randint(2**31, ()))


def loaders(num_samples: int, world_size: int, batch_size: int, **options: Any) -> list[DeepcoreDataLoader]:
    data = Numbers(num_samples)
    return [
        build_dataloader(data, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def samples(loader: Any) -> list[int]:
    return [int(i) for batch in loader for i in batch]


SIZES = {
    "num_samples": st.integers(1, 60),
    "world_size": st.integers(1, 5),
    "batch_size": st.integers(1, 7),
    "seed": st.one_of(st.none(), st.integers(0, 9)),
}


@given(**SIZES)
def test_ranks_cover_every_sample_and_pad_by_repeating(
    num_samples: int, world_size: int, batch_size: int, seed: int | None
) -> None:
    ranks = loaders(num_samples, world_size, batch_size, seed=seed)
    shares = [samples(loader) for loader in ranks]
    assert {len(share) for share in shares} == {-(-num_samples // world_size)}
    seen = Counter(itertools.chain.from_iterable(shares))
    assert set(seen) == set(range(num_samples))
    assert seen.total() - num_samples < world_size
    assert {len(loader) for loader in ranks} == {-(-len(shares[0]) // batch_size)}


@given(**SIZES)
def test_dropping_sees_no_sample_twice_and_only_whole_batches(
    num_samples: int, world_size: int, batch_size: int, seed: int | None
) -> None:
    if num_samples < world_size * batch_size:
        with pytest.raises(ConfigError, match=f"at least {world_size * batch_size}"):
            loaders(num_samples, world_size, batch_size, seed=seed, drop_last=True)
        return
    ranks = loaders(num_samples, world_size, batch_size, seed=seed, drop_last=True)
    batches = [[batch.tolist() for batch in loader] for loader in ranks]
    assert {len(batch) for rank in batches for batch in rank} == {batch_size}
    assert {len(rank) for rank in batches} == {num_samples // world_size // batch_size} == {len(ranks[0])}
    seen = Counter(i for rank in batches for batch in rank for i in batch)
    assert set(seen.values()) == {1}
    assert set(seen) <= set(range(num_samples))


def test_every_pass_is_a_new_epoch_and_repeats_exactly() -> None:
    one, two = (loaders(40, 2, 4, seed=3)[0] for _ in range(2))
    first, second = samples(one), samples(one)
    assert first != second
    assert [samples(two), samples(two)] == [first, second]
    two.set_epoch(0)
    assert [samples(two), samples(two)] == [first, second]
    assert samples(loaders(40, 2, 4, seed=4)[0]) != first


def test_without_a_seed_the_order_is_the_datasets() -> None:
    loader = loaders(6, 2, 2, seed=None)[1]
    assert samples(loader) == samples(loader) == [1, 3, 5]


def test_two_passes_begun_together_are_two_epochs() -> None:
    expected = loaders(20, 1, 1)[0]
    first, second = samples(expected), samples(expected)
    pairs = list(zip(*[loaders(20, 1, 1)[0]] * 2, strict=True))
    assert [int(a) for a, _ in pairs] == first
    assert [int(b) for _, b in pairs] == second


def test_a_pass_leaves_torchs_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    samples(loaders(9, 1, 2)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_differ_by_rank_and_epoch_and_repeat() -> None:
    def noise(rank: int) -> list[list[int]]:
        loader = build_dataloader(Noise(4), batch_size=4, rank=rank, world_size=2, num_workers=1)
        return [samples(loader), samples(loader)]

    first, second = noise(0), noise(1)
    assert len({tuple(draws) for draws in (*first, *second)}) == 4
    assert noise(0) == first


def test_collate_and_options_reach_the_loader() -> None:
    loader = build_dataloader(
        Numbers(4), batch_size=2, rank=0, world_size=1, seed=None, collate_fn=tuple, pin_memory=False, num_workers=1
    )
    assert list(loader) == [(0, 1), (2, 3)]
    assert (loader.loader.num_workers, loader.loader.pin_memory, loader.batch_size) == (1, False, 2)


def test_a_list_is_a_dataset() -> None:
    loader = build_dataloader([7.0, 8.0, 9.0], batch_size=3, rank=0, world_size=1, seed=None)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in loader] == [[7.0, 8.0, 9.0]]


def test_an_iterable_dataset_is_not_cut_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "_warned", set())
    monkeypatch.setattr(logging.getLogger("deepcore"), "warning", said.append)
    for rank in range(2):
        loader = build_dataloader(Stream(), batch_size=2, rank=rank, world_size=2)
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    assert len(said) == 1
    assert "each of the 2 ranks" in said[0]
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Numbers(3)), "is a loader already"),
        (loaders(3, 1, 1)[0], "is a loader already"),
        (iter([1, 2]), "has no length"),
        (Numbers(0), "is empty"),
        ([], "is empty"),
    ],
)
def test_what_is_no_dataset_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataloader(data, batch_size=1, rank=0, world_size=1)


# ---------------------------------------------------------------- RepeatingLoader


def test_repeating_begins_again_with_a_new_epoch() -> None:
    expected = loaders(6, 1, 2)[0]
    endless = RepeatingLoader(loaders(6, 1, 2)[0])
    assert len(endless) == 3
    got = [batch.tolist() for batch in itertools.islice(endless, 9)]
    assert got == [batch.tolist() for _ in range(3) for batch in expected]


@pytest.mark.parametrize("source", [[], iter([]), (i for i in ())])
def test_repeating_nothing_is_an_error(source: Any) -> None:
    with pytest.raises(UsageError, match="nothing to repeat"):
        next(RepeatingLoader(source))


def test_repeating_an_iterator_fails_at_its_end() -> None:
    endless = RepeatingLoader(iter([1, 2]))
    assert [next(endless), next(endless)] == [1, 2]
    with pytest.raises(UsageError, match="not iter"):
        next(endless)
