"""Owns the approximate orthogonalisation of matrices by Newton-Schulz iterations.

Knows nothing of optimizers; the products are torch's.
"""

from __future__ import annotations

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: steepest at 0, singular values end within about 0.7 to 1.2
EPS = 1e-7  # smallest norm to divide by
METHODS = ("standard", "gram")


def orthogonalize(matrix: torch.Tensor, *, method: str, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Replace the singular values of ``matrix`` by numbers near 1.

    With X = matrix / |matrix| (Frobenius), transposed where it is taller than wide, and A = X X^T, each of ``steps``
    iterations makes X = a X + (b A + c A^2) X, (a, b, c) = ``QUINTIC`` (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks").

    "gram" iterates on the small side only: with P = a I + b R + c R^2, R the Gram matrix of the first X, it makes
    Q = P Q and R = P R P, and X = Q X once at the end: the same polynomial, with fewer operations where the matrix is
    much wider than tall. Its small products are in fp32 whatever ``dtype`` is, since a Gram matrix has
    the squares of the singular values; the first and the last product are in ``dtype``.

    Args:
        matrix: (m, n).
        method: one of ``METHODS``.
        steps: iterations.
        dtype: in which products are made.

    Returns:
        (m, n) in ``dtype``.
    """
    assert method in METHODS
    x = matrix.to(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        x = x.mT
    x = x / x.norm().clamp(min=EPS)
    x = _gram(x, steps) if method == "gram" else _standard(x, steps)
    return x.mT if tall else x


def _standard(x: torch.Tensor, steps: int) -> torch.Tensor:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    a, b, c = QUINTIC
    gram = (x @ x.mT).float()
    unit = torch.eye(gram.shape[0], device=x.device)
    total = unit
    for _ in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(unit, alpha=a)
        total = factor @ total
        gram = factor @ gram @ factor
    return total.to(x.dtype) @ x
