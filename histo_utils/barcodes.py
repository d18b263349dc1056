"""Barcodes of patches, and the distance between slides that Yottixel searches by.

Yottixel is patented (US10628736B2); see the README before commercial use.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.spatial.distance import cdist

_FLOAT_METRICS = ("euclidean", "cosine")
_RULES = {"median": np.median, "mean": np.mean}
_PATCHES = 2**15  # of the gallery at once, so that millions of them fit in memory
_ROWS = 512  # of the queries at once, for products of matrices
_FEW = 2**14  # pairs of patches


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
    return bag_distances(bags, metric=metric)


def bag_distances(
    queries, gallery=None, metric=None, reduce="median", listed=None
) -> np.ndarray:
    """Distances of query slides to gallery slides by their patches' nearest patches.

    Parameters
    ----------
    queries : list of (n_i, bits) or (n_i, d) arrays
    gallery : list of such arrays, optional
        Without it the queries search among themselves, and each pair of patches is
        compared once for both directions.
    metric : see `median_of_min`
    reduce : {"median", "mean"}
        What becomes of a query's minima, one a patch: their median (Yottixel), or
        their mean, which under cosine is 1 - MaxSim / n of late interaction (Khattab
        and Zaharia 2020; n patches in the query).
    listed : (queries, m) array of int, optional
        Gallery slides to compare each query with; the others are infinitely far.

    Returns
    -------
    (queries, gallery) float64 array
        Not symmetric under either rule.

    Raises
    ------
    ValueError
        Bags of unlike kind or width, an empty bag, NaN, an unknown metric or rule.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> bag_distances([a], [a, b]).tolist()
    [[0.0, 0.0]]
    >>> bag_distances([a], [a, b], reduce="mean").round(2).tolist()
    [[0.0, 0.67]]
    """
    if reduce not in _RULES:
        raise ValueError(f"reduce={reduce!r}; valid are {', '.join(_RULES)}")
    alone = gallery is None
    queries = [np.asarray(bag) for bag in queries]
    gallery = queries if alone else [np.asarray(bag) for bag in gallery]
    bags = queries if alone else queries + gallery
    bits = _check_bags(bags)
    metric = metric or ("hamming" if bits else "euclidean")
    if (metric == "hamming") != bits or metric not in ("hamming", *_FLOAT_METRICS):
        raise ValueError(
            f"metric={metric!r} for {'bits' if bits else 'float features'}; valid here:"
            f" {'hamming' if bits else ', '.join(_FLOAT_METRICS)}"
        )
    if metric == "cosine" and not all(bag.any(axis=1).all() for bag in bags):
        raise ValueError(
            "a patch has the zero vector, which has no cosine; leave it out, or use "
            "metric='euclidean'"
        )
    rows, row_starts = _stacked(queries, metric)
    columns, starts = (rows, row_starts) if alone else _stacked(gallery, metric)
    kind = np.min_scalar_type(queries[0].shape[1]) if bits else np.float64
    minima = np.zeros((len(rows), len(gallery)), kind)
    if listed is None:
        for i, j in _blocks(row_starts, 0, 1 if bits else _ROWS):
            top, bottom = row_starts[i], row_starts[j]
            for first, last in _blocks(starts, i if alone else 0, _PATCHES):
                left, right = starts[first], starts[last]
                pairs = _pairs(rows[top:bottom], columns[left:right], metric, kind)
                found = np.minimum.reduceat(pairs, starts[first:last] - left, axis=1)
                minima[top:bottom, first:last] = found
                if alone:
                    found = np.minimum.reduceat(pairs, row_starts[i:j] - top, axis=0)
                    minima[left:right, i:j] = found.T
    else:
        for near, (top, bottom) in zip(listed, pairwise(row_starts), strict=True):
            few = [columns[starts[j] : starts[j + 1]] for j in near]
            pairs = _pairs(rows[top:bottom], np.concatenate(few), metric, kind)
            places = np.cumsum([0] + [len(part) for part in few[:-1]])
            minima[top:bottom, near] = np.minimum.reduceat(pairs, places, axis=1)
    parts = np.split(minima, row_starts[1:-1])
    matrix = np.stack([_RULES[reduce](part, axis=0) for part in parts]).astype(float)
    if listed is not None:
        absent = np.ones(matrix.shape, bool)
        np.put_along_axis(absent, np.asarray(listed), False, axis=1)
        matrix[absent] = np.inf
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


def _stacked(bags, metric):
    """Stack bags into one array, ready for their metric; and where each one starts."""
    together = np.concatenate(bags)
    starts = np.cumsum([0] + [len(bag) for bag in bags])
    if metric == "hamming":
        return _words(together), starts
    together = together.astype(np.float64)
    if metric == "cosine":
        together /= np.linalg.norm(together, axis=1, keepdims=True)
    return together, starts


def _blocks(starts, first, patches):
    """Cut slides from ``first`` on into runs of about so many patches."""
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + patches, "right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _pairs(a, b, metric, kind):
    """Distances of all patches of a to all of b, both from `_stacked`."""
    if metric == "hamming":
        return _hamming(a, b, kind)
    if metric == "euclidean":
        return cdist(a, b)
    # A small product of matrices waits for its threads where the cores are busy.
    few = len(a) * len(b) < _FEW
    cosines = np.einsum("ik,jk->ij", a, b) if few else a @ b.T
    # Products round by shape: without the last digits equal vectors are equally far,
    # and ties go by place in the table.
    return np.round(np.maximum(1 - cosines, 0), 12)


def _words(bits):
    """Pack rows of bits into uint64 words."""
    packed = np.packbits(bits.astype(bool), axis=1)
    spare = -packed.shape[1] % 8
    return np.pad(packed, ((0, 0), (0, spare))).view(np.uint64)


def _hamming(a, b, kind):
    """Hamming distances of packed rows, (len(a), len(b)), in bits."""
    total = np.zeros((len(a), len(b)), kind)
    differing = np.empty(total.shape, np.uint64)
    counts = np.empty(total.shape, np.uint8)
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    for mine, theirs in zip(a, b, strict=True):
        np.bitwise_xor(mine[:, None], theirs, out=differing)
        total += np.bitwise_count(differing, out=counts)
    return total
