"""Baselines without a network: image statistics as embeddings.

Every table of the book shows them: a trained system has to beat these, not random
weights. They come unscaled and are compared by Euclidean distance: the roots of a
histogram as they are, the others after `embeddings.standardise`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from histo_utils.embeddings import Embeddings
from histo_utils.patches import read_patch
from histo_utils.stains import cellularity


def mean_rgb(table: pd.DataFrame) -> Embeddings:
    """Mean red, green and blue of each patch, 0–1; vectors (n, 3).

    Raises
    ------
    ValueError
        An empty table; and what `patches.read_patch` raises for an unreadable patch.
    """
    return _embed(table, lambda image, mpp: image.mean(axis=(0, 1)) / 255)


def rgb_histogram(
    table: pd.DataFrame, bins: int = 4, root: bool = False, transform=None
) -> Embeddings:
    """Joint colour histogram of each patch; vectors (n, bins³), each summing to 1.

    Parameters
    ----------
    table : DataFrame
        A patch table.
    bins : int
        Equal bins per channel over 0–255, 1 to 256; bin (r, g, b) is at
        ``(r·bins + g)·bins + b``.
    root : bool
        Return square roots, whose squares sum to 1: Euclidean distance is then
        Hellinger's, and a rare colour weighs less after standardisation.
    transform : callable, optional
        Takes an image and its slide's name, returns an image (`stains.StainMatch`).

    Raises
    ------
    ValueError
        Bins outside 1–256; and as `mean_rgb`.
    """

    def places(image):
        return (image.astype(int) * bins // 256) @ np.array([bins**2, bins, 1])

    return _histograms(table, bins, bins**3, root, places, transform)


def grey_histogram(table: pd.DataFrame, bins: int = 64) -> Embeddings:
    """Square roots of each patch's histogram of grey levels; vectors (n, bins).

    What is left of `rgb_histogram` (``root=True``) without colour; grey is
    0.299 R + 0.587 G + 0.114 B. ``bins`` and errors as there.
    """

    def levels(image):
        return (image @ np.array([0.299, 0.587, 0.114]) * bins / 256).astype(int)

    return _histograms(table, bins, bins, True, levels)


def nuclear_area(table: pd.DataFrame) -> Embeddings:
    """Share of each patch that is nuclei (`stains.cellularity`), 0–1; vectors (n, 1).

    ``mpp`` (µm per pixel) is that of the table; errors as `mean_rgb` and `cellularity`.
    """
    return _embed(table, lambda image, mpp: [cellularity(image, mpp)])


def scaled_axes():
    """Standardise vectors and turn them onto their principal axes, all of them.

    An L2 penalty does not see a rotation: where there are fewer rows than numbers in a
    vector, the same logistic regression is only faster.
    """
    return make_pipeline(StandardScaler(), PCA(svd_solver="full"))


@threadpool_limits.wrap(limits=1)  # small fits: threads cost more than they help
def logistic_probe(embeddings, split, c_values) -> np.ndarray:
    """Labels of a split's test patches, predicted by L2 logistic regression.

    Scale and axes are the gallery's. The constant is the smallest of those with the
    best validation accuracy when fitted on the training patches; the classifier is then
    fitted on the whole gallery. ``split``: `protocols.Split`.
    """
    x, y = embeddings.vectors.astype(float), embeddings.table["label"].to_numpy()
    x = scaled_axes().fit(x[split.gallery]).transform(x)
    models = [LogisticRegression(C=c, max_iter=500, tol=1e-3) for c in sorted(c_values)]
    train, validation = ((x[m], y[m]) for m in (split.train, split.validation))
    right = [model.fit(*train).score(*validation) for model in models]
    best = models[int(np.argmax(right))].fit(x[split.gallery], y[split.gallery])
    return best.predict(x[split.test])


def _histograms(table, bins, n, root, bin_of, transform=None):
    """Shares of pixels in each of ``n`` bins, or their square roots."""
    if not 1 <= bins <= 256:
        raise ValueError(f"bins={bins}; expected 1 to 256 bins per channel")

    def shares(image, mpp):
        found = np.bincount(bin_of(image).ravel(), minlength=n) / image[..., 0].size
        return np.sqrt(found) if root else found

    return _embed(table, shares, transform)


def _embed(table, statistic, transform=None):
    """Embeddings of one statistic of (image, mpp) per patch."""
    if len(table) == 0:
        raise ValueError("the patch table is empty; expected one row per patch")
    change, values = transform or (lambda image, slide: image), []
    for row in table.to_dict("records"):
        image = change(read_patch(row), row["slide"])
        values.append(statistic(image, row.get("mpp")))
    return Embeddings(np.asarray(values, np.float32), table)
