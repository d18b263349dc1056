"""Measurements of slides, predicted by descriptions side by side.

A description is one array of patch vectors, or one array for each fold where a network
was trained for each: the fold that it never saw is then predicted by its own vectors.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils import bench
from histo_utils.embeddings import Embeddings
from histo_utils.measurements import (
    auroc,
    many_values,
    predict_status,
    predict_value,
    slide_means,
    spearman,
)


def by_slide(table, vectors):
    """Mean vectors of slides, and the slides (`measurements.slide_means`)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    return slide_means(Embeddings(vectors, table))


def out_of_fold(predict, table, vectors, y, **how) -> pd.DataFrame:
    """Predict a measurement of each slide, its fold of patients left out.

    Parameters
    ----------
    predict : callable
        `measurements.predict_value` or `predict_status`.
    table : pandas.DataFrame
        Patches, with ``fold``.
    vectors : (n, d) array, or list of them
        A list has one array a fold, in the order of the folds.
    y : (slides,) array
    **how
        Of ``predict``.

    Returns
    -------
    pandas.DataFrame
        Out-of-fold predictions, one row a slide.
    """
    slides = by_slide(table, np.zeros((len(table), 1)))[1]
    how |= {"folds": slides["fold"].to_numpy()}
    if not isinstance(vectors, list):
        return predict(by_slide(table, vectors)[0], y, slides["patient"], **how)
    parts = []
    for fold, own in zip(np.unique(slides["fold"]), vectors, strict=True):
        if predict is predict_value:  # the other folds' predictions are not wanted
            how["folds"] = (slides["fold"] == fold).to_numpy()
        part = predict(by_slide(table, own)[0], y, slides["patient"], **how)
        parts.append(part[part["row"].isin(np.flatnonzero(slides["fold"] == fold))])
    return pd.concat(parts).sort_values("row", ignore_index=True)


def numbers(table, described, y, reference, n_boot=2000, seed=0, **how) -> dict:
    """Predict a number by several descriptions, and compare their errors.

    Parameters
    ----------
    described : dict
        Name to a list of descriptions, one a seed.
    reference : str
        The description whose error is subtracted.

    Returns
    -------
    dict
        For each name ``rank correlation`` (`measurements.spearman`; the score is the
        mean over seeds, the interval over patients that of the first seed), ``seeds``,
        ``error`` (mean absolute error) and the paired difference of errors over
        patients, after averaging the seeds.
    """
    runs = {
        name: [out_of_fold(predict_value, table, v, y, seed=seed, **how) for v in many]
        for name, many in described.items()
    }
    errors = {
        name: np.mean([abs(r["predicted"] - r["observed"]) for r in many], axis=0)
        for name, many in runs.items()
    }
    rows = {}
    for name, many in runs.items():
        each = [spearman(run, n_boot, seed) for run in many]
        mean = {"score": float(np.mean([found["score"] for found in each]))}
        rows[name] = {
            "rank correlation": each[0] | mean,
            "seeds": " ".join(f"{found['score']:.2f}" for found in each),
            "error": float(errors[name].mean()),
        }
        pair = errors[name], errors[reference], many[0]["patient"]
        versus = "–" if name == reference else bench.compared(*pair, seed=seed)
        rows[name][f"error − {reference}"] = versus
    return rows


def genes_found(table, described, values, level=0.05, seed=0, **how) -> dict:
    """Count genes that each description predicts, of those tied to it and of noise.

    Parameters
    ----------
    described : dict
        Name to one array of patch vectors.
    values : pandas.DataFrame
        From `measurements.planted_outcomes`.
    level : float
        Of the adjusted P.
    """
    names = [name for name in values if name.startswith("gene")]
    rows = {}
    for name, vectors in described.items():
        x, slides = by_slide(table, vectors)
        how |= {"folds": slides["fold"].to_numpy(), "seed": seed}
        sure = many_values(x, values[names], slides["patient"], **how)["p_bh"] < level
        for kind in ("tied", "noise"):
            of = sure[sure.index.str.contains(kind)]
            text = f"{of.sum()} of {len(of)}"
            rows.setdefault(name, {})[f"{kind} genes found"] = text
    return rows


def mutations_found(table, described, values, n_boot=2000, seed=0, **how) -> dict:
    """Score each description for each mutation by its AUROC.

    Parameters
    ----------
    described : dict
        Name to a description.
    values : pandas.DataFrame
        From `measurements.planted_outcomes`.
    **how
        ``c_values`` of `measurements.predict_status`.
    """
    names = [name for name in values if name.startswith("mutation")]
    rows = {}
    for name, vectors in described.items():
        runs = [
            out_of_fold(predict_status, table, vectors, values[m], seed=seed, **how)
            for m in names
        ]
        found = [auroc(run, n_boot, seed) for run in runs]
        rows[name] = dict(zip(names, found, strict=True))
    return rows
