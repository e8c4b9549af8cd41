"""Owns a tiny run of every op, native against reference, that tells a working library from a miscompiled one.

Knows nothing of builds. The thorough comparison is the test suite's; this one has to take no noticeable time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepcore.ops import schemas

Arguments = list[object]

_NUMEL, _SPLIT = 67, 40  # longer than a vector register, with a tail, cut into two segments
_RELATIVE, _ABSOLUTE = 1e-5, 1e-7  # a wrong kernel is wrong by far more

# A finite range with both signs, without the cost of a generator.
_RAMP = torch.arange(_NUMEL, dtype=torch.float32).sub_(30).mul_(0.03125)


def failing(op: str, device: str, call: Callable[..., object] | None = None) -> str:
    """Run one op on the device and compare; "" if it agrees with its reference, else what is wrong.

    ``call``: how to call it, if not through the dispatcher.
    """
    make = ARGUMENTS.get(op)
    if make is None:
        return ""
    expected, got = make(torch.device("cpu")), make(torch.device(device))
    expected_out = reference(op)(*expected)
    try:
        got_out = (call or getattr(torch.ops.deepcore, op))(*got)
    except RuntimeError as error:
        return f"it raised {str(error).splitlines()[0]}"
    for want, have in zip(_tensors([*expected, expected_out]), _tensors([*got, got_out]), strict=True):
        if not torch.allclose(want, have.cpu(), rtol=_RELATIVE, atol=_ABSOLUTE):
            return f"it differs from its reference by up to {(want - have.cpu()).abs().max().item():.3g}"
    return ""


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


def _segments(device: torch.device) -> Arguments:
    rows = [[0, 0, _SPLIT, 0, 0], [0, _SPLIT, _NUMEL - _SPLIT, 0, 1]]
    return [torch.tensor(rows, device=device), torch.tensor([0, 2])]


def _flatten(device: torch.device) -> Arguments:
    flat = torch.zeros(_NUMEL + 3, dtype=torch.bfloat16, device=device)
    return [flat, [_RAMP.to(device)], torch.tensor([2])]


def _unflatten(device: torch.device) -> Arguments:
    return [[torch.zeros(_NUMEL - 3, device=device)], _RAMP.to(device, torch.float16), torch.tensor([2])]


def _bucket_sum(device: torch.device) -> Arguments:
    return [_RAMP.to(device, torch.bfloat16), torch.cat((_RAMP, _RAMP * 2, _RAMP * -5)).to(device), True, 3.0]


def _bucket_sum_squares(device: torch.device) -> Arguments:
    return [*_bucket_sum(device), *_segments(device)]


def _cast(device: torch.device) -> Arguments:
    return [
        torch.zeros(_NUMEL, dtype=torch.bfloat16, device=device),
        _RAMP.to(device),
        torch.tensor([7], device=device),
    ]


def _grad_stats(device: torch.device) -> Arguments:
    return [[_RAMP.to(device)], *_segments(device)]


def _adam(device: torch.device) -> Arguments:
    def ramp(scale: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [(_RAMP * scale).to(device, dtype)]

    hyper = [[0.01, 0.9, 0.99, 1e-6, 0.1, 1.0, 1.0, 1.0]]
    return [
        ramp(1.0),
        ramp(0.5, torch.bfloat16),
        ramp(0.25),
        [tensor.square() for tensor in ramp(0.25)],
        [tensor.square() for tensor in ramp(0.3)],
        ramp(0.0, torch.bfloat16),
        *_segments(device),
        torch.tensor(hyper, dtype=torch.float64, device=device),
        torch.tensor([3.0, 7.0], device=device),
        torch.ones(2, dtype=torch.uint8, device=device),
        torch.full((1,), 0.5, device=device),
        torch.zeros(1, device=device),
    ]


def _adam_stochastic(device: torch.device) -> Arguments:
    _, grads, first, second, largest, _, *rest = _adam(device)
    low = [_RAMP.to(device, torch.bfloat16)]
    origins, seed = torch.tensor([[5, 3], [6, 0]], device=device), torch.tensor([7], device=device)
    return [low, grads, first, second, largest, *rest, origins, seed]


def _elementwise(*hyper: float) -> Callable[[torch.device], Arguments]:
    """Arguments of an optimizer op with one state tensor per parameter and this row of hyperparameters."""

    def make(device: torch.device) -> Arguments:
        params, grads, _, state, _, copies, segments, offsets, _, *rest = _adam(device)
        row = torch.tensor([hyper], dtype=torch.float64, device=device)
        return [params, grads, state, copies, segments, offsets, row, *rest]

    return make


_LAMB = [0.01, 0.9, 0.99, 1e-6, 0.1, 1.0, 0.01, 10.0]


def _lamb_moments(device: torch.device) -> Arguments:
    params, grads, exp_avgs, exp_avg_sqs, _, _, segments, offsets, _, *rest = _adam(device)
    hyper = torch.tensor([_LAMB], dtype=torch.float64, device=device)
    squares = torch.zeros(2, 2, dtype=torch.float64, device=device)
    return [params, grads, exp_avgs, exp_avg_sqs, segments, offsets, hyper, *rest, squares]


def _lamb_apply(device: torch.device) -> Arguments:
    params, _, exp_avgs, exp_avg_sqs, _, copies, segments, offsets, _, steps, active, _, skip = _adam(device)
    hyper = torch.tensor([_LAMB], dtype=torch.float64, device=device)
    squares = torch.tensor([[1.0, 4.0], [4.0, 1.0]], dtype=torch.float64, device=device)
    return [params, exp_avgs, exp_avg_sqs, copies, segments, offsets, hyper, steps, active, squares, skip]


_MUON = [0.01, 0.95, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0]


def _muon_momentum(device: torch.device) -> Arguments:
    params, grads, buffers, _, *rest = _elementwise(*_MUON)(device)
    return [params, grads, buffers, *rest]


def _muon_apply(device: torch.device) -> Arguments:
    params, grads, _, copies, segments, offsets, hyper, steps, active, _, skip = _elementwise(*_MUON)(device)
    ratios = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    return [params, grads, copies, segments, offsets, hyper, steps, active, ratios, skip]


def _loss_scale(device: torch.device) -> Arguments:
    return [torch.tensor([8.0, 2.0, 1.0], device=device), torch.ones(1, device=device), 3, 2, False, 1.0]


ARGUMENTS: dict[str, Callable[[torch.device], Arguments]] = {
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
