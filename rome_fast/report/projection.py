"""Many dimensions on a plane."""

import importlib

import numpy as np
from numpy.typing import NDArray

_SEED = 0
# What t-SNE sees: more dimensions only slow it down.
_DIMENSIONS = 50


def directions(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, d) rows scaled to length 1; rows of zeros stay."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths == 0, 1, lengths)


def principal_components(
    vectors: NDArray[np.float64],  # (n, d)
    count: int = 2,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates (n, m) along the m = min(count, n, d) widest directions, and the share of the variance (m,) of each.

    The sign of a direction is arbitrary; here the coordinate farthest from 0 is positive, on any machine.
    """
    centred = vectors - vectors.mean(axis=0)
    left, widths, _ = np.linalg.svd(centred, full_matrices=False)
    points = (left * widths)[:, :count]
    farthest = np.abs(points).argmax(axis=0)
    points = points * np.where(points[farthest, np.arange(points.shape[1])] < 0, -1, 1)
    total = float((widths**2).sum())
    return points, widths[:count] ** 2 / (total or 1.0)


def neighbour_embedding(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, d) to (n, 2) by scikit-learn's t-SNE, seeded. Raises ImportError without scikit-learn."""
    manifold = importlib.import_module("sklearn.manifold")
    points, _ = principal_components(vectors, _DIMENSIONS)
    neighbours = min(30.0, (len(points) - 1) / 3)
    embedded: NDArray[np.float64] = manifold.TSNE(perplexity=neighbours, random_state=_SEED).fit_transform(points)
    return embedded
