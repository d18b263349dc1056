"""Measurements are predicted out of fold, patient by patient; leaks are found."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from histo_utils import measurements
from histo_utils.embeddings import Embeddings
from histo_utils.measurements import (
    auroc,
    many_values,
    planted_outcomes,
    predict_status,
    predict_value,
    slide_means,
    spearman,
)

N, D = 40, 60
FOLDS = np.arange(N) % 5
PATIENTS = np.array([f"P{i:02d}" for i in range(N)])


def made(rng, n=N, d=D):
    """Vectors with a few strong directions, as features of slides have."""
    strong = rng.standard_normal((n, 8)) @ rng.standard_normal((8, d))
    return strong + 0.3 * rng.standard_normal((n, d))


def with_chosen_features(x, y, patients, folds):
    """Predict with a leak: the features are chosen by all rows, test rows included."""
    centred = (x - x.mean(0)) / x.std(0)
    best = np.argsort(-abs(centred.T @ (y - y.mean())))[:5]
    parts = []
    for fold in np.unique(folds):
        fit, held = folds != fold, np.flatnonzero(folds == fold)
        line = Ridge(1.0).fit(x[fit][:, best], y[fit])
        score = line.predict(x[held][:, best]) - y[fit].mean()
        rows = {"row": held, "patient": patients[held], "fold": fold}
        parts.append(pd.DataFrame({**rows, "observed": y[held], "score": score}))
    return pd.concat(parts).sort_values("row", ignore_index=True)


def with_chosen_penalty(x, y, patients, folds):
    """Predict with a smaller leak: one penalty, the best on the test rows."""
    runs = [
        predict_value(x, y, patients, alphas=[a], folds=folds)
        for a in measurements.ALPHAS
    ]
    return max(runs, key=lambda o: spearman(o, n_boot=1)["score"])


def sees_its_test_rows(predict, x, y, patients, folds):
    """Whether a fold's scores change when that fold's own outcomes do."""
    before = predict(x, y, patients, folds=folds)
    for fold in np.unique(folds):
        other = np.where(folds == fold, y[::-1] * 3 - 2, y)
        after = predict(x, other, patients, folds=folds)
        own = (before["fold"] == fold).to_numpy()
        if not np.array_equal(before["score"][own], after["score"][own]):
            return True
    return False


def test_no_model_sees_the_outcomes_it_is_judged_by():
    rng = np.random.default_rng(0)
    x = made(rng)
    y = x[:, :20] @ rng.standard_normal(20) / 8 + rng.standard_normal(N)
    assert not sees_its_test_rows(predict_value, x, y, PATIENTS, FOLDS)
    assert sees_its_test_rows(with_chosen_features, x, y, PATIENTS, FOLDS)
    assert sees_its_test_rows(with_chosen_penalty, x, y, PATIENTS, FOLDS)


def test_no_model_sees_the_statuses_it_is_judged_by():
    rng = np.random.default_rng(1)
    x = made(rng)
    y = (x[:, 0] + rng.standard_normal(N) > 0).astype(int)
    before = predict_status(x, y, PATIENTS, folds=FOLDS)
    for fold in range(5):
        after = predict_status(
            x, np.where(fold == FOLDS, 1 - y, y), PATIENTS, folds=FOLDS
        )
        own = fold == FOLDS
        assert before["score"][own].nunique() > 1
        np.testing.assert_array_equal(before["score"][own], after["score"][own])
        others = before["score"][~own], after["score"][~own]
        assert not np.allclose(*others)  # they did learn from the fold


@pytest.mark.parametrize("predict", [predict_value, predict_status])
def test_scale_comes_from_the_training_part(predict):
    """One test row made enormous changes no other row of its fold."""
    rng = np.random.default_rng(2)
    x = made(rng)
    y = (x[:, 0] > 0).astype(float)
    far = x.copy()
    far[0] *= 1e4
    a, b = (predict(v, y, PATIENTS, folds=FOLDS) for v in (x, far))
    same = (FOLDS == 0) & (np.arange(N) > 0)
    assert a["score"][same].nunique() > 1
    np.testing.assert_array_equal(a["score"][same], b["score"][same])
    assert not np.allclose(a["score"][~same], b["score"][~same])


def test_noise_stays_at_chance_and_the_leak_does_not():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((N, 300))
    ours, leaking, rejected = [], [], []
    for seed in range(30):
        y = rng.standard_normal(N)
        found = spearman(predict_value(x, y, PATIENTS, seed=seed), n_boot=1)
        ours.append(found["score"])
        rejected.append(found["p"] < 0.05)
        leak = with_chosen_features(x, y, PATIENTS, FOLDS)
        leaking.append(spearman(leak, n_boot=1)["score"])
    assert abs(np.mean(ours)) < 0.1
    assert np.mean(rejected) < 0.15
    assert np.mean(leaking) > 0.5


def test_pooled_training_means_run_against_the_truth():
    """Why ``score`` leaves the training mean out: it is low where y is high."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((N, 5))
    found = [
        predict_value(x, rng.standard_normal(N), PATIENTS, alphas=[1.0], seed=s)
        for s in range(20)
    ]
    assert all((o["score"] == 0).all() for o in found)  # nothing was predicted
    assert {spearman(o, n_boot=1)["score"] for o in found} == {0.0}
    pooled = [o["predicted"].corr(o["observed"]) for o in found]
    assert max(pooled) < 0
    means = [o["observed"][o["fold"] != 0].mean() for o in found]
    firsts = [o["predicted"][o["fold"] == 0].to_numpy() for o in found]
    for mean, first in zip(means, firsts, strict=True):
        np.testing.assert_allclose(first, mean)


def test_planted_signal_is_found():
    rng = np.random.default_rng(5)
    x = made(rng)
    signal = x @ rng.standard_normal(D)
    found = spearman(predict_value(x, signal, PATIENTS))
    assert found["score"] > 0.8
    assert found["low"] < found["score"] < found["high"]
    assert found["p"] < 1e-6
    assert found["n"] == N
    status = auroc(predict_status(x, signal > 0, PATIENTS))
    assert status["score"] > 0.8
    assert status["low"] > 0.6
    assert (status["n"], status["positive"]) == (N, int((signal > 0).sum()))


def test_status_that_is_noise_stays_at_chance():
    rng = np.random.default_rng(10)
    x, found = rng.standard_normal((N, 1)), []
    for seed in range(20):
        y = rng.permutation(N) < 16
        outcomes = predict_status(x, y, PATIENTS, seed=seed)
        declined = outcomes["c"] == 0
        assert (outcomes["score"][declined] == 0).all()
        found.append(auroc(outcomes, n_boot=1)["score"])
    assert abs(np.mean(found) - 0.5) < 0.08
    alone = predict_status(x, y, PATIENTS, c_values=[0])
    np.testing.assert_allclose(alone["predicted"], 0.4, atol=0.03)
    assert auroc(alone)["score"] == 0.5


def test_copies_of_a_patient_are_kept_together():
    """Noise, but every patient has two equal slides: only a torn patient helps."""
    rng = np.random.default_rng(6)
    drawn = rng.standard_normal((N, D)), rng.standard_normal(N)
    x, y = (np.repeat(values, 2, axis=0) for values in drawn)
    patients = np.repeat(PATIENTS, 2)
    whole = predict_value(x, y, patients, alphas=[0.05])
    assert whole.groupby("patient")["fold"].nunique().max() == 1
    torn = predict_value(x, y, np.arange(2 * N), alphas=[0.05])
    assert abs(spearman(whole)["score"]) < 0.4
    assert spearman(whole)["n"] == N
    assert spearman(torn)["score"] > 0.5
    # inside, too: with torn inner folds the weak penalty would seem to work
    inner = predict_value(x, y, patients, alphas=[1.0, 0.05])
    assert (inner["alpha"] == 1.0).mean() > 0.5
    leaky = predict_value(x, y, np.arange(2 * N), alphas=[1.0, 0.05])
    assert (leaky["alpha"] == 0.05).mean() > 0.5


def test_elastic_net_by_hand():
    """One feature: the weight is soft-thresholded by a share of what kills it."""
    x = np.array([[-1.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [5.0], [-3.0]])
    y = np.array([-2.0, 2.0, -2.0, 2.0, -2.0, 2.0, 0.0, 0.0]) + 10
    folds = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = predict_value(
        x, y, np.arange(8), alphas=[0.5], l1_ratios=[1.0], folds=folds, n_splits=2
    )
    # trained on the first six: x and y - 10 are ±1 and ±2, so the weight is 2 - 0.5 · 2
    held = found[found["fold"] == 1]
    np.testing.assert_allclose(held["score"], [5.0, -3.0], atol=1e-6)
    np.testing.assert_allclose(held["predicted"], [15.0, 7.0], atol=1e-6)


def test_same_seed_same_predictions_and_order_of_rows():
    rng = np.random.default_rng(7)
    x, y = made(rng), rng.standard_normal(N)
    a, b = (predict_value(x, y, PATIENTS, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert a["row"].tolist() == list(range(N))
    np.testing.assert_array_equal(a["observed"], y)
    assert not predict_value(x, y, PATIENTS, seed=4)["fold"].equals(a["fold"])


def test_spearman_by_hand_over_patients():
    outcomes = pd.DataFrame(
        {
            "patient": ["a", "a", "b", "c", "d"],
            "observed": [0.0, 2.0, 2.0, 3.0, 4.0],  # patients: 1, 2, 3, 4
            "score": [5.0, 1.0, 0.5, 4.0, 9.0],  # patients: 3, 0.5, 4, 9
        }
    )
    # ranks 1 2 3 4 against 2 1 3 4: 1 - 6 · 2 / (4 · 15)
    found = spearman(outcomes)
    assert found["score"] == pytest.approx(0.8)
    assert found["n"] == 4
    # t = 0.8 · sqrt(2 / 0.36); with two degrees 1 - cdf = (1 - t / sqrt(2 + t²)) / 2
    assert found["p"] == pytest.approx((1 - 0.8) / 2)
    against = outcomes.assign(score=-outcomes["score"])
    assert spearman(against)["p"] == pytest.approx(0.9)


def test_auroc_by_hand_over_patients():
    outcomes = pd.DataFrame(
        {
            "patient": ["a", "a", "b", "c", "d", "e"],
            "observed": [1, 1, 1, 0, 0, 0],
            "score": [4.0, 0.0, 1.0, 1.0, 0.0, 3.0],  # a: 2
        }
    )
    # a beats c and d; b ties with c and beats d: 3.5 of 6
    found = auroc(outcomes)
    assert found["score"] == pytest.approx(3.5 / 6)
    assert (found["n"], found["positive"]) == (5, 2)
    perfect = outcomes.assign(score=outcomes["observed"])
    assert [auroc(perfect)[k] for k in ("score", "low", "high")] == [1, 1, 1]
    flat = outcomes.assign(score=0.0)
    assert [auroc(flat)[k] for k in ("score", "low", "high")] == [0.5] * 3


def test_bootstrap_intervals_by_loops():
    rng = np.random.default_rng(8)
    observed = np.repeat([0, 1], [12, 9])
    outcomes = pd.DataFrame(
        {
            "patient": np.arange(21),
            "observed": observed,
            "score": observed + rng.standard_normal(21),
        }
    )
    scores = outcomes["score"].to_numpy()
    draws = []
    for _ in range(4000):
        ill = rng.choice(scores[12:], 9)
        well = rng.choice(scores[:12], 12)
        draws.append(np.mean(ill[:, None] > well) + np.mean(ill[:, None] == well) / 2)
    found = auroc(outcomes)
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.025)
    values = outcomes.assign(observed=rng.standard_normal(21) + scores)
    draws = []
    for _ in range(1000):
        part = values.iloc[rng.integers(0, 21, 21)]
        draws.append(part["observed"].corr(part["score"], method="spearman"))
    found = spearman(values)
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.05)


def by_steps(p):
    """Benjamini and Hochberg 1995, written as it is read: from the largest down."""
    order, least = np.argsort(p)[::-1], 1.0
    adjusted = np.empty(len(p))
    for rank, i in zip(range(len(p), 0, -1), order, strict=True):
        least = min(least, p[i] * len(p) / rank)
        adjusted[i] = least
    return adjusted


def test_many_values_finds_the_planted_ones_and_adjusts():
    by_hand = [0.02, 0.04, 0.04, 0.02]
    np.testing.assert_allclose(by_steps(np.array([0.01, 0.04, 0.03, 0.005])), by_hand)
    rng = np.random.default_rng(9)
    x = made(rng)
    genes = {f"tied_{i}": x @ rng.standard_normal(D) for i in range(3)}
    genes |= {f"noise_{i}": rng.standard_normal(N) for i in range(9)}
    table = many_values(x, pd.DataFrame(genes), PATIENTS, n_boot=50)
    assert table.index.tolist() == list(genes)
    np.testing.assert_allclose(table["p_bh"], by_steps(table["p"].to_numpy()))
    assert set(table.index[table["p_bh"] < 0.05]) == {"tied_0", "tied_1", "tied_2"}
    alone = spearman(predict_value(x, genes["tied_1"], PATIENTS), n_boot=50)
    assert table.loc["tied_1", "score"] == alone["score"]


def test_slide_means_by_hand():
    table = pd.DataFrame(
        {
            "slide": ["t", "s", "t", "s", "s"],
            "patient": ["q", "p", "q", "p", "p"],
            "x": [0, 1, 2, 3, 4],
            "site": ["B", "A", "B", "A", "A"],
        }
    )
    vectors = np.float32([[1, 0], [3, 3], [3, 4], [0, 3], [0, 0]])
    means, slides = slide_means(Embeddings(vectors, table))
    np.testing.assert_allclose(means, [[2, 2], [1, 2]])
    assert slides.to_dict("list") == {
        "slide": ["t", "s"], "patient": ["q", "p"], "site": ["B", "A"],
        "patches": [2, 3],
    }  # fmt: skip
    table.loc[4, "patient"] = "r"
    with pytest.raises(ValueError, match="slide 's' has 2 patients"):
        slide_means(Embeddings(vectors, table))


def test_planted_outcomes_know_their_truth(phantoms):
    folder, slides = phantoms
    again = pd.concat([slides] * 8, ignore_index=True)
    again["patient"] = again["slide"] + (np.arange(64) // 8).astype(str)
    again = pd.concat([again, again[:5]], ignore_index=True)  # second slides
    found = planted_outcomes(again, folder, seed=1, n_tied=3, n_noise=6)
    shown = [c for c in found if c.startswith(("gene", "mutation", "nuclei"))]
    assert found.groupby("patient")[shown].nunique().max().max() == 1
    first = found.drop_duplicates("patient")
    assert first["nuclei_share"].between(0.01, 0.6).all()
    tied = [first["nuclei_share"].corr(first[f"gene_tied_{i:02d}"]) for i in range(3)]
    np.testing.assert_allclose(tied, [0.9, -0.9, 0.9], atol=0.08)
    noise = [first["nuclei_share"].corr(first[f"gene_noise_{i:02d}"]) for i in range(6)]
    assert np.abs(noise).max() < 0.4  # 3 / sqrt(64)
    label = again.drop_duplicates("patient")["label"]
    half = label.isin(["fibrous", "lymphoid"]).to_numpy()
    assert (first["mutation_tied"] != half).sum() == 6
    assert first["mutation_noise"].sum() == 32
    assert found.equals(planted_outcomes(again, folder, seed=1, n_tied=3, n_noise=6))


def test_true_nuclei_share_predicts_planted_genes(phantoms):
    """The known truth as a vector: what a perfect encoder would reach."""
    folder, slides = phantoms
    again = pd.concat([slides] * 5, ignore_index=True)
    again["patient"] = [f"P{i}" for i in range(40)]
    found = planted_outcomes(again, folder)
    genes = found.filter(like="gene_")
    noise = np.random.default_rng(0).standard_normal((40, 5))
    truth = np.column_stack([found["nuclei_share"], noise])
    table = many_values(truth, genes, found["patient"], n_boot=50)
    kept = set(table.index[table["p_bh"] < 0.05])
    tied = {f"gene_tied_{i:02d}" for i in range(5)}
    assert tied <= kept
    assert len(kept - tied) <= 1  # of 15: one false among six is what 5 % may give
    assert table.loc[sorted(tied), "score"].min() > 0.7
    label = pd.get_dummies(again["label"]).to_numpy(float)
    scores = [
        auroc(predict_status(label, found[name], found["patient"]))["score"]
        for name in ("mutation_tied", "mutation_noise")
    ]
    assert scores[0] > 0.8
    assert 0.2 < scores[1] < 0.7


def test_bad_input_says_what_to_do():
    x, y = np.eye(6), np.arange(6.0)
    cases = {
        "n_folds=5 for 3 groups": (x, y, list("aabbcc"), {}),
        "all 6 values are 1.0": (x, np.ones(6), list("abcdef"), {}),
        "row 2 of the values": (x, [0, 1, np.nan, 1, 0, 1], list("abcdef"), {}),
        "row 0 of the vectors": (x * np.nan, y, list("abcdef"), {}),
        "row 1 of the patients": (x, y, ["a", None, *"cdef"], {}),
        r"\(5,\)": (x, y[:5], list("abcdef"), {}),
        "alphas are": (x, y, list("abcdef"), {"alphas": [0.0]}),
        "patient a is in 2 folds": (x, y, list("aabbcc"), {"folds": [0, 1] * 3}),
        "with 1 values": (x, y, list("abcdef"), {"folds": [0] * 6}),
    }
    for message, (vectors, values, patients, how) in cases.items():
        with pytest.raises(ValueError, match=message):
            predict_value(vectors, values, patients, **how)
    cases = {
        "status 1; two": (x, [1, 0, 0, 0, 0, 0], list("abcdef"), {"n_splits": 3}),
        "status 0; two": (x, np.ones(6), list("abcdef"), {"n_splits": 3}),
        "slides of either": (x, [0, 1] * 3, list("aabbcc"), {"n_splits": 3}),
        "holds 2": (x, [0, 1, 2] * 2, list("abcdef"), {"n_splits": 3}),
    }
    for message, (vectors, values, patients, how) in cases.items():
        with pytest.raises(ValueError, match=message):
            predict_status(vectors, values, patients, **how)
    frame = pd.DataFrame({"good": y, "flat": 1.0})
    with pytest.raises(ValueError, match="measurement 'flat': all 6"):
        many_values(x, frame, list("abcdef"), n_splits=3)
    one = pd.DataFrame({"patient": [1, 2], "observed": [1, 1], "score": [0.0, 1]})
    with pytest.raises(ValueError, match="needs both"):
        auroc(one)
    with pytest.raises(ValueError, match="3 or more"):
        spearman(one)
    with pytest.raises(ValueError, match="no column label, nuclei_mask"):
        planted_outcomes(pd.DataFrame({"slide": ["s"], "patient": ["p"]}), ".")


def test_constants_are_the_documented_ones():
    assert measurements.ALPHAS[0] == 1.0  # a model may decline to predict
    assert sorted(measurements.ALPHAS, reverse=True) == list(measurements.ALPHAS)
    assert measurements.C_VALUES[0] == 0.0
    assert sorted(measurements.C_VALUES) == list(measurements.C_VALUES)
