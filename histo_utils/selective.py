"""Selective prediction: answer where the confidence is high enough, abstain elsewhere.

A *confidence* is one number per query, larger where surer. *Coverage* is the share of
queries that are answered, *risk* the share of wrong answers among them (Geifman and
El-Yaniv 2017). Queries of equal confidence are answered together or not at all.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from histo_utils import statistics
from histo_utils.search import Archive


def agreement(outcomes) -> np.ndarray:
    """Share of the k neighbours that have the nearest one's label; (n,), 1/k to 1."""
    labels = np.stack(outcomes["neighbour_labels"].to_list())
    return (labels == labels[:, :1]).mean(axis=1)


def closeness(outcomes) -> np.ndarray:
    """Minus the distance of the nearest neighbour; (n,)."""
    return -np.stack(outcomes["distances"].to_list())[:, 0].astype(float)


def risk_coverage(confidence, errors) -> pd.DataFrame:
    """Risk at every coverage that a threshold can reach.

    Parameters
    ----------
    confidence, errors : (n,) arrays
        Numbers; whether the answer is wrong.

    Returns
    -------
    DataFrame
        One row per distinct confidence, from the highest: ``threshold`` (answer where
        the confidence is at least this), ``coverage``, ``risk``.

    Examples
    --------
    >>> risk_coverage([0.9, 0.5, 0.5], [False, True, False])["risk"].round(2).tolist()
    [0.0, 0.33]
    """
    confidence, errors = np.asarray(confidence, float), np.asarray(errors, float)
    known = confidence.shape == errors.shape == (len(errors),) != (0,)
    if not known or np.isnan(confidence + errors).any():
        raise ValueError(
            f"confidence has shape {confidence.shape}, errors {errors.shape}; expected "
            "one number of each per query, none NaN, and at least one query"
        )
    levels, place = np.unique(-confidence, return_inverse=True)
    n = np.cumsum(np.bincount(place))
    risks = np.cumsum(np.bincount(place, errors)) / n
    return pd.DataFrame({"threshold": -levels, "coverage": n / n[-1], "risk": risks})


def area(confidence, errors) -> float:
    """Mean risk at coverages 1/n, 2/n, … 1; equal confidences in random order."""
    curve = risk_coverage(confidence, errors)
    reached = np.arange(1, len(errors) + 1) / len(errors)
    x, wrong = curve["coverage"], curve["coverage"] * curve["risk"]
    return float((np.interp(reached, [0, *x], [0, *wrong]) / reached).mean())


def threshold(confidence, errors, risk) -> float:
    """Lowest confidence with at most ``risk`` wrong answers; infinite if none has."""
    curve = risk_coverage(confidence, errors)
    allowed = curve.loc[curve["risk"] <= risk, "threshold"]
    return float(allowed.min()) if len(allowed) else float("inf")


def risk(answered, errors) -> float:
    """Share of wrong answers among the answered; NaN where nothing was answered."""
    answered = np.asarray(answered, bool)
    return float(np.mean(errors[answered])) if answered.any() else float("nan")


def abstain(embeddings, confidence, risks, k=10, fold="fold", **archive):
    """Answer each fold of patients above a threshold that the other folds chose.

    The other folds search one another (each of them in those left) and choose the
    `threshold`; then the fold is searched, once, against all of them. Its patients are
    neither queries nor gallery while the threshold is chosen.

    Parameters
    ----------
    embeddings : Embeddings
        With ``label``, ``patient`` and folds of whole patients.
    confidence : callable
        Outcomes -> (n,) array: `agreement`, `closeness`.
    risks : sequence of float
        Targets: shares of wrong answers.
    **archive
        Options of `search.Archive`.

    Returns
    -------
    DataFrame
        Outcomes of the whole table, once per ``target_risk``, with ``confidence``,
        ``threshold``, ``answered`` and ``wrong``.
    """
    folds, label = (embeddings.table[c].to_numpy() for c in (fold, "label"))
    names = np.unique(folds)
    if len(names) < 3:
        raise ValueError(
            f"column {fold!r} has {len(names)} values; expected three folds or more: "
            "one is the test, and two others search each other to choose"
        )
    parts = []
    for test in names:
        tried = []
        for inner in names[names != test]:
            gallery = (folds != test) & (folds != inner)
            queries = (folds == inner) & np.isin(label, label[gallery])  # as in use
            tried.append(_answers(embeddings, queries, gallery, k, archive))
        tried = pd.concat(tried, ignore_index=True)
        part = _answers(embeddings, folds == test, folds != test, k, archive)
        part["confidence"] = confidence(part)
        for target in risks:
            least = threshold(confidence(tried), tried["wrong"], target)
            parts.append(part.assign(target_risk=target, threshold=least))
    found = pd.concat(parts).sort_values(["target_risk", "query"], ignore_index=True)
    return found.assign(answered=found["confidence"] >= found["threshold"])


def without_each_class(embeddings, k=10, fold="fold", **archive):
    """Outcomes of all rows in archives ``without`` one class; theirs: ``present``."""
    folds, label = (embeddings.table[c].to_numpy() for c in (fold, "label"))
    parts = []
    for absent in np.unique(label):
        for test in np.unique(folds):
            gallery = (folds != test) & (label != absent)
            part = _answers(embeddings, folds == test, gallery, k, archive)
            parts.append(part.assign(without=absent, present=part["label"] != absent))
    return pd.concat(parts, ignore_index=True)


def auroc(confidence, present, archive=None) -> float:
    """Chance that a query whose class is present is surer; mean over archives."""
    # by ranks, since a bootstrap of scikit-learn's (equal) takes ten times as long
    archive = np.zeros(len(present)) if archive is None else np.asarray(archive)
    found = []
    for one in np.unique(archive):
        here = np.asarray(present, bool)[archive == one]
        n, absent = here.sum(), (~here).sum()
        if n and absent:
            ranks = rankdata(np.asarray(confidence)[archive == one])[here]
            found.append((ranks.sum() - n * (n + 1) / 2) / (n * absent))
    return float(np.mean(found)) if found else float("nan")


def scores(found) -> dict:
    """Score outcomes of `abstain`: area, its gain, coverage and risk at each target.

    A risk is a bare number where some draw of patients had no answer, "–" without any.
    """
    parts = list(found.groupby("target_risk"))
    first, patient = parts[0][1], parts[0][1]["patient"]
    sure = first["confidence"], first["wrong"]
    row = {
        "area": over_patients(area, sure, patient),
        "gain": over_patients(lambda c, w: w.mean() - area(c, w), sure, patient),
        "error_of_all": statistics.score(first["wrong"], patient),
    }
    for target, part in parts:
        reached = over_patients(risk, (part["answered"], part["wrong"]), patient)
        if np.isnan(reached["low"]):
            reached = "–" if np.isnan(reached["score"]) else reached["score"]
        row[f"coverage_at_{100 * target:.0f}"] = statistics.score(
            part["answered"], patient
        )
        row[f"risk_at_{100 * target:.0f}"] = reached
    return row


def absent_scores(searched, confidence, found) -> tuple[dict, dict]:
    """Score outcomes of `without_each_class`: AUROC, shares answered; AUROC by class.

    The thresholds are those of ``found``, of `abstain` with the same confidence.
    """
    sure, present = confidence(searched), searched["present"].to_numpy(bool)
    patient, without = (searched[c].to_numpy() for c in ("patient", "without"))
    columns = sure, present, pd.factorize(without)[0]
    row = {"AUROC": over_patients(auroc, columns, patient)}
    for target, part in found.groupby("target_risk"):
        answered = sure >= part["threshold"].to_numpy()[searched["query"]]
        for name, rows in (("absent", ~present), ("present", present)):
            row[f"{name}_answered_at_{100 * target:.0f}"] = statistics.score(
                answered[rows], patient[rows]
            )
    rows = {str(name): without == name for name in np.unique(without)}
    return row, {n: auroc(sure[mask], present[mask]) for n, mask in rows.items()}


def over_patients(statistic, columns, patients, n_boot=1000, seed=0) -> dict:
    """Score ``statistic(*columns)`` of per-query values, with its 95 % interval."""
    rows = np.column_stack([np.asarray(c, float) for c in columns])
    low, high = statistics.bootstrap_ci(
        rows, patients, n_boot, seed=seed, statistic=lambda drawn: statistic(*drawn.T)
    )
    n, score = int(pd.Series(np.asarray(patients)).nunique()), statistic(*rows.T)
    return {"score": score, "low": low, "high": high, "n": n, "queries": len(rows)}


def _answers(embeddings, queries, gallery, k, archive):
    """Outcomes of masked rows; a query's class may be missing, unlike in protocols."""
    table, rows = embeddings.table, np.flatnonzero(queries)
    patient, label = (table[name].to_numpy() for name in ("patient", "label"))
    shared = set(patient[queries]) & set(patient[gallery])
    if shared:
        raise ValueError(
            f"patient {min(map(str, shared))!r} is in queries and gallery "
            f"({len(shared)} such); expected folds of whole patients"
        )
    space = Archive(embeddings.take(gallery), **archive)
    ids, far = space.search(embeddings.take(queries), k)
    near = np.flatnonzero(gallery)[ids]
    return pd.DataFrame(
        {
            "query": rows, "label": label[rows], "patient": patient[rows],
            "predicted": label[near[:, 0]], "neighbours": list(near),
            "neighbour_labels": list(label[near]), "distances": list(far),
            "wrong": label[near[:, 0]] != label[rows],
        }
    )  # fmt: skip
