"""The bench: the same tasks and the same way to report them, for every encoder.

Two tasks, both scored by the label of the nearest neighbour (P@1). *Scan recognition*:
which scan is a patch from? It measures stain and texture; scans share patients by
design. *Label across patients*: which organ (or class) is it, with the patient's own
patches away? Intervals are over patients, the gallery fixed.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils import metrics, protocols, statistics
from histo_utils.embeddings import Embeddings

UNITS = ("self", "touching", "slide", "patient")


def quarters(table: pd.DataFrame) -> np.ndarray:
    """Part of its slide that each patch lies in, by the middle of the slide's patches.

    Returns
    -------
    (n,) array of ``"upper"``, ``"lower left"`` and ``"lower right"``
        To train on, to choose on, and to test on.
    """
    places = table.groupby("slide")[["x", "y"]]
    middle = (places.transform("min") + places.transform("max")) / 2
    right, lower = (table[axis] > middle[axis] for axis in ("x", "y"))
    return np.where(lower, np.where(right, "lower right", "lower left"), "upper")


def as_scans(embeddings: Embeddings) -> Embeddings:
    """Let the slide be the label."""
    table = embeddings.table
    return Embeddings(embeddings.vectors, table.assign(label=table["slide"]))


def tasks(embeddings: Embeddings, k: int = 1, **how) -> dict[str, pd.DataFrame]:
    """Outcomes on every task of the bench.

    Parameters
    ----------
    embeddings : Embeddings
        With ``slide``, ``patient``, ``label``, ``fold`` and places.
    k : int
        Neighbours kept.
    **how
        ``standardised`` and ``metric`` (`protocols.leave_one_out`).

    Returns
    -------
    dict of outcomes
        ``scan_leave_one_out``, ``scan_not_touching``; ``scan_choice`` (lower left
        quarter against the upper half, to choose on), ``scan_split`` (lower right
        quarter against the upper half), ``scan_split_not_touching``; ``organ`` (label,
        each patient fold against the others).
    """
    scans, where = as_scans(embeddings), quarters(embeddings.table)
    upper, left, right = (
        scans.take(where == part) for part in ("upper", "lower left", "lower right")
    )

    def against_upper(queries, exclude=None):
        return protocols.train_gallery(
            queries, upper, k, exclude, allow_shared_patients=True, **how
        )

    return {
        "scan_leave_one_out": protocols.leave_one_out(scans, k, **how),
        "scan_not_touching": protocols.leave_one_out(scans, k, "touching", **how),
        "scan_choice": against_upper(left),
        "scan_split": against_upper(right),
        "scan_split_not_touching": against_upper(right, "touching"),
        "organ": protocols.patient_folds(embeddings, k, **how),
    }


def galleries(embeddings: Embeddings, **how) -> dict[str, pd.DataFrame]:
    """Scan recognition of the lower right quarters, against four galleries."""
    scans = as_scans(embeddings)
    test = quarters(scans.table) == "lower right"
    found = tasks(embeddings, **how)
    return {
        "training_half": found["scan_split"],
        "test_among_test": protocols.leave_one_out(scans.take(test), 1, **how),
        "all_the_rest": found["scan_leave_one_out"][test],
        "all_the_rest_not_touching": found["scan_not_touching"][test],
    }


def exclusions(embeddings: Embeddings, **how) -> dict[str, pd.DataFrame]:
    """Label of the nearest patch, with nothing excluded, then more and more."""
    nothing = protocols.train_gallery(
        embeddings, embeddings, 1, allow_shared_patients=True, **how
    )
    rest = {unit: protocols.leave_one_out(embeddings, 1, unit, **how) for unit in UNITS}
    return {"nothing": nothing, **rest}


def scored(values, groups, n_boot: int = 2000, seed: int = 0) -> dict:
    """Mean of per-query values with its 95 % interval over groups (patients).

    Examples
    --------
    >>> scored([0, 1, 1, 1], ["a", "a", "b", "b"])["score"]
    0.75
    """
    values = np.asarray(values, float)
    low, high = statistics.bootstrap_ci(values, groups, n_boot, seed=seed)
    n = pd.Series(np.asarray(groups)).nunique()
    score = float(values.mean())
    return {"score": score, "low": low, "high": high, "n": n, "queries": len(values)}


def p_at_1(outcomes: pd.DataFrame, **bootstrap) -> dict:
    """P@1 of outcomes with its interval over patients (`scored`)."""
    right = metrics.accuracy(outcomes, per_query=True)
    return scored(right, outcomes["patient"], **bootstrap)


def macro(outcomes: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> dict:
    """Mean over classes of each class's P@1, with its interval over patients."""
    right = metrics.accuracy(outcomes, per_query=True)
    rows = np.column_stack([right, pd.factorize(outcomes["label"])[0]])

    def mean_of_classes(drawn):
        classes = drawn[:, 1].astype(int)
        sizes = np.bincount(classes)
        sums = np.bincount(classes, drawn[:, 0])
        return float((sums[sizes > 0] / sizes[sizes > 0]).mean())

    low, high = statistics.bootstrap_ci(
        rows, outcomes["patient"], n_boot, seed=seed, statistic=mean_of_classes
    )
    sizes = {"n": outcomes["patient"].nunique(), "queries": len(rows)}
    return {"score": mean_of_classes(rows), "low": low, "high": high, **sizes}


def compared(a, b, groups=None, seed: int = 0) -> dict:
    """Paired difference a - b over groups: interval, p, n, detectable difference.

    Parameters
    ----------
    a, b : outcomes, or (n,) arrays of values
        Outcomes of other queries (wider patches) are compared by their patients' means,
        over the patients that both have.
    groups : (n,) array
        Patient of each value; the outcomes' own where those are given. Every patient
        counts once (`statistics.paired_sign_flip`).
    """
    if isinstance(a, pd.DataFrame):
        means = [
            pd.Series(metrics.accuracy(x, per_query=True))
            .groupby(x["patient"].to_numpy())
            .mean()
            for x in (a, b)
        ]
        both = pd.concat(means, axis=1).dropna().to_numpy()
        a, b = both.T
    a, b = np.asarray(a, float), np.asarray(b, float)
    return statistics.compare(a, b, groups, seed=seed)


def scores(found: dict) -> dict:
    """P@1 of each outcomes in a dict."""
    return {name: p_at_1(outcomes) for name, outcomes in found.items()}


def summary(found: dict, by=None) -> dict:
    """P@1 on every task, macro over labels, and for each value of ``by``.

    Parameters
    ----------
    found : dict of outcomes
        From `tasks`.
    by : (n,) array, optional
        One value a patch (preparation, site); values of fewer than two patients are
        left out, since they have no interval.
    """
    organ, row = found["organ"], scores(found)
    by = pd.Series([None] * len(organ) if by is None else np.asarray(by))
    for value, part in organ.groupby(by.to_numpy()):
        if part["patient"].nunique() > 1:
            row[value] = p_at_1(part)
    return row | {"macro": macro(organ)}


def corrected(comparisons) -> None:
    """Add ``p_holm`` to all comparisons of one family (`compared`), in place."""
    cells = list(comparisons)
    for cell, p in zip(cells, statistics.holm([c["p"] for c in cells]), strict=True):
        cell["p_holm"] = float(p)


def family(runs: dict, reference: str, others, tasks) -> dict:
    """Compare a system with others on several tasks; Holm over all comparisons.

    Returns
    -------
    dict
        ``{other: {task: compared(reference, other) with "p_holm"}}``
    """
    found = {
        other: {
            task: compared(runs[reference][task], runs[other][task]) for task in tasks
        }
        for other in others
    }
    corrected(cell for row in found.values() for cell in row.values())
    return found


def sides(found: pd.DataFrame) -> dict:
    """Scores, difference and chance of `confounders.within_and_across`."""
    patient = found["patient"]
    row = {side: scored(found[side], patient) for side in ("within", "across")}
    row["difference"] = compared(found["within"], found["across"], patient)
    row |= found.filter(like="chance").mean().to_dict()
    return row | {"patients": patient.nunique()}


def column(found: dict, entry: str) -> pd.DataFrame:
    """Take one entry of every cell of ``{row: {column: {entry: …}}}``; transposed."""
    return pd.DataFrame(
        {row: {name: cell[entry] for name, cell in cells.items()}
         for row, cells in found.items()}
    )  # fmt: skip


def report(found: dict) -> pd.DataFrame:
    """Turn ``{row: {column: scored, compared, number or list}}`` into a table of text.

    Underscores of column names become spaces, so that a page can break them.
    """
    table = pd.DataFrame.from_dict(
        {
            row: {name: _text(value) for name, value in values.items()}
            for row, values in found.items()
        },
        orient="index",
    ).fillna("not run")
    return table.rename(columns=lambda name: str(name).replace("_", " "))


def _text(value):
    if isinstance(value, list):
        return " ".join(f"{one:.3f}" for one in value)
    if not isinstance(value, dict):
        return f"{value:.3f}" if isinstance(value, float) else value
    if "score" in value:
        return "{score:.3f}\u00a0[{low:.2f},\u00a0{high:.2f}]".format(**value)
    p = value.get("p_holm", value["p"])
    p = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    line = "{difference:+.3f} [{low:+.2f},\u00a0{high:+.2f}]; {p}; ±{detectable:.2f}"
    return line.format(**value | {"p": p})
