"""Baselines without a network: image statistics as embeddings.

Every table of the book shows them, since a trained system has to beat these and not
random weights. They come **unscaled** and are compared by Euclidean distance: the roots
of a histogram as they are, the others after `embeddings.standardise`, which uses the
**gallery's** mean and deviation (``standardised=True`` in the protocols).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils.embeddings import Embeddings
from histo_utils.mosaic import cellularity
from histo_utils.patches import read_patch


def mean_rgb(table: pd.DataFrame) -> Embeddings:
    """Mean red, green and blue of each patch, 0–1; vectors (n, 3).

    Parameters
    ----------
    table : DataFrame
        A patch table.

    Raises
    ------
    ValueError
        An empty table; and what `patches.read_patch` raises for an unreadable patch.
    """
    return _embed(table, lambda image, mpp: image.mean(axis=(0, 1)) / 255)


def rgb_histogram(table: pd.DataFrame, bins: int = 4, root: bool = False) -> Embeddings:
    """Joint colour histogram of each patch; vectors (n, bins³), each summing to 1.

    Parameters
    ----------
    table : DataFrame
        A patch table.
    bins : int
        Equal bins a channel over 0–255, 1 to 256; bin (r, g, b) is at
        ``(r·bins + g)·bins + b``.
    root : bool
        Return square roots, whose squares sum to 1: Euclidean distance is then
        Hellinger's, and a rare colour weighs less after standardisation.

    Raises
    ------
    ValueError
        Bins outside 1–256; and as `mean_rgb`.
    """
    if not 1 <= bins <= 256:
        raise ValueError(f"bins={bins}; expected 1 to 256 bins a channel")

    def histogram(image, mpp):
        r, g, b = np.moveaxis(image.astype(np.int64) * bins // 256, -1, 0)
        places = ((r * bins + g) * bins + b).ravel()
        shares = np.bincount(places, minlength=bins**3) / places.size
        return np.sqrt(shares) if root else shares

    return _embed(table, histogram)


def grey_histogram(table: pd.DataFrame, bins: int = 64) -> Embeddings:
    """Square roots of each patch's histogram of grey levels; vectors (n, bins).

    What is left of `rgb_histogram` (``root=True``) without colour; grey is
    0.299 R + 0.587 G + 0.114 B.

    Raises
    ------
    ValueError
        Bins outside 1–256; and as `mean_rgb`.
    """
    if not 1 <= bins <= 256:
        raise ValueError(f"bins={bins}; expected 1 to 256 grey levels")

    def histogram(image, mpp):
        grey = image @ np.array([0.299, 0.587, 0.114])
        counts = np.bincount((grey.ravel() * bins / 256).astype(np.int64), None, bins)
        return np.sqrt(counts / grey.size)

    return _embed(table, histogram)


def nuclear_area(table: pd.DataFrame) -> Embeddings:
    """Share of each patch that is nuclei (haematoxylin), 0–1; vectors (n, 1).

    Parameters
    ----------
    table : DataFrame
        A patch table; ``mpp`` in µm per pixel goes to `mosaic.cellularity`.

    Raises
    ------
    ValueError
        As `mean_rgb` and `mosaic.cellularity` do.
    """
    return _embed(table, lambda image, mpp: [cellularity(image, mpp=mpp)])


def _embed(table, statistic):
    if len(table) == 0:
        raise ValueError("the patch table is empty; expected one row a patch")
    rows = table.to_dict("records")
    values = [statistic(read_patch(row), row.get("mpp")) for row in rows]
    return Embeddings(np.asarray(values, np.float32), table)
