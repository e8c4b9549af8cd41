"""Owns a tiny run of every op, native against reference, that tells a working library from a miscompiled one.

Knows nothing of builds. The thorough comparison is the test suite's; this one has to take no noticeable time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deepcore.ops import schemas

Arguments = list[object]

_NUMEL = 67  # longer than a vector register, with a tail
_RELATIVE, _ABSOLUTE = 1e-5, 1e-7  # a wrong kernel is wrong by far more


@dataclass(frozen=True)
class _Run:
    """Where, and on how many elements, in two segments."""

    device: torch.device
    numel: int

    @property
    def split(self) -> int:
        return self.numel * 3 // 5

    def ramp(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A finite range with both signs, without the cost of a generator; another with each scale."""
        values = torch.arange(self.numel, dtype=torch.float32).remainder_(67).sub_(30).mul_(0.03125 * scale)
        return values.to(self.device, dtype)


def failing(op: str, device: str, call: Callable[..., object] | None = None) -> str:
    """Run one op on the device and compare; "" if it agrees with its reference, else what is wrong.

    ``call``: how to call it, if not through the dispatcher.
    """
    expected, got = arguments(op, torch.device("cpu")), arguments(op, torch.device(device))
    expected_out = reference(op)(*expected)
    try:
        got_out = (call or getattr(torch.ops.deepcore, op))(*got)
    except RuntimeError as error:
        return f"it raised {str(error).splitlines()[0]}"
    for want, have in zip(_tensors([*expected, expected_out]), _tensors([*got, got_out]), strict=True):
        if not torch.allclose(want, have.cpu(), rtol=_RELATIVE, atol=_ABSOLUTE):
            return f"it differs from its reference by up to {(want - have.cpu()).abs().max().item():.3g}"
    return ""


def arguments(op: str, device: torch.device, numel: int = _NUMEL) -> Arguments:
    """Arguments for a call of the op: one parameter, or what else it takes, of ``numel`` elements."""
    return _ARGUMENTS[op](_Run(device, numel))


def reference(op: str) -> Callable[..., object]:
    """The pure-torch kernel of an op."""
    kernels: dict[str, Callable[..., object]] = {}
    for stem in schemas.SCHEMAS.values():
        kernels.update((schema.split("(", 1)[0], kernel) for schema, kernel in stem.OPS.items())
    return kernels[op]


def stem(op: str) -> str:
    """The stem that an op belongs to."""
    return next(name for name, module in schemas.SCHEMAS.items() if any(s.split("(", 1)[0] == op for s in module.OPS))


def _tensors(values: list[object]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(list(value))
    return found


def _segments(run: _Run) -> Arguments:
    rows = [[0, 0, run.split, 0, 0], [0, run.split, run.numel - run.split, 0, 1]]
    return [torch.tensor(rows, device=run.device), torch.tensor([0, 2])]


def _flatten(run: _Run) -> Arguments:
    flat = torch.zeros(run.numel + 3, dtype=torch.bfloat16, device=run.device)
    return [flat, [run.ramp()], torch.tensor([2])]


def _unflatten(run: _Run) -> Arguments:
    return [[torch.zeros(run.numel - 3, device=run.device)], run.ramp(dtype=torch.float16), torch.tensor([2])]


def _bucket_sum(run: _Run) -> Arguments:
    return [run.ramp(dtype=torch.bfloat16), torch.cat((run.ramp(), run.ramp(2), run.ramp(-5))), True, 3.0]


def _bucket_sum_squares(run: _Run) -> Arguments:
    return [*_bucket_sum(run), *_segments(run)]


def _cast(run: _Run) -> Arguments:
    return [
        torch.zeros(run.numel, dtype=torch.bfloat16, device=run.device),
        run.ramp(),
        torch.tensor([7], device=run.device),
    ]


def _grad_stats(run: _Run) -> Arguments:
    return [[run.ramp()], *_segments(run)]


def _adam(run: _Run) -> Arguments:
    hyper = [[0.01, 0.9, 0.99, 1e-6, 0.1, 1.0, 1.0, 1.0]]
    return [
        [run.ramp()],
        [run.ramp(0.5, torch.bfloat16)],
        [run.ramp(0.25)],
        [run.ramp(0.25).square()],
        [run.ramp(0.3).square()],
        [run.ramp(0.0, torch.bfloat16)],
        *_segments(run),
        torch.tensor(hyper, dtype=torch.float64, device=run.device),
        torch.tensor([3.0, 7.0], device=run.device),
        torch.ones(2, dtype=torch.uint8, device=run.device),
        torch.full((1,), 0.5, device=run.device),
        torch.zeros(1, device=run.device),
    ]


def _adam_stochastic(run: _Run) -> Arguments:
    _, grads, first, second, largest, _, *rest = _adam(run)
    low = [run.ramp(dtype=torch.bfloat16)]
    origins, seed = torch.tensor([[5, 3], [6, 0]], device=run.device), torch.tensor([7], device=run.device)
    return [low, grads, first, second, largest, *rest, origins, seed]


def _elementwise(*hyper: float) -> Callable[[_Run], Arguments]:
    """Arguments of an optimizer op with one state tensor per parameter and this row of hyperparameters."""

    def make(run: _Run) -> Arguments:
        params, grads, _, state, _, copies, segments, offsets, _, *rest = _adam(run)
        row = torch.tensor([hyper], dtype=torch.float64, device=run.device)
        return [params, grads, state, copies, segments, offsets, row, *rest]

    return make


_LAMB = [0.01, 0.9, 0.99, 1e-6, 0.1, 1.0, 0.01, 10.0]


def _lamb_moments(run: _Run) -> Arguments:
    params, grads, exp_avgs, exp_avg_sqs, _, _, segments, offsets, _, *rest = _adam(run)
    hyper = torch.tensor([_LAMB], dtype=torch.float64, device=run.device)
    squares = torch.zeros(2, 2, dtype=torch.float64, device=run.device)
    return [params, grads, exp_avgs, exp_avg_sqs, segments, offsets, hyper, *rest, squares]


def _lamb_apply(run: _Run) -> Arguments:
    params, _, exp_avgs, exp_avg_sqs, _, copies, segments, offsets, _, steps, active, _, skip = _adam(run)
    hyper = torch.tensor([_LAMB], dtype=torch.float64, device=run.device)
    squares = torch.tensor([[1.0, 4.0], [4.0, 1.0]], dtype=torch.float64, device=run.device)
    return [params, exp_avgs, exp_avg_sqs, copies, segments, offsets, hyper, steps, active, squares, skip]


_MUON = [0.01, 0.95, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0]


def _muon_momentum(run: _Run) -> Arguments:
    params, grads, buffers, _, *rest = _elementwise(*_MUON)(run)
    return [params, grads, buffers, *rest]


def _muon_apply(run: _Run) -> Arguments:
    params, grads, _, copies, segments, offsets, hyper, steps, active, _, skip = _elementwise(*_MUON)(run)
    ratios = torch.tensor([0.5, 2.0], dtype=torch.float64, device=run.device)
    return [params, grads, copies, segments, offsets, hyper, steps, active, ratios, skip]


def _loss_scale(run: _Run) -> Arguments:
    return [torch.tensor([8.0, 2.0, 1.0], device=run.device), torch.ones(1, device=run.device), 3, 2, False, 1.0]


_ARGUMENTS: dict[str, Callable[[_Run], Arguments]] = {
    "flatten_": _flatten,
    "unflatten_": _unflatten,
    "bucket_sum_": _bucket_sum,
    "bucket_sum_squares_": _bucket_sum_squares,
    "cast_": _cast,
    "grad_stats": _grad_stats,
    "adam_": _adam,
    "adam_stochastic_": _adam_stochastic,
    "lamb_moments_": _lamb_moments,
    "lamb_apply_": _lamb_apply,
    "lion_": _elementwise(0.01, 0.9, 0.99, 0.1),
    "adagrad_": _elementwise(0.01, 0.1, 1e-6, 0.1),
    "sgd_": _elementwise(0.01, 0.9, 0.1, 1.0, 0.1),
    "muon_momentum_": _muon_momentum,
    "muon_apply_": _muon_apply,
    "loss_scale_update_": _loss_scale,
}
