"""Owns the two forms of what a pipeline's loss function returns: a mean, or a sum and the tokens that it runs over.

Knows nothing of what is made of either.
"""

from __future__ import annotations

from typing import Any


def split_loss(value: Any) -> tuple[Any, Any]:
    """(loss, number of tokens that it sums over), or (mean loss, None)."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    return value, None
