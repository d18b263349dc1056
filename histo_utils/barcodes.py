"""Barcodes of patches, and the distance between slides that Yottixel searches by.

Yottixel is patented (US10628736B2); see the README before commercial use.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

_FLOAT_METRICS = ("euclidean", "cosine")


def minmax_barcode(features) -> np.ndarray:
    """Turn vectors into bits: 1 where the next value is smaller (Yottixel).

    Parameters
    ----------
    features : (n, d) array of numbers, d ≥ 2

    Returns
    -------
    (n, d - 1) uint8 array of 0 and 1

    Notes
    -----
    Kalra et al. 2020 (Yottixel), as in the released code. Other code sets the opposite
    bit and a leading 0; Hamming distances differ only where neighbours are equal.

    Examples
    --------
    >>> minmax_barcode([[3, 1, 2, 2]]).tolist()
    [[1, 0, 0]]
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] < 2:
        raise ValueError(
            f"features have shape {features.shape}; expected (n, d) with d of 2 or more"
        )
    if np.isnan(features).any():
        row = int(np.isnan(features).any(axis=1).argmax())
        raise ValueError(f"row {row} of the features holds NaN; it has no barcode")
    return (features[:, 1:] < features[:, :-1]).astype(np.uint8)


def median_of_min(a, b, metric=None) -> float:
    """Distance of slide a to slide b: median over a of the minimum over b.

    Parameters
    ----------
    a, b : (n, bits) arrays of 0 and 1, or (n, d) arrays of floats
        The patches of two slides.
    metric : {"hamming", "euclidean", "cosine"}, optional
        Default by type: whole numbers are bits and compared by Hamming distance (in
        bits); floats are features and compared by Euclidean distance.

    Notes
    -----
    Yottixel's distance; it is **not** symmetric. An even number of patches gives the
    mean of the two middle minima.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> median_of_min(a, b), median_of_min(b, a)
    (1.0, 0.0)
    """
    return float(median_of_min_matrix([a, b], metric)[0, 1])


def median_of_min_matrix(bags, metric=None) -> np.ndarray:
    """All distances between slides; entry (i, j) is ``median_of_min(bag i, bag j)``.

    Parameters
    ----------
    bags : list of (n_i, bits) or (n_i, d) arrays
    metric : see `median_of_min`

    Returns
    -------
    (slides, slides) float64 array
    """
    bags = [np.asarray(bag) for bag in bags]
    bits = _check_bags(bags)
    metric = metric or ("hamming" if bits else "euclidean")
    if (metric == "hamming") != bits or metric not in ("hamming", *_FLOAT_METRICS):
        raise ValueError(
            f"metric={metric!r} for {'bits' if bits else 'float features'}; valid here:"
            f" {'hamming' if bits else ', '.join(_FLOAT_METRICS)}"
        )
    bags = [_words(bag) if bits else bag.astype(np.float64) for bag in bags]
    everything = np.concatenate(bags)
    starts = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
    matrix = np.empty((len(bags), len(bags)))
    for i, bag in enumerate(bags):
        pairs = _hamming(bag, everything) if bits else cdist(bag, everything, metric)
        matrix[i] = np.median(np.minimum.reduceat(pairs, starts, axis=1), axis=0)
    return matrix


def _check_bags(bags):
    kinds = {np.issubdtype(bag.dtype, np.floating) for bag in bags}
    shapes = {bag.shape[1:] for bag in bags}
    if any(bag.ndim != 2 or 0 in bag.shape for bag in bags) or len(shapes) != 1:
        raise ValueError(
            f"slides have shapes {[bag.shape for bag in bags][:4]}; expected (patches, "
            "d), at least one patch each and one d: leave slides without patches out"
        )
    if len(kinds) != 1:
        raise ValueError(
            "some slides are bits and some are float features; give one kind"
        )
    bits = not kinds.pop()
    for i, bag in enumerate(bags):
        if bits and ((bag != 0) & (bag != 1)).any():
            raise ValueError(
                f"slide {i} holds whole numbers other than 0 and 1; expected bits "
                "(minmax_barcode) or floats"
            )
        if not bits and not np.isfinite(bag).all():
            raise ValueError(f"slide {i} holds NaN or infinity; expected finite floats")
    return bits


def _words(bits):
    """Pack rows of bits into uint64 words."""
    packed = np.packbits(bits.astype(bool), axis=1)
    spare = -packed.shape[1] % 8
    return np.pad(packed, ((0, 0), (0, spare))).view(np.uint64)


def _hamming(a, b):
    """Hamming distances of packed rows, (len(a), len(b)), in bits."""
    total = np.zeros((len(a), len(b)), np.int32)
    for word in range(a.shape[1]):
        total += np.bitwise_count(a[:, word, None] ^ b[:, word])
    return total
