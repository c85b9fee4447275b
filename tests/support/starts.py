"""Starts of adapters, computed in float64 by NumPy."""

from __future__ import annotations

import numpy as np

from support.cases import Case


def matrices(case: Case, kernel: np.ndarray) -> np.ndarray:
    """A kernel as `(shared, d, k)`; the vocabulary of an embedding is `d`."""
    if case.is_table:
        return kernel[None]
    inputs, rest = case.equation.split(",")
    labels, output = rest.split("->")
    shared = [c for c in labels if c in inputs and c in output]
    contracted = [c for c in labels if c not in output]
    free = [c for c in labels if c not in inputs]
    size = dict(zip(labels, kernel.shape, strict=True))
    order = "".join([*shared, *contracted, *free])
    d, k = (int(np.prod([size[c] for c in axes])) for axes in (contracted, free))
    return np.einsum(f"{labels}->{order}", kernel).reshape(-1, d, k)


def factor_matrices(case: Case, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A B` as `(shared, d, k)`."""
    shared, d, k = matrices(case, kernel).shape
    return a.reshape(shared, d, -1) @ b.reshape(shared, -1, k)


def best(w: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of each matrix by a matrix of this rank (Eckart and Young)."""
    u, values, v = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * values[:, None, :rank]) @ v[:, :rank]


def decaying(d: int, k: int, seed: int = 0) -> np.ndarray:
    """A matrix whose singular values fall as `1 / i`, as those of trained layers do."""
    rng, n = np.random.default_rng(seed), min(d, k)
    u, v = (np.linalg.qr(rng.normal(size=(size, n)))[0] for size in (d, k))
    return (u / np.arange(1, n + 1)) @ v.T
