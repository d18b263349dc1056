"""Numbers from outcomes, with the interval that belongs to them.

The retrieval metrics take outcomes (:mod:`histo_utils.protocols`) and return the mean
over queries, or with ``per_query=True`` one value a query, for `bootstrap_ci` and
`paired_sign_flip`. The unit of n is the patient: pass ``groups=outcomes["patient"]``.
"""

from __future__ import annotations

from itertools import product
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

_CELLS = 2**22  # numbers held at once


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


class Comparison(NamedTuple):
    """Paired difference a - b, its interval, p value, and the number of groups."""

    difference: float
    low: float
    high: float
    p: float
    n: int


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
    the k; 0 where there is none. Lists are judged by their order alone: what was not
    found costs nothing (`map_at_r` counts it).
    """
    hits = _hits(outcomes, k)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    values = (precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)
    return _mean_or_all(values, per_query)


def map_at_r(outcomes, per_query=False):
    """MAP@R: average precision of the R nearest, divided by R (Musgrave et al. 2020).

    R is ``relevant``, the number of right items that the query may find.

    Raises
    ------
    ValueError
        Where fewer than R neighbours were kept: the value would come out too low.
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

    Notes
    -----
    Babaie et al. 2017: η_p = Σ|R∩Γ_s|/n, η_w = (1/S)·Σ|R∩Γ_s|/n_s. One of the two
    official scripts computes something else: `official_python_scorer`.

    Raises
    ------
    ValueError
        A class without test items, labels outside the classes, unequal lengths.
    """
    confusion = _confusion(y_true, y_pred, n_classes)
    right = np.diag(confusion)
    return _etas(right.sum() / confusion.sum(), right / confusion.sum(axis=1))


def official_python_scorer(y_true, y_pred, n_classes):
    """η as ``CalculateError.py`` computes it: mean **precision** in place of recall.

    KimiaLab/KimiaPath24 at commit cb676c0 divides by the column sums of a matrix whose
    rows are the truth; its MATLAB twin, and the paper, divide by the true counts. Kept
    to reproduce published numbers. Parameters, values and errors: `eta_scores`, and an
    error for a class that is never predicted (the script divides by zero).
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
            " and n labels"
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


def bootstrap_ci(values, groups=None, n_boot=2000, level=0.95, seed=0, statistic=None):
    """Percentile interval of a mean, drawing whole groups with replacement.

    Outcomes of one patient belong together, so patients are drawn, with all their
    queries; the gallery stays as it is.

    Parameters
    ----------
    values : (n,) or (n, m) array
        One row a query.
    groups : (n,) array, optional
        Patient of each row; without it rows are drawn.
    n_boot, seed : int
    level : float
        0.95 gives the 2.5th and 97.5th percentile.
    statistic : callable, optional
        Takes drawn rows of ``values``, returns a float; default the mean of the rows.

    Returns
    -------
    Interval
        ``(low, high)``

    Raises
    ------
    ValueError
        NaN, unequal lengths, fewer than two groups, a level outside 0–1.

    Examples
    --------
    >>> bootstrap_ci([0, 0, 1, 1], groups=["a", "a", "b", "b"])
    Interval(low=0.0, high=1.0)
    """
    values, codes, n = _grouped(values, groups)
    if not 0 < level < 1 or n_boot < 1:
        raise ValueError(
            f"level={level}, n_boot={n_boot}; expected a level between 0 and 1 and at "
            "least one draw"
        )
    if statistic is None and values.ndim != 1:
        raise ValueError(f"values have shape {values.shape}; give statistic= for rows")
    rng, draws = np.random.default_rng(seed), np.empty(n_boot)
    if statistic is None:
        sums, sizes = np.bincount(codes, values), np.bincount(codes)
    else:
        members = np.split(
            np.argsort(codes, kind="stable"), np.bincount(codes).cumsum()[:-1]
        )
    step = max(1, _CELLS // n)
    for s in range(0, n_boot, step):
        drawn = rng.integers(0, n, size=(min(step, n_boot - s), n))
        if statistic is None:
            draws[s : s + step] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
        else:
            draws[s : s + step] = [
                statistic(values[np.concatenate([members[g] for g in row])])
                for row in drawn
            ]
    tails = (1 - level) / 2
    return Interval(*(float(q) for q in np.quantile(draws, [tails, 1 - tails])))


def paired_sign_flip(a, b, groups=None, n_flips=10_000, level=0.95, seed=0):
    """Compare two systems on the same queries, patient by patient.

    The difference is the mean over patients of each patient's mean of a - b (every
    patient counts once). Under the null hypothesis a patient's difference is as likely
    to have the other sign: p is the share of sign patterns whose mean is at least as
    far from 0. All 2ⁿ patterns are tried for up to 12 patients, else ``n_flips`` are
    drawn and p = (1 + as far) / (1 + n_flips).

    Parameters
    ----------
    a, b : (n,) arrays
        Values of each query under either system.
    groups : (n,) array, optional
        Patient of each query; without it every query counts as one.
    n_flips, seed : int
    level : float
        Of the percentile bootstrap interval over patients.

    Returns
    -------
    Comparison
        ``(difference, low, high, p, n)``, n the number of patients
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; expected both systems' values on "
            "the same queries, in the same order"
        )
    per_group = _group_means(a - b, groups)
    n = len(per_group)
    seen = abs(per_group.mean()) * (1 - 1e-9) - 1e-15  # equal sums, other rounding
    if n <= 12:
        signs = np.array(list(product((-1.0, 1.0), repeat=n)))
        p = float((abs(signs @ per_group / n) >= seen).mean())
    else:
        rng, far, step = np.random.default_rng(seed), 0, max(1, _CELLS // n)
        for s in range(0, n_flips, step):
            signs = rng.integers(0, 2, size=(min(step, n_flips - s), n)) * 2.0 - 1
            far += int((abs(signs @ per_group / n) >= seen).sum())
        p = (1 + far) / (1 + n_flips)
    low, high = bootstrap_ci(per_group, level=level, seed=seed)
    return Comparison(float(per_group.mean()), low, high, p, n)


def holm(p_values) -> np.ndarray:
    """Adjust p values for their number (Holm 1979); same order, at most 1.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values are {p_values}; expected a list of numbers 0–1")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def detectable_difference(differences, groups=None, power=0.8, level=0.95) -> float:
    """Smallest true difference that a paired comparison of this size would find.

    (z₁₋α/₂ + z_power)·sd/√n over the n per-patient mean differences a - b, two-sided
    at α = 1 - level: with the defaults 2.80·sd/√n (normal approximation).

    Parameters
    ----------
    differences : (n,) array
        a - b of each query, or of each patient.
    groups : (n,) array, optional
        Patient of each query.
    """
    per_group = _group_means(np.asarray(differences, float), groups)
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(power)
    return float(z * per_group.std(ddof=1) / np.sqrt(len(per_group)))


def score_table(outcomes, ks=(1, 3, 5, 10), groups="patient", **bootstrap):
    """All retrieval metrics that the outcomes allow, each with its interval.

    Parameters
    ----------
    outcomes : DataFrame
    ks : sequence of int
        Those beyond the neighbours kept are left out.
    groups : str
        Column with the unit of n.
    **bootstrap
        ``n_boot``, ``level``, ``seed`` of `bootstrap_ci`.

    Returns
    -------
    DataFrame
        One row a metric: ``metric``, ``value``, ``low``, ``high``, ``queries``,
        ``groups``.
    """
    values = {"accuracy": accuracy(outcomes, per_query=True)}
    kept = 0 if outcomes["neighbours"].iloc[0] is None else _hits(outcomes).shape[1]
    for k in [k for k in ks if k <= kept]:
        values[f"precision@{k}"] = precision_at_k(outcomes, k, per_query=True)
        values[f"recall@{k}"] = recall_at_k(outcomes, k, per_query=True)
        values[f"majority@{k}"] = majority_at_k(outcomes, k, per_query=True)
    if kept:
        values["mAP"] = mean_average_precision(outcomes, per_query=True)
        if outcomes["relevant"].max() <= kept:
            values["MAP@R"] = map_at_r(outcomes, per_query=True)
    unit = outcomes[groups]
    rows = [
        (name, x.mean(), *bootstrap_ci(x, unit, **bootstrap))
        for name, x in values.items()
    ]
    table = pd.DataFrame(rows, columns=["metric", "value", "low", "high"])
    return table.assign(queries=len(outcomes), groups=unit.nunique())


def _mean_or_all(values, per_query):
    if len(values) == 0:
        raise ValueError("there are no outcomes; expected one row a query at least")
    return values if per_query else float(values.mean())


def _neighbour_labels(outcomes, k):
    if len(outcomes) == 0:
        raise ValueError("there are no outcomes; expected one row a query at least")
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
    if not (np.issubdtype(y_true.dtype, np.integer)):
        names = pd.Index(pd.unique(pd.Series(y_true))).sort_values()
        if len(names) != n_classes:
            raise ValueError(
                f"y_true holds {len(names)} of {n_classes} classes; a class without "
                "test items has no recall: leave it out of n_classes or add items"
            )
        strange = ~np.isin(y_pred, y_true)
        if strange.any():
            raise ValueError(
                f"y_pred holds {str(y_pred[strange.argmax()])!r}, not a class of y_true"
            )
        y_true, y_pred = names.get_indexer(y_true), names.get_indexer(y_pred)
    for name, y in (("y_true", y_true), ("y_pred", y_pred)):
        outside = y[(y < 0) | (y >= n_classes)]
        if outside.size:
            raise ValueError(
                f"{name} holds {outside[0]}, outside the classes 0 … {n_classes - 1}"
            )
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (y_true, y_pred), 1)
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


def _grouped(values, groups):
    values = np.asarray(values)
    values = values.astype(float) if values.dtype == bool else values
    if np.issubdtype(values.dtype, np.floating) and np.isnan(values).any():
        row = int(np.argwhere(np.isnan(values))[0, 0])
        raise ValueError(f"value {row} is NaN; expected a number for every query")
    units = np.arange(len(values)) if groups is None else groups
    codes = pd.factorize(pd.Series(units))[0]
    if len(codes) != len(values):
        raise ValueError(f"{len(values)} values but {len(codes)} groups; give one each")
    if len(codes) and codes.min() < 0:
        raise ValueError(
            f"value {int(codes.argmin())} has no group; expected a patient for each"
        )
    n = int(codes.max(initial=-1)) + 1
    if n < 2:
        raise ValueError(
            f"{n} group; an interval over groups (patients) needs 2 or more"
        )
    return values, codes, n


def _group_means(values, groups):
    values, codes, _ = _grouped(values, groups)
    return np.bincount(codes, values) / np.bincount(codes)
