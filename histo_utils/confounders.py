"""Confounders: what else than the label a neighbour shares with its query.

Functions return one value per query; `statistics.score` adds the interval.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from histo_utils import protocols, statistics
from histo_utils.embeddings import Embeddings
from histo_utils.patches import assign_folds

RULES = ("colour", "preparation", "related", "ambiguous")


def nearest(outcomes: pd.DataFrame) -> np.ndarray:
    """Gallery row of each query's nearest neighbour."""
    return np.stack(outcomes["neighbours"].to_list())[:, 0]


def agrees(outcomes: pd.DataFrame, values) -> np.ndarray:
    """Whether each query's nearest agrees with it; values of the one table searched."""
    values = np.asarray(values)
    return values[outcomes["query"]] == values[nearest(outcomes)]


def by_chance(table: pd.DataFrame, column: str, within: str | None = None):
    """Share of other patients' patches that agree with each patch in a column; (n,).

    What a random neighbour of the other patients would score, or with ``within`` of
    those that agree in that column too; NaN where there are none.
    """
    may = ~_same(table, "patient")
    may = may & _same(table, within) if within else may
    agree, allowed = (may & _same(table, column)).sum(axis=1), may.sum(axis=1)
    return np.where(allowed > 0, agree / np.maximum(allowed, 1), np.nan)


def by_value(outcomes: pd.DataFrame, table: pd.DataFrame, column: str) -> dict:
    """P@1 of systems by value of a column; two patients or fewer have no interval."""
    chance, found = by_chance(table, "label"), {}
    for value, part in table.groupby(column):
        n, rows = part["patient"].nunique(), outcomes["query"].isin(part.index)
        scores = statistics.score_table(outcomes[rows], by="system")
        row = {"patients": n, "by chance": float(chance[part.index].mean())}
        row |= statistics.nested(scores) if n > 2 else scores["score"].to_dict()
        found[str(value)] = row
    return found


def false_alarms(differences, groups, n: int = 2000, level=0.05, seed: int = 0) -> dict:
    """How often t-tests find a difference where there is none.

    In each of n experiments the two systems change places at random, all patches of a
    patient together, so that neither is better. Share of them that a t-test over
    ``patches`` and one over ``patients`` (means) rejects at ``level``.
    """
    differences, codes = np.asarray(differences, float), pd.factorize(groups)[0]
    means = np.bincount(codes, differences) / np.bincount(codes)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (n, len(means)))
    tests = {"patches": signs[:, codes] * differences, "patients": signs * means}
    return {
        unit: float((stats.ttest_1samp(values, 0, axis=1).pvalue < level).mean())
        for unit, values in tests.items()
    }


def within_and_across(embeddings: Embeddings, column: str, **how) -> pd.DataFrame:
    """Search other patients that share a column's value, and those that do not.

    What a score loses *across* sites or preparations, beyond what it loses by chance,
    is what it owed to them. Queried are only patches whose label other patients have on
    both sides, the same ones both times. ``how``: `protocols.train_gallery`.

    Returns
    -------
    DataFrame
        One row per query: ``query`` (its row), ``patient``, ``within`` and ``across``
        (1 where the nearest had the label), ``chance_within``, ``chance_across``.

    Raises
    ------
    ValueError
        If no label occurs on both sides: the column and the label are nested.
    """
    table = embeddings.table
    value, label = table[column].to_numpy().astype(str), table["label"].to_numpy()
    others, alike = ~_same(table, "patient"), _same(table, column)
    right, sides = _same(table, "label"), {"within": alike, "across": ~alike}
    both = [(others & side & right).any(axis=1) for side in sides.values()]
    rows = np.flatnonzero(np.all(both, axis=0))
    if not len(rows):
        raise ValueError(
            f"no label occurs with two values of {column!r} in other patients: the two "
            "are nested, and what either contributes cannot be separated"
        )
    found = pd.DataFrame({"query": rows, "patient": table["patient"].to_numpy()[rows]})
    for side, may in sides.items():
        hit = np.zeros(len(table))
        for name in np.unique(value[rows]):
            queries = rows[value[rows] == name]
            gallery = (value == name) == (side == "within")
            near = protocols.train_gallery(
                embeddings.take(queries), embeddings.take(gallery), 1, "patient",
                allow_shared_patients=True, **how,
            )  # fmt: skip
            hit[queries] = near["predicted"].to_numpy() == label[queries]
        may = (others & may)[rows]
        found[side] = hit[rows]
        found[f"chance_{side}"] = (may & right[rows]).sum(axis=1) / may.sum(axis=1)
    return found


def sides(system, column: str) -> dict:
    """Scores, difference and chance of `within_and_across`; system: Embeddings, how."""
    found = within_and_across(system[0], column, **system[1])
    patient, hits = (
        found["patient"].to_numpy(),
        found[["within", "across"]].to_numpy().T,
    )
    row = dict(
        zip(
            ("within", "across"),
            (statistics.score(h, patient) for h in hits),
            strict=True,
        )
    )
    row["difference"] = statistics.compare(*hits, patient)
    row |= found.filter(like="chance").mean().to_dict()
    return row | {"patients": found["patient"].nunique()}


def nesting(table: pd.DataFrame, column: str, label: str = "label") -> dict:
    """Count what could separate a column (site) from the label, over patients.

    Pairs of patients with the same value and other labels are the contrast that is
    needed; where there are none, the column is nested in the label.
    """
    first = table.drop_duplicates("patient")
    pairs = np.triu_indices(len(first), 1)
    alike, right = _same(first, column)[pairs], _same(first, label)[pairs]
    labels = first.groupby(column)[label].nunique()
    return {
        "values": len(labels), "values_with_one_label": int((labels == 1).sum()),
        "same_value_same_label": int((alike & right).sum()),
        "same_value_other_label": int((alike & ~right).sum()),
        "other_value_same_label": int((~alike & right).sum()),
        "other_value_other_label": int((~alike & ~right).sum()),
    }  # fmt: skip


def causes(
    outcomes, other, table, column="preparation", related=(), fold="fold", k=5
) -> pd.DataFrame:
    """Which rules fit each wrong hit of a search across patient folds.

    ``colour``: the colour histogram's nearest is of the same slide as the wrong hit.
    ``preparation``: query and wrong hit agree in ``column``, while the right label has
    patches with another value of it. ``related``: the two labels are in one collection
    of ``related``. ``ambiguous``: of the k nearest, at least as many have the right
    label as the wrong one. ``none``: no rule fits.

    Parameters
    ----------
    outcomes, other : outcomes of `protocols.patient_folds`
        Of the system, and of the histogram; the same queries, rows of ``table``.

    Returns
    -------
    DataFrame
        One row per wrong hit: ``query``, ``patient``, the rules (bool), ``none``, and
        ``chance_colour``, ``chance_preparation``, ``chance_related``: the share of all
        wrong patches that the query might have found for which the rule holds.
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
    q, hit = missed["query"].to_numpy(), nearest(missed)
    histogram = nearest(other.loc[missed.index])

    alike = label[q][:, None] == label
    may, same_value = folds[q][:, None] != folds, value[q][:, None] == value
    family = {name: i for i, names in enumerate(related) for name in names}
    families = np.array([family.get(name, -1) for name in label])
    fits = {
        "colour": slide[histogram][:, None] == slide,
        "preparation": same_value & (may & alike & ~same_value).any(1, keepdims=True),
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


def centred(embeddings: Embeddings, gallery, by: str | None = None) -> Embeddings:
    """Subtract the gallery's mean vector, or that of each group (batch correction).

    The means are those of gallery rows alone (``gallery``: bool mask); queries are
    moved by them too. What a group's patches have in common is gone afterwards, be it
    the preparation or a class that only occurs in it. ``by``: column of the groups.

    Examples
    --------
    >>> table = pd.DataFrame({"preparation": ["FFPE", "FFPE", "frozen", "frozen"]})
    >>> pairs = Embeddings(np.float32([[1, 0], [3, 0], [0, 5], [0, 6]]), table)
    >>> centred(pairs, [True, True, True, False], "preparation").vectors.tolist()
    [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    table, gallery = embeddings.table, np.asarray(gallery)
    if gallery.dtype != bool or gallery.shape != (len(table),) or not gallery.any():
        raise ValueError(
            f"the gallery mask is {gallery.dtype} of shape {gallery.shape}; expected "
            f"({len(table)},) bool with a row or more"
        )
    if by is not None and by not in table:
        raise ValueError(
            f"the table has no column {by!r}; it has {', '.join(map(str, table))}"
        )
    group = np.zeros(len(table)) if by is None else table[by].to_numpy()
    vectors = embeddings.vectors.astype(np.float64)
    for value in pd.unique(group):
        mine = group == value
        if not (mine & gallery).any():
            raise ValueError(
                f"no gallery row has {by} {value!r}, but {int(mine.sum())} queries do: "
                "leave them out, or centre by a column that the gallery knows"
            )
        vectors[mine] -= vectors[mine & gallery].mean(axis=0)
    return Embeddings(vectors.astype(np.float32), table)


def batch_correction(images, column, fold="fold", **how) -> pd.DataFrame:
    """Outcomes across patient folds of corrected images, and of centred vectors.

    ``images``: correction to Embeddings, with "none", whose vectors are centred by each
    fold's gallery too (by the ``column``, and by one mean unless Euclidean distance
    makes that void). One row per query and ``score``: "label", and whether the nearest
    agrees in the column; ``system`` is the correction, ``value`` the hit.
    """
    plain, parts, table = images["none"], [], images["none"].table
    masks = [(table[fold] != f).to_numpy() for f in sorted(table[fold].unique())]
    by = {f"centred_by_{column}": column}
    by |= {"centred": None} if how.get("metric") != "euclidean" else {}
    spaces = {way: [centred(plain, m, c) for m in masks] for way, c in by.items()}
    for way, space in (images | spaces).items():
        found = protocols.patient_folds(space, 1, fold, **how).assign(system=way)
        hits = {"label": found["label"] == found["predicted"]}
        hits[f"same_{column}"] = agrees(found, table[column])
        parts += [found.assign(score=name, value=hit) for name, hit in hits.items()]
    return pd.concat(parts, ignore_index=True)


def rule_scores(missed: pd.DataFrame, rules=(*RULES, "none")) -> dict:
    """Count each rule of `causes`: wrong hits, share of rows, share at random."""
    found = {}
    for rule in rules:
        share = statistics.score(missed[rule], missed["patient"])
        found[rule] = {"wrong_hits": int(missed[rule].sum()), "share": share}
        if f"chance_{rule}" in missed:
            found[rule]["at_random"] = float(missed[f"chance_{rule}"].mean())
    return found


def folds_by_unit(embeddings, unit, c=0.001, seed=0, **space) -> pd.DataFrame:
    """Outcomes of all patches in five folds that keep a unit (a column) whole.

    With ``protocol``: ``neighbour`` (``space``: its metric) and ``linear SVM``
    (constant ``c``). Folds of files leave duplicates of one tile on both sides, folds
    of tiles do not; ``patient``, the unit of n, is the slide.
    """
    folded = embeddings.table.assign(patient=embeddings.table[unit])
    folded["fold"] = assign_folds(folded, 5, seed=seed)
    made = Embeddings(embeddings.vectors, folded)
    found = [protocols.patient_folds(made, 1, **space).assign(protocol="neighbour")]
    for fold in range(5):
        test = (folded["fold"] == fold).to_numpy()
        pair = made.take(~test), made.take(test)
        said = protocols.linear_probe(*pair, [c], seed=seed)
        found.append(said.assign(query=np.flatnonzero(test), protocol="linear SVM"))
    found = pd.concat(found).sort_values(["protocol", "query"], ignore_index=True)
    return found.assign(patient=folded["slide"].to_numpy()[found["query"]])


def _same(table, name):
    values = table[name].to_numpy()
    return values[:, None] == values
