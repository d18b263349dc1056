"""What slide vectors say about measurements: expression, mutation, nuclear area.

A slide's vector is the mean of its patches' vectors. A measurement is predicted out of
fold: the model that judges a patient saw nothing of that patient, neither for its
weights nor for its scale nor for the choice of its penalty. Out-of-fold predictions are
a DataFrame with one row a slide:

==============  ==============================================================
``row``         row of the vectors
``patient``     its patient
``fold``        the outer fold that held it out
``observed``    the measured value (0 or 1 for a status)
``predicted``   the predicted value (probability)
``score``       ``predicted`` less what the training part says without any
                vector: its mean (log-odds less the log-odds of its share)
==============  ==============================================================

and columns with what was chosen inside. Correlation and AUROC take ``score``: a
training part that lost the high values has a lower mean, so pooled predictions that
say nothing but that mean run *against* the truth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression, enet_path
from sklearn.preprocessing import StandardScaler

from histo_utils.patches import assign_folds

ALPHAS = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05)  # of the penalty that leaves nothing
L1_RATIOS = (0.1, 0.5)
C_VALUES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


def slide_means(embeddings) -> tuple[np.ndarray, pd.DataFrame]:
    """Mean vector of each slide, and its row.

    Parameters
    ----------
    embeddings : Embeddings
        With the columns ``slide`` and ``patient``.

    Returns
    -------
    vectors : (s, d) float64 array
        Slides in the order in which they are met.
    table : DataFrame
        One row a slide: the columns that have one value in every slide, and
        ``patches``, their number.

    Raises
    ------
    ValueError
        A missing column, or a slide with two patients.
    """
    table = embeddings.table
    for name in ("slide", "patient"):
        if name not in table:
            raise ValueError(
                f"the table has no column {name!r}; it has {', '.join(table.columns)}"
            )
    groups = table.groupby("slide", sort=False)
    single = (groups.nunique(dropna=False) <= 1).all()
    if not single["patient"]:
        several = groups["patient"].nunique(dropna=False)
        raise ValueError(
            f"slide {several.index[several > 1][0]!r} has {several.max()} patients; "
            "expected one: correct the table"
        )
    keep = ["slide", *single.index[single]]
    slides = groups.head(1)[[name for name in table.columns if name in keep]]
    slides = slides.reset_index(drop=True).assign(patches=groups.size().to_numpy())
    codes = groups.ngroup().to_numpy()
    sums = np.zeros((len(slides), embeddings.dim))
    np.add.at(sums, codes, embeddings.vectors)
    return sums / slides["patches"].to_numpy()[:, None], slides


def predict_value(
    vectors, y, patients, *, alphas=ALPHAS, l1_ratios=L1_RATIOS, folds=None,
    n_splits=5, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Predict a number of each slide out of fold, by an elastic net.

    Each outer fold is predicted by a model of the other folds: standardised vectors,
    penalty chosen by the squared error of inner folds, the strongest of equally good
    ones. Patients are whole in both.

    Parameters
    ----------
    vectors : (n, d) array
        One row a slide.
    y : (n,) array
    patients : (n,) array
    alphas : sequence of float
        Penalties to choose from, each a share (0–1] of the smallest that sets all
        weights to zero in the part it is fitted on. With 1.0 among them the model may
        decline to predict.
    l1_ratios : sequence of float
        Shares of the L1 penalty to choose from, (0–1].
    folds : (n,) array, optional
        The outer folds, patients whole; dealt out by ``seed`` if not given.
    n_splits : int
        Outer and inner folds; fewer inner ones where there are fewer patients.
    seed : int

    Returns
    -------
    DataFrame
        Out-of-fold predictions, with ``alpha`` and ``l1_ratio``.

    Raises
    ------
    ValueError
        Unequal lengths, NaN, a constant ``y``, fewer patients than folds, a patient in
        two of the ``folds``, penalties outside their range.

    Notes
    -----
    Zou and Hastie 2005; nesting: Varma and Simon 2006. The paper of chapter 06 (Li et
    al. 2022) names no regression that we could read: this one is ours.
    """
    alphas, ratios = sorted(alphas, reverse=True), sorted(l1_ratios, reverse=True)
    for name, values in (("alphas", alphas), ("l1_ratios", ratios)):
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError(f"{name} are {values}; expected shares above 0, up to 1")

    def scores(x_fit, y_fit, x_held):
        known, aim = np.asfortranarray(x_fit), y_fit - y_fit.mean()
        paths = [_weights(known, aim, ratio, alphas) for ratio in ratios]
        weights = np.stack(paths, axis=2).reshape(x_fit.shape[1], -1)
        return (x_held @ weights).T

    x, y, patients, folds = _checked(vectors, y, patients, folds, n_splits, seed)
    if np.ptp(y) == 0:
        raise ValueError(f"all {len(y)} values are {y[0]}; there is nothing to predict")
    return _nested(
        x, y, patients, folds, n_splits, seed, None, scores,
        [{"alpha": alpha, "l1_ratio": ratio} for alpha in alphas for ratio in ratios],
        base=np.mean,
        predict=np.add,
        error=lambda truth, predicted: (truth - predicted) ** 2,
    )  # fmt: skip


def predict_status(
    vectors, y, patients, *, c_values=C_VALUES, folds=None, n_splits=5, seed=0
) -> pd.DataFrame:
    """Predict a yes or no of each slide out of fold, by L2 logistic regression.

    As `predict_value`; the constant is chosen by the log loss of inner folds, the
    smallest of equally good ones, and patients are dealt into folds status by status.

    Parameters
    ----------
    vectors : (n, d) array
        One row a slide.
    y : (n,) array of bool, or of 0 and 1
        A patient's slides share it.
    patients : (n,) array
    c_values : sequence of float
        Inverse penalties on standardised vectors to choose from. 0 leaves no weight,
        so that the model may decline to predict; ever so small weights would still
        order the patients.
    folds, n_splits, seed
        As in `predict_value`.

    Returns
    -------
    DataFrame
        Out-of-fold predictions (``predicted`` is a probability), with ``c``.

    Raises
    ------
    ValueError
        As `predict_value`; other values than 0 and 1, a patient with both, or so few
        patients of a status that a training part would hold fewer than two.
    """
    c_values = sorted(c_values)
    if not c_values or c_values[0] < 0:
        raise ValueError(f"c_values are {c_values}; expected numbers of 0 or more")
    y = np.asarray(y)
    x, y, patients, folds = _checked(vectors, y, patients, folds, n_splits, seed, y)
    _check_status(y, patients, folds)

    def scores(x_fit, y_fit, x_held):
        found = np.zeros((len(c_values), len(x_held)))
        for line, c in zip(found, c_values, strict=True):
            if c > 0:
                machine = LogisticRegression(C=c, max_iter=5000).fit(x_fit, y_fit)
                line[:] = machine.decision_function(x_held) - logit(y_fit.mean())
        return found

    return _nested(
        x, y, patients, folds, n_splits, seed, y, scores,
        [{"c": c} for c in c_values],
        base=lambda known: logit(known.mean()),
        predict=lambda odds, score: expit(odds + score),
        error=lambda truth, p: -np.log(np.where(truth == 1, p, 1 - p) + 1e-12),
    )  # fmt: skip


def spearman(outcomes, n_boot: int = 2000, seed: int = 0) -> dict:
    """Rank correlation of out-of-fold predictions with the truth, over patients.

    A patient counts once, with the means of its slides. Predictions that do not differ
    order nothing: their correlation is taken as 0.

    Parameters
    ----------
    outcomes : DataFrame
        From `predict_value`.
    n_boot, seed : int
        Of the 95 % percentile interval: patients are drawn, models stay.

    Returns
    -------
    dict
        ``score`` (Spearman's ρ), ``low``, ``high``, ``p``, ``n`` (patients). p is that
        of Student's t distribution for ρ > 0, since only that is a prediction; it takes
        patients for independent, which out-of-fold predictions are but nearly.

    Raises
    ------
    ValueError
        Fewer than three patients, or NaN.
    """
    observed, score = _by_patient(outcomes, least=3)
    n = len(observed)
    rho = float(_rank_correlation(observed, score))
    wide = np.sqrt((n - 2) / max(1 - rho**2, 1e-12))
    drawn = np.random.default_rng(seed).integers(0, n, (n_boot, n))
    low, high = _ends(_rank_correlation(observed[drawn], score[drawn]))
    p = float(stats.t.sf(rho * wide, n - 2))
    return {"score": rho, "low": low, "high": high, "p": p, "n": n}


def auroc(outcomes, n_boot: int = 2000, seed: int = 0) -> dict:
    """Share of pairs of patients, one of each status, that the scores order rightly.

    A patient counts once, with its slides' mean score; equal scores count half.

    Parameters
    ----------
    outcomes : DataFrame
        From `predict_status`.
    n_boot, seed : int
        Of the 95 % percentile interval: patients of either status are drawn, each as
        many as there are; models stay.

    Returns
    -------
    dict
        ``score``, ``low``, ``high``, ``n`` (patients), ``positive`` (of them).

    Raises
    ------
    ValueError
        One status only, or NaN.
    """
    observed, score = _by_patient(outcomes, least=2)
    with_it, without = score[observed == 1], score[observed == 0]
    if len(with_it) + len(without) < len(observed) or not len(with_it) * len(without):
        raise ValueError(
            f"{len(with_it)} patients have status 1 and {len(without)} of "
            f"{len(observed)} status 0; the AUROC needs both and nothing else"
        )
    wins = np.sign(with_it[:, None] - without) / 2 + 0.5
    rng = np.random.default_rng(seed)
    times = [  # how often each patient is drawn
        rng.multinomial(k, np.full(k, 1 / k), n_boot) / k for k in wins.shape
    ]
    low, high = _ends(np.einsum("bi,ij,bj->b", times[0], wins, times[1], optimize=True))
    counts = {"n": len(observed), "positive": len(with_it)}
    return {"score": float(wins.mean()), "low": low, "high": high, **counts}


def many_values(
    vectors, values, patients, *, n_boot: int = 2000, seed: int = 0, **how
) -> pd.DataFrame:
    """Predict many measurements (genes) from the same vectors.

    Parameters
    ----------
    vectors : (n, d) array
        One row a slide.
    values : DataFrame with n rows
        One column a measurement; rows as those of the vectors.
    patients : (n,) array
    n_boot, seed : int
    **how
        ``alphas``, ``l1_ratios``, ``folds``, ``n_splits`` of `predict_value`.

    Returns
    -------
    DataFrame
        One row a column of ``values``: what `spearman` returns, and ``p_bh``, p
        adjusted for their number (Benjamini and Hochberg 1995). All measurements share
        their folds.

    Raises
    ------
    ValueError
        As `predict_value`, the measurement named.
    """
    if not isinstance(values, pd.DataFrame) or values.columns.has_duplicates:
        raise ValueError(
            "values are no DataFrame with a column a measurement, each of its own name"
        )
    rows = {}
    for name in values.columns:
        try:
            found = predict_value(vectors, values[name], patients, seed=seed, **how)
        except ValueError as error:
            raise ValueError(f"measurement {name!r}: {error}") from error
        rows[name] = spearman(found, n_boot, seed)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_bh=stats.false_discovery_control(table["p"]))


def planted_outcomes(
    slides, folder, seed: int = 0, *, n_tied: int = 5, n_noise: int = 15,
    correlation: float = 0.9,
) -> pd.DataFrame:  # fmt: skip
    """Outcomes of phantom slides with a known truth; synthetic, and no evidence.

    Each is a property of the patient, as a sequenced sample would be: slides of one
    patient share it.

    Parameters
    ----------
    slides : DataFrame
        One row a phantom: ``slide``, ``patient``, ``label``, ``nuclei_mask``,
        ``tissue_mask`` (`phantom.write_phantom_archive`, or `slide_means`).
    folder : path-like
        The archive, which the masks' paths are relative to.
    seed : int
    n_tied, n_noise : int
        Genes that follow the nuclei, every second one falling with them, and genes
        that follow nothing.
    correlation : float
        Of tied genes with the true share of nuclei in the tissue, expected, 0–1.

    Returns
    -------
    DataFrame
        Rows as those of ``slides``: ``slide``, ``patient``, ``nuclei_share`` (of the
        tissue, mean of the patient's slides), ``gene_tied_…``, ``gene_noise_…``, and
        bool ``mutation_tied`` (every other label of the alphabet, one patient in ten
        flipped) and ``mutation_noise`` (half of the patients).

    Raises
    ------
    ValueError
        A missing column, or fewer than four patients.
    """
    needed = ("slide", "patient", "label", "nuclei_mask", "tissue_mask")
    missing = [name for name in needed if name not in slides]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}; outcomes are planted on "
            "phantoms, whose table has it: phantom.write_phantom_archive"
        )
    share = pd.Series(
        [
            _covered(folder, row.nuclei_mask) / _covered(folder, row.tissue_mask)
            for row in slides.itertuples()
        ]
    )
    codes, names = pd.factorize(slides["patient"])
    n = len(names)
    if n < 4:
        raise ValueError(f"{n} patients; planting outcomes needs 4 or more")
    rng = np.random.default_rng(seed)
    nuclei = share.groupby(codes).mean().to_numpy()
    known = (nuclei - nuclei.mean()) / nuclei.std()
    noise = rng.standard_normal((n, n_tied + n_noise))
    tied = known[:, None] * np.where(np.arange(n_tied) % 2, -1, 1) * correlation
    tied = tied + np.sqrt(1 - correlation**2) * noise[:, :n_tied]
    label = slides["label"].groupby(codes).first()
    planted = label.isin(sorted(set(label))[::2]).to_numpy()
    outcomes = {
        "nuclei_share": nuclei,
        **{f"gene_tied_{i:02d}": tied[:, i] for i in range(n_tied)},
        **{f"gene_noise_{i:02d}": noise[:, n_tied + i] for i in range(n_noise)},
        "mutation_tied": planted ^ (rng.permutation(n) < round(n / 10)),
        "mutation_noise": rng.permutation(n) < n // 2,
    }
    rows = pd.DataFrame(outcomes).iloc[codes].reset_index(drop=True)
    return pd.concat(
        [slides[["slide", "patient"]].reset_index(drop=True), rows], axis=1
    )


def _nested(
    x, y, patients, folds, n_splits, seed, strata, scores, penalties, *, base, predict,
    error,
):  # fmt: skip
    """Out-of-fold predictions; the penalty is chosen inside each training part.

    ``scores(x_fit, y_fit, x_held)`` gives (penalties, held) scores, the strongest
    penalty first, on vectors that were scaled by the rows they are fitted on.
    """

    def scaled(fit, held):
        scale = StandardScaler().fit(x[fit])
        return scores(scale.transform(x[fit]), y[fit], scale.transform(x[held]))

    parts = []
    for fold in np.unique(folds):
        fit, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        inner, errors = _inner(patients, strata, fit, n_splits, seed), 0.0
        for part in np.unique(inner):
            train, test = fit[inner != part], fit[inner == part]
            found = predict(base(y[train]), scaled(train, test))
            errors = errors + error(y[test], found).sum(axis=1)
        best = int(np.argmin(errors))
        score = scaled(fit, held)[best]
        rows = {
            "row": held, "patient": patients[held], "fold": fold, "observed": y[held],
            "predicted": predict(base(y[fit]), score), "score": score,
        }  # fmt: skip
        parts.append(pd.DataFrame({**rows, **penalties[best]}))
    return pd.concat(parts).sort_values("row", ignore_index=True)


def _inner(patients, strata, fit, n_splits, seed):
    """Inner folds of the rows in `fit`."""
    most = len(np.unique(patients[fit]))
    if strata is not None:
        most = min(pd.Series(patients[fit]).groupby(strata[fit]).nunique())
    return _dealt(
        patients[fit], None if strata is None else strata[fit],
        min(n_splits, max(2, most)), seed,
    )  # fmt: skip


def _dealt(patients, strata, n_splits, seed):
    table = pd.DataFrame({"patient": patients})
    if strata is not None:
        table["label"] = strata
    return assign_folds(table, n_splits, seed=seed).to_numpy()


def _checked(vectors, y, patients, folds, n_splits, seed, strata=None):
    x, y = np.asarray(vectors, float), np.asarray(y, float)
    patients = np.asarray(patients)
    if x.ndim != 2 or not len(x) or not x.shape[:1] == y.shape == patients.shape:
        raise ValueError(
            f"vectors {x.shape}, values {y.shape} and patients {patients.shape}; "
            "expected (n, d), (n,) and (n,), one row a slide"
        )
    gaps = {
        "the vectors": ~np.isfinite(x).all(axis=1),
        "the values": ~np.isfinite(y),
        "the patients": pd.isna(patients),
    }
    for name, bad in gaps.items():
        if bad.any():
            raise ValueError(
                f"row {int(bad.argmax())} of {name} holds NaN or infinity "
                f"({int(bad.sum())} such rows); leave those slides out"
            )
    if folds is None:
        return x, y, patients, _dealt(patients, strata, n_splits, seed)
    folds = np.asarray(folds)
    if folds.shape != y.shape or len(np.unique(folds)) < 2:
        raise ValueError(
            f"folds of shape {folds.shape} with {len(np.unique(folds))} values; "
            f"expected two folds or more, one for each of the {len(y)} slides"
        )
    several = pd.Series(folds).groupby(patients).nunique()
    if (several > 1).any():
        raise ValueError(
            f"patient {several.index[several > 1][0]} is in {several.max()} folds; "
            "give folds that keep patients whole (patches.assign_folds)"
        )
    return x, y, patients, folds


def _check_status(y, patients, folds):
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"the status holds {y[~np.isin(y, (0, 1))][0]}; expected 0, 1")
    both = pd.Series(y).groupby(patients).nunique() > 1
    if both.any():
        raise ValueError(
            f"patient {both.index[both][0]} has slides of either status; expected one: "
            "a status belongs to the patient"
        )
    for fold in np.unique(folds):
        away = folds != fold
        for status in (0, 1):
            left = len(np.unique(patients[away & (y == status)]))
            if left < 2:
                raise ValueError(
                    f"without fold {fold} {left} patients have status {status}; two "
                    "are needed to choose a penalty: take more patients, or n_splits "
                    "that spread them"
                )


def _weights(x, aim, ratio, alphas):
    """Weights (d, alphas) of elastic nets on standardised vectors and a centred aim."""
    least = abs(x.T @ aim).max() / len(x) / ratio  # leaves no weight
    if least == 0:
        return np.zeros((x.shape[1], len(alphas)))
    steps = least * np.array(alphas) * (1 + 1e-9)  # rounding lets no weight through
    return enet_path(
        x, aim, l1_ratio=ratio, alphas=steps, precompute=False, tol=1e-3, max_iter=5000
    )[1]


def _by_patient(outcomes, least):
    means = outcomes.groupby("patient")[["observed", "score"]].mean()
    if len(means) < least or means.isna().to_numpy().any():
        raise ValueError(
            f"{len(means)} patients, {int(means.isna().any(axis=1).sum())} with NaN; "
            f"expected {least} or more, and a number for each"
        )
    return means["observed"].to_numpy(), means["score"].to_numpy()


def _rank_correlation(a, b):
    """Spearman's ρ of the last axes; 0 where either is constant."""
    a, b = (stats.rankdata(values, axis=-1) for values in (a, b))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    size = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return (a * b).sum(axis=-1) / np.where(size > 0, size, 1)


def _ends(draws):
    return tuple(float(q) for q in np.quantile(draws, [0.025, 0.975]))


def _covered(folder, name):
    with Image.open(Path(folder) / name) as mask:
        return np.asarray(mask).mean()
