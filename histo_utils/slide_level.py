"""Expression, mutation and other measurements predicted from slide vectors.

A slide's vector is the mean of its patches' vectors. Predictions are out of fold: the
model of a patient saw nothing of that patient, neither for its weights nor for its
scale nor for its penalty. They are a DataFrame with one row per slide: ``row`` (of the
vectors), ``patient``, ``fold`` (that held it out), ``observed``, ``predicted`` (a
probability for a status), ``score``, and the penalty. ``score`` is ``predicted`` minus
what the training folds predict without any vector, their mean (log-odds for a status);
correlation and AUROC take it, because a training part that lost the high values has a
lower mean: pooled predictions that hold nothing but that mean run *against* the truth.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression, enet_path
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from histo_utils.patches import assign_folds
from histo_utils.statistics import bootstrap_ci

ALPHAS = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05)  # of the penalty that leaves nothing
L1_RATIOS = (0.1, 0.5)
C_VALUES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


def slide_means(embeddings) -> tuple[np.ndarray, pd.DataFrame]:
    """Mean vector (slides, d) of each slide, and the slides.

    Slides stand in order of first appearance, with the columns that have one value in
    every slide and ``patches``, their number. A slide of two patients is a ValueError.
    """
    groups = embeddings.table.groupby("slide", sort=False)
    values = groups.nunique(dropna=False)
    if (values["patient"] > 1).any():
        raise ValueError(
            f"slide {values['patient'].idxmax()!r} has {values['patient'].max()} "
            "patients; expected one: correct the table"
        )
    slides = groups.head(1).drop(columns=values.columns[(values > 1).any()])
    slides = slides.reset_index(drop=True).assign(patches=groups.size().to_numpy())
    sums = np.zeros((len(slides), embeddings.dim))
    np.add.at(sums, groups.ngroup().to_numpy(), embeddings.vectors)
    return sums / slides["patches"].to_numpy()[:, None], slides


def predict_value(
    vectors, y, patients, *, alphas=ALPHAS, l1_ratios=L1_RATIOS, folds=None,
    n_splits=5, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Predict a number per slide out of fold, by an elastic net.

    The penalty has the smallest squared error over inner folds, the strongest of
    equally good ones (nesting: Varma and Simon 2006); patients are whole in both.

    Parameters
    ----------
    vectors : (n, d) or (folds, n, d) array
        One row per slide, standardised here; or one such array per outer fold, in
        sorted order, where an encoder was trained without each fold.
    y, patients : (n,) arrays
    alphas, l1_ratios : sequences of float
        Penalties to choose from, as shares (0–1] of the smallest that sets all weights
        to zero (with 1.0 the model may decline to predict); shares of the L1 penalty.
    folds : (n,) array, optional
        The outer folds; default: ``n_splits`` of them, assigned by ``seed``.
    n_splits, seed : int
        Also of the inner folds; fewer where there are fewer patients.
    """
    alphas, ratios = sorted(alphas, reverse=True), sorted(l1_ratios, reverse=True)
    for name, values in (("alphas", alphas), ("l1_ratios", ratios)):
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError(f"{name} are {values}; expected shares above 0, up to 1")

    def scores(x_fit, y_fit, x_held):
        known, aim = np.asfortranarray(x_fit), y_fit - y_fit.mean()
        # the smallest pure L1 penalty without weights; rounding lets none through
        most = abs(known.T @ aim).max() / len(aim) * (1 + 1e-9)
        if most == 0:
            return np.zeros((len(choices), len(x_held)))
        how = {"precompute": False, "tol": 1e-3, "max_iter": 5000}
        steps = most * np.array(alphas)
        weights = [enet_path(known, aim, l1_ratio=ratio, alphas=steps / ratio, **how)[1]
                   for ratio in ratios]  # fmt: skip
        return (x_held @ np.stack(weights, axis=2).reshape(x_fit.shape[1], -1)).T

    x, y, patients, folds = _checked(vectors, y, patients, folds, n_splits, seed)
    if np.ptp(y) == 0:
        raise ValueError(f"all {len(y)} values are {y[0]}; there is nothing to predict")
    choices = [{"alpha": a, "l1_ratio": ratio} for a in alphas for ratio in ratios]
    return _nested(x, y, patients, folds, n_splits, seed, scores, choices)


def predict_status(
    vectors, y, patients, *, c_values=C_VALUES, folds=None, n_splits=5, seed=0
) -> pd.DataFrame:
    """Predict a status (0 or 1) per slide out of fold, by L2 logistic regression.

    As `predict_value`; the constant, an inverse penalty of ``c_values``, has the
    smallest log loss over inner folds, the smallest of equally good ones. 0 leaves no
    weight: the model may decline to predict. Folds are assigned status by status, and
    a patient's slides share their status.
    """
    c_values = sorted(c_values)
    if not c_values or c_values[0] < 0:
        raise ValueError(f"c_values are {c_values}; expected numbers of 0 or more")
    x, y, patients, folds = _checked(vectors, y, patients, folds, n_splits, seed, True)

    def scores(x_fit, y_fit, x_held):
        found = np.zeros((len(c_values), len(x_held)))
        for line, c in zip(found, c_values, strict=True):
            if c > 0:
                model = LogisticRegression(C=c, max_iter=5000).fit(x_fit, y_fit)
                line[:] = model.decision_function(x_held) - logit(y_fit.mean())
        return found

    data = x, y, patients, folds, n_splits, seed
    return _nested(*data, scores, [{"c": c} for c in c_values], status=True)


def spearman(predictions, n_boot: int = 2000, seed: int = 0) -> dict:
    """Rank correlation of out-of-fold scores with the truth, over patients' means.

    ``score`` (ρ; 0 where all scores are equal), ``low``, ``high`` (95 %, over patients,
    models fixed), ``n`` and ``p`` (Student's t for ρ > 0, patients as independent).
    """
    values = _by_patient(predictions, least=3)
    n, rho = len(values), _rank_correlation(values)
    t = rho * np.sqrt((n - 2) / max(1 - rho**2, 1e-12))
    ends = bootstrap_ci(values, n_boot=n_boot, seed=seed, statistic=_rank_correlation)
    return {"score": rho, **ends._asdict(), "p": float(stats.t.sf(t, n - 2)), "n": n}


def auroc(predictions, n_boot: int = 2000, seed: int = 0) -> dict:
    """AUROC of out-of-fold scores over patients' means.

    ``score``, ``low``, ``high`` (95 %: patients drawn within either status, models
    fixed), ``n`` (patients) and ``positive`` of them.
    """
    observed, score = _by_patient(predictions, least=2).T
    ill, well = score[observed == 1], score[observed == 0]
    if len(ill) + len(well) < len(observed) or not len(ill) * len(well):
        raise ValueError(
            f"{len(ill)} patients have status 1 and {len(well)} of {len(observed)} "
            "status 0; the AUROC needs both and nothing else"
        )
    wins, rng = np.sign(ill[:, None] - well) / 2 + 0.5, np.random.default_rng(seed)
    # how often each patient is drawn, as a share
    a, b = (rng.multinomial(k, np.full(k, 1 / k), n_boot) / k for k in wins.shape)
    draws = ((a @ wins) * b).sum(axis=1)
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    found = {"score": float(roc_auc_score(observed, score)), "low": low, "high": high}
    return found | {"n": len(observed), "positive": len(ill)}


def planted_outcomes(
    slides, signal, seed: int = 0, *, n_tied=10, n_noise=10, correlation=0.9
) -> pd.DataFrame:
    """Outcomes that follow a signal (slides,), or nothing: a control, and no evidence.

    They belong to the patient, as a sequenced sample would, and so does the signal, its
    slides' mean: ``gene_tied_…`` (expected correlation with it, every second one
    negative), ``gene_noise_…``, and ``mutation_…`` (the gene is above its median).
    """
    codes, signal = pd.factorize(slides["patient"])[0], np.asarray(signal, float)
    n, rng = codes.max() + 1, np.random.default_rng(seed)
    if n < 4 or not np.isfinite(signal).all() or np.ptp(signal) == 0:
        raise ValueError(
            f"{n} patients, a signal from {signal.min()} to {signal.max()}; expected "
            "four patients or more, and finite numbers that differ"
        )
    means = np.bincount(codes, signal) / np.bincount(codes)
    known = (means - means.mean())[:, None] / means.std()
    genes = rng.standard_normal((n, n_tied + n_noise))
    genes[:, :n_tied] *= np.sqrt(1 - correlation**2)
    genes[:, :n_tied] += known * np.where(np.arange(n_tied) % 2, -1, 1) * correlation
    names = [f"tied_{i:02d}" for i in range(n_tied)]
    names += [f"noise_{i:02d}" for i in range(n_noise)]
    kinds = {"gene_": genes, "mutation_": (genes > np.median(genes, axis=0)) * 1}
    found = [pd.DataFrame(x, columns=names).add_prefix(k) for k, x in kinds.items()]
    return pd.concat(found, axis=1).iloc[codes].reset_index(drop=True)


def _nested(x, y, patients, folds, n_splits, seed, scores, choices, status=False):
    """Out-of-fold predictions; the penalty is chosen inside each training part.

    ``scores(x_fit, y_fit, x_held)``: (choices, held), the strongest penalty first.
    """
    parts = []
    for number, fold in enumerate(np.unique(folds)):
        own = x if x.ndim == 2 else x[number]

        def predict(fit, held, own=own):
            scale, mean = StandardScaler().fit(own[fit]), y[fit].mean()
            x_fit, x_held = scale.transform(own[fit]), scale.transform(own[held])
            score = scores(x_fit, y[fit], x_held)
            return expit(logit(mean) + score) if status else mean + score, score

        fit, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        strata = y[fit] if status else np.zeros(len(fit))
        fewest = pd.Series(patients[fit]).groupby(strata).nunique().min()
        inner = _assigned(patients[fit], strata, min(n_splits, max(2, fewest)), seed)
        errors = np.zeros(len(choices))
        for part in np.unique(inner):
            train, test = fit[inner != part], fit[inner == part]
            miss = abs(y[test] - predict(train, test)[0])
            errors += (-np.log(1 - miss + 1e-12) if status else miss**2).sum(axis=1)
        best = int(np.argmin(errors))
        predicted, score = (values[best] for values in predict(fit, held))
        parts.append(pd.DataFrame({
            "row": held, "patient": patients[held], "fold": fold, "observed": y[held],
            "predicted": predicted, "score": score, **choices[best],
        }))  # fmt: skip
    return pd.concat(parts).sort_values("row", ignore_index=True)


def _assigned(patients, strata, n_splits, seed):
    table = pd.DataFrame({"patient": patients, "label": strata})
    return assign_folds(table, n_splits, seed=seed).to_numpy()


def _checked(vectors, y, patients, folds, n_splits, seed, status=False):
    """Arrays without gaps, with outer folds of whole patients."""
    x, y = np.asarray(vectors, float), np.asarray(y, float)
    patients, n = np.asarray(patients), y.size
    if x.ndim not in (2, 3) or not n or x.shape[-2] != n or patients.shape != y.shape:
        raise ValueError(
            f"vectors {x.shape}, values {y.shape} and patients {patients.shape}; "
            "expected (n, d) or (folds, n, d), (n,) and (n,), one row per slide"
        )
    whole = np.isfinite(x).all(axis=-1).reshape(-1, n).all(axis=0)
    gaps = {"vectors": ~whole, "values": ~np.isfinite(y), "patients": pd.isna(patients)}
    for name, bad in gaps.items():
        if bad.any():
            raise ValueError(
                f"row {bad.argmax()} of the {name} holds NaN or infinity "
                f"({bad.sum()} such rows); leave those slides out"
            )
    values = pd.Series(y).groupby(patients).nunique()
    if status and (not np.isin(y, (0, 1)).all() or values.max() > 1):
        raise ValueError(
            f"the status holds {np.unique(y).tolist()}, patient {values.idxmax()} has "
            f"{values.max()} values; expected 0 and 1, one status per patient"
        )
    if folds is None:
        folds = _assigned(patients, y if status else np.zeros(n), n_splits, seed)
    several = pd.Series(np.asarray(folds)).groupby(patients).nunique()
    fits = x.shape[:-2] in ((), (count := len(np.unique(folds)),))
    if count < 2 or several.max() > 1 or not fits:
        raise ValueError(
            f"{count} folds, patient {several.idxmax()} in {several.max()}, vectors "
            f"{x.shape}; expected two folds or more of whole patients "
            "(patches.assign_folds), and of several arrays of vectors one per fold"
        )
    for fold, value in itertools.product(np.unique(folds), (0, 1) if status else ()):
        if (left := len(set(patients[(folds != fold) & (y == value)]))) < 2:
            raise ValueError(
                f"without fold {fold} {left} patients have status {value}; two are "
                "needed: take more patients, or n_splits that spread them"
            )
    return x, y, patients, np.asarray(folds)


def _by_patient(predictions, least):
    """Observed value and score of each patient, means of its slides; (patients, 2)."""
    means = predictions.groupby("patient")[["observed", "score"]].mean()
    if len(means) < least or means.isna().to_numpy().any():
        raise ValueError(
            f"{len(means)} patients, {int(means.isna().any(axis=1).sum())} with NaN; "
            f"expected {least} or more, and a number for each"
        )
    return means.to_numpy(float)


def _rank_correlation(rows):
    """Spearman's ρ of rows (observed, score); 0 where either is constant."""
    a, b = stats.rankdata(rows, axis=0).T
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0
