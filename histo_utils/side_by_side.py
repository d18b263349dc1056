"""Systems side by side: scores over seeds, paired differences, class by class."""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils import bench, logistic, metrics, trials


def outcomes(table, splits, predicted) -> pd.DataFrame:
    """Outcomes of the test patches of all splits.

    Parameters
    ----------
    table : pandas.DataFrame
    splits : list of trials.Split
    predicted : list of arrays
        What the test patches of each split were answered with.
    """
    parts = []
    for split, said in zip(splits, predicted, strict=True):
        facts = table[split.test]
        parts.append(pd.DataFrame({
            "query": np.flatnonzero(split.test), "predicted": said,
            "label": trials.classes(facts, split.task).to_numpy(),
            "patient": facts["patient"].to_numpy(),
        }))  # fmt: skip
    return trials.together(parts)


def ask(table, splits, c_values, vectors, **how) -> dict:
    """Ask the test patches in every way that fits their task.

    Parameters
    ----------
    table : pandas.DataFrame
    splits : list of trials.Split
        Of one task.
    c_values : sequence of float
        Of `logistic.probe`.
    vectors : (n, d) array, or list of them
        A list has one array a split.
    **how
        Of `trials.asked`.

    Returns
    -------
    dict of outcomes
        ``nearest neighbour``; for scans ``neighbour apart`` (patches that touch the
        query left out), for organs ``logistic regression``.
    """
    several = vectors if isinstance(vectors, list) else [vectors] * len(splits)
    pairs = list(zip(several, splits, strict=True))
    made = [(trials.with_vectors(table, own), split) for own, split in pairs]

    def nearest(exclude):
        parts = [trials.asked(e, split, "test", exclude, **how) for e, split in made]
        return trials.together(parts)

    found = {"nearest neighbour": nearest(None)}
    if splits[0].task == "scan":
        return found | {"neighbour apart": nearest("touching")}
    labels = trials.classes(table, splits[0].task).to_numpy()
    said = [logistic.probe(own, labels, split, c_values)[0] for own, split in pairs]
    return found | {"logistic regression": outcomes(table, splits, said)}


def scores(asked, n_boot=2000, seed=0) -> dict:
    """Score every system of every question over seeds and patients.

    Parameters
    ----------
    asked : dict
        ``{question: {system: outcomes, one a seed}}``.

    Returns
    -------
    dict
        ``{"question, system": trials.over_seeds(…)}``
    """
    return {
        f"{question}, {name}": trials.over_seeds(runs, n_boot, seed)
        for question, systems in asked.items()
        for name, runs in systems.items()
    }


def differences(asked, pairs, seed=0) -> dict:
    """Paired differences of systems, Holm's correction over all of them.

    Parameters
    ----------
    asked : dict
        As in `scores`.
    pairs : list of (str, str)
        Systems to compare, first minus second, wherever both were asked.

    Returns
    -------
    dict
        ``{"question: first − second": trials.against(…) with "p_holm"}``
    """
    found = {
        f"{question}: {a} − {b}": trials.against(systems[a], systems[b], seed=seed)
        for question, systems in asked.items()
        for a, b in pairs
        if a in systems and b in systems
    }
    bench.corrected(found.values())
    return found


def recalls(runs, values, n_boot=2000, seed=0) -> dict:
    """Share answered rightly of each class, mean over seeds.

    Parameters
    ----------
    runs : list of outcomes
        One a seed, of the same queries.
    values : (n,) array
        Class of each row of the table that was asked; or any other group.

    Returns
    -------
    dict
        ``{class: bench.scored(…)}``; ``low`` and ``high`` are NaN where fewer than
        three patients stand behind a class.
    """
    hit = np.mean([metrics.accuracy(run, per_query=True) for run in runs], axis=0)
    group, rows = np.asarray(values)[runs[0]["query"]], {}
    for name, part in runs[0].assign(hit=hit).groupby(group):
        rows[name] = bench.scored(part["hit"], part["patient"], n_boot, seed)
        if rows[name]["n"] < 3:
            rows[name] |= {"low": float("nan"), "high": float("nan")}
    return rows


def score_table(found):
    """`scores` as a table of text, with every seed."""
    rows = {
        name: {
            "score": line, "patients": line["n"], "queries": line["queries"],
            "seeds": " ".join(f"{score:.3f}" for score in line["seeds"]),
        }
        for name, line in found.items()
    }  # fmt: skip
    return bench.report(rows)


def difference_table(found):
    """`differences` as a table of text."""
    return bench.report({name: {"difference": line} for name, line in found.items()})
