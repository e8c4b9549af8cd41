"""Owns the split of attention heads over the ranks of an axis, as arithmetic.

Knows nothing of tensors and collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from deepcore.errors import LayoutError

Range = tuple[int, int]  # first head, number of heads


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank works on.

    Attributes:
        queries: by rank, its query heads; they partition all of them, and a rank may have none.
        keys: by rank, the key and value heads that its query heads read; ranges of several ranks may overlap.
        ratio: query heads per key head.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    ratio: int

    def expansion(self, rank: int) -> list[int] | None:
        """By query head of ``rank``, the index of its key head there; None where an even repetition says the same."""
        first, count = self.queries[rank]
        first_key, num_keys = self.keys[rank]
        if num_keys <= 1 or (first % self.ratio == 0 and count % self.ratio == 0):
            return None
        return [head // self.ratio - first_key for head in range(first, first + count)]


@lru_cache(maxsize=256)
def plan_heads(num_queries: int, num_keys: int, size: int) -> HeadPlan:
    """Split heads over ``size`` ranks as evenly as they divide.

    Key heads are split where there are enough of them, and query heads follow; else query heads are split, and a key
    head goes to every rank that reads it.

    Raises:
        LayoutError: the query heads are no multiple of the key heads.
    """
    if not num_keys or num_queries % num_keys:
        raise LayoutError(
            "query heads and key heads do not match",
            got=f"{num_queries} query heads, {num_keys} key and value heads",
            expected="a multiple: each key head serves equally many query heads",
            do="check scatter_idx, which names the dim of heads, and the model's head counts",
        )
    ratio = num_queries // num_keys
    if num_keys >= size:
        keys = _evenly(num_keys, size)
        return HeadPlan(tuple((first * ratio, count * ratio) for first, count in keys), keys, ratio)
    queries = _evenly(num_queries, size)
    return HeadPlan(queries, tuple(_keys_of(queried, ratio) for queried in queries), ratio)


def _evenly(count: int, parts: int) -> tuple[Range, ...]:
    share, more = divmod(count, parts)
    return tuple((part * share + min(part, more), share + (part < more)) for part in range(parts))


def _keys_of(queried: Range, ratio: int) -> Range:
    first, count = queried
    if not count:
        return 0, 0
    return first // ratio, (first + count - 1) // ratio - first // ratio + 1
