"""Trials: a system is trained some times, chosen on one part and asked on another once.

Both tasks of the bench as splits to train on, and five seeds put together: the score is
their mean, its interval is over seeds *and* patients, and comparisons are paired over
patients after the seeds were averaged.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from histo_utils import bench, metrics, protocols, provenance
from histo_utils.embeddings import Embeddings, load_embeddings

TASKS = ("scan", "organ")
MOST_SEEDS = 100


class Split(NamedTuple):
    """Who trains, who chooses and who is asked; masks over the rows of a table.

    Attributes
    ----------
    task : {"scan", "organ"}
    train, choose, gallery, test : (n,) bool arrays
        To fit weights; to choose epochs and constants; what test patches are searched
        in; what is asked once.
    """

    task: str
    train: np.ndarray
    choose: np.ndarray
    gallery: np.ndarray
    test: np.ndarray


def splits(table: pd.DataFrame, task: str) -> list[Split]:
    """All splits of a task of the bench.

    Parameters
    ----------
    table : pandas.DataFrame
        Patches with ``slide``, ``x``, ``y``; with ``fold`` (of patients) for organs.
    task : {"scan", "organ"}
        *scan*: the upper half trains and is the gallery, the lower left quarter
        chooses, the lower right is asked; one split. *organ*: each fold of patients is
        asked once against all others as gallery; of these, the next fold chooses and
        the rest train.

    Raises
    ------
    ValueError
        An unknown task; fewer than three folds, or a patient in two.
    """
    if task == "scan":
        where = bench.quarters(table)
        upper, left, right = (
            where == part for part in ("upper", "lower left", "lower right")
        )
        return [Split(task, upper, left, upper, right)]
    if task != "organ":
        raise ValueError(f"unknown task {task!r}; valid are {', '.join(TASKS)}")
    folds = np.unique(table["fold"])
    shared = table.groupby("patient")["fold"].nunique().gt(1)
    if len(folds) < 3 or shared.any():
        raise ValueError(
            f"{len(folds)} folds, {int(shared.sum())} patients in more than one; "
            "expected three or more folds of whole patients: patches.assign_folds"
        )
    fold = table["fold"].to_numpy()
    found = []
    for asked, choosing in zip(folds, np.roll(folds, -1), strict=True):
        test, choose = fold == asked, fold == choosing
        found.append(Split(task, ~test & ~choose, choose, ~test, test))
    return found


def classes(table: pd.DataFrame, task: str) -> pd.Series:
    """Class of every patch under a task: its slide, or its label."""
    return table["slide"] if task == "scan" else table["label"]


def asked(embeddings, split: Split, part="test", exclude=None, **how) -> pd.DataFrame:
    """Outcomes of the patches that choose or test: the nearest neighbour's class.

    Parameters
    ----------
    embeddings : Embeddings
        Of the whole table that was split.
    split : Split
    part : {"choose", "test"}
        Choosing patches are searched in those that trained, test patches in the
        gallery.
    exclude : {"touching"}, optional
        Leave out gallery patches that touch the query.
    **how
        ``standardised`` and ``metric``; default: cosine.
    """
    made = bench.as_scans(embeddings) if split.task == "scan" else embeddings
    gallery, queries = split.gallery, split.test
    if part == "choose":
        gallery, queries = split.train, split.choose
    how = how or {"metric": "cosine"}
    outcomes = protocols.train_gallery(
        made.take(queries), made.take(gallery), 1, exclude,
        allow_shared_patients=split.task == "scan", **how,
    )  # fmt: skip
    return outcomes.assign(query=np.flatnonzero(queries))


def together(outcomes: list[pd.DataFrame]) -> pd.DataFrame:
    """Outcomes of several splits as one, in the order of the table."""
    return pd.concat(outcomes).sort_values("query", ignore_index=True)


def over_seeds(
    runs: list[pd.DataFrame], n_boot: int = 2000, seed: int = 0, value=metrics.accuracy
) -> dict:
    """Mean score of seeds, with every seed's; 95 % interval over seeds and patients.

    Parameters
    ----------
    runs : list of outcomes
        One a seed, of the same queries.
    value : callable
        Metric of one query, ``value(outcomes, per_query=True)``; default: P@1.

    Returns
    -------
    dict
        ``score``, ``low``, ``high``, ``n`` (patients), ``queries``, ``seeds``.

    Raises
    ------
    ValueError
        Runs of different queries.
    """
    hits = _hits(runs, value)
    codes, patients = pd.factorize(runs[0]["patient"])
    sums = np.stack([np.bincount(codes, row, len(patients)) for row in hits])
    sizes = np.bincount(codes)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(patients), size=(n_boot, len(patients)))
    which = rng.integers(len(runs), size=(n_boot, len(runs)))
    # patients are drawn once a sample and asked of every drawn seed
    means = np.stack([
        sums[w][:, d].sum() / (len(w) * sizes[d].sum())
        for w, d in zip(which, drawn, strict=True)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "score": float(hits.mean()), "low": float(low), "high": float(high),
        "n": len(patients), "queries": hits.shape[1],
        "seeds": [float(row.mean()) for row in hits],
    }  # fmt: skip


def against(runs, other, seed: int = 0, value=metrics.accuracy) -> dict:
    """Paired difference of the seeds' mean to another system's, over patients.

    Parameters
    ----------
    runs, other : outcomes, or list of outcomes
        One a seed, of the same queries.
    value : callable
        As `over_seeds`.

    Returns
    -------
    dict
        As `bench.compared`.
    """
    runs, other = listed(runs), listed(other)
    _hits([*runs, *other], value)  # the same queries?
    means = [_hits(side, value).mean(axis=0) for side in (runs, other)]
    return bench.compared(*means, groups=runs[0]["patient"], seed=seed)


def family(runs: dict, reference: str, tasks) -> dict:
    """Compare systems with a reference on several tasks, Holm over all comparisons.

    Parameters
    ----------
    runs : dict
        ``{system: {task: outcomes or list of outcomes}}``.
    reference : str
        The system that is subtracted.

    Returns
    -------
    dict
        ``{system: {task: against(system, reference) with "p_holm"}}``
    """
    found = {
        system: {
            task: against(row[task], runs[reference][task])
            for task in tasks
            if task in row
        }
        for system, row in runs.items()
        if system != reference
    }
    bench.corrected(cell for row in found.values() for cell in row.values())
    return found


def keep_vectors(made: list[list[Embeddings]], folder) -> None:
    """Keep the vectors of networks that were trained some times on each split.

    Parameters
    ----------
    made : list of lists of Embeddings
        For each seed one a split, in the order of `splits`, each of the whole table.
    folder : path
        Vectors that it held before are replaced, as a whole or not at all.
    """
    names = {str(seed) for seed in range(MOST_SEEDS)}
    with provenance.new_folder(folder, names, "kept vectors") as fresh:
        for seed, parts in enumerate(made):
            for number, one in enumerate(parts):
                one.save(fresh / str(seed) / str(number))


def kept_vectors(folder, table: pd.DataFrame) -> list[list[Embeddings]]:
    """Load what `keep_vectors` kept, if it is of these patches in these folds.

    Returns
    -------
    list of lists of Embeddings
        For each seed one a split; empty where nothing was kept, or for other patches
        or folds.
    """
    columns = ["image", "x", "y", "size", "mpp", "patient", "label", "fold"]
    wanted, found = table[columns].reset_index(drop=True), []
    while (place := Path(folder) / str(len(found))).is_dir():
        n = sum(1 for _ in place.iterdir())
        found.append([load_embeddings(place / str(i)) for i in range(n)])
    every = [one.table for parts in found for one in parts]
    same = all(t.reindex(columns=columns).equals(wanted) for t in every)
    return found if same else []


def with_vectors(table: pd.DataFrame, vectors) -> Embeddings:
    """Embeddings of a table and what a network gave for its rows."""
    return Embeddings(np.ascontiguousarray(vectors, np.float32), table)


def listed(runs) -> list[pd.DataFrame]:
    """Outcomes of seeds as a list; of one run, a list of one."""
    return [runs] if isinstance(runs, pd.DataFrame) else runs


def _hits(runs, value):
    first = runs[0]
    for run in runs:
        if (
            len(run) != len(first)
            or not (run["query"].to_numpy() == first["query"].to_numpy()).all()
        ):
            raise ValueError(
                "runs of different queries; expected one outcome a seed, all of the "
                "same split"
            )
    return np.stack([value(run, per_query=True) for run in runs])
