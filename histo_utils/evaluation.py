"""Evaluation: one system under all protocols, remedies and rules of silence.

What chapter 9 asks of every encoder, as functions from vectors to scores with their
intervals over patients. The protocols stand in `bench` and `protocols`, the measures of
confidence in `trust`, centring in `remedies`.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd

from histo_utils import bench, confounders, metrics, protocols, selective, trials
from histo_utils.embeddings import Embeddings
from histo_utils.patches import read_patch

TITLES = {
    "scan_leave_one_out": "scan, leave-one-out",
    "scan_not_touching": "scan, not touching",
    "scan_split": "scan, upper → lower right",
    "scan_split_not_touching": "scan, split, not touching",
    "organ": "label, patient folds",
    "leave_one_patient_out": "label, leave one patient out",
}
SCAN_SPLIT = ("scan_split", "scan_split_not_touching")


def under_all(embeddings, **how) -> dict:
    """Outcomes under all protocols, with as many neighbours as MAP@R needs.

    Parameters
    ----------
    embeddings : Embeddings
    **how
        ``standardised`` and ``metric``.

    Returns
    -------
    dict of outcomes
        As `bench.tasks`, and ``leave_one_patient_out``.
    """
    table = embeddings.table
    k = max(5, int(table["slide"].value_counts().max()) - 1)
    made = bench.tasks(embeddings, k, **how)
    k = _findable(table)
    made["organ"] = protocols.patient_folds(embeddings, k, **how)
    made["leave_one_patient_out"] = protocols.leave_one_patient_out(
        embeddings, k, **how
    )
    return made


def under_own(scans, folds, **how) -> dict:
    """Outcomes of a trained system under the protocols that it may be asked.

    It was trained on the upper halves of these scans, so of the tasks on scans only
    `SCAN_SPLIT` is left; and for labels anew for each fold of patients.

    Parameters
    ----------
    scans : list of Embeddings
        One a seed.
    folds : list of lists of Embeddings
        For each seed one a fold (`protocols.patient_folds`); may be empty.
    **how
        ``standardised`` and ``metric``.

    Returns
    -------
    dict of lists of outcomes
        One a seed: `SCAN_SPLIT`, and ``organ`` if there are folds.
    """
    table = scans[0].table
    k = max(5, int(table["slide"].value_counts().max()) - 1)
    every = [bench.tasks(made, k, **how) for made in scans]
    found = {task: [made[task] for made in every] for task in SCAN_SPLIT}
    k = _findable(table)
    organ = [protocols.patient_folds(made, k, **how) for made in folds]
    return found | ({"organ": organ} if organ else {})


def _findable(table):
    """Most patches of a patch's label that other patients have; 5 at least."""
    label, own = (table.groupby(c)["label"].transform("size")
                  for c in ("label", ["label", "patient"]))  # fmt: skip
    return max(5, int((label - own).max()))


def judged(task: str, outcomes) -> dict:
    """P@1, majority@5 and MAP@R with intervals; η for scans, macro for labels.

    Of several seeds (a list of outcomes) the means, with intervals over seeds and
    patients, and P@1 of each (``seeds``).
    """
    runs = trials.listed(outcomes)
    row = _scored(runs, metrics.accuracy)
    row["majority_at_5"] = _scored(runs, functools.partial(metrics.majority_at_k, k=5))
    row["map_at_r"] = _scored(runs, metrics.map_at_r)
    if not task.startswith("scan"):
        macros = [bench.macro(run) for run in runs]
        mean = float(np.mean([macro["score"] for macro in macros]))
        return row | {"macro": macros[0] if len(runs) == 1 else mean}
    n = runs[0]["label"].nunique()
    etas = [metrics.eta_scores(run["label"], run["predicted"], n) for run in runs]
    names = ("eta_p", "eta_w", "eta_total")
    return row | dict(zip(names, np.mean(etas, axis=0).tolist(), strict=True))


def _scored(runs, value):
    if len(runs) > 1:
        return trials.over_seeds(runs, value=value)
    return bench.scored(value(runs[0], per_query=True), runs[0]["patient"])


def differences(runs: dict, reference: str, task: str, score="p_at_1") -> dict:
    """Every other system minus the reference on one task; Holm over the systems.

    Parameters
    ----------
    runs : dict
        ``{system: {task: outcomes, or a list of them, one a seed}}``; systems without
        the task are left out.
    reference : str
    task : str
    score : {"p_at_1", "map_at_r"}
    """
    value = {"p_at_1": metrics.accuracy, "map_at_r": metrics.map_at_r}[score]
    base = runs[reference][task]
    found = {
        name: trials.against(run[task], base, value=value)
        for name, run in runs.items()
        if name != reference and task in run
    }
    bench.corrected(found.values())
    return found


def apart(families: dict, level=0.05) -> str:
    """List what differs after Holm's correction, as Markdown.

    Parameters
    ----------
    families : dict
        ``{score: {task: differences(…)}}``.
    level : float
        Of ``p_holm``.
    """
    lines = []
    for score, tasks in families.items():
        for task, found in tasks.items():
            sure = {n: d["difference"] for n, d in found.items() if d["p_holm"] < level}
            said = ", ".join(f"`{name}` {gap:+.2f}" for name, gap in sure.items())
            lines.append(f"* {score}, {TITLES[task]}: {said or 'none'}.")
    return "\n".join(lines)


def by_value(outcomes: dict, table: pd.DataFrame, column: str) -> dict:
    """P@1 of some systems for each value of a column, with chance and patients.

    Two patients have no interval worth the name: up to two, the score stands alone.

    Parameters
    ----------
    outcomes : dict
        System to outcomes of all rows of the table.
    table : pandas.DataFrame
    column : str
    """
    chance, found = confounders.by_chance(table, "label"), {}
    for value, part in table.groupby(column):
        n = part["patient"].nunique()
        row = {"patients": n, "by chance": float(chance[part.index].mean())}
        for name, out in outcomes.items():
            mine = out.loc[part.index]
            row[name] = bench.p_at_1(mine) if n > 2 else metrics.accuracy(mine)
        found[str(value)] = row
    return found


def remedied(embeddings, column: str, centre=False, **how) -> pd.DataFrame:
    """Label outcomes over patient folds, and whether the nearest shares a column.

    Parameters
    ----------
    embeddings : Embeddings
        Already of remedied images, where the remedy acts on images.
    column : str
        Preparation or site.
    centre : False, None or str
        Centre by each fold's gallery: all by one mean (None), or by a column.
    **how
        ``standardised`` and ``metric``.

    Returns
    -------
    DataFrame
        Outcomes of one neighbour, with ``same``.
    """
    folds = embeddings.table["fold"].to_numpy()
    values, parts = embeddings.table[column].to_numpy(), []
    for fold in np.unique(folds):
        gallery, space = folds != fold, embeddings
        if centre is not False:
            space = confounders.centred(embeddings, gallery, centre)
        part = protocols.train_gallery(
            space.take(~gallery), space.take(gallery), 1, **how
        )
        same = values[gallery][confounders.nearest(part)] == values[~gallery]
        parts.append(part.assign(query=np.flatnonzero(~gallery), same=same))
    return pd.concat(parts).sort_values("query", ignore_index=True)


def centrings(embeddings, column: str, **how) -> dict:
    """Outcomes of `remedied` as they are, centred by one mean, and by a column."""
    ways = {"none": False, "centred": None, f"centred_by_{column}": column}
    return {
        name: remedied(embeddings, column, way, **how) for name, way in ways.items()
    }


def histogram_of(table: pd.DataFrame, transform, bins: int = 4) -> Embeddings:
    """`baselines.rgb_histogram` (roots) of transformed patches (`stains.StainMatch`).

    Parameters
    ----------
    table : pandas.DataFrame
    transform : callable
        ``transform(image, slide)`` -> uint8 image.
    bins : int
        Equal bins a channel.
    """
    shares = []
    for row in table.to_dict("records"):
        seen = transform(read_patch(row), row["slide"]).astype(np.int64) * bins // 256
        places = (seen @ [bins**2, bins, 1]).ravel()
        shares.append(np.bincount(places, minlength=bins**3) / len(places))
    return Embeddings(np.sqrt(shares, dtype=np.float32), table)


def effects(ways: dict, column: str) -> dict:
    """Score remedies, each also as a paired difference to ``none``.

    Parameters
    ----------
    ways : dict
        ``{system: {remedy: outcomes of `remedied`}}``, a remedy named ``none`` in each.
    column : str
        For the names of the entries.

    Returns
    -------
    dict
        ``{system: {remedy: {"label": …, "same_<column>": …, "label_minus_none": …,
        "same_<column>_minus_none": …}}}``; Holm over all differences.
    """
    found, comparisons, same = {}, [], f"same_{column}"
    for system, outcomes in ways.items():
        none, found[system] = outcomes["none"], {}
        for way, out in outcomes.items():
            row = {"label": bench.p_at_1(out)}
            row[same] = bench.scored(out["same"], out["patient"])
            if way != "none":
                compared = {
                    "label": bench.compared(out, none),
                    same: bench.compared(out["same"], none["same"], out["patient"]),
                }
                comparisons += compared.values()
                row |= {f"{name}_minus_none": c for name, c in compared.items()}
            found[system][way] = row
    bench.corrected(comparisons)
    return found


def silence(ruled: dict) -> dict:
    """Judge a confidence, and the thresholds that other patients chose.

    Parameters
    ----------
    ruled : dict
        Risk that was aimed at -> `selective.abstain` with one and the same confidence.

    Returns
    -------
    dict
        ``area`` under risk over coverage, ``gain`` (the overall error minus the area),
        ``error_of_all``; for each risk, 0.2 say, ``coverage_at_20`` and ``risk_at_20``
        as reached: a bare number where some draw of patients had no answer, "–" where
        nothing was answered.
    """
    out = next(iter(ruled.values()))
    sure, patient = [out["confidence"], out["wrong"]], out["patient"]
    row = {"area": selective.over_patients(selective.area, sure, patient)}
    row["gain"] = selective.over_patients(
        lambda c, w: w.mean() - selective.area(c, w), sure, patient
    )
    row["error_of_all"] = bench.scored(out["wrong"], patient)
    for aim, made in ruled.items():
        both = made["answered"], made["wrong"]
        at = f"at_{100 * aim:.0f}"
        row[f"coverage_{at}"] = bench.scored(made["answered"], patient)
        row[f"risk_{at}"] = _if_known(
            selective.over_patients(selective.risk, both, patient)
        )
    return row


def _if_known(found):
    """Leave out what has no value: an interval, or all of it."""
    if np.isnan(found["score"]):
        return "–"
    return found["score"] if np.isnan(found["low"]) else found


def unknown(asked: pd.DataFrame, confidence, ruled: dict) -> tuple[dict, dict]:
    """Ask whether a confidence knows that a query's class is not in the archive.

    Parameters
    ----------
    asked : DataFrame
        From `selective.without_each_class`.
    confidence : callable
        As given to `selective.abstain`.
    ruled : dict
        Risk that was aimed at -> `selective.abstain` of the same embeddings; its
        thresholds are applied.

    Returns
    -------
    row : dict
        Mean ``AUROC`` over archives; the shares of queries with an absent and with a
        present class that are answered at each risk (``absent_answered_at_20``).
    each : dict
        Class that was taken out -> AUROC.
    """
    sure, patient = confidence(asked), asked["patient"].to_numpy()
    code, names = pd.factorize(asked["without"])
    gone = ~asked["present"].to_numpy(bool)
    row = {
        "AUROC": selective.over_patients(
            selective.mean_auroc, [sure, ~gone, code], patient
        )
    }
    for aim, made in ruled.items():
        answered = sure >= made["threshold"].to_numpy()[asked["query"]]
        for said, rows in (("absent", gone), ("present", ~gone)):
            cell = bench.scored(answered[rows], patient[rows])
            row[f"{said}_answered_at_{100 * aim:.0f}"] = cell
    each = {
        str(name): selective.auroc(sure[code == i], ~gone[code == i])
        for i, name in enumerate(names)
    }
    return row, each
