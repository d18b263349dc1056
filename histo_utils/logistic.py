"""Logistic regression on vectors: chosen on a part, and in repeated random folds.

Vectors are standardised and then turned onto their own principal axes. An L2 penalty
does not see a rotation, so the answers stay the same, and where there are fewer rows
than numbers in a vector the fit is that much faster.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits


def axes(vectors, known):
    """Standardise vectors by the known rows, and turn them onto those rows' axes.

    Parameters
    ----------
    vectors : (n, d) array
    known : (n,) bool array
        Rows that give mean, deviation and axes.

    Returns
    -------
    (n, min(known rows, d)) array
        Inner products with known rows are those of the standardised vectors.
    """
    x = np.asarray(vectors, float)
    deviation = x[known].std(axis=0)
    x = (x - x[known].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    return x @ np.linalg.svd(x[known], full_matrices=False)[2].T


# Small fits: threads that wait for each other cost more than they help.
@threadpool_limits.wrap(limits=1)
def probe(vectors, labels, split, c_values):
    """Classify the test rows of a split.

    Scale and axes are those of the gallery, which needs no label. The constant is
    the smallest of those that answer most of the choosing rows rightly when fitted on
    the training rows; the classifier is then fitted on the whole gallery.

    Parameters
    ----------
    vectors : (n, d) array
    labels : (n,) array
    split : trials.Split
    c_values : sequence of float
        Inverse penalties to choose from.

    Returns
    -------
    predicted : array
        Labels of the test rows.
    c : float
        The constant.
    """
    x, labels = axes(vectors, split.gallery), np.asarray(labels)
    c_values = sorted(c_values)
    right = [
        _fitted(x[split.train], labels[split.train], c).score(
            x[split.choose], labels[split.choose]
        )
        for c in c_values
    ]
    c = c_values[int(np.argmax(right))]
    machine = _fitted(x[split.gallery], labels[split.gallery], c)
    return machine.predict(x[split.test]), c


@threadpool_limits.wrap(limits=1)
def random_folds(vectors, labels, c, repeat, n_folds=5) -> np.ndarray:
    """Whether each row is answered rightly in random folds, whoever its patient is.

    Parameters
    ----------
    vectors : (n, d) array
        Scaled by all rows.
    labels : (n,) array
    c : float
        The constant, not chosen.
    repeat : int
        Seed of the folds.
    """
    x, labels = axes(vectors, np.ones(len(vectors), bool)), np.asarray(labels)
    right = np.zeros(len(labels))
    for fit, held in KFold(n_folds, shuffle=True, random_state=repeat).split(x):
        found = _fitted(x[fit], labels[fit], c).predict(x[held])
        right[held] = found == labels[held]
    return right


def p_by_repeats(a, b) -> list[float]:
    """P of a paired t-test over the first 2, 3, … repeats, as if independent.

    They are not: the same rows are dealt again. Shown to be seen, not to be used.

    Parameters
    ----------
    a, b : (repeats,) arrays
        Accuracy of each repeat. Where all differences are equal P is NaN.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    same = [np.ptp((a - b)[:r]) < 1e-12 for r in range(2, len(a) + 1)]
    return [
        float("nan") if flat else float(ttest_rel(a[:r], b[:r]).pvalue)
        for r, flat in enumerate(same, 2)
    ]


def over_repeats(hits) -> dict:
    """Accuracy over repeats, and P of the first system against the second.

    Parameters
    ----------
    hits : dict
        System to a (repeats, n) array of right (1) and wrong (0) answers; two systems.

    Returns
    -------
    dict
        ``accuracy`` (``{system: {"mean", "sd"}}``) and ``p_by_repeats``.
    """
    means = {name: np.asarray(hit).mean(axis=1) for name, hit in hits.items()}
    return {
        "accuracy": {n: {"mean": m.mean(), "sd": m.std(ddof=1)}
                     for n, m in means.items()},
        "p_by_repeats": p_by_repeats(*means.values()),
    }  # fmt: skip


def in_words(found) -> str:
    """Say the P value over repeats and the tests over patients beside it; Markdown.

    Parameters
    ----------
    found : dict
        ``accuracy`` (``{system: {"mean", "sd"}}``), ``repeats``, ``p_by_repeats``;
        other entries are paired differences (`bench.compared`), named for their unit.
    """
    p = found["p_by_repeats"][-1]
    scores = ", ".join(
        "{} {mean:.3f} (sd over repeats {sd:.4f})".format(name, **line)
        for name, line in found["accuracy"].items()
    )
    said = "not defined" if p is None or np.isnan(p) else f"{p:.1e}"
    lines = [
        f"* Five random folds over patches, {found['repeats']} times: {scores}; "
        f"P of a paired t-test over repeats: {said}."
    ]
    lines += [
        "* {}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], sign-flip P = {p:.3f}, "
        "n = {n}, detectable {detectable:.3f}.".format(name, **line)
        for name, line in found.items()
        if isinstance(line, dict) and "detectable" in line
    ]
    return "\n".join(lines)


def _fitted(x, labels, c):
    return LogisticRegression(C=c, max_iter=500, tol=1e-3).fit(x, labels)
