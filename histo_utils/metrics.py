"""Retrieval metrics, and published scores as they were computed.

The retrieval metrics take outcomes (:mod:`histo_utils.protocols`) and return the mean
over queries, or with ``per_query=True`` one value per query, as `score_table` and
`compare_table` (:mod:`histo_utils.statistics`) need them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

_CELLS = 2**22  # numbers held at once


def accuracy(outcomes, per_query=False):
    """Share of queries whose ``predicted`` label is right; for every protocol."""
    right = outcomes["predicted"].to_numpy() == outcomes["label"].to_numpy()
    return _mean_or_all(np.asarray(right, float), per_query)


def precision_at_k(outcomes, k=1, per_query=False):
    """Share of the k nearest that have the query's label."""
    return _mean_or_all(_hits(outcomes, k).mean(axis=1), per_query)


def recall_at_k(outcomes, k=1, per_query=False):
    """Share of queries with at least one right item among the k nearest.

    This is Recall@K of metric learning. In information retrieval the same name means
    the share of all relevant items that are among the k nearest.
    """
    return _mean_or_all(_hits(outcomes, k).any(axis=1).astype(float), per_query)


def majority_at_k(outcomes, k=5, per_query=False):
    """Share of queries whose k nearest vote for the right label.

    Of equally frequent labels the one met first, nearest first, wins.
    """
    right = majority_labels(outcomes, k) == outcomes["label"].to_numpy()
    return _mean_or_all(np.asarray(right, float), per_query)


def majority_labels(outcomes, k=5) -> np.ndarray:
    """Winning label of each query's k nearest; ties as in `majority_at_k`."""
    labels = _neighbour_labels(outcomes, k)
    codes = pd.factorize(labels.ravel())[0].reshape(labels.shape)
    winner, step = np.empty(len(codes), np.int64), max(1, _CELLS // k**2)
    for s in range(0, len(codes), step):
        part = codes[s : s + step]
        votes = (part[:, :, None] == part[:, None, :]).sum(axis=2)
        winner[s : s + step] = votes.argmax(axis=1)  # the first, so the nearest
    return np.take_along_axis(labels, winner[:, None], axis=1)[:, 0]


def mean_average_precision(outcomes, k=None, per_query=False):
    """Mean average precision of the ranked lists of length k (default: all kept).

    AP = Σ P@i over the right places i ≤ k, divided by the number of right places among
    the k; 0 where there is none. What was not found costs nothing (see `map_at_r`).
    """
    hits = _hits(outcomes, k)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    values = (precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)
    return _mean_or_all(values, per_query)


def map_at_r(outcomes, per_query=False):
    """MAP@R: average precision of the R nearest, divided by R (Musgrave et al. 2020).

    R is ``relevant``, the number of right items that the query may find; fewer than R
    neighbours are an error, since the value would come out too low.
    """
    hits = _hits(outcomes, None)
    r = outcomes["relevant"].to_numpy(dtype=np.int64)
    if r.max() > hits.shape[1]:
        raise ValueError(
            f"the outcomes hold {hits.shape[1]} neighbours but MAP@R needs R = "
            f"{r.max()} for query {int(r.argmax())}; run the protocol with k={r.max()}"
        )
    hits = hits & (np.arange(hits.shape[1]) < r[:, None])
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return _mean_or_all((precision * hits).sum(axis=1) / r, per_query)


def eta_scores(y_true, y_pred, n_classes):
    """η_p, η_w and η_total of Kimia Path24: accuracy, mean recall, their product.

    Parameters
    ----------
    y_true, y_pred : (n,) labels
        Numbers 0 … n_classes-1, or names.
    n_classes : int

    Returns
    -------
    (eta_p, eta_w, eta_total) : floats, 0–1

    Raises
    ------
    ValueError
        A class without test items, labels outside the classes, unequal lengths.

    Notes
    -----
    Babaie et al. 2017: η_p = Σ|R∩Γ_s|/n, η_w = (1/S)·Σ|R∩Γ_s|/n_s, the balanced
    accuracy. One of the two official scripts differs: `official_python_scorer`.
    """
    confusion = _confusion(y_true, y_pred, n_classes)
    right = np.diag(confusion)
    return _etas(right.sum() / confusion.sum(), right / confusion.sum(axis=1))


def official_python_scorer(y_true, y_pred, n_classes):
    """η as ``CalculateError.py`` computes it: mean **precision** in place of recall.

    KimiaLab/KimiaPath24 at commit cb676c0 divides by the column sums of a matrix whose
    rows are the truth; its MATLAB twin, and the paper, divide by the true counts. Used
    as `eta_scores`; a class that is never predicted is an error (the script divides by
    zero).
    """
    confusion = _confusion(y_true, y_pred, n_classes)
    right, predicted = np.diag(confusion), confusion.sum(axis=0)
    if (predicted == 0).any():
        raise ValueError(
            f"class number {int((predicted == 0).argmax())} is never predicted, where "
            "the official script divides by zero; use eta_scores"
        )
    return _etas(right.sum() / confusion.sum(), right / predicted)


def cumulative_cutoff_score(vectors, labels):
    """Compute the defective metric behind the published "Recall@1" of 99.40 %.

    For each class, in the order given, **only its first item** queries the whole set,
    itself included; its Euclidean ranking is cut at the number of items up to and
    **including that class**, and the class's items above the cut are counted. Random
    vectors with Path24's class sizes score 53 %; the order of the classes changes the
    value. Never a result: kept to reproduce camilo-nunez/ffnir at commit cac8757.

    Parameters
    ----------
    vectors : (n, d) array of floats
    labels : (n,) array
        Each class in one block.

    Returns
    -------
    (eta_p, eta_w, eta_total) : floats, 0–1

    Raises
    ------
    ValueError
        NaN, unequal lengths, or a class in more than one block.
    """
    vectors = np.asarray(vectors, np.float64)
    codes, names = pd.factorize(pd.Series(labels))
    if vectors.ndim != 2 or len(vectors) != len(codes) or not len(codes):
        raise ValueError(
            f"vectors of shape {vectors.shape} for {len(codes)} labels; expected (n, d)"
        )
    if not np.isfinite(vectors).all():
        row = int((~np.isfinite(vectors)).any(axis=1).argmax())
        raise ValueError(f"row {row} of the vectors holds NaN or infinity")
    if (np.diff(codes) < 0).any():
        row = int((np.diff(codes) < 0).argmax()) + 1
        raise ValueError(
            f"class {str(names[codes[row]])!r} comes back at row {row}; the metric "
            "needs each class in one block: sort vectors and labels by class"
        )
    sizes = np.bincount(codes)
    found = np.empty(len(sizes))
    for s, end in enumerate(np.cumsum(sizes)):
        distances = ((vectors - vectors[end - sizes[s]]) ** 2).sum(axis=1)
        top = np.argsort(distances, kind="stable")[:end]
        found[s] = (codes[top] == s).sum()
    return _etas(found.sum() / len(codes), found / sizes)


def _mean_or_all(values, per_query):
    if len(values) == 0:
        raise ValueError("there are no outcomes; expected one row per query")
    return values if per_query else float(values.mean())


def _neighbour_labels(outcomes, k):
    if len(outcomes) == 0:
        raise ValueError("there are no outcomes; expected one row per query")
    if outcomes["neighbour_labels"].iloc[0] is None:
        raise ValueError(
            "these outcomes come from a classifier and have no neighbours; use accuracy"
            " or eta_scores"
        )
    labels = np.stack(outcomes["neighbour_labels"].to_list())
    k = labels.shape[1] if k is None else k
    if not 1 <= k <= labels.shape[1]:
        raise ValueError(
            f"k={k} but the outcomes hold {labels.shape[1]} neighbours; run the "
            f"protocol with k={max(k, 1)}"
        )
    return labels[:, :k]


def _hits(outcomes, k=None):
    labels = _neighbour_labels(outcomes, k)
    own = outcomes["label"].to_numpy()[:, None]
    return np.asarray(labels == own, bool)


def _confusion(y_true, y_pred, n_classes):
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    if y_true.shape != y_pred.shape or y_true.ndim != 1 or not y_true.size:
        raise ValueError(
            f"y_true has shape {y_true.shape}, y_pred {y_pred.shape}; expected two "
            "lists of the same length, not empty"
        )
    numbers = np.issubdtype(y_true.dtype, np.integer)
    classes = np.arange(n_classes) if numbers else np.unique(y_true)
    if len(classes) != n_classes:
        raise ValueError(
            f"y_true holds {len(classes)} of {n_classes} classes; a class without "
            "test items has no recall: leave it out of n_classes or add items"
        )
    for name, y in (("y_true", y_true), ("y_pred", y_pred)):
        strange = y[~np.isin(y, classes)]
        if strange.size:
            raise ValueError(
                f"{name} holds {strange.tolist()[0]!r}, which is not one of the "
                f"classes {classes[0]} … {classes[-1]}"
            )
    confusion = confusion_matrix(y_true, y_pred, labels=classes)
    empty = confusion.sum(axis=1) == 0
    if empty.any():
        raise ValueError(
            f"class {int(empty.argmax())} has no test items ({int(empty.sum())} such "
            "classes) and no recall; leave it out or add items"
        )
    return confusion


def _etas(eta_p, per_class):
    eta_w = float(per_class.mean())
    return float(eta_p), eta_w, float(eta_p) * eta_w
