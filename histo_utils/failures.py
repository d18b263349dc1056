"""Failures: a first cut, by rules, of why a nearest neighbour is wrong.

The rules use what a table knows and overlap; they say what a mistake *coincides* with,
never what caused it. Beside each stands how often it would hold if the wrong neighbour
were drawn at random. What tissue shows only a pathologist can tell.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

RULES = ("colour", "preparation", "related", "ambiguous")


def causes(
    outcomes, other, table, column="preparation", related=(), fold="fold", k=5
) -> pd.DataFrame:
    """Which rules fit each wrong hit of a search across patient folds.

    ``colour``: the colour histogram's nearest is of the same slide as the wrong hit.
    ``preparation``: query and wrong hit agree in a column, while the right label could
    have been found with another value of it. ``related``: the two labels are named as
    hard to tell apart. ``ambiguous``: of the k nearest, at least as many have the right
    label as the wrong one. ``none``: no rule fits.

    Parameters
    ----------
    outcomes, other : outcomes of `protocols.patient_folds`
        Of the system, and of the histogram; the same queries.
    table : pandas.DataFrame
        The patch table that neighbours are rows of.
    column : str
    related : iterable of collections of str
        Labels that belong together.
    fold : str
    k : int

    Returns
    -------
    DataFrame
        One row a wrong hit: ``query``, ``patient``, the rules (bool), ``none``, and
        ``chance_colour``, ``chance_preparation``, ``chance_related``: the share of all
        wrong patches that the query might have found for which the rule holds.

    Raises
    ------
    ValueError
        Outcomes of other queries.
    """
    if not outcomes["query"].equals(other["query"]):
        raise ValueError(
            f"{len(outcomes)} and {len(other)} outcomes of different queries; expected "
            "one search each of the same table"
        )
    label, slide, value, folds = (
        table[name].to_numpy() for name in ("label", "slide", column, fold)
    )
    missed = outcomes[outcomes["label"] != outcomes["predicted"]]
    q = missed["query"].to_numpy()
    hit = np.stack(missed["neighbours"].to_list())[:, 0]
    histogram = np.stack(other.loc[missed.index, "neighbours"].to_list())[:, 0]

    may = folds[q][:, None] != folds
    alike = label[q][:, None] == label
    family = {name: i for i, names in enumerate(related) for name in names}
    families = np.array([family.get(name, -1) for name in label])
    elsewhere = (may & alike & (value[q][:, None] != value)).any(axis=1)
    fits = {
        "colour": slide[histogram][:, None] == slide,
        "preparation": (value[q][:, None] == value) & elsewhere[:, None],
        "related": (families[q][:, None] == families) & (families >= 0),
    }
    near = np.stack(missed["neighbour_labels"].to_list())[:, :k]
    votes = [(near == x[:, None]).sum(axis=1) for x in (label[q], label[hit])]

    found = pd.DataFrame({"query": q, "patient": missed["patient"].to_numpy()})
    row, candidates = np.arange(len(q)), may & ~alike
    for rule, holds in fits.items():
        found[rule] = holds[row, hit]
        found[f"chance_{rule}"] = (holds & candidates).sum(1) / candidates.sum(1)
    found["ambiguous"] = votes[0] >= votes[1]
    found["none"] = ~found[list(RULES)].any(axis=1)
    return found
