"""Owns the batch arithmetic: train_batch_size = micro batch x accumulation steps x data-parallel ranks.

Knows nothing of process groups: the number of ranks is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from deepcore.config.ledger import Ledger, Problem
from deepcore.config.paths import is_unset, lookup, remove, shown

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_KEYS = (TOTAL, MICRO, STEPS)


@dataclass(frozen=True)
class Layout:
    """What is known of the ranks from outside of the config; ``data`` where the data-parallel ranks are."""

    world_size: int
    num_stages: int = 1
    data: int | None = None


def resolve_ranks(raw: dict[str, Any], layout: Layout, ledger: Ledger) -> int | None:
    """The number of data-parallel ranks, written to ``raw``; None where it cannot be told (a problem is recorded)."""
    sequence = _size(raw, "sequence_parallel_size")
    tensor = max(_size(raw, "tensor_parallel.autotp_size"), _size(raw, "tensor_parallel.tp.tp_size"), 1)
    given, world = raw.get("data_parallel_size"), layout.world_size
    axes = {"pipeline": layout.num_stages, "sequence": sequence, "tensor": tensor}
    shown = {name: size for name, size in axes.items() if name != "pipeline" or size > 1}
    inner = layout.num_stages * sequence * tensor
    if layout.data is None and world % inner:
        what = f"the ranks cannot be split into {_listed([f'{name}-' for name in shown])}parallel groups"
        got = f"{world} ranks / ({' x '.join(f'{name} {size}' for name, size in shown.items())}) = {world / inner:g}"
        ledger.problems.append(
            Problem(what, got=got, expected="an integer", do="change the number of ranks or the sizes of the axes")
        )
        return None
    ranks = world // inner if layout.data is None else layout.data
    product = " x ".join(f"{size} {name}" for name, size in shown.items())
    if _is_positive(given) and given != ranks:
        what = "data_parallel_size does not agree with the number of ranks"
        got = f"{int(given)} data-parallel x {product} is not {world} ranks"
        do = f"remove data_parallel_size, or set it to {ranks}, or start {int(given) * inner} ranks"
        ledger.problems.append(Problem(what, got=got, expected=str(ranks), do=do))
    elif is_unset(given):
        raw["data_parallel_size"] = ranks
        ledger.mark("data_parallel_size", "inferred", f"{world} ranks / ({product})")
    return ranks


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _size(raw: dict[str, Any], path: str) -> int:
    value = lookup(raw, path)
    return int(value) if _is_positive(value) else 1


def resolve_batch(raw: dict[str, Any], ranks: int | None, ledger: Ledger) -> None:
    """Completes the three batch settings in ``raw``, in place.

    ===========================  ==========================================
    given                        inferred
    ===========================  ==========================================
    all three                    nothing; the product must hold
    total, micro                 steps = total / (micro x ranks)
    total, steps                 micro = total / (steps x ranks)
    micro, steps                 total = micro x steps x ranks
    total                        steps = 1, micro = total / ranks
    micro                        steps = 1, total = micro x ranks
    steps, or none               an error
    ===========================  ==========================================
    """
    given = {key: raw[key] for key in _KEYS if not is_unset(remaining(raw, key, ledger))}
    invalid = [key for key, value in given.items() if not _is_positive(value)]
    if ranks is None or invalid:
        # Placeholders keep the rest checkable; a problem is recorded, or pydantic will find it in the value itself.
        raw.update({key: raw.get(key, 1) for key in _KEYS})
        return
    sizes = {key: int(value) for key, value in given.items()}
    found = _product(sizes, ranks, ledger) if TOTAL not in sizes else _quotient(sizes, ranks, ledger)
    for key in _KEYS:
        if key not in sizes:
            note = f"{found[TOTAL]} = {found[MICRO]} x {found[STEPS]} x {ranks} ranks"
            ledger.mark(key, "inferred", note)
    raw.update(found)


def remaining(raw: dict[str, Any], key: str, ledger: Ledger) -> Any:
    """The value of ``key``; "auto" and null are taken out of ``raw`` and noted."""
    value = raw.get(key)
    if is_unset(value):
        if remove(raw, key) == "auto":
            ledger.note(key, '"auto"')
        return None
    return value


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and float(value).is_integer()


def _product(sizes: dict[str, int], ranks: int, ledger: Ledger) -> dict[str, int]:
    if MICRO not in sizes:
        what = f"{TOTAL} or {MICRO} is needed, and there is nothing to infer it from"
        got = f"{STEPS} = {sizes[STEPS]} alone" if STEPS in sizes else "none of the batch settings"
        do = f'set "{MICRO}", for example to 8'
        ledger.problems.append(Problem(what, got=got, expected=f"{TOTAL} = {MICRO} x {STEPS} x {ranks} ranks", do=do))
    micro, steps = sizes.get(MICRO, 1), sizes.get(STEPS, 1)
    return {TOTAL: micro * steps * ranks, MICRO: micro, STEPS: steps}


def _quotient(sizes: dict[str, int], ranks: int, ledger: Ledger) -> dict[str, int]:
    total, micro = sizes[TOTAL], sizes.get(MICRO)
    steps = sizes.get(STEPS, 1 if micro is None else None)
    if micro is not None and steps is not None:
        if micro * steps * ranks != total:
            ledger.problems.append(_mismatch(total, micro, steps, ranks))
        return {TOTAL: total, MICRO: micro, STEPS: steps}
    missing, known, name = (STEPS, micro, MICRO) if micro is not None else (MICRO, steps, STEPS)
    divisor = (known or 1) * ranks
    if total % divisor:
        ledger.problems.append(_indivisible(total, known or 1, name, missing, ranks))
    inferred = max(total // divisor, 1)
    return {TOTAL: total, MICRO: micro or inferred, STEPS: steps or inferred}


def _mismatch(total: int, micro: int, steps: int, ranks: int) -> Problem:
    return Problem(
        f"the batch settings contradict each other: {TOTAL} = {MICRO} x {STEPS} x ranks does not hold",
        got=f"{total} != {micro} x {steps} x {ranks} = {micro * steps * ranks}",
        expected=f"{TOTAL} = {micro * steps * ranks} with the other two as they are",
        do="remove one of the three, and it is inferred",
    )


def _indivisible(total: int, known: int, name: str, missing: str, ranks: int) -> Problem:
    divisor = known * ranks
    below, above = total // divisor * divisor, (total // divisor + 1) * divisor
    choices = f"{below} or {above}" if below else str(above)
    return Problem(
        f"{TOTAL} does not divide into whole micro-batches",
        got=f"{missing} = {total} / ({name} {known} x {ranks} ranks) = {shown(round(total / divisor, 4))}",
        expected=f"a multiple of {known} x {ranks} = {divisor}",
        do=f"set {TOTAL} to {choices}, or change {name} or the number of ranks",
    )


def fitting_world_size(raw: dict[str, Any]) -> int:
    """The smallest number of ranks that a config can mean: what its three batch settings and its axes imply, else 1."""
    axes = _size(raw, "sequence_parallel_size") * max(
        _size(raw, "tensor_parallel.autotp_size"), _size(raw, "tensor_parallel.tp.tp_size")
    )
    total, micro, steps = (int(raw[key]) if _is_positive(raw.get(key)) else 0 for key in _KEYS)
    if total and micro and steps and total % (micro * steps) == 0:
        return total // (micro * steps) * axes
    return _size(raw, "data_parallel_size") * axes
