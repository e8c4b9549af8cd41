"""Owns the approximate orthogonalisation of stacks of matrices by Newton-Schulz iterations.

Knows nothing of optimizers; the products are torch's, of all matrices of a stack in one call. How many they are changes
no bit of any.
"""

from __future__ import annotations

import platform
from functools import cache

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: steepest at 0, singular values end within about 0.7 to 1.2
EPS = 1e-7  # smallest norm to divide by
METHODS = ("standard", "gram")
# Elements: from there on a CPU takes one matrix after the other, whose products then stay in its caches.
LARGE = 1 << 16


def orthogonalize(matrices: torch.Tensor, *, method: str, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Replace the singular values of each of ``matrices`` by numbers near 1.

    With X = matrix / |matrix| (Frobenius), transposed where it is taller than wide, and A = X X^T, each of ``steps``
    iterations makes X = a X + (b A + c A^2) X, (a, b, c) = ``QUINTIC`` (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks").

    "gram" iterates on the small side only: with P = a I + b R + c R^2, R the Gram matrix of the first X, it makes
    Q = P Q and R = P R P, and X = Q X once at the end: the same polynomial, with fewer operations where the matrix is
    much wider than tall. Its small products are in fp32 whatever ``dtype`` is, since a Gram matrix has
    the squares of the singular values; the first and the last product are in ``dtype``.

    An x86 processor that cannot multiply bf16 numbers takes eight times as long with them: there, products are made in
    fp32 from factors that are rounded to bf16, and rounded. Hardware does the same, but for the order of a sum.

    Args:
        matrices: (k, m, n).
        method: one of ``METHODS``.
        steps: iterations.
        dtype: in which products are made.

    Returns:
        (k, m, n), contiguous, of ``dtype``.
    """
    assert method in METHODS
    out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    alone = out.device.type == "cpu" and out[0].numel() >= LARGE
    most = 1 if alone else len(out)
    for some, into in zip(matrices.split(most), out.split(most), strict=True):
        into.copy_(_orthogonal(some.to(dtype), method, steps, by_halves=alone))
    return out


def _orthogonal(x: torch.Tensor, method: str, steps: int, *, by_halves: bool) -> torch.Tensor:
    dtype = x.dtype
    norms = torch.stack([matrix.norm() for matrix in x]).clamp(min=EPS)  # one by one: sums in the order of one matrix
    tall = x.shape[1] > x.shape[2]
    x = x / norms[:, None, None]
    if dtype == torch.bfloat16 and x.device.type == "cpu" and _widens_bf16():
        x = x.float()
    if tall:
        x = x.mT.contiguous()  # on a CPU the copy takes less time than products of columns
    if method == "gram":
        x = _gram(x, steps, dtype)
    else:
        x = _by_halves(x[0], steps, dtype)[None] if by_halves else _standard(x, steps, dtype)
    return x.mT if tall else x


@cache
def _widens_bf16() -> bool:
    return platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported()


def _rounded(product: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of ``dtype``, in the dtype that products are made in."""
    return product if product.dtype == dtype else product.to(dtype).to(product.dtype)


def _standard(x: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = _rounded(torch.bmm(x, x.mT), dtype)
        factor = _rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), dtype)
        x = _rounded(torch.baddbmm(x, factor, x, beta=a), dtype)
    return x


def _by_halves(x: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Of one matrix, without the lower left quarters of what is symmetric: those are copied, not multiplied."""
    a, b, c = QUINTIC
    gram = x.new_empty(x.shape[0], x.shape[0])
    factor, other = torch.empty_like(gram), torch.empty_like(x)
    low, high = slice(x.shape[0] // 2), slice(x.shape[0] // 2, None)
    quarters = ((low, low), (low, high), (high, high))
    for _ in range(steps):
        for rows, columns in quarters:
            torch.mm(x[rows], x[columns].mT, out=gram[rows, columns])
        gram[high, low] = gram[low, high].mT
        gram = _rounded(gram, dtype)
        for rows, columns in quarters:
            part = factor[rows, columns]
            torch.addmm(gram[rows, columns], gram[rows], gram[:, columns], beta=b, alpha=c, out=part)
        factor[high, low] = factor[low, high].mT
        factor = _rounded(factor, dtype)
        torch.addmm(x, factor, x, beta=a, out=other)
        x, other = _rounded(other, dtype), x
    return x


def _gram(x: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    a, b, c = QUINTIC
    gram = _rounded(torch.bmm(x, x.mT), dtype).float()
    unit = torch.eye(gram.shape[1], device=x.device)
    total = unit.expand_as(gram)
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(unit, alpha=a)
        total = torch.bmm(factor, total)
        gram = torch.bmm(torch.bmm(factor, gram), factor)
    return _rounded(torch.bmm(_rounded(total, dtype).to(x.dtype), x), dtype)
