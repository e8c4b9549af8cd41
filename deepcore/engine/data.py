"""Owns the training loader: which rank sees which samples, in which order, in which epoch.

Knows nothing of models or engines, and issues no collective: equal arguments on all ranks give matching shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from deepcore.base.log import warn_once
from deepcore.errors import ConfigError, UsageError


class _From(Sampler[int]):
    """A sampler's indices from a place on: what came before was seen already.

    Attributes:
        start: how many the next pass leaves out.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(self._sampler, self.start, None)

    def __len__(self) -> int:
        return len(self._sampler)


class DeepcoreDataLoader:
    """One rank's batches; each pass over it is a new epoch with its own order.

    A pass takes the epoch number that comes next (0, 1, ...), so nobody has to remember ``set_epoch``; calling it
    chooses the number of the next pass, which is how a resumed run returns to its place. The order depends on the
    seed and that number alone. Passes do not touch torch's global random state.

    A checkpoint keeps the place inside of a pass. After ``load_state_dict`` the next pass begins there, without
    reading what lies before, and a pass that is under way ends.

    Args:
        loader: this rank's batches; its ``generator`` is ours to seed.
        sampler: where the epoch's order comes from, if it has one.
        worker_seed: from an epoch's number to the seed of this rank's worker processes.
        place: what skips samples of ``sampler``; None where batches have to be drawn to be skipped.
        num_ranks: how many ranks share an epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: DistributedSampler[Any] | None,
        worker_seed: Callable[[int], int],
        place: _From | None = None,
        num_ranks: int = 1,
    ) -> None:
        self.loader, self.sampler, self._worker_seed, self._place = loader, sampler, worker_seed, place
        self.dataset, self.batch_size = loader.dataset, loader.batch_size
        self.epoch = 0
        self._num_ranks = num_ranks
        self._begun: int | None = None  # the epoch of the pass that began last, until it has ended
        self._seen = 0  # samples of this rank in it, those left out included
        self._skip = 0  # samples of all ranks that the next pass leaves out
        self._moves = 0  # how often a place was loaded: passes that began before are over

    def __len__(self) -> int:
        """The number of batches per epoch on this rank, the same on every rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # As a generator this runs with the pass's first batch, just before the sampler reads its epoch: two passes
        # that are begun together still get two epochs.
        self.loader.generator.manual_seed(self._worker_seed(self.epoch))
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch)
        self._begun, self.epoch = self.epoch, self.epoch + 1
        self._seen, self._skip = self._skip // self._num_ranks, 0
        moves, left_out, size = self._moves, self._seen, self.batch_size or 1
        if self._place is not None:
            self._place.start, left_out = left_out, 0
        for batch in self.loader:
            if left_out > 0:
                left_out -= size
                continue
            self._seen += size
            yield batch
            if self._moves != moves:
                return
        self._begun = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass shows."""
        self.epoch = epoch

    def state_dict(self, rewind: int = 0) -> dict[str, int]:
        """The place: an epoch, and how many samples all ranks have seen of it.

        Args:
            rewind: batches of this rank that do not count as seen.
        """
        if self._begun is None:
            return {"epoch": self.epoch, "samples": self._skip}
        seen, size = max(0, self._seen - rewind * (self.batch_size or 1)), self.batch_size or 1
        if self._place is not None and len(self._place) - seen < (size if self.loader.drop_last else 1):
            return {"epoch": self._begun + 1, "samples": 0}
        return {"epoch": self._begun, "samples": seen * self._num_ranks}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Let the next pass begin at a saved place, whatever the number of ranks and the batch size were.

        Where what was seen does not divide by the ranks, fewer than one sample per rank come again.
        """
        self.epoch, self._skip = saved["epoch"], saved["samples"]
        self._begun = None
        self._moves += 1


class RepeatingLoader:
    """Endless batches: begins the wrapped loader again whenever it ends, each time as a new pass."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        """The length of one pass; TypeError where the wrapped loader has none."""
        return len(self.loader)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            UsageError: the wrapped loader has no batch to repeat: it is empty, or an iterator that can run once only.
        """
        for batch in self._batches:
            return batch
        self._batches = iter(self.loader)
        for batch in self._batches:
            return batch
        raise UsageError(
            "RepeatingLoader has nothing to repeat",
            got=f"a {type(self.loader).__name__} that began again without a batch",
            expected="an iterable that can be passed over many times, with at least one batch",
            do="Wrap the loader itself, not iter(loader) or a generator, and check that it is not empty.",
        )


def build_dataloader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    seed: int | None = 0,
    **options: Any,
) -> DeepcoreDataLoader:
    """The loader of one data-parallel rank.

    A map-style dataset (``__len__`` and ``__getitem__``) is cut by torch's DistributedSampler: over one epoch the
    ranks together see every sample, and all ranks see equally many. Where the number of samples does not divide by
    ``world_size``, the first ones of the epoch's order are repeated; with ``drop_last`` the surplus is left out
    instead, and so is a last batch that would be short. An ``IterableDataset`` decides by itself what each rank
    reads; it is neither cut nor shuffled.

    Args:
        dataset: map-style or iterable.
        batch_size: samples per micro-batch on this rank.
        rank: this rank's index in the data-parallel axis.
        world_size: the size of that axis.
        collate_fn: makes a batch of a list of samples; torch's default where None.
        drop_last: leave surplus samples out instead of repeating some.
        seed: of the epochs' orders, the same on every rank; None keeps the dataset's own order.
        options: passed on to ``torch.utils.data.DataLoader``: ``num_workers`` (0 unless given: no process is
            started behind your back), ``pin_memory`` (unless given, where CUDA is available) and the like.

    Raises:
        ConfigError: ``dataset`` is a loader, has no length or no sample, or is too small for one batch per rank.
    """
    _check_kind(dataset)
    options.setdefault("pin_memory", torch.cuda.is_available())
    # Without its own generator a loader draws its workers' seed from the global one, and changes what follows.
    options.update(generator=torch.Generator(), batch_size=batch_size, collate_fn=collate_fn, drop_last=drop_last)

    def worker_seed(epoch: int) -> int:
        return (seed or 0) + epoch * world_size + rank

    if isinstance(dataset, IterableDataset):
        if world_size > 1:
            warn_once(
                "iterable-dataset-on-many-ranks",
                f"An IterableDataset is read in full by each of the {world_size} ranks unless it shards itself. "
                "Let it skip by rank (deepcore.comm.get_rank()), or use a dataset with __len__ and __getitem__.",
            )
        return DeepcoreDataLoader(DataLoader(dataset, **options), None, worker_seed, None, world_size)
    _check_size(dataset, batch_size, world_size, drop_last)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=world_size, rank=rank, shuffle=seed is not None, seed=seed or 0, drop_last=drop_last
    )
    place = _From(sampler)
    return DeepcoreDataLoader(DataLoader(dataset, sampler=place, **options), sampler, worker_seed, place, world_size)


def _check_kind(dataset: object) -> None:
    if isinstance(dataset, (DataLoader, DeepcoreDataLoader)):
        raise ConfigError(
            "training_data is a loader already",
            got=type(dataset).__name__,
            expected="a dataset: the engine cuts it by rank and batches it",
            do="Pass loader.dataset, or iterate over your own loader and leave training_data out.",
        )
    if not isinstance(dataset, (IterableDataset, Sized)):
        raise ConfigError(
            "training_data has no length",
            got=type(dataset).__name__,
            expected="a dataset with __len__ and __getitem__, or a torch.utils.data.IterableDataset",
            do="Add __len__, or derive it from IterableDataset.",
        )


def _check_size(dataset: Any, batch_size: int, world_size: int, drop_last: bool) -> None:
    num_samples = len(dataset)
    needed = batch_size * world_size if drop_last else 1
    if num_samples < needed:
        raise ConfigError(
            "training_data is too small" if num_samples else "training_data is empty",
            got=f"{num_samples} samples",
            expected=f"at least {needed}"
            + (f" (micro-batch {batch_size} x {world_size} ranks, dropping what is short)" if drop_last else ""),
            do="Give more data, or a smaller micro-batch." if num_samples else "Give a dataset with samples.",
        )
