"""Scores and comparisons of tidy outcomes, with the patient as the unit of n.

*Outcomes* are one long table, one row per query, with ``system``, ``protocol``,
``seed``, ``query``, ``patient``, ``label`` and ``predicted``. Every score of the book
is `score_table`, every comparison `compare_table`; what a score counts is a metric of
`metrics` (``value``).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from histo_utils import metrics, published

_CELLS = 2**22  # numbers held at once


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


def score_table(
    outcomes, value=metrics.accuracy, by=("system", "protocol"), *, macro=False,
    n_boot=2000, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Score outcomes, one row per system and protocol.

    Parameters
    ----------
    outcomes : pandas.DataFrame
        Tidy outcomes; ``seed`` only where a system was trained several times, each
        time with the same queries.
    value : callable or str
        A metric of one query, ``value(outcomes, per_query=True)``, or a column.
    by : str or sequence of str
        Columns; outcomes that share their values are one row.
    macro : bool
        Mean over labels of each label's score.
    n_boot, seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``by``: ``score``, ``low`` and ``high`` (95 %, bootstrap over
        patients and seeds, the gallery fixed; NaN where there are not two patients, or
        none is known), ``n`` (patients), ``queries`` (per seed) and ``seeds`` (the
        score of each).

    Raises
    ------
    ValueError
        Seeds with different queries; an unknown column.

    Examples
    --------
    >>> outcomes = pd.DataFrame({"system": "a", "query": [0, 1], "patient": ["p", "q"],
    ...                          "label": ["x", "y"], "predicted": ["x", "x"]})
    >>> score_table(outcomes, by="system")["score"].to_dict()
    {'a': 0.5}
    """
    rows = {}
    for name, part in _groups(outcomes, by):
        values, patients = _values(part, value)
        labels = part["label"].to_numpy()[: len(patients)] if macro else None
        rows[name] = score(values, patients, labels, n_boot=n_boot, seed=seed)
    return _table(rows, by)


def eta_table(outcomes, by="system", n_boot=2000, seed=0) -> pd.DataFrame:
    """η_p, η_w and η_total (`metrics.eta_scores`), with 95 % intervals over scans.

    The labels are the scans; they are drawn with replacement, with the queries of all
    seeds. Indexed by ``by``; each cell holds ``score`` (mean over seeds), ``low``,
    ``high``, ``n`` (scans) and ``seeds`` (the score of each), as `report` takes them.
    """
    rows = {}
    for name, part in _groups(outcomes, by):
        hits = (part["predicted"] == part["label"]).groupby(part["label"])
        right, n = hits.sum().to_numpy(), hits.size().to_numpy()
        drawn = np.random.default_rng(seed).integers(len(n), size=(n_boot, len(n)))
        p, w = right[drawn].sum(1) / n[drawn].sum(1), (right / n)[drawn].mean(1)
        ends = np.quantile([p, w, p * w], [0.025, 0.975], axis=1).T.tolist()
        runs = part.assign(seed=part.get("seed", 0)).groupby("seed", dropna=False)
        each = [metrics.eta_scores(r["label"], r["predicted"], len(n)) for _, r in runs]
        cells = zip(published.ETAS, ends, np.transpose(each).tolist(), strict=True)
        rows[name] = {
            eta: dict(score=float(np.mean(x)), low=a, high=b, n=len(n), seeds=x)
            for eta, (a, b), x in cells
        }
    return _table(rows, by)


def compare_table(
    outcomes, value=metrics.accuracy, *, reference, by="protocol", family=None, seed=0
) -> pd.DataFrame:
    """Compare every system with a reference: paired over patients, seeds averaged.

    Parameters
    ----------
    outcomes, value
        As `score_table`.
    reference : str
        The system that is subtracted.
    by : str or sequence of str
        Columns; comparisons are made inside each of their values, where both systems
        have outcomes.
    family : str or sequence of str, optional
        Holm's correction is made inside each value of these columns; default: over all
        rows of the table.
    seed : int
        Of the random draws.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``system`` and ``by``: `compare`'s entries and ``p_holm``.

    Raises
    ------
    ValueError
        A reference without outcomes; seeds with different queries.
    """
    by = _listed(by)
    if reference not in set(outcomes["system"]):
        raise ValueError(
            f"the reference {reference!r} has no outcomes; there are "
            f"{', '.join(map(str, pd.unique(outcomes['system'])))}"
        )
    means = {}
    for name, part in _groups(outcomes, ["system", *by]):
        values, patients = _values(part, value)
        if pd.isna(patients).all():
            patients = ["unknown"] * len(patients)
        means[name] = pd.Series(values.mean(axis=0)).groupby(patients).mean()
    rows = {}
    for (system, *rest), mean in means.items():
        other = means.get((reference, *rest))
        if system != reference and other is not None:
            rows[(system, *rest)] = compare(mean, other, seed=seed)
            if list(mean.index) == ["unknown"]:
                rows[(system, *rest)]["n"] = 0
    table = _table(rows, ["system", *by])
    if len(table):
        keys = [table.index.get_level_values(c) for c in _listed(family or [])]
        p = table["p"].groupby(keys) if keys else None
        table["p_holm"] = p.transform(holm) if keys else holm(table["p"])
    return table


def score(values, patients, labels=None, *, n_boot=2000, seed=0) -> dict:
    """Mean of per-query values, with a 95 % interval over patients and seeds.

    Parameters
    ----------
    values : (n,) or (seeds, n) array
    patients : (n,) array
        Drawn with replacement, with all their queries; all missing: no interval.
    labels : (n,) array, optional
        Average over labels of each label's mean (macro).
    n_boot, seed : int

    Examples
    --------
    >>> score([0, 1, 1, 1], ["a", "a", "b", "b"])["score"]
    0.75
    """
    values = np.atleast_2d(np.asarray(values, float))
    unknown = pd.isna(pd.Series(patients)).all()
    patients = ["unknown"] * values.shape[1] if unknown else patients
    _, codes, n = _grouped(values[0], patients, least=1)
    _check_numbers(values)
    groups = np.zeros(len(codes), int) if labels is None else pd.factorize(labels)[0]
    width, cells = groups.max() + 1, codes * (groups.max() + 1) + groups
    size = np.bincount(cells, minlength=n * width).reshape(n, width)
    sums = np.stack([np.bincount(cells, row, n * width) for row in values])
    sums = sums.reshape(len(values), n, width)

    def mean_over_labels(total, count):
        share = np.divide(total, count, out=np.full(total.shape, np.nan),
                          where=count > 0)  # fmt: skip
        return np.nanmean(share, axis=-1)

    low = high = float("nan")
    if n > 1:
        rng = np.random.default_rng(seed)
        drawn = _counts(rng.integers(n, size=(n_boot, n)), n)
        which = _counts(
            rng.integers(len(values), size=(n_boot, len(values))), len(sums)
        )
        total = np.einsum("bs,spl,bp->bl", which, sums, drawn, optimize=True)
        spread = mean_over_labels(total, len(values) * (drawn @ size))
        low, high = (float(q) for q in np.quantile(spread, [0.025, 0.975]))
    each = mean_over_labels(sums.sum(axis=1), size.sum(axis=0))
    return {
        "score": float(each.mean()), "low": low, "high": high,
        "n": 0 if unknown else n,
        "queries": values.shape[1], "seeds": each.tolist(),
    }  # fmt: skip


def compare(a, b, patients=None, *, n_flips=20_000, seed=0) -> dict:
    """Compare two systems on the same queries: mean over patients of their mean a - b.

    ``p`` is that of a sign-flip test: under the null hypothesis a patient's difference
    is as likely to have the other sign; all patterns of signs are tried if they are
    fewer than ``n_flips``, else so many random ones.

    Parameters
    ----------
    a, b : (n,) arrays, or Series indexed by patient
        Values of each query; or patients' means, compared over those that both have.
    patients : (n,) array, optional
        Patient of each query; without it every row is one.
    n_flips, seed : int

    Returns
    -------
    dict
        ``difference``, ``low`` and ``high`` (bootstrap over patients), ``p``, ``n``
        (patients), ``detectable``; of one patient the difference alone, all else NaN.
    """
    if isinstance(a, pd.Series) and isinstance(b, pd.Series) and patients is None:
        a, b = a.align(b, join="inner")
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; expected both systems' values on "
            "the same queries, in the same order"
        )
    each = _group_means(a - b, patients)
    if len(each) < 2:
        nothing = dict.fromkeys(("low", "high", "p", "detectable"), float("nan"))
        return {"difference": float(each.mean()), "n": len(each)} | nothing
    flipped = stats.permutation_test(
        (np.round(each, 12),),  # means that are equal but for rounding count as equal
        lambda x, axis: abs(x.mean(axis=axis)), alternative="greater", vectorized=True,
        permutation_type="samples", n_resamples=n_flips,
        batch=max(1, _CELLS // len(each)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = bootstrap_ci(each, seed=seed)
    return {
        "difference": float(each.mean()), "low": low, "high": high,
        "p": float(flipped.pvalue), "n": len(each),
        "detectable": detectable_difference(each),
    }  # fmt: skip


def bootstrap_ci(values, groups=None, n_boot=2000, level=0.95, seed=0, statistic=None):
    """Percentile interval of a mean, drawing whole groups (patients) with replacement.

    Parameters
    ----------
    values : (n,) or (n, m) array
        One row per query.
    groups : (n,) array, optional
        Patient of each row; without it rows are drawn.
    n_boot, level, seed
    statistic : callable, optional
        Takes drawn rows of ``values``, returns a float; default the mean of the rows.

    Raises
    ------
    ValueError
        NaN, unequal lengths, fewer than two groups, a level outside 0–1.

    Examples
    --------
    >>> bootstrap_ci([0, 0, 1, 1], groups=["a", "a", "b", "b"])
    Interval(low=0.0, high=1.0)
    """
    values, codes, n = _grouped(values, groups)
    if not 0 < level < 1 or n_boot < 1:
        raise ValueError(
            f"level={level}, n_boot={n_boot}; expected a level between 0 and 1 and at "
            "least one draw"
        )
    if statistic is None and values.ndim != 1:
        raise ValueError(f"values have shape {values.shape}; give statistic= for rows")
    rng = np.random.default_rng(seed)
    sizes = np.bincount(codes)
    if statistic is None:
        drawn, sums = rng.integers(n, size=(n_boot, n)), np.bincount(codes, values)
        draws = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    else:
        order = np.argsort(codes, kind="stable")
        members = np.split(order, sizes.cumsum()[:-1])
        draws = [
            statistic(values[np.concatenate([members[g] for g in row])])
            for row in rng.integers(n, size=(n_boot, n))
        ]
    tails = (1 - level) / 2
    return Interval(*(float(q) for q in np.quantile(draws, [tails, 1 - tails])))


def holm(p_values) -> np.ndarray:
    """Adjust p values for their number (Holm 1979); same order, at most 1; NaN stays.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.array(p_values, float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1) | np.isnan(p)).all():
        raise ValueError(f"p values are {p_values}; expected a list of numbers 0–1")
    if np.isnan(p).any():  # comparisons without a test are no part of the family
        known = ~np.isnan(p)
        p[known] = holm(p[known])
        return p
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def correct(comparisons) -> None:
    """Add ``p_holm`` to some `compare` results, in place; they are one family."""
    cells = list(comparisons)
    for cell, p in zip(cells, holm([c["p"] for c in cells]), strict=True):
        cell["p_holm"] = float(p)


def detectable_difference(differences, groups=None, power=0.8, level=0.95) -> float:
    """Smallest true difference that a paired comparison of this size would find.

    (z₁₋α/₂ + z_power)·sd/√n over the n per-patient mean differences a - b, two-sided at
    α = 1 - level: with the defaults 2.80·sd/√n (normal approximation).
    """
    per_group = _group_means(np.asarray(differences, float), groups)
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(power)
    return float(z * per_group.std(ddof=1) / np.sqrt(len(per_group)))


def nested(table: pd.DataFrame) -> dict:
    """Turn `score_table` or `compare_table` into nested dicts, as results files hold.

    Examples
    --------
    >>> index = pd.MultiIndex.from_tuples([("a", "scan")], names=["system", "protocol"])
    >>> nested(pd.DataFrame({"score": [0.5]}, index=index))
    {'a': {'scan': {'score': 0.5}}}
    """
    found = {}
    for keys, row in zip(table.index, table.to_dict("records"), strict=True):
        keys, place = keys if isinstance(keys, tuple) else (keys,), found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = row
    return found


def report(found) -> pd.DataFrame:
    """Lay out scores and comparisons as a table of text.

    ``found``: ``{row: {column: score, comparison, number or list}}``, or a table with
    two index levels. Cells without a value read "not run"; underscores of column names
    become spaces, so that a page can break them.
    """
    found = nested(found) if isinstance(found, pd.DataFrame) else found
    rows = {
        row: {name: _text(value) for name, value in values.items()}
        for row, values in found.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index").astype(object)
    table = table.fillna("not run")
    return table.rename(columns=lambda name: str(name).replace("_", " "))


def _text(value):
    if isinstance(value, list):
        return " ".join(f"{one:.3f}" for one in value)
    if not isinstance(value, dict):
        return f"{value:.3f}" if isinstance(value, float) else value
    if "score" in value:
        if not np.isfinite(np.array([value["low"], value["high"]], float)).all():
            return f"{value['score']:.3f}"
        return "{score:.3f}\u00a0[{low:.2f},\u00a0{high:.2f}]".format(**value)
    p = value.get("p_holm", value["p"])
    if p is None or np.isnan(p):  # NaN becomes null in results files
        return "{difference:+.3f}".format(**value)
    p = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    line = "{difference:+.3f} [{low:+.2f},\u00a0{high:+.2f}]; {p}; ±{detectable:.2f}"
    return line.format(**value | {"p": p})


def _listed(names):
    return [names] if isinstance(names, str) else list(names)


def _groups(outcomes, by):
    """Pairs of key (always a tuple) and rows, in the order of first appearance."""
    by = _listed(by)
    missing = [name for name in by if name not in outcomes]
    if missing:
        raise ValueError(
            f"the outcomes have no column {missing[0]!r}; they have "
            f"{', '.join(map(str, outcomes.columns))}"
        )
    return outcomes.groupby(by, sort=False, dropna=False)


def _table(rows, by):
    by = _listed(by)
    index = pd.MultiIndex.from_tuples(rows, names=by)
    table = pd.DataFrame(list(rows.values()), index=index)
    return table if len(by) > 1 else table.set_index(index.get_level_values(0))


def _values(part, value):
    """Values (seeds, queries) of one system and protocol, and the queries' patients."""
    found = part[value].to_numpy(float) if isinstance(value, str) else (
        np.asarray(value(part, per_query=True), float)
    )  # fmt: skip
    if "seed" not in part or part["seed"].isna().all():
        return found[None], part["patient"].to_numpy()
    runs = part.groupby("seed", sort=False).indices.values()
    first, *others = [part["query"].to_numpy()[rows] for rows in runs]
    if not all(np.array_equal(first, other) for other in others):
        raise ValueError(
            "seeds have different queries; expected the same queries, in the same "
            "order, for every seed of a system"
        )
    return np.stack([found[rows] for rows in runs]), part["patient"].to_numpy()[
        next(iter(runs))
    ]


def _counts(drawn, n):
    """How often each of n items was drawn; one row per sample."""
    samples = len(drawn)
    cells = (np.arange(samples)[:, None] * n + drawn).ravel()
    return np.bincount(cells, minlength=samples * n).reshape(samples, n).astype(float)


def _check_numbers(values):
    if np.isnan(values).any():
        row = int(np.argwhere(np.isnan(values))[0, -1])
        raise ValueError(f"value {row} is NaN; expected a number for every query")


def _grouped(values, groups, least=2):
    values = np.asarray(values)
    values = values.astype(float) if values.dtype == bool else values
    if np.issubdtype(values.dtype, np.floating) and np.isnan(values).any():
        row = int(np.argwhere(np.isnan(values))[0, 0])
        raise ValueError(f"value {row} is NaN; expected a number for every query")
    units = np.arange(len(values)) if groups is None else groups
    codes = pd.factorize(pd.Series(units))[0]
    if len(codes) != len(values):
        raise ValueError(f"{len(values)} values but {len(codes)} groups; give one each")
    if len(codes) and codes.min() < 0:
        raise ValueError(
            f"value {int(codes.argmin())} has no group; expected a patient for each"
        )
    n = int(codes.max(initial=-1)) + 1
    if n < least:
        raise ValueError(
            f"{n} group; an interval over groups (patients) needs 2 or more"
        )
    return values, codes, n


def _group_means(values, groups):
    values, codes, _ = _grouped(values, groups, least=1)
    return np.bincount(codes, values) / np.bincount(codes)
