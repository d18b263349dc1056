"""Trust: when to believe a hit, and when an archive should rather give no answer.

A *confidence* is one number a query; larger is surer. Queries are answered from the
surest on: *coverage* is the share that is answered, *risk* the share of those that are
wrong (selective classification, Geifman and El-Yaniv 2017). Queries of equal confidence
are answered together or not at all, since no threshold divides them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils import metrics, statistics
from histo_utils.search import Archive


def answers(embeddings, queries, gallery, k=10, **archive) -> pd.DataFrame:
    """Outcomes of some rows searched among others, whether their class is there or not.

    Protocols refuse a query without a right item in the gallery; here it may be asked.

    Parameters
    ----------
    embeddings : Embeddings
        With ``label`` and ``patient``.
    queries, gallery : (n,) bool arrays
        Rows that ask, rows that may be found.
    k : int
    **archive
        Options of `search.Archive`.

    Returns
    -------
    DataFrame
        ``query``, ``label``, ``patient``, ``predicted``, ``neighbours`` (rows of the
        whole table), ``neighbour_labels``, ``distances``.

    Raises
    ------
    ValueError
        A patient on both sides; and as `search.Archive`.
    """
    table, rows = embeddings.table, np.flatnonzero(queries)
    patient = table["patient"].to_numpy()
    shared = set(patient[queries]) & set(patient[gallery])
    if shared:
        raise ValueError(
            f"patient {min(map(str, shared))!r} is in queries and gallery "
            f"({len(shared)} such); expected masks that divide by patient"
        )
    space = Archive(embeddings.take(gallery), **archive)
    ids, far = space.search(embeddings.take(queries), k)
    near = np.flatnonzero(gallery)[ids]
    label = table["label"].to_numpy()
    return pd.DataFrame(
        {
            "query": rows, "label": label[rows], "patient": patient[rows],
            "predicted": label[near[:, 0]], "neighbours": list(near),
            "neighbour_labels": list(label[near]), "distances": list(far),
        }
    )  # fmt: skip


def agreement(outcomes: pd.DataFrame) -> np.ndarray:
    """Share of the k neighbours that have the nearest one's label; (n,), 1/k to 1."""
    labels = np.stack(outcomes["neighbour_labels"].to_list())
    return (labels == labels[:, :1]).mean(axis=1)


def closeness(outcomes: pd.DataFrame) -> np.ndarray:
    """Minus the distance of the nearest neighbour; (n,)."""
    return -np.stack(outcomes["distances"].to_list())[:, 0].astype(float)


def wrong(outcomes: pd.DataFrame) -> np.ndarray:
    """Whether the nearest has another label than the query; (n,) bool."""
    return metrics.accuracy(outcomes, per_query=True) == 0


def risk_coverage(confidence, errors) -> pd.DataFrame:
    """Risk at every coverage that a threshold can have.

    Parameters
    ----------
    confidence : (n,) array
    errors : (n,) bool array
        Whether the answer is wrong.

    Returns
    -------
    DataFrame
        One row a distinct confidence, from the highest: ``threshold`` (answer where
        the confidence is at least this), ``coverage`` and ``risk``, 0–1.

    Raises
    ------
    ValueError
        No queries, unequal lengths, NaN.

    Examples
    --------
    >>> risk_coverage([0.9, 0.5, 0.5, 0.1], [False, True, False, True])
       threshold  coverage      risk
    0        0.9      0.25  0.000000
    1        0.5      0.75  0.333333
    2        0.1      1.00  0.500000
    """
    levels, answered, mistakes = _steps(confidence, errors)
    n = answered[-1]
    return pd.DataFrame(
        {"threshold": levels, "coverage": answered / n, "risk": mistakes / answered}
    )


def area(confidence, errors) -> float:
    """Area under the risk-coverage curve: mean risk over coverages 1/n, 2/n, … 1.

    Within equal confidences the risk is that of a random order, on average; a constant
    confidence therefore has the overall error as its area. Lower is better.

    Examples
    --------
    >>> area([2, 1], [False, True]), area([1, 2], [False, True]), area([1, 1], [0, 1])
    (0.25, 0.75, 0.5)
    """
    _, answered, mistakes = _steps(confidence, errors)
    places = np.arange(1, answered[-1] + 1)
    made = np.interp(places, np.append(0, answered), np.append(0, mistakes))
    return float((made / places).mean())


def threshold(confidence, errors, risk: float) -> float:
    """Choose the lowest confidence to answer at such that at most ``risk`` is wrong.

    Returns
    -------
    float
        Of all thresholds whose risk is small enough the one with the most answers;
        infinity where there is none (answer nothing). Choose on other patients than
        are asked: a threshold looks better than it is where it was chosen.
    """
    curve = risk_coverage(confidence, errors)
    allowed = curve.loc[curve["risk"] <= risk, "threshold"]
    return float(allowed.min()) if len(allowed) else float("inf")


def abstain(embeddings, confidence, risk, k=10, fold="fold", **archive) -> pd.DataFrame:
    """Let each fold of patients be answered by a threshold that other folds chose.

    For each fold, the others search among one another (each of them in those left) and
    choose the `threshold`; only then is the fold asked, once, against all others. The
    fold's patients are neither queries nor gallery while its threshold is chosen.

    Parameters
    ----------
    embeddings : Embeddings
        With ``label``, ``patient`` and folds of whole patients.
    confidence : callable
        Outcomes -> (n,) array: `agreement`, `closeness`.
    risk : float
        Share of wrong answers that is aimed at.
    k, **archive : see `answers`
    fold : str

    Returns
    -------
    DataFrame
        `answers` of all rows, in the table's order, with ``confidence``,
        ``threshold``, ``answered`` and ``wrong``.

    Raises
    ------
    ValueError
        Fewer than three folds; and as `answers`.
    """
    folds = embeddings.table[fold].to_numpy()
    label = embeddings.table["label"].to_numpy()
    names = np.unique(folds)
    if len(names) < 3:
        raise ValueError(
            f"column {fold!r} has {len(names)} values; expected three folds or more: "
            "one is asked, and two others search in each other to choose"
        )
    parts = []
    for asked in names:
        tried = []
        for inner in names[names != asked]:
            gallery = (folds != asked) & (folds != inner)
            # what the rule is asked later always has its class in the gallery
            queries = (folds == inner) & np.isin(label, label[gallery])
            tried.append(answers(embeddings, queries, gallery, k, **archive))
        tried = pd.concat(tried, ignore_index=True)
        least = threshold(confidence(tried), wrong(tried), risk)
        part = answers(embeddings, folds == asked, folds != asked, k, **archive)
        parts.append(part.assign(confidence=confidence(part), threshold=least))
    found = pd.concat(parts).sort_values("query", ignore_index=True)
    answered = found["confidence"] >= found["threshold"]
    return found.assign(answered=answered, wrong=wrong(found))


def without_each_class(embeddings, k=10, fold="fold", **archive) -> pd.DataFrame:
    """Ask every patch of archives that lack one class, one archive a class.

    Each fold of patients is searched among the others, from which the class was taken.

    Returns
    -------
    DataFrame
        `answers` with ``without`` (the class that was taken out) and ``present``
        (whether the query's own class is in the archive); classes × n rows.

    Raises
    ------
    ValueError
        As `answers`.
    """
    folds = embeddings.table[fold].to_numpy()
    label = embeddings.table["label"].to_numpy()
    parts = []
    for taken in np.unique(label):
        for asked in np.unique(folds):
            gallery = (folds != asked) & (label != taken)
            part = answers(embeddings, folds == asked, gallery, k, **archive)
            parts.append(part.assign(without=taken, present=part["label"] != taken))
    return pd.concat(parts, ignore_index=True)


def auroc(confidence, present) -> float:
    """Chance that a query whose class is there is surer than one whose class is not.

    Equal confidences count half; 0.5 is no knowledge. NaN where one kind is missing.

    Examples
    --------
    >>> auroc([3, 2, 2, 1], [True, True, False, False])
    0.875
    """
    confidence, present = np.asarray(confidence, float), np.asarray(present, bool)
    n_in, n_out = present.sum(), (~present).sum()
    if not n_in or not n_out:
        return float("nan")
    _, place, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[present].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def mean_auroc(confidence, present, archive) -> float:
    """Mean over archives of the `auroc` in each; those that have none are left out."""
    archive = np.asarray(archive)
    confidence, present = np.asarray(confidence), np.asarray(present)
    each = [
        auroc(confidence[archive == a], present[archive == a])
        for a in np.unique(archive)
    ]
    known = [value for value in each if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def risk(answered, errors) -> float:
    """Share of the answered that are wrong; NaN where nothing was answered."""
    answered, errors = np.asarray(answered, bool), np.asarray(errors, bool)
    return float(errors[answered].mean()) if answered.any() else float("nan")


def over_patients(statistic, columns, patients, n_boot=1000, seed=0) -> dict:
    """Compute a statistic of several values a query, with an interval over patients.

    Parameters
    ----------
    statistic : callable
        Takes the columns, returns a float: `area`, `risk`, `mean_auroc`.
    columns : sequence of (n,) arrays of numbers
    patients : (n,) array

    Returns
    -------
    dict
        ``score``, ``low``, ``high`` (95 %, patients drawn with all their queries),
        ``n``, ``queries``; both ends NaN where a draw has no value.
    """
    rows = np.column_stack([np.asarray(c, float) for c in columns])
    low, high = statistics.bootstrap_ci(
        rows, patients, n_boot, seed=seed, statistic=lambda drawn: statistic(*drawn.T)
    )
    n = int(pd.Series(np.asarray(patients)).nunique())
    score = float(statistic(*rows.T))
    return {"score": score, "low": low, "high": high, "n": n, "queries": len(rows)}


def _steps(confidence, errors):
    """Distinct confidences from the highest; how many answered, and wrong, by then."""
    confidence, errors = np.asarray(confidence, float), np.asarray(errors, float)
    if confidence.shape != errors.shape or confidence.ndim != 1 or not len(errors):
        raise ValueError(
            f"confidence has shape {confidence.shape}, errors {errors.shape}; expected "
            "one value of each a query, and one query at least"
        )
    if np.isnan(confidence).any() or np.isnan(errors).any():
        raise ValueError("a confidence or an error is NaN; expected numbers")
    levels, place = np.unique(-confidence, return_inverse=True)
    answered = np.cumsum(np.bincount(place))
    return -levels, answered, np.cumsum(np.bincount(place, errors))
